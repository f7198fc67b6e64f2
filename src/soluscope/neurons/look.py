"""The chosen tokens once more: the text and the activations around each, and the effect of its neuron there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from soluscope.data.streams import Stream
from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun, observe_blocks
from soluscope.neurons.scale import of_rows
from soluscope.neurons.scan import Scanned, halves
from soluscope.neurons.schema import CONTEXT, STAGES, TOP
from soluscope.neurons.selection import NONE
from soluscope.probes.low_activation_impact import surrogate

NUMBERS = ("effect", "D", "k_eff", "gain", "engagement")
"""Numbers of an example, in the order of `_effects`."""
PAIRS_AT_ONCE = 1024
"""Number of examples whose effects are computed at once."""


@torch.no_grad()
def examples(model: Any, stream: Stream, scanned: Scanned) -> pd.DataFrame:
    """Return the chosen examples, one per line, ordered by neuron, stage, range and rank.

    Columns: neuron, stage, range (`TOP`, or 0 to 9 from the lowest), rank, document, half (of the documents: rules
    are chosen on half 0), row, pos, tokens (of the window), peak (index in it), pre, mid, post (of the window),
    effect, D (nats; nan without a target), k_eff, gain, engagement.
    """
    chosen = _chosen(scanned)
    width = stream.tokens.shape[1]
    rows, index = (chosen["place"] // width).unique(return_inverse=True)
    kept = stream.keep[rows.cpu()].flatten().nonzero().squeeze(-1)
    columns = [chosen[name].cpu() for name in ("neuron", "place")]
    at = index.cpu() * width + columns[1] % width  # place in the chosen rows
    order = at.argsort(stable=True)
    found = _empty(len(at))
    done, first = 0, 0
    for block in observe_blocks(model, of_rows(stream, rows.cpu()), with_loss=False):
        places = kept[done : done + len(block.pos)]
        done += len(block.pos)
        last = int(torch.searchsorted(at[order], places[-1:], side="right"))
        here, first = order[first:last], last
        t = torch.searchsorted(places, at[here]).to(block.device)
        neurons = columns[0][here].to(block.device)
        for name, values in _of_block(block, t, neurons, scanned.log_gain).items():
            found[name][here.numpy()] = values.numpy(force=True)
    table = pd.DataFrame({name: chosen[name].cpu().numpy() for name in ("neuron", "range", "rank")})
    table["stage"] = [STAGES[number] for number in chosen["stage"].tolist()]
    table["row"] = (columns[1] // width).numpy()
    table["half"] = halves(stream).flatten()[columns[1]].numpy()
    lengths = found.pop("length").tolist()
    for name, filled in found.items():
        if filled.ndim == 1:
            table[name] = filled
        else:  # windows
            table[name] = pd.Series([row[:n] for row, n in zip(filled, lengths, strict=True)])
    return table


def _empty(n: int) -> dict[str, NDArray[Any]]:
    """Return arrays for `n` examples, so that the passes over blocks leave no small arrays behind in memory."""
    windows: dict[str, Any] = {"tokens": np.int32, **dict.fromkeys(STAGES, np.float32)}
    numbers: dict[str, Any] = dict.fromkeys(("document", "pos", "peak", "length"), np.int64)
    numbers |= dict.fromkeys(NUMBERS, np.float64)
    found: dict[str, NDArray[Any]] = {name: np.zeros(n, dtype) for name, dtype in numbers.items()}
    shape = (n, 2 * CONTEXT + 1)
    return found | {name: np.zeros(shape, dtype) for name, dtype in windows.items()}


def _chosen(scanned: Scanned) -> dict[str, Int[Tensor, " example"]]:
    """Return neuron, stage (its number), range, rank and place of each example."""
    parts = []
    for number, stage in enumerate(STAGES):
        groups = [(TOP, scanned.top[stage][1]), *enumerate(scanned.sample[stage])]
        for of_range, places in groups:
            rank, neuron = (places != NONE).nonzero(as_tuple=True)
            same = torch.full_like(rank, number), torch.full_like(rank, of_range)
            parts.append(torch.stack([neuron, *same, rank, places[rank, neuron]]))
    found = torch.cat(parts, dim=1)
    for row in (3, 2, 1, 0):  # stable sorts: by neuron, then stage, range and rank
        found = found[:, found[row].argsort(stable=True)]
    return dict(zip(("neuron", "stage", "range", "rank", "place"), found, strict=True))


def _of_block(run: HookedRun, t: Tensor, neurons: Tensor, log_gain: float) -> dict[str, Tensor]:
    """Return the arrays of `_empty` for the examples at the tokens `t` of a block, with one neuron each."""
    start, stop = _windows(run, t)
    offsets = torch.arange(2 * CONTEXT + 1, device=run.device)
    inside = (start[:, None] + offsets).clamp_max(len(run.pos) - 1)
    found: dict[str, Tensor] = {
        "document": run.string[t], "pos": run.pos[t], "peak": t - start, "length": stop - start,
        "tokens": run.tokens[inside],
        **{stage: getattr(run, stage)[inside, neurons[:, None]] for stage in STAGES},
    }  # fmt: skip
    pairs = zip(t.split(PAIRS_AT_ONCE), neurons.split(PAIRS_AT_ONCE), strict=True)
    effects = [_effects(run.subset(some), of_some, log_gain) for some, of_some in pairs]
    for number, name in enumerate(NUMBERS):
        found[name] = torch.cat([part[number] for part in effects])
    return found


def _windows(run: HookedRun, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of each token's window: its row, its document, and `CONTEXT` tokens on either side."""
    n = len(run.pos)
    is_new = (run.pos <= 1) | (run.string != run.string.roll(1))  # BOS is not shown
    is_new[0] = True
    bounds = torch.cat([is_new.nonzero().squeeze(-1), torch.tensor([n], device=run.device)])
    group = torch.searchsorted(bounds, t, side="right")
    start = torch.maximum(bounds[group - 1], t - CONTEXT)
    return start, torch.minimum(bounds[group], t + CONTEXT + 1)


def _effects(run: HookedRun, neurons: Tensor, log_gain: float) -> tuple[Tensor, ...]:
    """Return `NUMBERS` at tokens, with one neuron each.

    The effect is the change of the token's loss when the neuron's hook_post is set to 0. D is the effect minus the
    same effect in the static surrogate, the same model with one gain for all tokens (protocol.md, P9).
    """

    def effect(of: HookedRun) -> Tensor:
        edited = of.post.scatter(1, neurons[:, None], 0.0)
        return (loss_at_post(of, edited) - loss_at_post(of, of.post)).double()

    live = effect(run)
    static = effect(surrogate(run, math.exp(log_gain))) if len(run.pos) else live
    return live, live - static, run.k_eff, run.gain.double(), run.engagement
