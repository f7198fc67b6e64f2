"""Automatic proxies for blind ratings (P12). Each file here defines one proxy, as `PROXY`. A proxy is not a rating.

A proxy gives a neuron one number from its stored examples, without a model and without knowing the arm. The number
should be higher for neurons that a person calls interpretable. `rating/calibration.py` measures whether it is: on
planted neurons, on neurons before training, and on neurons that people have rated.

Source: protocol.md section 9.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Complete = Callable[[str], str]
"""A language model: a function from a prompt to the text that follows it."""


@dataclass(frozen=True, eq=False)
class Window:
    """Consecutive tokens of one document around an example, with a neuron's activation at each."""

    row: int
    start: int
    """Position in the row of the first token."""
    tokens: NDArray[np.int64]
    activations: NDArray[np.float64]
    peak: int
    """Index of the token for which the window was chosen."""
    half: int
    """Half of the documents: a proxy learns from half 0 and is tested on half 1."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One neuron at one stage, as a proxy sees it."""

    windows: Sequence[Window]
    """Stored examples: the largest activations and a sample of each of ten ranges, each window once."""
    level: float
    """Activation from which the neuron is active: the lower bound of its upper five ranges. nan: never."""
    rule_f1: float | None
    """F1 of the best rule on half 1; None without a rule."""
    vocabulary: Sequence[str]
    """Text of each token."""


@dataclass(frozen=True)
class Proxy:
    """One automatic proxy."""

    label: str
    """Name for people."""
    unit: str
    measure: Callable[[Seen, Complete], float | None]
    """Function from a neuron to its number. The result is None for a neuron with too few examples."""
    asks: bool = False
    """True: the proxy asks a language model, which is its second argument. Others must not call it."""
