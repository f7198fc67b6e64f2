"""A finished run -> a folder that others can load: the family's layout, and a model card.

The layout is that of NeelNanda/SoLU_1L512W_C4_Code, so that TransformerLens loads what its own classes
compute. A model that they do not compute has an `act_fn` of our own in its config.json, at whose name
every version stops, and no weights where TransformerLens looks for them: it is refused, never loaded
wrong. soluscope loads every export, from the run's own files.

    config.json  *_final.pth              as TransformerLens reads them
    tokenizer.json  tokenizer_config.json  special_tokens_map.json
    config.yaml  model.json  model.safetensors  done.json   the run's own
    results.jsonl                          what the probes found of this run
    README.md                              the model card
"""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soluscope import results
from soluscope.config import Config
from soluscope.errors import UserError
from soluscope.files import write_bytes, write_text
from soluscope.report import controls, findings
from soluscope.results import Row
from soluscope.runs.folder import Run

if TYPE_CHECKING:
    from torch import Tensor

    from soluscope.hooked.convert import SoluscopeTransformer
    from soluscope.model import LanguageModel
    from soluscope.runs.weights import Facts
    from soluscope.variants import Variant

OWN = ("config.yaml", "model.json", "model.safetensors", "done.json")
"""The run's files that go with it, byte for byte."""
LENS_EPS = 1e-5
"""The epsilon that TransformerLens's from_pretrained gives every norm, whatever config.json says."""
SIZES = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab")
HERE = '"."  # where this file lies'
NAME = "user/name"
"""Stands in the card for the name on the hub where there is none."""


def export(run_dir: Path, out: Path, repo: str | None = None) -> tuple[str | None, str | None]:
    """Write the run to the new folder `out`, whole or not at all, and push it first if `repo` is given.

    Returns:
        Why TransformerLens does not compute it, None if it does; and where it was pushed to, if it was.

    Raises:
        UserError: no finished run, `out` is not new, or the hub does not take it; nothing is left behind.
    """
    run = Run(run_dir)
    _check_run(run)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already: name a new folder, or delete it")
    if repo is not None:
        _check_push(repo)
    with _whole(out.resolve()) as folder:
        obstacle = _write(run, folder, repo)
        url = None if repo is None else _push(folder, repo)
    return obstacle, url


def load(folder: str | Path, device: str = "cpu") -> SoluscopeTransformer:
    """An exported run as a HookedTransformer, exactly as it was trained, whatever its variant.

    Args:
        folder: the export, or what huggingface_hub's snapshot_download gives for its repository.
        device: where to put it.

    Raises:
        UserError: it is no export, is broken, or the two models disagree.
    """
    from soluscope.hooked.convert import load_tokenizer, to_hooked

    run = Run(Path(folder))
    model = to_hooked(run.load_model(), run.facts, run.variant, device)
    model.set_tokenizer(load_tokenizer(run.dir / "tokenizer.json", run.facts))
    return model


