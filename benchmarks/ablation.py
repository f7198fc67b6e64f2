"""Times of exact ablation against hooks at SoLU-1L's shape, one JSON line per case on stdout.

    python benchmarks/ablation.py [--device cuda] [--n_positions 64]

Weights and tokens are random. Both sides of a ratio run in one process, interleaved, in fp32 and
inference mode. A hooked forward pass that edits one neuron at one position gives one (token, neuron)
pair. A pass that edits the neuron at all positions takes as long and gives one pair per position,
because the loss is per-token. The closed forms are timed for all 2048 neurons of some tokens; computing
W_out U, once per model, is not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope.data.streams import Stream
from soluscope.hooked.ablation import Ablation, loss_at_gain
from soluscope.hooked.activations import HookedRun, observe

D_MODEL, D_MLP, D_VOCAB, EPS = 512, 2048, 48262, 1e-5
N_ROUNDS, N_CHECKED = 5, 3
TOLERANCE = 1e-6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--n_positions", type=int, default=64, help="positions of the prompt, BOS included"
    )
    parser.add_argument("--n_tokens", type=int, default=32, help="tokens ablated in one call")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, run = _model_and_run(args.device, args.n_positions)
    tokens = torch.arange(1, 1 + min(args.n_tokens, args.n_positions - 2), device=args.device)
    before = _memory(args.device)
    ablation = Ablation(run)
    held = _memory(args.device, peak=True) - before
    gains = run.gain[:, None] * torch.linspace(0.5, 2, 16, device=args.device)
    few = run.subset(torch.isin(torch.arange(len(run.pos), device=args.device), tokens))
    cases: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "post": (len(tokens) * D_MLP, lambda: ablation.post(tokens)),
        "post, tolerance 1e-6": (
            len(tokens) * D_MLP,
            lambda: ablation.post(tokens, 0.0, TOLERANCE),
        ),
        "mid": (len(tokens) * D_MLP, lambda: ablation.mid(tokens)),
        "pre": (len(tokens) * D_MLP, lambda: ablation.pre(tokens)),
        "gain": (len(tokens) * gains.shape[1], lambda: loss_at_gain(few, gains[tokens])),
    }
    for name, (n_pairs, measure) in cases.items():
        ms, hook_ms, peak = _interleaved(
            measure, lambda: _hooked(model, run, "post", 7, slice(1, 2)), args.device
        )
        line: dict[str, Any] = {
            "case": name, "device": args.device, "n_tokens": len(tokens),
            "ms_per_pair": round(ms / n_pairs, 5), "hooked_forward_ms": round(hook_ms, 1),
            "n_positions": args.n_positions,
            "speedup_vs_hook_per_pair": round(hook_ms / (ms / n_pairs)),
            "speedup_vs_hook_all_positions": round(hook_ms / (args.n_positions - 1) / (ms / n_pairs)),
            "peak_extra_memory_gb": round((held + max(0, peak)) / 1e9, 2),
        }  # fmt: skip
        if "tolerance" in name:
            bounds = ablation.bounds(tokens)
            decided = bounds.high - bounds.low <= 2 * TOLERANCE
            line["share_decided_by_bound"] = round(decided.float().mean().item(), 4)
        if name != "gain":
            line["largest_difference_from_hooks"] = _difference(model, run, name, tokens, measure())
        print(json.dumps(line), flush=True)


def _model_and_run(device: str, n_positions: int) -> tuple[Any, HookedRun]:
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=1, d_model=D_MODEL, n_ctx=n_positions, d_head=64, n_heads=8, d_mlp=D_MLP,
        d_vocab=D_VOCAB, act_fn="solu_ln", normalization_type="LN", eps=EPS, device=device, seed=0,
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    rows = torch.randint(1, D_VOCAB, (1, n_positions))
    rows[:, 0] = 0
    stream = Stream("random", rows, torch.zeros_like(rows), torch.ones_like(rows).bool(), bos=0)
    return model, observe(model, stream)


@torch.inference_mode()
def _hooked(model: Any, run: HookedRun, stage: str, neuron: int, where: slice) -> Tensor:
    """Return per-token losses with the neuron set to zero at some positions."""

    def zeroed(values: Tensor, hook: Any) -> Tensor:
        values[:, where, neuron] = 0
        return values

    losses: Tensor = model.run_with_hooks(
        run.tokens[None], return_type="loss", loss_per_token=True,
        fwd_hooks=[(f"blocks.0.mlp.hook_{stage}", zeroed)],
    )  # fmt: skip
    return losses[0]


def _interleaved(
    measure: Callable[[], Tensor], hooked: Callable[[], Tensor], device: str
) -> tuple[float, float, float]:
    """Return the median milliseconds of both, and the peak number of bytes that `measure` added."""
    times: dict[Callable[[], Tensor], list[float]] = {measure: [], hooked: []}
    measure(), hooked()
    peak = 0.0
    for _ in range(N_ROUNDS):
        for side, taken in times.items():
            before = _memory(device)
            began = time.perf_counter()
            side()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append((time.perf_counter() - began) * 1000)
            if side is measure:
                peak = max(peak, _memory(device, peak=True) - before)
    ms, hook_ms = (statistics.median(taken) for taken in times.values())
    return ms, hook_ms, peak


def _memory(device: str, *, peak: bool = False) -> float:
    """Return the bytes in use; with `peak`, the largest number since the last call without `peak`."""
    if device == "cuda":
        if peak:
            return torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


def _difference(model: Any, run: HookedRun, case: str, tokens: Tensor, changes: Tensor) -> float:
    """Return the largest difference from the hooks at some neurons, in nats."""
    stage = case.split(",")[0]
    nothing = _hooked(model, run, stage, 0, slice(0, 0))
    worst = 0.0
    for neuron in torch.linspace(0, D_MLP - 1, N_CHECKED).long().tolist():
        wanted = (_hooked(model, run, stage, neuron, slice(None)) - nothing)[tokens]
        worst = max(worst, float((wanted - changes[:, neuron]).abs().max()))
    return worst


if __name__ == "__main__":
    main()
