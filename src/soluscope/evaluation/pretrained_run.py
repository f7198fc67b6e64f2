"""Run folder of a pretrained model, in its own study: runs/<name>/<name>, like the folder of a trained run.

pretrained.json  name and source of the model, its text, and the studies shown beside it
model.json       facts about the model
tokenizer/       the model's tokenizer, with the names of its BOS, EOS and PAD tokens
probes/          files written by the suite

The weights are not copied: they stay in the hub's cache or in the model's folder.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from soluscope import results
from soluscope.config import PretrainedConfig
from soluscope.data import tokenizer
from soluscope.data.cache import (
    TokenCache,
    of_study,
    open_cache,
    prepare,
    share_with_study,
    study_facts,
)
from soluscope.errors import UserError
from soluscope.evaluation.summaries import about_run
from soluscope.files import read_json, write_bytes, write_text
from soluscope.hooked.activations import HookedRun, check_model
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.hooked.pretrained import load_pretrained, repository_of
from soluscope.probes._per_token import PerToken
from soluscope.results import Measurement
from soluscope.runs.folder import Run
from soluscope.runs.weights import Facts
from soluscope.terminal import answer

ORIGIN = "pretrained.json"


@dataclass(frozen=True)
class Origin:
    """Content of pretrained.json."""

    name: str
    """Argument of `load_pretrained`: a name, or the absolute path of a folder."""
    repository: str | None
    """Repository on the hub; None for a folder."""
    commit: str
    """Commit of the repository; for a folder, the sha256 of its weights."""
    data: str
    """Source of the text."""
    corpus: dict[str, Any] | None
    """Settings of the source, as requested."""
    beside: list[str]
    """Absolute paths of the studies whose runs are shown beside the model."""

    @property
    def description(self) -> str:
        """Return the model's origin in words."""
        if self.repository is None:
            return f"a model from a folder, with weights of sha256 {self.commit[:12]}…"
        return f"{self.repository} at commit {self.commit[:12]}"


def read_origin(run_dir: Path) -> Origin | None:
    """Return the origin of the pretrained model in a run folder; None for any other folder.

    Raises:
        UserError: if pretrained.json cannot be read.
    """
    path = run_dir / ORIGIN
    if not path.is_file():
        return None
    return read_json(path, Origin, f"delete {run_dir} to create it again")


def make_run(name: str, config: PretrainedConfig, say: Callable[[str], None] = answer) -> Path:
    """Create or update the run folder of a pretrained model: its facts, tokenizer and text.

    Args:
        name: as for `load_pretrained`.
        config: runs_dir, revision, text, and studies to show beside the model.
        say: function called with one line if the text has changed, or is not the preferred text.

    Raises:
        UserError: if there is no such model, the model cannot be probed, there is no text, a study beside
            the model was not evaluated, or the folder is already used for something else.
    """
    _check_studies(config.studies)
    model = load_pretrained(name, config.revision)
    check_model(model)
    repository = repository_of(name)
    study_dir = Path(config.runs_dir) / model.facts.run
    run_dir = study_dir / model.facts.run
    before = read_origin(run_dir)
    _check_place(study_dir, before, name, repository)
    with Run(run_dir).lock():
        folder = run_dir / "tokenizer"
        _write_tokenizer(model, folder)
        cache, data, corpus = _text(config, before, study_dir, folder, say)
        _share(cache, study_dir, say)
        facts = replace(model.facts, study=study_dir.name)
        write_text(run_dir / "model.json", json.dumps(asdict(facts), indent=1) + "\n")
        origin = Origin(
            name=name if repository else str(Path(name).resolve()), repository=repository,
            commit=facts.commit, data=data, corpus=corpus,
            beside=[str(Path(study).resolve()) for study in config.studies],
        )  # fmt: skip
        write_text(run_dir / ORIGIN, json.dumps(asdict(origin), indent=1) + "\n")
    return run_dir


def load_again(run: Run, origin: Origin, device: str) -> SoluscopeTransformer:
    """Return the model of a run folder, from the hub's cache or from the model's folder.

    Raises:
        UserError: if the model is no longer available, or its folder now holds other weights.
    """
    revision = origin.commit if origin.repository else None
    model = load_pretrained(origin.name, revision, device)
    if model.facts.commit != origin.commit:
        raise UserError(
            f"{origin.name} holds other weights now than when {run.dir} was made: probe the new weights with "
            f"'soluscope probe {origin.name}'"
        )
    model.facts = run.facts
    return model


