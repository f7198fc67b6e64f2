"""Planted models: hand-set weights with a known answer. Each file here defines one control, as `CONTROL`.

A planted model is a real HookedTransformer in fp64 and goes through the same `observe` as a trained
model. A probe is trusted if it finds the effect on its positive controls and no effect on its negative
controls. Each file derives the truth of its model in its docstring, and tests check that truth against
brute force.

Source: protocol.md section 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

    from soluscope.data.streams import Stream


@dataclass(frozen=True)
class Planted:
    """A planted model and the token streams on which probes measure it."""

    model: HookedTransformer
    streams: dict[str, Stream]
    """`natural`: rows sampled from the model itself, so that no model has a lower expected loss on them;
    `pairs`: a clean row followed by its corruptions, for the probes that patch."""


@dataclass(frozen=True)
class Control:
    """A planted model together with its known answer."""

    section: str
    """Name in protocol.md section 6, such as `C1`."""
    truth: str
    """The fact that holds in the model, in one sentence."""
    build: Callable[[], Planted]
    """Builder of the model and its streams. The seed is fixed, so every call returns the same; a call takes
    at most a second or two."""
