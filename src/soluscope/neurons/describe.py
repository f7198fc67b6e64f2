"""From the sums of a scan to tables: each neuron's statistics and its best rules before and after the norm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from soluscope.neurons.rules import Rules
from soluscope.neurons.scan import EXTRAS, Scanned
from soluscope.neurons.schema import (
    BINS_BELOW,
    BINS_OF_RANGE,
    N_RANGES,
    SIDES,
    STAGES,
    Stage,
)

Floats = NDArray[np.float64]

MIN_TOKENS = 10
"""Fewest tokens with a rule, without it, and in a neuron's ranges, in the half on which the rule is chosen."""
UPPER = N_RANGES // 2
"""Lowest of the upper five ranges, whose tokens count as the neuron's own tokens."""
UPPER_BINS = slice(BINS_BELOW + BINS_OF_RANGE * UPPER, None)
"""Bars of a histogram in these ranges."""


def statistics(scanned: Scanned, gamma: Tensor, examples: pd.DataFrame) -> pd.DataFrame:
    """Return one line per neuron: moments, its own tokens, and effects.

    A neuron's own tokens are the tokens in its upper five ranges. Columns with the suffix of a stage: `mean`, `sd`,
    `kurtosis` (3 for a normal distribution), `low` and `width` of its ranges, and `share`, the share of the tokens
    that are its own. For the stages before and after the norm also `k_eff` and `engagement`, means over its own
    tokens. `effect` is the mean |effect| of its examples in the upper five ranges after the norm, and `D` their
    mean |D|.
    """
    columns: dict[str, Any] = {"neuron": np.arange(len(gamma)), "gamma": _array(gamma)}
    for stage in STAGES:
        low, width = (_array(part).astype(float) for part in scanned.scales[stage])
        mean, variance, kurtosis = _moments(_array(scanned.moments[stage]))
        unit = np.where(np.isfinite(width), width, 0.0)
        columns |= {
            f"mean_{stage}": low + unit * mean, f"sd_{stage}": unit * np.sqrt(variance),
            f"kurtosis_{stage}": kurtosis, f"low_{stage}": low, f"width_{stage}": width,
            f"share_{stage}": _array(scanned.histogram[stage])[:, UPPER_BINS].sum(1)
            / scanned.n_tokens,
        }  # fmt: skip
    for stage in SIDES:
        extras = _array(scanned.counts[stage]).sum(0)[-len(EXTRAS) :, UPPER]
        for name, total in zip(EXTRAS[1:], extras[1:], strict=True):
            columns[f"{name}_{stage}"] = _ratio(total, extras[0])
    table = pd.DataFrame(columns)
    own = examples[(examples["stage"] == SIDES[1]) & (examples["range"] >= UPPER)]
    for name in ("effect", "D"):
        table[name] = own[name].abs().groupby(own["neuron"]).mean().reindex(table["neuron"])
    return table


def _moments(powers: Floats) -> tuple[Floats, Floats, Floats]:
    """Return mean, variance and kurtosis from the means of the first four powers; nan for a constant."""
    m1, m2, m3, m4 = powers
    variance = np.clip(m2 - m1**2, 0, None)
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    return m1, variance, _ratio(fourth, variance**2)


def best_rules(scanned: Scanned) -> pd.DataFrame:
    """Return each neuron's best rule before and after the norm, one line per neuron and side.

    A rule says that the neuron is active, that is in the range `level` or above, exactly where the rule holds. Rule
    and level with the highest F1 are chosen on the documents of even rank. All numbers are measured on the others.

    Returns:
        The columns neuron, side (`mid` or `post`), rule, kind, `chosen_f1` (of the rule on the documents of even
        rank, where it was chosen), and for each stage s of mid and post:

        - level_s, precision_s, recall_s, f1_s: the level is the best one at that stage for this rule.
        - consistent_s: the share of the tokens in each range at which the rule holds, a list of ten; nan for an
          empty range.
        - above_s: the same share in all ranges above the first together.

        `drop` is above_mid - above_post, the signature of section 6.4 of the SoLU paper: after the norm, more of
        the tokens that activate the neuron do not fit its rule. `chosen_drop` is the same on the documents of even
        rank. A neuron without a rule has an empty name and nan.
    """
    counts = {stage: _array(scanned.counts[stage]) for stage in SIDES}
    return pd.concat(
        [_of_side(side, counts, scanned.rules) for side in SIDES], ignore_index=True
    ).sort_values(["neuron", "side"], ignore_index=True)


