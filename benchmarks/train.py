"""Times of a training step, one JSON line per case on stdout.

    python benchmarks/train.py [--device cuda]

All sides of a ratio run in one process, interleaved, so that a noisy machine slows both sides equally:
our module, the same step under Lightning, and HookedTransformer with the same weights and optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformer_lens import HookedTransformer

from soluscope import plugins
from soluscope.config import Config, load_config
from soluscope.data.cache import TokenCache, prepare
from soluscope.hooked.convert import to_hooked
from soluscope.training.batches import Batches, batch_rows
from soluscope.training.module import TrainingModule
from soluscope.training.run import facts_of, train

D_MODEL, D_MLP, CTX, D_VOCAB, BATCH = 128, 512, 128, 4096, 16
N_STEPS, N_WARMUP, N_BATCHES = 12, 3, 512
BF16_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bf16 peak of each GPU, in FLOP/s, keyed by a part of the GPU's name."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        configs = {
            name: _config(name, device, folder) for name in plugins.names("soluscope.variants")
        }
        cache = prepare(configs["gelu"])
        steps: dict[str, Callable[[], None]] = {}
        for name, config in configs.items():
            steps[name], steps[f"{name} hooked"] = _steps(config, cache, device)
        times = _interleaved(steps, device)
        lightning_ms = _lightning_step(configs["solu_ln"], device)
        for name in configs:
            ms = times[name]
            line: dict[str, Any] = {
                "case": "train_step", "variant": name, "device": device, "ms": round(ms, 2),
                "ratio_to_hooked_transformer": round(ms / times[f"{name} hooked"], 3),
                "ratio_to_gelu": round(ms / times["gelu"], 3),
            }  # fmt: skip
            if name == "solu_ln":
                line["lightning_share"] = round(lightning_ms / (ms + lightning_ms), 4)
            if device == "cuda":
                line |= _throughput(ms)
            print(json.dumps(line), flush=True)
        print(json.dumps(_data_case(configs["solu_ln"], cache, times["solu_ln"])))


def _config(variant: str, device: str, folder: str) -> Config:
    return load_config(
        [
            f"variant={variant}", "size=d128", f"model.d_model={D_MODEL}", f"model.d_mlp={D_MLP}",
            f"model.ctx={CTX}", f"tokens.d_vocab={D_VOCAB}", f"train.batch_size={BATCH}", "train.lr=1e-3",
            f"train.device={device}", f"runs_dir={folder}", f"tokens.cache_dir={folder}/tokens",
            "train.steps=40", "train.warmup_steps=1",
        ]
    )  # fmt: skip


def _steps(
    config: Config, cache: TokenCache, device: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return our step and HookedTransformer's: same weights, batch, optimizer and clipping, no Lightning."""
    ours = TrainingModule(config, cache).to(device)
    facts = facts_of(config, cache, ours.model)
    hooked = to_hooked(TrainingModule(config, cache).model, facts, device).train()
    rows = cache.rows("train", config.model.ctx)
    tokens = torch.from_numpy(rows[batch_rows(0, 0, config.train.batch_size, len(rows))]).to(device)
    bf16 = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")

    def step_of(module: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            with bf16:
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()

        return step

    assert isinstance(hooked, HookedTransformer)
    return (
        step_of(ours.model, lambda: ours.loss(tokens, ours.bos)),
        step_of(hooked, lambda: hooked(tokens, return_type="loss")),
    )


def _interleaved(steps: dict[str, Callable[[], None]], device: str) -> dict[str, float]:
    """Return the median milliseconds of each step, over rounds in which each step runs once."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(N_WARMUP + N_STEPS):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn >= N_WARMUP:
                times[name].append((time.perf_counter() - began) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def _lightning_step(config: Config, device: str) -> float:
    """Return the milliseconds that Lightning and our callback add to a step.

    This small time would drown in the difference of two large, noisy times. So a model of two neurons is
    trained through the real loop, and the same step is timed without the loop.
    """
    small = load_config(
        [
            "variant=solu_ln", "size=tiny", "model.d_model=2", "model.n_heads=1", "model.d_mlp=2", "model.ctx=3",
            "train.batch_size=1", "train.steps=1000", "train.warmup_steps=1", "train.lr=1e-6", "train.lr_rest=1e-6",
            f"train.device={device}", "train.compile=false", f"tokens.d_vocab={D_VOCAB}",
            f"runs_dir={config.runs_dir}", f"tokens.cache_dir={config.tokens.cache_dir}", "study=lightning",
        ]
    )  # fmt: skip
    seconds: float = json.loads((train(small) / "done.json").read_text())["seconds"]
    step, _ = _steps(small, prepare(small), device)
    return max(
        0.0, seconds * 1000 / small.train.steps - _interleaved({"small": step}, device)["small"]
    )


def _data_case(config: Config, cache: TokenCache, step_ms: float) -> dict[str, Any]:
    """Time a batch from the real data loader, rows drawn and copied from the memmap, relative to a step."""
    batches = Batches(config, cache)
    batches.trainer = SimpleNamespace(global_step=0)
    loader = iter(batches.train_dataloader())
    next(loader)
    began = time.perf_counter()
    for _ in range(N_BATCHES):
        next(loader)
    ms = (time.perf_counter() - began) * 1000 / N_BATCHES
    return {"case": "batch", "ms": round(ms, 4), "share_of_step": round(ms / step_ms, 5)}


def _throughput(ms: float) -> dict[str, float]:
    """Return tokens per second, and the matrix products' share of the GPU's dense bf16 peak."""
    tokens = BATCH * CTX
    matrices = 4 * D_MODEL**2 + 2 * D_MODEL * D_MLP + D_MODEL * D_VOCAB
    flops = 6 * tokens * (matrices + CTX * D_MODEL)
    line: dict[str, float] = {"tokens_per_s": round(tokens / ms * 1000)}
    for name, peak in BF16_FLOPS.items():
        if name in torch.cuda.get_device_name():
            line["share_of_peak"] = round(flops / ms * 1000 / peak, 4)
    return line


if __name__ == "__main__":
    main()
