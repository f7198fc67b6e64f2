"""The chosen tokens once more: the text and the activations around each, and the effect of its neuron there."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from soluscope.data.streams import Stream
from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import HookedRun, observe_blocks
from soluscope.neurons.scale import of_rows
from soluscope.neurons.scan import Scanned, halves
from soluscope.neurons.schema import CONTEXT, STAGES, TOP
from soluscope.neurons.selection import NONE
from soluscope.probes.low_activation_impact import surrogate

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
    parts, done, first = [], 0, 0
    for block in observe_blocks(model, of_rows(stream, rows.cpu()), with_loss=False):
        places = kept[done : done + len(block.pos)]
        done += len(block.pos)
        last = int(torch.searchsorted(at[order], places[-1:], side="right"))
        here, first = order[first:last], last
        t = torch.searchsorted(places, at[here]).to(block.device)
        neurons = columns[0][here].to(block.device)
        parts.append(_of_block(block, t, neurons, scanned.log_gain).assign(chosen=here.numpy()))
    table = pd.concat(parts, ignore_index=True).sort_values("chosen", ignore_index=True)
    table["row"] = (columns[1] // width).numpy()
    table["half"] = halves(stream).flatten()[columns[1]].numpy()
    for name in ("neuron", "range", "rank"):
        table[name] = chosen[name].cpu().numpy()
    table["stage"] = [STAGES[number] for number in chosen["stage"].tolist()]
    return table.drop(columns="chosen")


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


def _of_block(run: HookedRun, t: Tensor, neurons: Tensor, log_gain: float) -> pd.DataFrame:
    """Return the examples at the tokens `t` of a block, with one neuron each."""
    start, stop = _windows(run, t)
    offsets = torch.arange(2 * CONTEXT + 1, device=run.device)
    inside = (start[:, None] + offsets).clamp_max(len(run.pos) - 1)
    lengths = (stop - start).tolist()

    def cut(values: Tensor) -> list[Any]:
        return [row[:n] for row, n in zip(values.cpu().numpy(), lengths, strict=True)]

    table: dict[str, Any] = {
        "document": run.string[t].cpu(), "pos": run.pos[t].cpu(), "tokens": cut(run.tokens[inside].int()),
        "peak": (t - start).cpu(),
        **{stage: cut(getattr(run, stage)[inside, neurons[:, None]].float()) for stage in STAGES},
    }  # fmt: skip
    effects = [
        _effects(run.subset(some), of_some, log_gain)
        for some, of_some in zip(t.split(PAIRS_AT_ONCE), neurons.split(PAIRS_AT_ONCE), strict=True)
    ]
    for number, name in enumerate(("effect", "D", "k_eff", "gain", "engagement")):
        table[name] = torch.cat([part[number] for part in effects]).cpu() if effects else []
    return pd.DataFrame(table)


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
    """Return the effect, D, K, gain and engagement at tokens, with one neuron each.

    The effect is the change of the token's loss when the neuron's hook_post is set to 0. D is the effect minus the
    same effect in the static surrogate, the same model with one gain for all tokens (protocol.md, P9).
    """

    def effect(of: HookedRun) -> Tensor:
        edited = of.post.scatter(1, neurons[:, None], 0.0)
        return (loss_at_post(of, edited) - loss_at_post(of, of.post)).double()

    live = effect(run)
    static = effect(surrogate(run, math.exp(log_gain))) if len(run.pos) else live
    return live, live - static, run.k_eff, run.gain.double(), run.engagement
