"""Made-up records for the report's tests; no model is involved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from soluscope import plugins
from soluscope.evaluation.summaries import stored_words
from soluscope.results import GateResult, Measurement, ProbeWords, Setting, TokenValue

ABOUT: dict[str, Any] = {
    "study": "synthetic", "run": "solu_ln-s0", "arm": "solu_ln", "variant": "solu_ln", "seed": 0,
}  # fmt: skip
RUN = Measurement(
    **ABOUT, probe="", quantity="", value=None, unit="nats", stream="natural", n=400, n_clusters=40,
    cluster="document",
)  # fmt: skip
"""A measurement of one run, to be completed."""
LN = Setting(
    study="synthetic", arm="solu_ln", variant="solu_ln", values={}, role="per_token",
    twin="solu_frozen_ln", n=1,
)  # fmt: skip
"""The settings of the run's arm, which has a per-token norm."""


def number(
    probe: str, quantity: str, value: float, half: float = 0.0001, **fields: Any
) -> Measurement:
    """Return a probe's number for one run, with an interval of width 2 `half`."""
    known = {"probe": probe, "quantity": quantity, "low": value - half, "high": value + half}
    return replace(RUN, value=value, **(known | fields))


@cache
def words(probe: str) -> ProbeWords:
    """Return a probe's words in the form in which they are stored with its numbers, from a made-up commit."""
    stored = stored_words(probe, plugins.pick("soluscope.probes", probe), "synthetic")
    return replace(stored, commit="abc1234")


def gate(
    probe: str, control: str, asked: str, passed: bool = True, value: float = 0.9, low: float = 0.8
) -> GateResult:
    """Return the result of a probe on a control."""
    return GateResult(
        study="synthetic", probe=probe, control=control, passed=passed, asked=asked,
        section=plugins.pick("soluscope.controls", control).section,
        sign="negative" if "within" in asked else "positive",
        measured="r (median)", value=value, low=low, high=0.99, unit="share",
    )  # fmt: skip


def passed(*probes: str) -> list[GateResult]:
    """Return a passed gate for each of these probes, so that the report may cite them."""
    return [gate(probe, "pinned", "within 0.01 of 0") for probe in probes]


def token_values(texts: Sequence[str], arm: str = "solu_ln") -> list[TokenValue]:
    """Return the values of a text: token n has gain 300 + 50 n, r n/10 and effect n - 2 (none at the end)."""
    columns = {
        "gain": ("1 / activation", lambda n: 300.0 + 50 * n),
        "r": ("share", lambda n: n / 10),
        "ablation effect": ("nats", lambda n: n - 2.0 if n < len(texts) - 1 else None),
    }
    about = ABOUT | {"run": f"{arm}-s0", "arm": arm, "variant": arm}
    return [
        TokenValue(
            **about, quantity=name, unit=unit, value=value(n), place=n, text=text, stream="natural"
        )
        for name, (unit, value) in columns.items()
        for n, text in enumerate(texts)
    ]
