"""Definition of a probe. Each file in this folder defines one probe, as `PROBE`; the folder is the list.

A probe's `measure` turns one model's activations into numbers of three kinds: values per token; estimates,
which are numbers other than averages over tokens (a correlation, a ratio, a curve over ranks) and are given
as sums over strings with a function of these sums; and, for some probes, values per neuron. A probe has no
access to a variant's name or to a config, and it does not average, resample, draw or save. evaluation/
computes the summaries and their intervals for all probes in one place, and the report draws the probe's
`figures`.

This file itself imports no torch, because a configuration is checked against the names in this folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from soluscope.errors import UserError
from soluscope.results import Answer, Claim, Figure, Gate, Quantity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from soluscope.hooked.activations import HookedRun

__all__ = ["Claim", "Estimate", "Figure", "Gate", "Probe", "Quantity"]


@dataclass(frozen=True)
class Estimate:
    """A number other than a mean over tokens: a function of sums over strings (documents).

    Its interval comes from resampling strings, so `value` must hold for any weighted sum of rows.
    `_estimates.py` computes the usual estimates: ratios, correlations, slopes.
    """

    quantity: str
    """A key of the probe's `estimates`."""
    sums: NDArray[np.float64]
    """[string part], one row for each string with at least one value."""
    value: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Function from weighted sums [draw part] to the number [draw]; nan where it is undefined."""
    n: int
    """Number of observations that entered: tokens, pairs, strings or neurons."""
    x: float | None = None
    """Position on the horizontal axis, for a point of a curve."""
    group: str = ""
    """Name of the curve, or of the split."""
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """Numbers of one probe on one run."""

    tokens: dict[str, Tensor]
    """One value per token, by quantity or by column that quantities are split by; in fp32 or fp64, copied to
    the CPU. nan at a token without a value."""
    estimates: tuple[Estimate, ...] = ()
    neurons: dict[str, Tensor] = field(default_factory=dict)
    """Columns of a table with one row per neuron, saved beside the table of tokens for inspection; copied to
    the CPU."""

    def __post_init__(self) -> None:
        for name in ("tokens", "neurons"):
            columns = {key: values.cpu() for key, values in getattr(self, name).items()}
            object.__setattr__(self, name, columns)


@dataclass(frozen=True)
class Probe:
    """A measurement, its description and its known answers.

    Raises:
        UserError: if the docstring lacks its title or a section, or its answers leave out a number.
    """

    docstring: str | None = field(repr=False)
    """The module's `__doc__`, which `words_of` parses into the description."""
    measure: Callable[[HookedRun], Measured]
    """Function of a whole run; a `PerToken` of `_per_token.py` if each value depends on its own row alone."""
    quantities: dict[str, Quantity]
    streams: tuple[str, ...]
    """Names of the streams to measure on; data/streams.py defines them."""
    gates: tuple[Gate, ...]
    """Positive and negative controls."""
    known: Callable[[], Iterator[tuple[HookedRun, dict[str, Any]]]]
    """Runs with planted activations and, by quantity, the value at each token, worked out by hand."""
    estimates: dict[str, Quantity] = field(default_factory=dict)
    """Estimates that `measure` may return."""
    one_layer: bool = False
    """True for a probe that is exact, or meaningful, only in a one-layer model. Deeper models skip it,
    with a record of its name; the other probes read a deeper model's last layer."""
    one_scale: bool = False
    """True for a probe that needs one gain for each token. A model whose mid norm divides the neurons of a token by
    different numbers skips it, with a record of its name."""
    tested: str = ""
    """Name of the quantity or estimate whose rate of false positives is measured. If the probe is
    confirmatory, its change by training is tested."""
    shuffle: str = ""
    """Field of the run to permute over tokens for the rate of false positives: the true value of `tested`
    is then 0. If empty, random halves of the documents are compared instead."""
    confirmatory: bool = False
    """True if the probe's test is in the family that is corrected for multiple testing (protocol.md section 5)."""
    claims: tuple[Claim, ...] = ()
    """Published claims about models without LayerNorm, which `soluscope remove norms=all` tests."""
    figures: tuple[Figure, ...] = ()
    section: str = field(init=False)
    """The probe's number in protocol.md: `P1`."""
    name: str = field(init=False)
    """Heading in the report, in the terms of the papers."""
    question: str = field(init=False)
    """One sentence."""
    answers: tuple[Answer, ...] = field(init=False)
    """Answers to the question by ranges of the tested quantity, lowest range first."""
    formula: str = field(init=False)
    """Computation, in plain text."""
    reading: str = field(init=False)
    """Interpretation of the result, both with smearing and without it."""
    pitfalls: str = field(init=False)
    source: str = field(init=False)
    """Paper and section, or protocol.md section."""

    def __post_init__(self) -> None:
        for word, text in words_of(self.docstring).items():
            object.__setattr__(self, word, text)
        object.__setattr__(self, "answers", answers_of(self.docstring))


