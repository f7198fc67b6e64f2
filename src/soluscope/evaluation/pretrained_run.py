"""The folder of a pretrained model, in a study of its own: runs/<name>/<name>, as that of a run that was trained.

pretrained.json  what was loaded and from where, the text, and the studies shown beside it
model.json       facts about the model
tokenizer/       the model's tokenizer, and which of its tokens are BOS, EOS and PAD
probes/          what the suite writes

The weights stay where they were downloaded to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from soluscope import results
from soluscope.config import PretrainedConfig
from soluscope.data import tokenizer
from soluscope.data.cache import TokenCache, open_cache, prepare, share_with_study
from soluscope.errors import UserError
from soluscope.evaluation.summaries import about_run
from soluscope.files import write_bytes, write_text
from soluscope.hooked.activations import HookedRun, check_model
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.hooked.pretrained import load_pretrained, repository_of
from soluscope.results import Measurement
from soluscope.runs.folder import Run, lock
from soluscope.runs.weights import Facts

ORIGIN = "pretrained.json"


@dataclass(frozen=True)
class Origin:
    """What pretrained.json holds."""

    name: str
    """What `load_pretrained` takes: a name, or a folder's whole path."""
    repository: str | None
    """On the hub; None of a folder."""
    commit: str
    """Of the repository; of a folder its weights' sha256."""
    data: str
    corpus: dict[str, Any] | None
    """The text's source, and what was asked of it."""
    beside: list[str]
    """Studies whose runs are shown beside the model."""

    @property
    def said(self) -> str:
        """Where the model is from, in words."""
        if self.repository is None:
            return f"of a folder whose weights have the sha256 {self.commit[:12]}…"
        return f"{self.repository} at commit {self.commit[:12]}"


