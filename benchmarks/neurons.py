"""Time and memory of the neurons of one run: `soluscope neurons` without the loading of the model.

    python benchmarks/neurons.py runs/demo/solu_ln-s0
    python benchmarks/neurons.py runs/demo/solu_ln-s0 200000 400000

The text is the rows of the report split and then of the select split, one million tokens by default. Each number
of tokens is measured in a separate process. The script prints one JSON line for each: wall-clock and CPU seconds of
the first look and the scan, and of the examples, the MB that the process has before, and the largest number of MB
beyond these.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from soluscope.data.cache import Split
from soluscope.data.streams import Stream
from soluscope.data.tokenizer import from_bytes, texts_of
from soluscope.evaluation.one_run import tokens_of
from soluscope.hooked.convert import load_run
from soluscope.neurons import describe, look
from soluscope.neurons.scan import scan
from soluscope.runs.folder import Run

SIZES = ("1000000",)


def main(run: str, sizes: list[str]) -> None:
    for n_tokens in sizes or SIZES:
        subprocess.run([sys.executable, __file__, "--one", run, n_tokens], check=True)


def measure(run: Run, n_tokens: int) -> None:
    """Print the times and the memory of one measurement; call this once per process."""
    model, stream = load_run(run), text_of(run, n_tokens)
    before, begin = memory("VmRSS"), (time.perf_counter(), time.process_time())
    scanned = scan(model, stream)
    between = (time.perf_counter(), time.process_time())
    examples = look.examples(model, stream, scanned)
    describe.statistics(scanned, torch.ones(model.cfg.d_mlp), examples)
    describe.best_rules(scanned)
    end = (time.perf_counter(), time.process_time())
    line = {
        "n_tokens": scanned.n_tokens, "n_neurons": model.cfg.d_mlp, "threads": torch.get_num_threads(),
        "seconds": round(end[0] - begin[0], 1), "cpu_seconds": round(end[1] - begin[1], 1),
        "cpu_seconds_scan": round(between[1] - begin[1], 1), "cpu_seconds_examples": round(end[1] - between[1], 1),
        "n_examples": len(examples), "mb_before": round(before), "mb_added": round(memory("VmHWM") - before),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def text_of(run: Run, n_tokens: int) -> Stream:
    """Return the first rows of the held-out splits of a run's study, of about `n_tokens` tokens."""
    cache, ctx = tokens_of(run), run.facts.ctx
    tokens: list[torch.Tensor] = []
    string: list[torch.Tensor] = []
    splits: tuple[Split, ...] = ("report", "select")
    for split in splits:
        rows = cache.rows(split, ctx)
        chosen = torch.arange(len(rows)).numpy()
        documents = torch.from_numpy(rows.documents(chosen))
        documents[:, 0] = documents[:, 1]
        tokens.append(torch.from_numpy(rows[chosen]))
        string.append(documents + 10_000 * len(string))
    chosen_tokens, owner = (torch.cat(part)[: n_tokens // (ctx - 1)] for part in (tokens, string))
    keep = torch.ones_like(chosen_tokens, dtype=torch.bool)
    tokenizer = from_bytes(cache.tokenizer_path.read_bytes(), "no tokenizer")
    bos, vocab = cache.meta["bos"], texts_of(tokenizer)
    return Stream("held out", chosen_tokens, owner, keep, bos, vocab)


def memory(field: str) -> float:
    """Return this process's resident MB: now (VmRSS), or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(dict(line.split(":", 1) for line in lines)[field].split()[0]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(Run(Path(sys.argv[2])), int(sys.argv[3]))
    else:
        main(sys.argv[1], sys.argv[2:])
