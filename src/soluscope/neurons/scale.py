"""Ten ranges of activation for each neuron and stage, from a first look at evenly spaced rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from soluscope.data.streams import Stream
from soluscope.hooked.activations import HookedRun, observe_blocks
from soluscope.neurons.schema import N_RANGES, STAGES, Stage

NUMBERS = 2**23
"""Largest number of activations of one stage in the first look."""
N_PEAKS = 5
"""Number of a neuron's strongest tokens in the first look, from which rules about single tokens are made."""


class Scale(NamedTuple):
    """A neuron's ranges at one stage: range r covers `low` + r `width` to `low` + (r + 1) `width`.

    The first range also holds everything below `low`, and the last one everything above its upper bound.
    """

    low: Float[Tensor, " d_mlp"]
    """Median of the neuron in the first look: its level at a typical token."""
    width: Float[Tensor, " d_mlp"]
    """A tenth of the distance from there to its maximum; infinite for a constant neuron."""

    def units(self, values: Float[Tensor, "token d_mlp"]) -> Float[Tensor, "token d_mlp"]:
        """Return activations in widths above `low`."""
        return (values - self.low) / self.width


@dataclass(frozen=True)
class FirstLook:
    """Facts from the first rows that the scan needs before it begins."""

    scales: dict[Stage, Scale]
    peaks: list[int]
    """Tokens at the neurons' strongest activations; those of the most neurons first."""
    before_peaks: list[int]
    """Tokens before these, in the same order."""


def content(run: HookedRun) -> Bool[Tensor, " token"]:
    """Return a mask of the tokens that can be examples: all except BOS."""
    return ~run.is_bos


@torch.no_grad()
def first_look(model: Any, stream: Stream) -> FirstLook:
    """Return each neuron's ranges and strongest tokens, from evenly spaced rows of the stream (all, if few)."""
    n_rows, width = stream.tokens.shape
    wanted = max(1, NUMBERS // (width * model.cfg.d_mlp))
    rows = torch.arange(n_rows)[:: -(-n_rows // wanted)]
    blocks = list(observe_blocks(model, of_rows(stream, rows), with_loss=False))
    tokens, before = (torch.cat(part) for part in zip(*map(_tokens, blocks), strict=True))
    scales: dict[Stage, Scale] = {}
    peaks, before_peaks = Counter[int](), Counter[int]()
    for stage in STAGES:
        values = torch.cat([getattr(block, stage)[content(block)] for block in blocks])
        scales[stage] = _scale(values)
        strongest = values.topk(min(N_PEAKS, len(values)), dim=0).indices  # [peak d_mlp]
        peaks.update(tokens[strongest].mode(0).values.tolist())
        before_peaks.update(before[strongest].mode(0).values.tolist())
    return FirstLook(scales, _ordered(peaks), _ordered(before_peaks))


def of_rows(stream: Stream, rows: Int[Tensor, " row"]) -> Stream:
    """Return some rows of a stream."""
    parts = (stream.tokens[rows], stream.string[rows], stream.keep[rows])
    return Stream(stream.name, *parts, stream.bos, stream.vocab)


def _tokens(run: HookedRun) -> tuple[Tensor, Tensor]:
    """Return the tokens that can be examples, and the token before each."""
    kept = content(run)
    return run.tokens[kept], run.tokens.roll(1)[kept]


def _scale(values: Float[Tensor, "token d_mlp"]) -> Scale:
    low, high = values.median(0).values, values.amax(0)
    # Equal activations differ by rounding, and must not fill ten ranges.
    largest = high.abs().maximum(low.abs())
    flat = high - low <= (1e-6 * largest).maximum(1e-9 * largest.max())
    return Scale(low, ((high - low) / N_RANGES).masked_fill(flat, torch.inf))


def _ordered(counted: Counter[int]) -> list[int]:
    return [token for token, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