def read_origin(run_dir: Path) -> Origin | None:
    """What a run folder says of the pretrained model that it is of; None where it is of none.

    Raises:
        UserError: if it cannot be read.
    """
    path = run_dir / ORIGIN
    if not path.is_file():
        return None
    try:
        return Origin(**json.loads(path.read_text(encoding="utf8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is broken ({error}): delete {run_dir} to make it again") from error


def make_run(name: str, config: PretrainedConfig, say: Callable[[str], None] = print) -> Path:
    """The run folder of a pretrained model, made or brought up to date: its facts, tokenizer and text.

    Args:
        name: as for `load_pretrained`.
        config: where it lies, which revision, what text and what beside it.
        say: told where the text is not the one that was hoped for.

    Raises:
        UserError: no such model, one that cannot be probed, no text, a study beside that was not
            evaluated, or a folder of that name that is something else.
    """
    _check_studies(config.studies)
    model = load_pretrained(name, config.revision)
    check_model(model)
    repository = repository_of(name)
    study_dir = Path(config.runs_dir) / model.facts.run
    run_dir = study_dir / model.facts.run
    before = read_origin(run_dir)
    _check_place(study_dir, before, name, repository)
    with lock(run_dir):
        folder = run_dir / "tokenizer"
        _write_tokenizer(model, folder)
        cache, data, corpus = _text(config, before, study_dir, folder, say)
        _share(cache, study_dir, say)
        facts = replace(model.facts, study=study_dir.name)
        write_text(run_dir / "model.json", json.dumps(asdict(facts), indent=1) + "\n")
        origin = Origin(
            name=name if repository else str(Path(name).resolve()), repository=repository,
            commit=facts.commit, data=data, corpus=corpus, beside=config.studies,
        )  # fmt: skip
        write_text(run_dir / ORIGIN, json.dumps(asdict(origin), indent=1) + "\n")
    return run_dir


def load_again(run: Run, origin: Origin, device: str) -> SoluscopeTransformer:
    """Return the model that a run folder is of, from the hub's cache or its folder.

    Raises:
        UserError: if it is not to be had any more, or the folder holds other weights now.
    """
    revision = origin.commit if origin.repository else None
    model = load_pretrained(origin.name, revision, device)
    if model.facts.commit != origin.commit:
        raise UserError(
            f"{origin.name} holds other weights than those of {run.dir}: probe them anew with "
            f"'python eval/run.py {origin.name}'"
        )
    model.facts = run.facts
    return model


def measurements(
    facts: Facts, origin: Origin, text: TokenCache, loss: Measurement, run: HookedRun
) -> list[Measurement]:
    """Return what is known of a pretrained model, its loss, and what its gain says that epsilon is.

    Args:
        facts: about the model.
        origin: of its folder.
        text: the tokens it is probed on.
        loss: its mean loss on the report split.
        run: its activations on natural text.
    """
    split = text.meta["splits"]["report"]
    note = (
        f"the report split of data={text.meta['source']} ({split['n_documents']:,} documents in all), and "
        "whether the model was trained on these is not known"
    )
    names = ("n_layers", "d_model", "n_heads", "d_mlp", "ctx", "d_vocab", "ln_eps", "eps", "kappa")
    known = {name: value for name in names if (value := getattr(facts, name)) is not None}
    base = Measurement(
        **about_run(facts, pretrained=True), probe="pretrained", quantity="", value=None, unit=""
    )
    made = [replace(loss, note=note)]
    made += [
        replace(base, quantity=name, value=float(value), note=origin.said)
        for name, value in known.items()
    ]
    if run.eps is not None:
        square = run.scale.double().square()  # 1 / g^2
        off = ((run.s2 + run.eps) / square - 1).abs()
        everywhere = replace(base, stream="natural", positions="all", n=len(square))
        made += [
            replace(
                everywhere, quantity="1/g^2 - var", statistic="median",
                value=float((square - run.s2).median()),
            ),
            replace(
                everywhere, quantity="|g^2 (var + eps) - 1|", statistic="max", value=float(off.max())
            ),
        ]  # fmt: skip
    return made


def _check_studies(studies: Sequence[str]) -> None:
    """Refuse what cannot be shown beside a model, or not together.

    Raises:
        UserError: if one was not evaluated, or two have runs of the same name.
    """
    owner: dict[str, str] = {}
    for study in studies:
        path = Path(study) / "results.jsonl"
        if not path.is_file():
            raise UserError(
                f"study={study} has no results: make them with 'python eval/run.py {study}'"
            )
        for each in results.read(path):
            if each.arm and owner.setdefault(each.arm, each.study) != each.study:
                raise UserError(
                    f"study={study}: {each.study} and {owner[each.arm]} both have runs of {each.arm}, which one "
                    "page cannot tell apart: give one of them"
                )


def _check_place(study_dir: Path, before: Origin | None, name: str, repository: str | None) -> None:
    """Refuse a folder that is not this model's.

    Raises:
        UserError: if it is the model's own, another model's, or a study of runs that were trained.
    """
    what = ""
    if (study_dir / "config.json").is_file():
        what = "the model's own folder"
    elif before is None and (study_dir / "data.json").is_file():
        what = "a study of other runs"
    elif before is not None and before.repository != repository:
        what = f"of another model ({before.repository or before.name})"
    if what:
        raise UserError(f"{study_dir} is {what}: choose another runs_dir= for {name}")


def _write_tokenizer(model: SoluscopeTransformer, folder: Path) -> None:
    """The file itself, and its special tokens as the model takes them, for `data.tokenizer.load`."""
    special_tokens = {
        f"{key}_token": model.tokenizer.convert_ids_to_tokens(getattr(model.facts, key))
        for key in ("bos", "eos", "pad")
    }
    content = (Path(model.tokenizer.name_or_path) / "tokenizer.json").read_bytes()
    write_bytes(folder / "tokenizer.json", content)
    write_text(folder / "tokenizer_config.json", json.dumps(special_tokens) + "\n")


def _text(
    config: PretrainedConfig,
    before: Origin | None,
    study_dir: Path,
    folder: Path,
    say: Callable[[str], None],
) -> tuple[TokenCache, str, dict[str, Any] | None]:
    """The tokens to probe on, their source, and what was asked of it.

    What was asked for; else that of last time; else the hub's, or the standard library where the hub
    cannot be read.
    """
    if config.prepared is not None:
        cache = open_cache(Path(config.prepared))
        if cache.meta["tokenizer_hash"] != _hash_in_cache(folder):
            raise UserError(
                f"prepared={config.prepared} was made with another tokenizer than the model's: leave it out"
            )
        return cache, cache.meta["asked"]["data"], config.corpus
    if not config.says_text and before is not None:
        config = replace(config, data=before.data, corpus=before.corpus)
        kept = _of_last_time(study_dir, folder)
        if kept is not None:
            return kept, before.data, before.corpus
    if config.says_text:
        data = config.data or "hub"
        return prepare(config.text(data, str(folder))), data, config.corpus
    try:
        return prepare(config.text("hub", str(folder))), "hub", None
    except UserError as error:
        say(f"data=stdlib is used, Python's own files, since data=hub cannot be: {error}")
        return prepare(config.text("stdlib", str(folder))), "stdlib", None


def _of_last_time(study_dir: Path, folder: Path) -> TokenCache | None:
    """The study's tokens, where they still lie there and are the tokenizer's."""
    shared = study_dir / "data.json"
    if not shared.is_file():
        return None
    path = Path(json.loads(shared.read_text(encoding="utf8"))["path"])
    if not path.is_dir():
        return None
    cache = open_cache(path)
    return cache if cache.meta["tokenizer_hash"] == _hash_in_cache(folder) else None


def _hash_in_cache(folder: Path) -> str:
    """Hash that the tokenizer in `folder` has in a token cache, which writes it in a layout of its own."""
    content = tokenizer.load(str(folder)).tokenizer.to_str(pretty=True)
    return hashlib.sha256(content.encode("utf8")).hexdigest()


def _share(cache: TokenCache, study_dir: Path, say: Callable[[str], None]) -> None:
    """The text is the study's, in place of another one that it had."""
    shared = study_dir / "data.json"
    if shared.is_file():
        if json.loads(shared.read_text(encoding="utf8"))["key"] == cache.meta["key"]:
            return
        say("another text than last time")
        for path in (shared, study_dir / "tokenizer.json"):
            path.unlink(missing_ok=True)
    share_with_study(cache, study_dir)