def _check_run(run: Run) -> None:
    if not run.config_file.is_file():
        problem = "has no config.yaml" if run.dir.is_dir() else "does not exist"
        raise UserError(f"{run.dir} {problem}: wanted a run's folder, such as runs/demo/solu_ln-s0")
    if not run.is_done():
        raise UserError(f"{run.dir} has not finished: train it to its end, then export it")


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to; renamed onto it at the end, removed if anything fails."""
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, out)
    except OSError as error:
        raise UserError(f"cannot export to {out}: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(run: Run, folder: Path, repo: str | None) -> str | None:
    """All files of the export. Returns what keeps TransformerLens from loading it."""
    import torch

    from soluscope.hooked.convert import load_tokenizer

    trained, facts = run.load_model(), run.facts
    for name in OWN:
        write_bytes(folder / name, (run.dir / name).read_bytes())
    told = load_tokenizer(run.tokenizer, facts)  # checks that it is this model's
    write_bytes(folder / "tokenizer.json", run.tokenizer.read_bytes())
    special = {name: str(token) for name, token in told.special_tokens_map.items()}
    write_text(folder / "special_tokens_map.json", _json(special))
    write_text(
        folder / "tokenizer_config.json",
        _json({
            **special, "add_bos_token": True, "model_max_length": facts.ctx,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }),
    )  # fmt: skip
    weights, obstacle = f"{facts.run}_final.pth", None
    try:
        lens_state = _lens_state(trained, facts, run.variant)
    except UserError as error:
        obstacle = str(error)
    else:
        torch.save(lens_state, file := io.BytesIO())
        write_bytes(folder / weights, file.getvalue())
    write_text(folder / "config.json", _json(_family_config(run.config, facts, obstacle, repo)))
    rows = _rows(run.dir.parent / "results.jsonl")
    own = [row for row in rows if (row.run, row.config) == (facts.run, facts.config)]
    if own:
        results.write(folder / "results.jsonl", own)
    done = run.done() or {}
    yaml = run.config_file.read_text(encoding="utf8")
    loading = _loading(weights, obstacle, repo)
    write_text(folder / "README.md", _card(facts, done, _probes(own, rows), loading, yaml))
    return obstacle


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _rows(path: Path) -> list[Row]:
    return results.read(path) if path.is_file() else []


# --- what TransformerLens reads -------------------------------------------------------------------


def _lens_state(trained: LanguageModel, facts: Facts, variant: Variant) -> dict[str, Tensor]:
    """The state of TransformerLens's own HookedTransformer that computes this model.

    In the end it is asked, stage by stage, so that a variant with a difference that nobody has thought
    of here is refused too.

    Raises:
        UserError: why there is none.
    """
    import torch
    from torch import nn
    from transformer_lens import HookedTransformerConfig

    from soluscope.hooked.convert import SoluscopeTransformer, check_agreement

    norm = trained.mlp(0).ln
    if norm is not None and norm.eps is None:
        raise UserError(f"its mid norm is {facts.mid_norm}, and TransformerLens has LayerNorm only")
    for eps, where in (facts.ln_eps, "residual stream's norms"), (facts.eps, "mid norm"):
        if eps is not None and not math.isclose(eps, LENS_EPS, rel_tol=1e-6):
            raise UserError(
                f"the epsilon of its {where} is {eps:g}, and TransformerLens takes {LENS_EPS:g}"
            )
    lens = SoluscopeTransformer(
        HookedTransformerConfig(
            **_sizes(facts), act_fn=facts.hooked_act_fn, normalization_type="LN", init_weights=False,
            device="cpu",
        ),
        move_to_device=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(64, facts.d_mlp, dtype=torch.float64, generator=generator)
    if not torch.allclose(variant.nonlinearity(pre), lens.blocks[0].mlp.act_fn(pre), atol=1e-9):
        raise UserError(f"its nonlinearity is not what TransformerLens calls {facts.hooked_act_fn}")
    state = trained.state_dict()
    masks = {name for name, _ in lens.named_buffers()}
    if lens.state_dict().keys() - masks != state.keys():
        raise UserError("its parameters are not those of TransformerLens")
    lens.load_state_dict(state, strict=False)
    lens.facts = facts
    check_agreement(trained, nn.Module.eval(lens))
    return {name: tensor.detach().clone() for name, tensor in lens.state_dict().items()}


def _sizes(facts: Facts) -> dict[str, int]:
    return {
        "n_layers": facts.n_layers, "d_model": facts.d_model, "n_ctx": facts.ctx, "d_mlp": facts.d_mlp,
        "d_head": facts.d_model // facts.n_heads, "n_heads": facts.n_heads, "d_vocab": facts.d_vocab,
    }  # fmt: skip


def _family_config(
    config: Config, facts: Facts, obstacle: str | None, repo: str | None
) -> dict[str, Any]:
    """config.json under the keys of the family's own."""
    train = config.train
    return {
        **_sizes(facts),
        "architecture": "neel",  # else TransformerLens asks whether the name has `_old` in it
        "act_fn": f"soluscope:{facts.variant}" if obstacle else facts.hooked_act_fn,
        "attn_only": False, "shortformer_pos": False, "final_rms": False, "normalization": "LN",
        "ln_eps": facts.ln_eps, "neuron_scale": 1.0, "neuron_temp": 1.0,
        "seed": facts.seed, "dataset_name": config.data, "lr": facts.lr, "lr_schedule": train.schedule,
        "betas": [train.beta1, train.beta2], "weight_decay": train.weight_decay,
        "max_steps": facts.steps, "max_tokens": facts.tokens,
        "use_bfloat16_matmul": facts.precision == "bf16",
    } | ({"tokenizer_name": repo} if repo else {})  # fmt: skip


