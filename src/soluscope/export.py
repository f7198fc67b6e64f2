"""Export of a finished run to a folder that other people can load, with a model card.

The layout is that of NeelNanda/SoLU_1L512W_C4_Code, so that TransformerLens can load a model that its own
classes compute. For any other model, config.json has a special `act_fn`, which every version of
TransformerLens refuses by name, and the export has no weights under the name that TransformerLens expects.
Such a model is therefore refused and never loaded wrongly. soluscope loads every export, from copies of the
run's own files.

    config.json  *_final.pth               for TransformerLens
    tokenizer.json  tokenizer_config.json  special_tokens_map.json
    model.json  model.safetensors  done.json   copies of the run's files
    config.yaml                            the run's settings without the folders of this machine
    results.jsonl                          the probes' results on this run
    README.md                              the model card
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from soluscope import results
from soluscope.config import Config, for_others, to_yaml
from soluscope.errors import UserError
from soluscope.files import reason, replacing_folder, write_bytes, write_text
from soluscope.reading import read_yaml
from soluscope.report import controls, findings
from soluscope.results import NOT_PROBES, Measurement, OfRun, Record, of_kind
from soluscope.runs.folder import Run

if TYPE_CHECKING:
    from torch import Tensor

    from soluscope.hooked.convert import SoluscopeTransformer
    from soluscope.model import LanguageModel
    from soluscope.runs.weights import Facts

OWN = ("model.json", "model.safetensors", "done.json")
"""Files of the run that are copied byte for byte."""
LENS_EPS = 1e-5
"""Epsilon that TransformerLens's from_pretrained sets in every norm, whatever config.json contains."""
SIZES = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab")
HERE = '"."  # the folder of this file'


def export(run_dir: Path, out: Path, repo: str | None = None) -> tuple[str | None, str | None]:
    """Write the run to the new folder `out`, completely or not at all. Push it first if `repo` is given.

    Returns:
        The reason why TransformerLens cannot compute the model, or None without such a reason; and the address
        of the pushed repository, or None without a push.

    Raises:
        UserError: if the run is not finished, `out` is not new, or the hub refuses the push. No files are
            left then.
    """
    run = Run(run_dir)
    _check_run(run)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new folder, or delete the existing one")
    if repo is not None:
        _check_push(repo)
    with _whole(out.resolve()) as folder:
        obstacle = _write(run, folder, repo)
        url = None if repo is None else _push(folder, repo)
    return obstacle, url


def load(folder: str | Path, device: str = "cpu") -> SoluscopeTransformer:
    """Load an exported run of any variant as a HookedTransformer that computes exactly the trained model.

    Args:
        folder: folder of the export, or the folder that huggingface_hub's snapshot_download returns.
        device: device of the loaded model.

    Raises:
        UserError: if the folder is not an export or is broken, or the loaded model disagrees with the trained
            model.
    """
    from soluscope.hooked.convert import load_tokenizer, to_hooked

    run = Run(Path(folder))
    model = to_hooked(run.load_model(), run.facts, device)
    model.set_tokenizer(load_tokenizer(run.dir / "tokenizer.json", run.facts))
    return model


def _check_run(run: Run) -> None:
    if not run.config_file.is_file():
        problem = "has no config.yaml" if run.dir.is_dir() else "does not exist"
        raise UserError(f"{run.dir} {problem}: give a run's folder, such as runs/STUDY/VARIANT-s0")
    if not run.is_done():
        raise UserError(f"{run.dir} has not finished: finish training it, then export it")
    files = [run.config_file, *(run.dir / name for name in OWN), run.tokenizer, _results(run)]
    for path in files:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link, and an export holds files of the run only: export the run from its own "
                "folder, or replace the link by a copy"
            )