SECTIONS = ("Question", "Answers", "Formula", "Reading", "Pitfalls", "Source")
"""Headings in the docstring of a probe's module."""
NL = "\n"
_NUMBER = r"-?\d*\.?\d+"
_RANGE = re.compile(rf"(?:above ({_NUMBER})|below ({_NUMBER})|({_NUMBER}) to ({_NUMBER})): +(.+)")
_EXAMPLE = "'above 0.01: one sentence', '-0.01 to 0.01: ...' and 'below -0.01: ...'"


def words_of(docstring: str | None) -> dict[str, str]:
    """Return the sections of a probe's module docstring, each on one line; `answers_of` returns the answers.

    The first line is `P1: name`. Each heading in `SECTIONS` has a separate line, ends with a colon and
    is followed by its indented text. Text without indentation is for readers of the file only.

    Raises:
        UserError: if the first line or a section is missing.
    """
    text = docstring or ""
    first_line = text.partition("\n")[0]
    title = re.fullmatch(r"(P\d+): (.+)", first_line)
    if title is None:
        raise UserError(
            f"the docstring of a probe begins with {first_line!r}: begin it with 'P1: name'"
        )
    words = {"section": title[1], "name": title[2]}
    words |= {heading.lower(): " ".join(_body(text, heading).split()) for heading in SECTIONS}
    del words["answers"]
    return words


def answers_of(docstring: str | None) -> tuple[Answer, ...]:
    """Return the answers of a probe's module docstring, lowest range first.

    An answer begins on a new line with the range of the tested quantity that it is for: `above 0.01: `,
    `-0.01 to 0.01: ` or `below -0.01: `.

    Raises:
        UserError: if the section is missing, a line has no range, or there is a number with no answer or two.
    """
    text = docstring or ""
    of_probe = f"the answers of probe {text.partition(NL)[0]!r}"
    found: list[Answer] = []
    for line in filter(None, map(str.strip, _body(text, "Answers").splitlines())):
        if part := _RANGE.fullmatch(line):
            above, below, low, high = (None if x is None else float(x) for x in part.groups()[:4])
            found.append(
                Answer(part[5], above if low is None else low, below if high is None else high)
            )
        elif found:
            found[-1] = replace(found[-1], text=f"{found[-1].text} {line}")
        else:
            raise UserError(
                f"{of_probe} begin with {line!r}: begin each answer with a "
                f"range of the tested quantity, as in {_EXAMPLE}"
            )
    found.sort(key=lambda answer: -math.inf if answer.low is None else answer.low)
    ends = [answer.high for answer in found[:-1]] == [answer.low for answer in found[1:]]
    if not ends or found[0].low is not None or found[-1].high is not None:
        raise UserError(
            f"{of_probe} are for numbers "
            f"{', '.join(answer.label for answer in found)}: give each number one answer, as in {_EXAMPLE}"
        )
    return tuple(found)


def _body(text: str, heading: str) -> str:
    """Return the indented lines below a heading of a probe's docstring."""
    body = re.search(rf"^{heading}:\n((?:[ ]+.*\n?|\n)*)", text, re.MULTILINE)
    if body is None or not body[1].strip():
        raise UserError(
            f"the docstring of probe {text.partition(NL)[0]!r} lacks {heading!r}: write '{heading}:' on a "
            f"separate line and indent the text below it; the sections are {', '.join(SECTIONS)}"
        )
    return body[1]