# --- the card -------------------------------------------------------------------------------------

WITH_SOLUSCOPE = """\
from soluscope.export import load

folder = {folder}
model = load(folder)
"""
WITH_TRANSFORMER_LENS_3 = """\
import json

import torch
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer

folder = {folder}
config = json.load(open(f"{{folder}}/config.json"))
sizes = {{name: config[name] for name in {sizes}}}
model = HookedTransformer(
    {{**sizes, "act_fn": config["act_fn"], "normalization_type": "LN"}},
    tokenizer=AutoTokenizer.from_pretrained(folder),
)
model.load_state_dict(torch.load(f"{{folder}}/{weights}", weights_only=True))
"""
WITH_TRANSFORMER_LENS_4 = """\
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import tl_legacy
from transformers import AutoTokenizer

tl_legacy.TL_LEGACY_PREFIXES += ("{name}",)
model = TransformerBridge.boot_tl_legacy("{name}", tokenizer=AutoTokenizer.from_pretrained("{name}"))
"""


def _loading(weights: str, obstacle: str | None, repo: str | None) -> str:
    """The card's section on how to load the model. The code in it is run by the tests."""
    folder, imports = HERE, ""
    if repo:
        folder = f'snapshot_download("{repo}")'
        imports = "from huggingface_hub import snapshot_download\n"
    lines = [
        "Exactly as it was trained, a HookedTransformer with its tokenizer, with soluscope:",
        "",
    ]
    lines += [_code(imports + WITH_SOLUSCOPE.format(folder=folder), "python"), ""]
    if obstacle:
        return "\n".join([
            *lines, f"With soluscope only: {_escaped(obstacle)}. TransformerLens refuses it by the name of its "
            "`act_fn` in config.json.",
        ])  # fmt: skip
    code = WITH_TRANSFORMER_LENS_3.format(folder=folder, sizes=json.dumps(SIZES), weights=weights)
    code = code.replace("import torch\n", f"import torch\n{imports}")
    lines += [
        "With TransformerLens 3.9, whose `from_pretrained` takes names of its own list only:", "",
        _code(code, "python"), "",
        "With TransformerLens 4, as a TransformerBridge" + ("" if repo else ", from the hub") + ":", "",
        _code(WITH_TRANSFORMER_LENS_4.format(name=repo or NAME), "python"),
    ]  # fmt: skip
    return "\n".join(lines)


def _card(facts: Facts, done: dict[str, Any], probes: str, loading: str, yaml: str) -> str:
    """README.md: what it is, how to load it, what it lost, what the probes found, how it was made."""
    described = {
        "variant": facts.variant, "mid norm": facts.mid_norm, "epsilon of the mid norm": facts.eps,
        "kappa, epsilon times d_mlp squared": facts.kappa, "gain, one for all tokens": facts.gain,
        **_sizes(facts), "epsilon of the residual stream's norms": facts.ln_eps, "seed": facts.seed,
        "learning rate": facts.lr, "optimizer steps": facts.steps, "tokens seen": facts.tokens,
        "precision": facts.precision, "hash of the configuration": facts.config, "commit": facts.commit,
        **{f"version of {name}": version for name, version in facts.versions.items()},
    }  # fmt: skip
    losses = {
        "select, for choosing settings": done.get("select_loss"),
        "report": done.get("report_loss"),
    }
    return "\n".join([
        "---", "tags:", "- soluscope", "- solu", "- mechanistic-interpretability", "---", "",
        f"# {_escaped(facts.run)}", "",
        f"A language model of {facts.n_layers} layer{'s'[: facts.n_layers != 1]}, trained to study what "
        f"LayerNorm does in SoLU models; one of the study {_escaped(facts.study)}.", "",
        _table(["", ""], [[key, _told(v)] for key, v in described.items() if v is not None]), "",
        "## Loading", "", loading, "",
        "## Losses", "", "On held-out documents, in nats a token.", "",
        _table(["split", "loss"], [[split, _told(loss)] for split, loss in losses.items()]), "",
        "## Probes", "", probes, "",
        "## Configuration", "", _code(yaml, "yaml"), "",
    ])  # fmt: skip


