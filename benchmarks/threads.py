"""Time of two training runs at once with one thread each, and of one run with two threads: their ratio.

    python benchmarks/threads.py
    python benchmarks/threads.py 100 5

The arguments are the number of steps (default 40) and of repetitions (default 3). The model is that of size=demo,
with random tokens. Both sides are interleaved, each run in a forked process. The script prints one JSON line: the
medians of seconds per run, and their ratio. A ratio above 1 means that the pair is faster. Other work on the
machine distorts the ratio, because two threads wait for each other, so the load is printed too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from statistics import median

import torch

from soluscope.config import load_config
from soluscope.runs.weights import build_model


def train(n_threads: int, n_steps: int) -> None:
    """Train solu_ln of the demo size for some steps."""
    torch.set_num_threads(n_threads)
    torch.manual_seed(0)
    config = load_config(["variant=solu_ln", "size=demo"])
    d_vocab = config.tokens.d_vocab
    model = build_model(config, d_vocab)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(n_steps):
        tokens = torch.randint(3, d_vocab, (config.train.batch_size, config.model.ctx))
        optimizer.zero_grad()
        model.loss(tokens, bos=0).backward()
        optimizer.step()


def seconds(n_runs: int, n_threads: int, n_steps: int) -> float:
    """Return the seconds of `n_runs` runs at once, divided by their number."""
    begin = time.perf_counter()
    children = []
    for _ in range(n_runs):
        child = os.fork()
        if child == 0:
            train(n_threads, n_steps)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return (time.perf_counter() - begin) / n_runs


def main(n_steps: int = 40, n_repetitions: int = 3) -> None:
    """Measure both sides in turn, and print one JSON line."""
    pairs, alone = [], []
    for _ in range(n_repetitions):
        pairs.append(seconds(2, 1, n_steps))
        alone.append(seconds(1, 2, n_steps))
    print(
        json.dumps(
            {
                "s_per_run_of_a_pair": round(median(pairs), 2),
                "s_per_run_alone": round(median(alone), 2),
                "ratio": round(median(alone) / median(pairs), 2),
                "load": round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
