"""The time of a training step on this machine, measured without reading any text."""

from __future__ import annotations

import statistics
import time

import torch

from soluscope.config import Config
from soluscope.runs.weights import build_model
from soluscope.training.device import on_cuda

N_WARMUP, N_STEPS = 2, 5


def seconds_per_step(config: Config, d_vocab: int, alone: bool) -> float:
    """Return the median seconds of a step of this configuration, on random tokens.

    Args:
        config: the run.
        d_vocab: entries of the vocabulary.
        alone: False if the job shares the machine with others and so computes with one thread.
    """
    device = "cuda" if on_cuda(config) else "cpu"
    before = torch.get_num_threads()
    torch.set_num_threads(config.train.threads or (before if alone else 1))
    try:
        model = build_model(config, d_vocab).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        shape = (config.train.batch_size // config.train.micro_batches, config.model.ctx)
        seconds = []
        for _ in range(N_WARMUP + N_STEPS):
            began = time.perf_counter()
            for _ in range(config.train.micro_batches):
                model.loss(torch.randint(0, d_vocab, shape, device=device), bos=0).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return statistics.median(seconds[N_WARMUP:])