def _of_side(side: Stage, counts: dict[Stage, Floats], rules: Rules) -> pd.DataFrame:
    n_rules = len(rules.names)
    f1 = _scores(counts[side][0], n_rules)[2]  # [rule level neuron]
    n_neurons = f1.shape[2]
    every = np.arange(n_neurons)
    best = np.where(np.isnan(f1), -1.0, f1).max(axis=1).argmax(axis=0)  # the first of equal rules
    found = np.isfinite(f1[best, :, every]).any(axis=1)
    table = pd.DataFrame({"neuron": every, "side": side})
    table["rule"] = np.where(found, np.array(rules.names, dtype=object)[best], "")
    table["chosen_f1"] = np.where(found, np.nanmax(f1[best, :, every], axis=1, initial=-1), np.nan)
    table["kind"] = np.where(found, np.array(rules.kinds, dtype=object)[best], "")
    for stage in SIDES:
        table = table.join(_measured(stage, counts[stage], best, found))
    table["drop"] = table["above_mid"] - table["above_post"]
    above = [
        _ratio(*(counts[stage][0][row, 1, every] for row in (best, n_rules))) for stage in SIDES
    ]
    table["chosen_drop"] = np.where(found, above[0] - above[1], np.nan)
    return table


def _measured(stage: Stage, counts: Floats, best: NDArray[np.intp], found: Any) -> pd.DataFrame:
    """Return the numbers of the chosen rules at one stage, on the documents of odd rank."""
    every = np.arange(counts.shape[3])
    n_rules = counts.shape[1] - len(EXTRAS)
    chosen = _scores(counts[0], n_rules)[2][best, :, every]
    level = 1 + np.where(np.isnan(chosen), -1.0, chosen).argmax(axis=1)
    scores = _scores(counts[1], n_rules, least=1)
    precision, recall, f1 = (part[best, level - 1, every] for part in scores)
    both, active = counts[1][best, :, every], counts[1][n_rules].T  # [neuron level]
    in_range = [part - np.pad(part[:, 1:], ((0, 0), (0, 1))) for part in (both, active)]
    columns = {
        f"precision_{stage}": precision, f"recall_{stage}": recall, f"f1_{stage}": f1,
        f"above_{stage}": _ratio(both[:, 1], active[:, 1]),
    }  # fmt: skip
    table = pd.DataFrame({name: np.where(found, value, np.nan) for name, value in columns.items()})
    table.insert(0, f"level_{stage}", np.where(found, level, 0))
    table[f"consistent_{stage}"] = list(np.where(found[:, None], _ratio(*in_range), np.nan))
    return table


def _scores(counts: Floats, n_rules: int, least: int = MIN_TOKENS) -> tuple[Floats, Floats, Floats]:
    """Return precision, recall and F1 of each rule, level (1 to 9) and neuron; nan below `least` tokens."""
    both = counts[:n_rules, 1:]
    holds, active, n_tokens = counts[:n_rules, :1], counts[n_rules, 1:], counts[n_rules, :1]
    enough = (holds >= least) & (n_tokens - holds >= least) & (active >= least)
    precision, recall, f1 = (
        np.where(enough, above / np.maximum(below, 1), np.nan)
        for above, below in ((both, active), (both, holds), (2 * both, holds + active))
    )
    return precision, recall, f1


def _ratio(above: Floats, below: Floats) -> Floats:
    """Return the quotient; nan where `below` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = np.where(below != 0, above / below, np.nan)
    return result


def _array(values: Tensor) -> NDArray[Any]:
    return values.numpy(force=True)
