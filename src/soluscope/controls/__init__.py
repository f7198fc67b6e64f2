"""Models with hand-planted weights and a known answer. Each file here defines one, as `CONTROL`.

They are real HookedTransformers, in fp64, that go through the same `observe` as trained models; a
probe is believed where it says yes on its positive controls and no on its negative ones. Each file
derives its truth in its docstring, and tests hold that truth to brute force.

Source: science.md section 6.
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
    """A model and what it is to be read on."""

    model: HookedTransformer
    streams: dict[str, Stream]
    """`natural`: rows sampled from the model itself, so that its loss is the least there can be;
    `pairs`: a clean row and then its corruptions, for the probes that patch."""


@dataclass(frozen=True)
class Control:
    """A model whose answer is known."""

    section: str
    """`C1`: its name in science.md section 6."""
    truth: str
    """What holds in it, in one sentence."""
    build: Callable[[], Planted]
    """Made anew from a fixed seed, the same each time, in at most a second or two."""
