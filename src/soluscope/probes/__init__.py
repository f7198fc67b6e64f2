"""Define what a probe is. Each file in this folder defines one, as `PROBE`; the folder is the list.

A probe turns one model's activations into numbers (`measure`): values per token; estimates, which are
numbers that are not averages over tokens (a correlation, a ratio, a curve over ranks), as sums over
strings and the function of these sums; and, where it has any, values per neuron. It never sees a
variant's name or a config, and it does not average, resample, draw or save: evaluation/ makes the
summaries, with their intervals, for all probes alike, and the report draws what `figures` asks for.

This file itself imports no torch, since a configuration is checked against the names in this folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from soluscope.errors import UserError
from soluscope.results import Figure, Gate, Quantity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from soluscope.hooked.activations import HookedRun

__all__ = ["Estimate", "Figure", "Gate", "Probe", "Quantity"]


@dataclass(frozen=True)
class Estimate:
    """A number that is not a mean over tokens: a function of sums over strings (documents).

    Its interval comes from resampling strings, so `value` must hold for any weighted sum of rows.
    `_estimates.py` makes the usual ones: ratios, correlations, shares of variance.
    """

    quantity: str
    """A key of the probe's `estimates`."""
    sums: NDArray[np.float64]
    """[string part], one row for each string that has anything."""
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """From weighted sums [draw part] to the number [draw]; nan where it is not defined."""
    n: int
    """How many tokens (or pairs of prompts) went in."""
    x: float | None = None
    """Place on the horizontal axis, where it is a point of a curve."""
    group: str = ""
    """Which curve, or which split."""
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """The numbers of one probe on one run."""

    tokens: dict[str, Tensor]
    """By quantity, and by column that quantities are split by: one value per token, on the CPU in fp32
    or fp64; nan where a token has none."""
    estimates: tuple[Estimate, ...] = ()
    neurons: dict[str, Tensor] = field(default_factory=dict)
    """Columns of a table with one row per neuron, saved beside the tokens' for whoever wants to look."""


@dataclass(frozen=True)
class Probe:
    """A measurement, the words that go with it, and the answers it must give.

    Raises:
        UserError: if the docstring lacks some of the words.
    """

    docstring: str | None = field(repr=False)
    """The module's `__doc__`, from which the words are read: see `words_of`."""
    measure: Callable[[HookedRun], Measured]
    quantities: dict[str, Quantity]
    streams: tuple[str, ...]
    """Streams it is measured on, of those in data/streams.py."""
    gates: tuple[Gate, ...]
    """Positive and negative controls."""
    known: Callable[[], Iterator[tuple[HookedRun, dict[str, Any]]]]
    """Runs with planted activations and, by quantity, the value at each token, worked by hand."""
    estimates: dict[str, Quantity] = field(default_factory=dict)
    """The estimates that `measure` may give."""
    one_layer: bool = False
    """Exact, or meaningful, only where the model has one layer; left out by name for deeper ones,
    whose last layer all other probes read."""
    tested: str = ""
    """The quantity or estimate whose rate of false positives is measured, and which is compared with
    the static twin's where the probe is confirmatory."""
    shuffle: str = ""
    """Field of the run which, permuted over tokens, leaves nothing for `tested` to find: it is 0."""
    confirmatory: bool = False
    """One of the tests that are corrected together for their number (science.md section 5)."""
    figures: tuple[Figure, ...] = ()
    section: str = field(init=False)
    """The probe's number in science.md: `P1`."""
    name: str = field(init=False)
    """The heading: what a reader of the papers would look for."""
    question: str = field(init=False)
    """One sentence."""
    formula: str = field(init=False)
    """The computation, in plain text."""
    reading: str = field(init=False)
    """How to read the result: what smearing would look like, what its absence would."""
    pitfalls: str = field(init=False)
    source: str = field(init=False)
    """Paper and section, or science.md section."""

    def __post_init__(self) -> None:
        for word, text in words_of(self.docstring).items():
            object.__setattr__(self, word, text)


SECTIONS = ("Question", "Formula", "Reading", "Pitfalls", "Source")
"""Headings in the docstring of a probe's module."""


def words_of(docstring: str | None) -> dict[str, str]:
    """Return a probe's words from its module's docstring, each on one line.

    The first line is `P1: name`. Each of `SECTIONS` stands with a colon on a line of its own, above its
    indented text. Other text, which is not indented, is for readers of the file only.

    Raises:
        UserError: if the first line or a section is missing.
    """
    text = docstring or ""
    first_line = text.partition("\n")[0]
    title = re.fullmatch(r"(P\d+): (.+)", first_line)
    if title is None:
        raise UserError(f"a probe's docstring begins with {first_line!r}: begin it with 'P1: name'")
    words = {"section": title[1], "name": title[2]}
    for heading in SECTIONS:
        body = re.search(rf"^{heading}:\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
        if body is None or not body[1].strip():
            raise UserError(
                f"the docstring of probe {first_line!r} lacks {heading!r}: write '{heading}:' on a line of "
                f"its own and indent the text below it; a probe has {', '.join(SECTIONS)}"
            )
        words[heading.lower()] = " ".join(body[1].split())
    return words
