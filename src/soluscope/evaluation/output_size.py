"""The size of the MLP's output beside the residual stream, which is measured for every run, also without probes.

A verdict on a static arm needs it: where ln_final gives that arm a scale for each token, its loss does not show
that one gain is enough.

Source: protocol.md section 4, Cautions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.evaluation.summaries import Summary
from soluscope.hooked.activations import HookedRun
from soluscope.hooked.output_size import output_size
from soluscope.results import OUTPUT_SIZE, SCALED_SIZE, Measurement


def median_size(blocks: Iterable[HookedRun], base: Measurement, config: EvalConfig) -> Measurement:
    """Return the median of |o| / |r0| over the tokens that are not BOS, with its interval over documents.

    Args:
        blocks: the natural text in blocks of whole rows.
        base: fields shared by all measurements of the run.
        config: the bootstrap's settings.
    """
    sizes, documents = [], []
    for block in blocks:
        content = ~block.is_bos
        sizes.append(output_size(block).scaled[content].cpu())
        documents.append(block.string[content].cpu())
    values, owner = torch.cat(sizes).numpy(), torch.cat(documents).numpy()
    row = replace(
        base,
        probe=OUTPUT_SIZE,
        quantity=SCALED_SIZE,
        unit="ratio",
        stream="natural",
        statistic="median",
    )
    make = Summary(streams.unit_of(row.stream), config.n_draws, config.seed)
    return make.of_tokens(values, owner, row)
