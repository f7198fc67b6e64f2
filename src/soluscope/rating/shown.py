"""The examples of a neuron as a person sees them: texts with shades, without any number that identifies the arm.

Activations of different arms and stages differ in size by orders of magnitude. Shades are relative to the largest
activation among the neuron's examples, so that the size stays hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

from soluscope.files import Whole
from soluscope.text import readable

N_SHADES = 10
"""Number of shades of a firing token; shade 0 is none."""


@dataclass(frozen=True)
class Neuron:
    """One neuron of one run, or of the run before training."""

    arm: str
    run: str
    index: int
    trained: bool = True


@dataclass(frozen=True)
class Example:
    """Consecutive tokens of one document, with the neuron's activation at each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    at: int
    """Index of the token at which the neuron was chosen to be shown."""


class Source(Protocol):
    """Stored examples of a study's neurons."""

    study: str
    identity: str
    """Hash of the stored examples: plans that were drawn from other examples are not used with these."""

    def neurons(self) -> list[Neuron]:
        """Return all neurons with stored examples, in a fixed order."""

    def stages(self, arm: str) -> list[str]:
        """Return the stages at which the arm's activations differ: `mid` and `post`, or `post` without a norm."""

    def examples(self, neuron: Neuron, stage: str, mode: str) -> list[Example]:
        """Return the neuron's examples with positive activations, the largest activation first."""


@dataclass(frozen=True)
class Snippet:
    """One example as shown: tokens, the shade of each from 0 (not firing) to `N_SHADES`, and the marked token."""

    tokens: tuple[str, ...]
    shades: tuple[Whole, ...]
    at: Whole


def snippets(examples: Sequence[Example]) -> tuple[Snippet, ...]:
    """Return examples as they are shown, with shades relative to the largest activation among them."""
    largest = max((value for each in examples for value in each.activations), default=0.0)
    return tuple(
        Snippet(
            tuple(map(visible, each.tokens)),
            tuple(shade(value, largest) for value in each.activations),
            each.at,
        )
        for each in examples
    )


def shade(value: float, largest: float) -> int:
    """Return the shade of an activation: 0 up to 0, then in equal steps up to `N_SHADES` at the largest."""
    if not value > 0 or not largest > 0:
        return 0
    return max(1, min(N_SHADES, round(N_SHADES * value / largest)))


@cache
def visible(text: str) -> str:
    """Return a token's text with a sign before each line end and tab, which would not show its shade."""
    return readable(text).replace("\t", "\u21e5\t").replace("\n", "\u21b5\n")
