"""One pass over a text: every neuron's top examples, samples, histograms, moments, and counts for its rules.

Memory does not grow with the text: the passes keep a few numbers per neuron, range and rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from soluscope.data.streams import Stream
from soluscope.hooked.activations import HookedRun, observe_blocks
from soluscope.neurons import rules
from soluscope.neurons.scale import FirstLook, Scale, content, first_look
from soluscope.neurons.schema import (
    BINS_BELOW,
    BINS_OF_RANGE,
    N_BINS,
    N_OF_RANGE,
    N_RANGES,
    N_TOP,
    SIDES,
    STAGES,
    Stage,
)
from soluscope.neurons.selection import SampleByRange, TopByDocument

TOKENS_AT_ONCE = 1024
"""Number of tokens whose activations are compared with all ranges at once."""
EXTRAS = ("tokens", "k_eff", "engagement")
"""Columns beside the rules whose sums over a neuron's tokens are kept: their number, K and r."""


@dataclass(frozen=True)
class Scanned:
    """The result of a pass."""

    n_tokens: int
    """Number of tokens that could be examples."""
    n_documents: int
    scales: dict[Stage, Scale]
    top: dict[Stage, tuple[Float[Tensor, "rank d_mlp"], Int[Tensor, "rank d_mlp"]]]
    """Values and places of the top examples."""
    sample: dict[Stage, Int[Tensor, "range rank d_mlp"]]
    """Places of the samples."""
    histogram: dict[Stage, Int[Tensor, "d_mlp bin"]]
    moments: dict[Stage, Float[Tensor, "power d_mlp"]]
    """Means of the first four powers of the activations in units of the scale; fp64."""
    rules: rules.Rules
    counts: dict[Stage, Float[Tensor, "half column level d_mlp"]]
    """At the stages before and after the norm: sums of the columns (rules, then `EXTRAS`) over the tokens in the
    range `level` or above, in the documents of even rank and in the others; fp64."""
    log_gain: float
    """Mean log gain; exp of it is the one gain of the static surrogate."""


class _OfStage:
    """Sums and selections of one stage, which grow by each block."""

    def __init__(self, scale: Scale, n_places: int, n_columns: int) -> None:
        low = scale.low
        self.scale, n = scale, len(low)
        self.top = TopByDocument(N_TOP, n, low)
        self.sample = SampleByRange(N_OF_RANGE, n, n_places, low)
        self.histogram = torch.zeros(n * N_BINS, dtype=torch.long, device=low.device)
        self.powers = torch.zeros(4, n, dtype=torch.float64, device=low.device)
        self.counts = torch.zeros(2, n_columns, N_RANGES, n, dtype=torch.float64, device=low.device)
        self._first_bin = torch.arange(n, device=low.device) * N_BINS

    def add(self, values: Tensor, owner: Tensor, places: Tensor) -> Int[Tensor, "token d_mlp"]:
        """Add tokens and return their ranges."""
        self.top.add(values, owner, places)
        units = self.scale.units(values)
        bins = (units * BINS_OF_RANGE).floor_().clamp_(-BINS_BELOW, N_BINS - BINS_BELOW - 1).long()
        self.histogram += torch.bincount(
            (bins + (self._first_bin + BINS_BELOW)).flatten(), minlength=len(self.histogram)
        )
        power = units
        for number in range(4):
            self.powers[number] += power.sum(0, dtype=torch.float64)
            power = power * units if number < 3 else power
        ranges = bins.clamp_(min=0) // BINS_OF_RANGE
        self.sample.add(ranges, places)
        return ranges

    def count(self, ranges: Tensor, columns: Float[Tensor, "token column"], half: Tensor) -> None:
        """Add the columns' sums over the tokens in each range or above, for each half of the documents."""
        levels = torch.arange(1, N_RANGES, device=ranges.device)[:, None]
        for number in range(2):
            own = (half == number).nonzero().squeeze(-1)
            self.counts[number, :, 0] += columns[own].sum(0, dtype=torch.float64)[:, None]
            for some in own.split(TOKENS_AT_ONCE):
                reached = (ranges[some, None] >= levels).to(columns.dtype).flatten(1)
                sums = columns[some].T @ reached
                self.counts[number, :, 1:] += sums.view(len(sums), N_RANGES - 1, -1)


@torch.no_grad()
def scan(model: Any, stream: Stream, look: FirstLook | None = None) -> Scanned:
    """Read a stream once and return what each neuron of the model's last MLP does.

    Args:
        model: as for `observe_blocks`.
        stream: rows of whole documents, whose rows follow each other.
        look: ranges to use, by default those of a first look at the same stream.
    """
    look = first_look(model, stream) if look is None else look
    before = [token for token in look.before_peaks if token != stream.bos]
    of_rules = rules.make(stream.vocab, look.peaks, before)
    n_columns = len(of_rules.names) + len(EXTRAS)
    stages = {
        stage: _OfStage(look.scales[stage], stream.tokens.numel(), n_columns) for stage in STAGES
    }
    place_of = stream.keep.flatten().nonzero().squeeze(-1)
    half = halves(stream).flatten()[place_of]
    done, n_tokens, log_gain = 0, 0, 0.0
    for block in observe_blocks(model, stream, with_loss=False):
        here = slice(done, done + len(block.pos))
        done += len(block.pos)
        kept = content(block)
        places = place_of[here].to(block.device)[kept]
        columns = torch.cat([of_rules.labels(block).float(), _extras(block)], dim=1)[kept]
        n_tokens += len(places)
        log_gain += float(block.gain[kept].double().log().sum())
        for stage, of_stage in stages.items():
            ranges = of_stage.add(getattr(block, stage)[kept], block.string[kept], places)
            if stage in SIDES:
                of_stage.count(ranges, columns, half[here].to(block.device)[kept])
    return Scanned(
        n_tokens, len(stream.string.unique()), look.scales,
        top={stage: each.top.result() for stage, each in stages.items()},
        sample={stage: each.sample.result() for stage, each in stages.items()},
        histogram={stage: each.histogram.view(-1, N_BINS) for stage, each in stages.items()},
        moments={stage: each.powers / n_tokens for stage, each in stages.items()},
        rules=of_rules, counts={stage: stages[stage].counts for stage in SIDES},
        log_gain=log_gain / n_tokens,
    )  # fmt: skip


def halves(stream: Stream) -> Int[Tensor, "row pos"]:
    """Return 0 for the tokens of documents of even rank, on which rules are chosen, and 1 for the others."""
    rank: Tensor = stream.string.unique(return_inverse=True)[1]
    return rank % 2


def _extras(run: HookedRun) -> Float[Tensor, "token 3"]:
    """Return the columns `EXTRAS`; a token whose activations are all 0 counts with K = 0."""
    k_eff = run.k_eff.nan_to_num(0.0)
    return torch.stack([torch.ones_like(k_eff), k_eff, run.engagement], dim=1).float()
