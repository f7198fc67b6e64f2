"""How long the probes take on one trained model, and whether that grows as the number of tokens does.

    python benchmarks/suite.py runs/demo/solu_ln-s0
    python benchmarks/suite.py runs/demo/solu_ln-s0 2000 10000 50000

Works on a copy of the run's folder. Prints one JSON line a probe: seconds at each number of tokens,
its own activations and intervals included, and the exponent by which they grow from the first number
to the last (1: in proportion). The first stream that needs a model's activations pays for them, so
`tokens` stands for observing the natural stream.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from itertools import pairwise
from math import log
from pathlib import Path

from soluscope import plugins
from soluscope.config import EvalConfig
from soluscope.suite import evaluate


def main(words: list[str]) -> None:
    run_dir, sizes = Path(words[0]), [int(word) for word in words[1:]] or [2000, 10_000, 50_000]
    taken = {n_tokens: times(run_dir, n_tokens) for n_tokens in sizes}
    ratio = sizes[-1] / sizes[0]
    for name in [*taken[sizes[0]], "all"]:
        seconds = {n: round(each.get(name, sum(each.values())), 2) for n, each in taken.items()}
        grown = log(max(seconds[sizes[-1]], 1e-3) / max(seconds[sizes[0]], 1e-3)) / log(ratio)
        print(json.dumps({"probe": name, "seconds": seconds, "exponent": round(grown, 2)}))


def times(run_dir: Path, n_tokens: int) -> dict[str, float]:
    """Seconds of each probe, and of `tokens`; controls and losses left out."""
    marks: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        study = Path(scratch) / run_dir.parent.name
        copy = study / run_dir.name
        shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("probes", "checkpoints"))
        for name in ("data.json", "tokenizer.json"):
            shutil.copy(run_dir.parent / name, study / name)
        config = EvalConfig(n_tokens=n_tokens, n_loss_tokens=1000)
        evaluate(copy, config, lambda text: marks.append((text, time.perf_counter())))
        marks.append(("", time.perf_counter()))
    wanted = {"tokens", *plugins.names("soluscope.probes")}
    found = {}
    for (text, begin), (_, end) in pairwise(marks):
        name = text.rpartition(": ")[2].split(" (")[0]
        if name in wanted and "controls of" not in text:
            found[name] = end - begin
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
