"""P2: Gain variation along a prompt

The hackathon study averaged the gain over all positions of a prompt, BOS included. The gain at BOS differs
from the gain at all other tokens, so that average changes as 1/n with the prompt's length n even if all other
tokens have the same gain (protocol.md section 1.6). The last token's gain and the mean without BOS do not
have this defect. The probe computes all four aggregations from the same activations.

Question:
    How much does the gain vary, and does it grow with the prompt, as the hackathon study reported?

Answers:
    above 0.1: Within a text the gain varies by more than 10% (BOS left out).
    0.01 to 0.1: Within a text the gain varies by less than 10% (BOS left out).
    below 0.01: Within a text the gain is one constant: it varies by less than 1% (BOS left out).

Formula:
    g_n against the number n of tokens in a prompt: the last token's gain, the mean without BOS, the mean with
    BOS, and 1/std of the whole [pos d_mlp] tensor;
    a + b/n against a + b log n by AICc;
    sd of log g within a string.

Reading:
    Smearing predicts that the gain of ordinary tokens varies by more than 10% with context. The gain of an
    untrained model varies too, so compare with it; and a gain that varies need not matter. If only the
    published aggregations change with n and the last token's gain is flat, the change comes from BOS's share
    in an average.

Pitfalls:
    Prefixes of one string are not independent: intervals resample strings. With learned positions, the input
    of a repeated token still changes with its position. hook_scale is 1 / gain.

Source:
    Baginski et al. 2023 (hackathon study), Figures 1 to 3; protocol.md sections 1.6 and 7 P2
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soluscope.comparison.stats import fit_aicc
from soluscope.hooked.activations import HookedRun, Text, planted
from soluscope.probes import Estimate, Figure, Gate, Probe, Quantity
from soluscope.probes._estimates import mean_over_strings
from soluscope.probes._per_token import PerToken
from soluscope.probes._tokens import array, arrays

AGGREGATIONS = {
    "last token": "gain of the prompt's last token",
    "mean without BOS": "gain averaged over the prompt, BOS left out",
    "mean with BOS (as published)": "gain averaged over the prompt, BOS included",
    "1/std of all (as published)": "1 / standard deviation of the whole [pos d_mlp] tensor, without epsilon",
}


def _curves(run: HookedRun) -> dict[str, Tensor]:
    """Return, at each token, each aggregation of the prompt that ends there; nan at BOS.

    Attention is causal, so the prompt's prefixes need no separate runs.
    """
    values: dict[str, list[Tensor]] = {name: [] for name in AGGREGATIONS}
    starts = [*run.is_bos.nonzero().squeeze(-1).tolist(), len(run.pos)]
    for start, end in pairwise(starts):
        gain = run.gain[start:end].double()
        mid = run.mid[start:end].double()
        n = torch.arange(1, 1 + end - start, device=run.device)  # in the prompt, BOS included
        mean, square = (mid.pow(k).mean(-1).cumsum(0) / n for k in (1, 2))
        columns = (
            gain,
            (gain.cumsum(0) - gain[0]) / (n - 1),
            gain.cumsum(0) / n,
            (square - mean.square()).rsqrt(),
        )
        for name, column in zip(AGGREGATIONS, columns, strict=True):
            values[name].append(torch.cat([column.new_full((1,), torch.nan), column[1:]]))
    return {name: torch.cat(parts) for name, parts in values.items()}


def _estimates(text: Text, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield averages over strings of the numbers that `fits` returns for each string."""
    string, pos, columns = array(text.string), array(text.pos), arrays(tokens)
    by_string = np.argsort(string, kind="stable")
    ends = np.flatnonzero(np.diff(string[by_string])) + 1
    rows = [
        fits(pos[indices], {name: values[indices] for name, values in columns.items()})
        for indices in np.split(by_string, ends)
    ]
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        if not np.isnan(values).all():
            yield mean_over_strings(name, values)


def fits(pos: NDArray[np.int64], columns: dict[str, NDArray[np.floating]]) -> dict[str, float]:
    """Fit a + b / n and a + b log n to one string's values, and compare them by corrected AIC.

    Args:
        pos: position of each of the string's tokens.
        columns: by aggregation, the value at each of these tokens.

    Returns:
        For each aggregation, AICc of the logarithm minus AICc of 1/n (above 0: 1/n fits better), nan
        where the gain does not vary or has fewer than 5 values; and sd of log gain over the string, BOS
        left out.
    """
    content = pos >= 1
    n = pos[content].astype(float) + 1  # tokens in the average, BOS included
    spread = float(np.log(columns["last token"][content]).std())
    # A smaller spread is rounding error.
    row = {"sd of log gain": spread if spread > 1e-12 else 0.0}
    for name in AGGREGATIONS:
        y = columns[name][content]
        flat = len(y) < 5 or np.ptp(y) <= 1e-6 * abs(y).max()
        row[f"AICc(log) - AICc(1/n): {name}"] = np.nan if flat else _preference(n, y)
    return row


def _preference(n: NDArray[np.float64], y: NDArray[np.floating]) -> float:
    fit = fit_aicc(n, y)
    return fit["a + b log n"].aicc - fit["a + b/n"].aicc


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield a prompt in which only BOS differs: gain 1/2 against 1.

    The published mean is 1 - 1/(2n), and 1/std is sqrt(n / (n + 3)). The last token's gain and the mean
    without BOS are flat.
    """
    at_bos, elsewhere = [2.0, -2.0], [1.0, -1.0]
    run = planted(torch.tensor([[at_bos, elsewhere, elsewhere, elsewhere]]), eps=1e-12)
    n = range(2, 5)
    yield (
        run,
        {
            "last token": [math.nan, 1, 1, 1],
            "mean without BOS": [math.nan, 1, 1, 1],
            "mean with BOS (as published)": [math.nan, *(1 - 1 / (2 * k) for k in n)],
            "1/std of all (as published)": [math.nan, *(math.sqrt(k / (k + 3)) for k in n)],
        },
    )


PROBE = Probe(
    __doc__,
    gates=(
        Gate("smear_shared", "sd of log gain", above=0.5),
        Gate("bos_gain", "sd of log gain", within=0.01),
        Gate("bos_gain", "AICc(log) - AICc(1/n): mean with BOS (as published)", above=10.0),
    ),
    one_scale=True,
    tested="sd of log gain",
    confirmatory=True,
    measure=PerToken(_curves, _estimates),
    known=known,
    quantities={
        name: Quantity("1 / activation", meaning, curve=True)
        for name, meaning in AGGREGATIONS.items()
    },
    streams=("prefixes", "sentences", "repeated", "random"),
    estimates={
        "sd of log gain": Quantity(
            "log gain",
            "standard deviation of log gain over one string's tokens, BOS left out",
            more_smeared_when="higher",
        ),
        **{
            f"AICc(log) - AICc(1/n): {name}": Quantity(
                "AICc", "above 0: a + b/n fits better than a + b log n"
            )
            for name in AGGREGATIONS
        },
    },
    figures=(
        *(
            Figure(f"Figures 1 to 3: {meaning}", (name,), kind="curve", log_x=True, relative=True)
            for name, meaning in AGGREGATIONS.items()
        ),
        Figure("Spread of log gain within a string", ("sd of log gain",)),
    ),
)