def measurements(
    facts: Facts, origin: Origin, text: TokenCache, loss: Measurement, blocks: Iterable[HookedRun]
) -> list[Measurement]:
    """Return the known facts about a pretrained model, its loss, and the epsilon that its gain implies.

    Args:
        facts: facts about the model.
        origin: origin of the model.
        text: tokens that the model is probed on.
        loss: mean loss of the model on the report split.
        blocks: activations of the model on natural text, in blocks.
    """
    split = text.meta["splits"]["report"]
    note = (
        f"the report split of data={text.meta['source']} ({split['n_documents']:,} documents in all); it is "
        "not known whether the model was trained on these documents"
    )
    names = ("n_layers", "d_model", "n_heads", "d_mlp", "ctx", "d_vocab", "ln_eps", "eps", "kappa")
    known = {name: value for name in names if (value := getattr(facts, name)) is not None}
    base = Measurement(
        **about_run(facts, pretrained=True), probe="pretrained", quantity="", value=None, unit=""
    )
    rows = [replace(loss, note=note)]
    rows += [
        replace(base, quantity=name, value=float(value), note=origin.description)
        for name, value in known.items()
    ]
    _, measured = PerToken(_scales, lambda text, columns: ()).of_blocks(blocks)
    square, s2, wanted = measured.tokens.values()
    if not wanted.isnan().all():
        off = (wanted / square - 1).abs()
        everywhere = replace(base, stream="natural", positions="all", n=len(square))
        rows += [
            replace(
                everywhere, quantity="1/g^2 - var", statistic="median",
                value=float((square - s2).median()),
            ),
            replace(
                everywhere, quantity="|g^2 (var + eps) - 1|", statistic="max", value=float(off.max())
            ),
        ]  # fmt: skip
    return rows


def _scales(run: HookedRun) -> dict[str, Tensor]:
    """Return the square of each token's scale, and the values that it should have; nan without an epsilon."""
    eps = math.nan if run.eps is None else run.eps
    return {"1/g^2": run.scale.double().square(), "var": run.s2, "var + eps": run.s2 + eps}


def _check_studies(studies: Sequence[str]) -> None:
    """Refuse studies that cannot be shown beside a model, or not together.

    Raises:
        UserError: if a study was not evaluated, or two studies have arms of the same name.
    """
    owner: dict[str, str] = {}
    for study in studies:
        path = Path(study) / "results.jsonl"
        if not path.is_file():
            raise UserError(
                f"study={study} has no results: make them with 'soluscope probe {study}'"
            )
        for each in results.read(path):
            if each.arm and owner.setdefault(each.arm, each.study) != each.study:
                raise UserError(
                    f"study={study}: {each.study} and {owner[each.arm]} both have runs of {each.arm}, and one "
                    "page cannot distinguish them: give only one of the two studies"
                )


def _check_place(study_dir: Path, before: Origin | None, name: str, repository: str | None) -> None:
    """Refuse a study folder that is in use for something else.

    Raises:
        UserError: if the folder holds the model's own files, another model's run, or a study of trained runs.
    """
    content = ""
    if (study_dir / "config.json").is_file():
        content = "the model's own folder"
    elif before is None and (study_dir / "data.json").is_file():
        content = "a study of other runs"
    elif before is not None and before.repository != repository:
        content = f"the study of another model ({before.repository or before.name})"
    if content:
        raise UserError(f"{study_dir} is {content}: choose another runs_dir= for {name}")


def _write_tokenizer(model: SoluscopeTransformer, folder: Path) -> None:
    """Write tokenizer.json, and its special tokens as the model uses them, for `data.tokenizer.load`."""
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
    """Return the tokens to probe on, their source, and the requested settings of the source.

    The config may name the text. Otherwise it is the text of the last time; without a last time, it is the
    hub's text, or the standard library if the hub cannot be read.
    """
    if config.prepared is not None:
        cache = open_cache(Path(config.prepared))
        if cache.meta["tokenizer_hash"] != _hash_in_cache(folder):
            raise UserError(
                f"prepared={config.prepared} was made with another tokenizer than the model's: omit prepared="
            )
        return cache, cache.meta["asked"]["data"], config.corpus
    if not config.sets_text and before is not None:
        config = replace(config, data=before.data, corpus=before.corpus)
        kept = _of_last_time(study_dir, folder)
        if kept is not None:
            return kept, before.data, before.corpus
    if config.sets_text:
        data = config.data or "hub"
        return prepare(config.text(data, str(folder))), data, config.corpus
    try:
        return prepare(config.text("hub", str(folder))), "hub", None
    except UserError as error:
        say(f"using data=stdlib (Python's own files), because data=hub cannot be read: {error}")
        return prepare(config.text("stdlib", str(folder))), "stdlib", None


def _of_last_time(study_dir: Path, folder: Path) -> TokenCache | None:
    """Return the study's tokens; None without them, or for tokens of another tokenizer."""
    cache = of_study(study_dir) if (study_dir / "data.json").is_file() else None
    return cache if cache and cache.meta["tokenizer_hash"] == _hash_in_cache(folder) else None


def _hash_in_cache(folder: Path) -> str:
    """Return the hash of the tokenizer in `folder` as a token cache stores it, in the cache's own layout."""
    content = tokenizer.load(str(folder)).tokenizer.to_str(pretty=True)
    return hashlib.sha256(content.encode("utf8")).hexdigest()


def _share(cache: TokenCache, study_dir: Path, say: Callable[[str], None]) -> None:
    """Make the text the study's text, in place of any earlier text."""
    shared = study_dir / "data.json"
    if shared.is_file() and study_facts(study_dir)["key"] != cache.meta["key"]:
        say("the text is not that of the last time")
        for path in (shared, study_dir / "tokenizer.json"):
            path.unlink(missing_ok=True)
    share_with_study(cache, study_dir)