def _probes(own: Sequence[Row], rows: Sequence[Row]) -> str:
    """What the probes found of this run on natural text, BOS left out; the rest is in results.jsonl."""
    points = [row for row in own if row.x is None and (row.positions, row.group) == ("not BOS", "")]
    if not points:
        return "Not probed yet."
    parts = [
        "On natural text where a probe has any, BOS left out, with 95% intervals. Curves, splits and other "
        "texts are in results.jsonl."
    ]
    for probe in sorted({row.probe for row in points}):
        found = [row for row in points if row.probe == probe]
        first = min(map(findings.by_stream, found))
        gate = controls.gate(rows, probe)
        told = {"passed": "", "failed": ": failed its controls, not to be cited"}.get(
            gate, "" if probe == "loss" else ": put before no control"
        )
        lines = [
            [f"{row.statistic} of {row.quantity}" if row.statistic else row.quantity, row.unit,
             findings.estimate(row), str(row.n), row.note]
            for row in found
            if findings.by_stream(row) == first
        ]  # fmt: skip
        parts += [
            f"<details><summary>{html.escape(probe)}{told}</summary>",
            _table(["quantity", "unit", "value [interval]", "n", "note"], lines), "</details>",
        ]  # fmt: skip
    return "\n\n".join(parts)


def _told(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells are text, not Markdown."""
    cells = [
        list(map(_escaped, heads)),
        ["---"] * len(heads),
        *([*map(_escaped, x)] for x in lines),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _escaped(text: str) -> str:
    """`text` on one line, as Markdown and HTML that show it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&!$:@])", r"\\\1", " ".join(text.split()))


def _code(text: str, language: str) -> str:
    """A code block that nothing in `text` ends."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


# --- the hub --------------------------------------------------------------------------------------


def _check_push(repo: str) -> None:
    """Refuse before anything is computed what the hub would refuse at its end."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {str(error).splitlines()[0]}") from error
    if "/" not in repo:
        raise UserError(f"--push {repo}: wanted a name on the hub, as in --push user/name")
    if get_token() is None:
        raise UserError(f"--push {repo}: no token: set HF_TOKEN, or sign in with 'hf auth login'")


def _push(folder: Path, repo: str) -> str:
    """Make the repository, if it is not there, and commit the folder to it. Returns where it can be seen.

    One commit, and so not upload_folder, which may make several and leaves a repository half written
    between them. What an earlier export left goes with it: TransformerLens takes the first *final.pth
    that it finds. Other files stay.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        files = sorted(path.name for path in folder.iterdir())
        old = [
            name
            for name in api.list_repo_files(repo)
            if name not in files and name.endswith(("final.pth", "results.jsonl"))
        ]
        api.create_commit(
            repo,
            [
                *(CommitOperationDelete(name) for name in old),
                *(CommitOperationAdd(name, folder / name) for name in files),
            ],
            commit_message="Export of a soluscope run",
        )
    except Exception as error:  # of the hub, of the network, and of the threads that upload
        raise UserError(_why_not(error, repo, api.endpoint)) from error
    return str(url)


def _why_not(error: BaseException, repo: str, endpoint: str) -> str:
    """What the hub's client raised, in one line."""
    cause: BaseException | None = error
    status = None
    while cause is not None and status is None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__
    if status in (401, 403):
        return (
            f"the hub does not let us write {repo} ({status}): set HF_TOKEN to a token that may; "
            "nothing was pushed"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = f"answers {status}" if status is not None else f"was not reached ({reason})"
    return f"{endpoint} {said} for {repo}: push it again, it has the whole export or nothing of it"