def _results(run: Run) -> Path:
    return run.dir.parent / "results.jsonl"


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`. At the end it is renamed to `out`; after an error it is removed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(out) as beside:
            yield beside
    except OSError as error:
        raise UserError(f"cannot export to {out}: {error}") from error


def _write(run: Run, folder: Path, repo: str | None) -> str | None:
    """Write all files of the export. Return the reason why TransformerLens cannot load it, or None."""
    import torch

    from soluscope.hooked.convert import load_tokenizer

    trained, facts = run.load_model(), run.facts
    for name in OWN:
        write_bytes(folder / name, (run.dir / name).read_bytes())
    # Not `run.config`, in which environment variables are replaced by their values.
    yaml = to_yaml(for_others(read_yaml(run.config_file)))
    write_text(folder / "config.yaml", yaml)
    tokenizer = load_tokenizer(run.tokenizer, facts)  # checks that the tokenizer is this model's
    write_bytes(folder / "tokenizer.json", run.tokenizer.read_bytes())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
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
        lens_state = _lens_state(trained, facts)
    except UserError as error:
        obstacle = str(error)
    else:
        torch.save(lens_state, file := io.BytesIO())
        write_bytes(folder / weights, file.getvalue())
    write_text(folder / "config.json", _json(_family_config(run.config, facts, obstacle, repo)))
    stored = _results(run)
    records = results.read(stored) if stored.is_file() else []
    of_run = [
        each
        for each in records
        if isinstance(each, OfRun) and (each.run, each.config) == (facts.run, facts.config)
    ]
    if of_run:
        results.write(folder / "results.jsonl", of_run)
    probes = _probes(of_kind(of_run, Measurement), records)
    write_text(folder / "README.md", _card(run, yaml, probes, weights, obstacle, repo))
    return obstacle


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


# --- the files for TransformerLens ----------------------------------------------------------------


def _lens_state(trained: LanguageModel, facts: Facts) -> dict[str, Tensor]:
    """Return the state of a HookedTransformer of TransformerLens that computes this model.

    At the end, its stages are compared with those of the trained model, so that a variant with a difference
    that is not checked explicitly is refused too.

    Raises:
        UserError: if no such state exists; the message gives the reason.
    """
    import torch
    from torch import nn
    from transformer_lens import HookedTransformerConfig

    from soluscope.hooked.convert import SoluscopeTransformer, check_agreement

    if trained.is_constant:
        raise UserError(
            "its norms divide by constants, but TransformerLens's files allow one epsilon only"
        )
    norm = trained.mlp(0).ln
    if norm is not None and not norm.is_layer_norm:
        raise UserError(
            f"its mid norm is {facts.mid_norm}, but TransformerLens has only LayerNorm as a mid norm"
        )
    for eps, where in (facts.ln_eps, "residual stream's norms"), (facts.eps, "mid norm"):
        if eps is not None and not math.isclose(eps, LENS_EPS, rel_tol=1e-6):
            raise UserError(
                f"the epsilon of its {where} is {eps:g}, but TransformerLens always uses {LENS_EPS:g}"
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
    if not torch.allclose(
        trained.mlp(0).nonlinearity(pre), lens.blocks[0].mlp.act_fn(pre), atol=1e-9
    ):
        raise UserError(f"its nonlinearity differs from TransformerLens's {facts.hooked_act_fn}")
    state = trained.folded()
    masks = {name for name, _ in lens.named_buffers()}
    if lens.state_dict().keys() - masks != state.keys():
        raise UserError("its parameters have other names than in TransformerLens")
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
    """Return the content of config.json, with the keys of the SoLU family's files."""
    train = config.train
    return {
        **_sizes(facts),
        "architecture": "neel",  # without this key, TransformerLens looks for `_old` in the name
        "act_fn": f"soluscope:{facts.variant}" if obstacle else facts.hooked_act_fn,
        "attn_only": False, "shortformer_pos": False, "final_rms": False, "normalization": "LN",
        "ln_eps": facts.ln_eps, "neuron_scale": 1.0, "neuron_temp": 1.0,
        "seed": facts.seed, "dataset_name": config.data, "lr": facts.lr, "lr_schedule": train.schedule,
        "betas": [train.beta1, train.beta2], "weight_decay": train.weight_decay,
        "max_steps": facts.steps, "max_tokens": facts.tokens,
        "use_bfloat16_matmul": facts.precision == "bf16",
    } | ({"tokenizer_name": repo} if repo else {})  # fmt: skip


# --- the card -------------------------------------------------------------------------------------


def _card(
    run: Run,
    yaml: str,
    probes: Sequence[dict[str, Any]],
    weights: str,
    obstacle: str | None,
    repo: str | None,
) -> str:
    """Return README.md: description, loading, losses, results of the probes, and configuration.

    The template escapes all values as Markdown, except inside code blocks.
    """
    facts = run.facts
    longest = max((len(ticks) for ticks in re.findall("`+", yaml)), default=0)
    described = {
        "variant": facts.variant, "mid norm": facts.mid_norm, "epsilon of the mid norm": facts.eps,
        "kappa, epsilon times d_mlp squared": facts.kappa, "gain, one for all tokens": facts.gain,
        **_sizes(facts), "epsilon of the residual stream's norms": facts.ln_eps, "seed": facts.seed,
        "learning rate": facts.lr, "optimizer steps": facts.steps, "tokens seen": facts.tokens,
        **({"initial weights": facts.init_from.run} if facts.init_from else {}),
        "precision": facts.precision, "hash of the configuration": facts.config, "commit": facts.commit,
        **{f"version of {name}": version for name, version in facts.versions.items()},
    }  # fmt: skip
    environment = Environment(
        loader=PackageLoader("soluscope"), autoescape=True, finalize=_escaped, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["code"] = Markup
    return environment.get_template("card.md.j2").render(
        facts=facts, described=described, probes=probes, weights=weights, obstacle=obstacle, repo=repo,
        done=run.done() or {},
        folder=f'snapshot_download("{repo}")' if repo else HERE,
        import_hub="from huggingface_hub import snapshot_download\n" if repo else "",
        sizes=json.dumps(SIZES), yaml=yaml.rstrip(),
        fence="`" * max(3, 1 + longest),  # longer than any backticks inside the configuration
    )  # fmt: skip


def _probes(measurements: Sequence[Measurement], records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return each probe's results on natural text, BOS left out. results.jsonl has all results."""
    points = [
        row
        for row in measurements
        if row.x is None and (row.positions, row.group) == ("not BOS", "")
    ]
    result = []
    for probe in sorted({row.probe for row in points}):
        rows = [row for row in points if row.probe == probe]
        first = min(map(findings.by_stream, rows))
        remark = {
            "passed": "",
            "failed": ": failed its controls; do not cite these numbers",
            "not run": "" if probe in NOT_PROBES else ": not validated on the control models",
        }[controls.standing(records, probe)]
        lines = [
            [f"{row.statistic} of {row.quantity}" if row.statistic else row.quantity, row.unit,
             findings.estimate(row), str(row.n), row.note]
            for row in rows
            if findings.by_stream(row) == first
        ]  # fmt: skip
        result.append({"heading": f"{probe}{remark}", "lines": lines})
    return result


def _escaped(value: object) -> Markup:
    """Return `value` on one line, escaped for Markdown and HTML; Markup is returned unchanged."""
    if isinstance(value, Markup):
        return value
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return Markup(re.sub(r"([\\`*_{}\[\]<>|#~&!$:@])", r"\\\1", " ".join(text.split())))


# --- the hub --------------------------------------------------------------------------------------


def _check_push(repo: str) -> None:
    """Refuse a push that the hub would refuse, before anything is computed."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo}: {str(error).splitlines()[0]}") from error
    if "/" not in repo:
        raise UserError(f"--push {repo}: give a name on the hub, as in --push user/name")
    if get_token() is None:
        raise UserError(
            f"--push {repo}: there is no token: set HF_TOKEN, or sign in with 'hf auth login'"
        )


def _push(folder: Path, repo: str) -> str:
    """Create the repository if necessary, commit the folder to it, and return its address.

    upload_folder is not used, because it may make several commits, and between them the repository is
    incomplete. The same commit deletes the weights and results of an earlier export, because TransformerLens
    loads the first *final.pth that it finds. Other files stay.
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
    except Exception as error:  # of the hub, of the network, or of the uploading threads
        raise UserError(_why_not(error, repo, api.endpoint)) from error
    return str(url)


def _why_not(error: BaseException, repo: str, endpoint: str) -> str:
    """Return a one-line message for an error of the hub's client."""
    cause: BaseException | None = error
    status = None
    while cause is not None and status is None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        cause = cause.__cause__
    if status in (401, 403):
        return (
            f"the hub refuses to write {repo} ({status}): set HF_TOKEN to a token with write access; "
            "nothing was pushed"
        )
    outcome = f"answers {status}" if status is not None else f"was not reached ({reason(error)})"
    return (
        f"{endpoint} {outcome} for {repo}: push again; the repository contains either the whole export or "
        "nothing of it"
    )
