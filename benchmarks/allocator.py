"""Time and page faults of a training step, with freed memory returned to the system and kept, as JSON lines.

    python benchmarks/allocator.py

The setting holds for a whole process, so the two sides run in separate processes, in turns.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from soluscope.config import load_config
from soluscope.memory import keep_freed_memory
from soluscope.runs.weights import build_model
from soluscope.training.module import parameter_groups

N_TURNS, N_STEPS, N_WARMUP = 4, 60, 5


def main() -> None:
    if len(sys.argv) > 1:
        _steps(sys.argv[1] == "kept")
        return
    sides: dict[str, list[dict[str, float]]] = {"returned": [], "kept": []}
    for _ in range(N_TURNS):
        for side, found in sides.items():
            done = subprocess.run([sys.executable, __file__, side], capture_output=True, check=True)
            found.append(json.loads(done.stdout))
    medians = {
        side: {key: round(statistics.median(each[key] for each in found), 1) for key in found[0]}
        for side, found in sides.items()
    }
    ratio = medians["kept"]["cpu_ms"] / medians["returned"]["cpu_ms"]
    print(json.dumps({"case": "allocator", **medians, "ratio": round(ratio, 3)}))


def _steps(kept: bool) -> None:
    """Print the median CPU time and the mean number of page faults of a step of size=demo with one thread."""
    if kept:
        keep_freed_memory()
    torch.set_num_threads(1)
    config = load_config(["variant=solu_ln", "size=demo"])
    model = build_model(config, config.tokens.d_vocab)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    tokens = torch.randint(3, config.tokens.d_vocab, (config.train.batch_size, config.model.ctx))
    times, faults = [], 0
    for turn in range(N_WARMUP + N_STEPS):
        if turn == N_WARMUP:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = time.process_time()
        optimizer.zero_grad()
        model.loss(tokens, 0).backward()
        optimizer.step()
        times.append((time.process_time() - began) * 1000)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    print(json.dumps({"cpu_ms": statistics.median(times[N_WARMUP:]), "faults": faults / N_STEPS}))


if __name__ == "__main__":
    main()
