"""What a probe is. Each file in this folder defines one, as `PROBE`; the folder is the list.

A probe turns one model's activations into one value a token. It never sees a variant's name or a
config, and it does not average, draw or save: suite.py makes the summaries, with their intervals,
for all probes alike, and the report draws what `figures` asks for.

Probe files import torch inside functions, so that names, questions and parameters can be read
without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from soluscope.activations import HookedRun

Direction = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Quantity:
    """One column that a probe measures: one value a token, nan where it has none."""

    unit: str
    meaning: str
    """One line a reader needs to read the number."""
    statistics: tuple[str, ...] = ("mean",)
    """How tokens become one number: `mean`, `median`, `q05`, `q95`, `sd`, `share above 0.5`."""
    curve: bool = False
    """Summarise at each position on its own (x = tokens after BOS), pooled over strings."""
    split_by: tuple[str, ...] = ()
    """Other columns of the probe by whose quartiles the tokens are also summarised."""
    more_smeared_when: Direction = "neither"


@dataclass(frozen=True)
class Figure:
    """What to draw from the rows of a probe; the drawing is the report's.

    `kind="dots"`: one dot and interval for each arm and seed, quantities or groups as panels.
    `kind="curve"`: value against row.x, one thin line a seed, one panel a stream.
    """

    title: str
    quantities: tuple[str, ...]
    kind: Literal["dots", "curve"] = "dots"
    statistic: str = "mean"
    streams: tuple[str, ...] = ()
    """Streams to draw, each its own panel; empty: all that the rows have."""
    positions: str = "not BOS"
    group: str = ""
    """The split to draw (`gain` draws the groups `gain Q1` … `gain Q4`); empty: unsplit rows."""
    log_y: bool = False
    log_x: bool = False
    relative: bool = False
    """Divide each run's curve by its own last value, so that shapes are seen where sizes differ."""
    x_title: str = "tokens after BOS"


@dataclass(frozen=True)
class Probe:
    """A measurement, the words that go with it, and the answers it must give."""

    name: str
    """Its heading: what a reader of the papers would look for."""
    section: str
    """Where science.md defines it: `P1`."""
    question: str
    """One sentence."""
    reading: str
    """How to read the result: what smearing would look like, what its absence would."""
    pitfalls: str
    measure: Callable[[HookedRun, Any], dict[str, Tensor]]
    """Values by quantity, each [token], on the CPU in fp32 or fp64."""
    quantities: dict[str, Quantity]
    streams: tuple[str, ...]
    """Streams it is measured on, of those in streams.py."""
    known: Callable[[], Iterator[tuple[HookedRun, dict[str, Any]]]]
    """Runs with planted activations and, by quantity, the value at each token, worked by hand."""
    params: type = type(None)
    per_string: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    """From a string's tokens (the probe's own table) to one row of further values for it."""
    string_quantities: dict[str, Quantity] = field(default_factory=dict)
    """What the columns of `per_string` are."""
    figures: tuple[Figure, ...] = ()
    source: str = ""
    """Paper and section, or science.md section."""
