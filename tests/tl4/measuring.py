"""Code shared by both sides of the comparison: every probe on every one of its streams, as plain arrays.

With 3.9 this file is also a script. It trains the models, plants the controls, measures them and writes
the models and their numbers:

    python tests/tl4/measuring.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from soluscope import plugins
from soluscope.data import streams
from soluscope.data.cache import open_cache
from soluscope.errors import UserError
from soluscope.evaluation.summaries import token_table
from soluscope.hooked.activations import HookedRun, observe

VARIANTS = plugins.names("soluscope.variants")
PROBES = plugins.names("soluscope.probes")
CONTROLS = ("pinned", "smear_shared", "or_gate")
"""Controls planted in fp64: with a constant gain, with a per-token gain, and with prompts to patch."""
N_TOKENS = 1000

Numbers = dict[str, np.ndarray[Any, Any]]


def of_run(model: Any, run_dir: Path) -> Numbers:
    """Return everything measured on the model of a run folder, on the streams that `eval/run.py` makes."""
    cache = open_cache(Path(json.loads((run_dir.parent / "data.json").read_text())["path"]))
    tokenizer = Tokenizer.from_file(str(cache.tokenizer_path))
    ctx = model.facts.ctx

    def observed(name: str) -> HookedRun:
        return observe(model, streams.make(name, cache, tokenizer, ctx, N_TOKENS, seed=0))

    return _measured(observed)


def of_planted(model: Any, planted: dict[str, streams.Stream]) -> Numbers:
    """Return the same for a control; its `natural` stream and its `pairs` are used for all streams of a kind."""

    def observed(name: str) -> HookedRun:
        kind = "pairs" if name.startswith(streams.PAIRS) else "natural"
        if kind not in planted:
            raise UserError(f"the control has no {kind}")
        return observe(model, planted[kind])

    return _measured(observed)


def _measured(observed: Callable[[str], HookedRun]) -> Numbers:
    runs: dict[str, HookedRun] = {}
    found: Numbers = {}
    for name in PROBES:
        probe = plugins.pick("soluscope.probes", name)
        for stream in probe.streams:
            try:
                runs[stream] = runs.get(stream) or observed(stream)
            except UserError:  # this model has no such stream, on either side
                continue
            if probe.one_scale and bool(runs[stream].scale.isnan().all()):
                continue
            for key, values in _numbers(probe, runs[stream]):
                found[f"{name} | {stream} | {key}"] = np.asarray(values, dtype=np.float64)
    for stream, run in runs.items():
        for stage in ("pre", "mid", "post", "scale", "resid_mid", "loss"):
            found[f"observe | {stream} | {stage}"] = getattr(run, stage).numpy()
    return found


def _numbers(probe: Any, run: HookedRun) -> Iterator[tuple[str, Any]]:
    measured = probe.measure(run)
    table = token_table(run, measured)
    yield from ((f"token {name}", column) for name, column in table.items())
    for number, e in enumerate(measured.estimates):
        key = f"estimate {number} {e.quantity} {e.group}"
        yield key, [np.nan if e.x is None else e.x, *e.value(e.sums.sum(0, keepdims=True))]
    yield from ((f"neuron {name}", column) for name, column in measured.neurons.items())


def write(folder: Path) -> None:
    """Write run folders below `folder`/runs, controls as weights and rows of tokens, and all their numbers."""
    from rich.progress import Progress

    import soluscope
    from soluscope.training.run import train

    for variant in VARIANTS:
        config = soluscope.load_config([
            f"variant={variant}", "size=tiny", "study=tl4", f"runs_dir={folder / 'runs'}",
            f"tokens.cache_dir={folder / 'tokens'}", "corpus.max_mb=4", "train.steps=60",
            "train.threads=1", "train.precision=fp32", "wandb=off",
        ])  # fmt: skip
        run_dir = train(config, Progress(disable=True))
        np.savez(folder / f"{variant}.npz", **of_run(soluscope.load(run_dir), run_dir))
    for name in CONTROLS:
        planted = plugins.pick("soluscope.controls", name).build()
        model = planted.model
        what = {
            "state": {key: value.detach() for key, value in model.named_parameters()},
            "eps": model.blocks[0].mlp.ln.eps,
            "ln_eps": model.cfg.eps,
            "streams": {kind: vars(stream) for kind, stream in planted.streams.items()},
        }
        torch.save(what, folder / f"{name}.pt")
        np.savez(folder / f"{name}.npz", **of_planted(model, planted.streams))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
