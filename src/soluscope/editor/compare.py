"""A neuron on a text and on an edited text: pairs of tokens, and the differences of the activations there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from soluscope.neurons.schema import STAGES, Stage
from soluscope.notebook.on_text import OnText

Pair = tuple[int | None, int | None]
"""Places of a token in the text and in the edited text; None where one of them does not have the token."""


@dataclass(frozen=True)
class Line:
    """A token of the text, of the edited text, or of both."""

    token: str | None
    edited_token: str | None
    changed: bool
    """True if the two texts have different tokens here."""
    values: dict[Stage, tuple[float | None, float | None]]
    """The neuron's activation in the text and in the edited text."""
    gain: tuple[float | None, float | None]

    def difference(self, stage: Stage) -> float | None:
        """Return the activation in the edited text minus that in the text; None for a token of one text only."""
        before, after = self.values[stage]
        return None if before is None or after is None else after - before


def compare(text: OnText, edited: OnText) -> list[Line]:
    """Return the tokens of both texts in reading order, with the neuron's activations."""
    return [_line(text, edited, *pair) for pair in pairs(text.ids, edited.ids)]


def pairs(ids: Sequence[int], edited: Sequence[int]) -> list[Pair]:
    """Return which tokens of two texts belong together.

    The tokens before and after the edit are the same in both texts. Between these, texts of equal length are paired
    by position, and others by their longest common parts.
    """
    first = _n_equal(ids, edited)
    last = _n_equal(ids[first:][::-1], edited[first:][::-1])
    middle, edited_middle = ids[first : len(ids) - last], edited[first : len(edited) - last]
    found: list[Pair] = [(place, place) for place in range(first)]
    if len(middle) == len(edited_middle):
        found += [(first + place, first + place) for place in range(len(middle))]
    else:
        matcher = SequenceMatcher(None, middle, edited_middle, autojunk=False)
        for kind, a, b, c, d in matcher.get_opcodes():
            left, right = range(first + a, first + b), range(first + c, first + d)
            if kind == "equal":
                found += zip(left, right, strict=True)
            else:
                found += [(place, None) for place in left] + [(None, place) for place in right]
    found += [(len(ids) - n, len(edited) - n) for n in range(last, 0, -1)]
    return found


def _n_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """Return the number of equal tokens at the start."""
    same = (a == b for a, b in zip(some, others, strict=False))
    return next((n for n, equal in enumerate(same) if not equal), min(len(some), len(others)))


def _line(text: OnText, edited: OnText, at: int | None, edited_at: int | None) -> Line:
    def of(
        values: Sequence[float], edited_values: Sequence[float]
    ) -> tuple[float | None, float | None]:
        before = None if at is None else values[at]
        return before, None if edited_at is None else edited_values[edited_at]

    return Line(
        token=None if at is None else text.tokens[at],
        edited_token=None if edited_at is None else edited.tokens[edited_at],
        changed=at is None or edited_at is None or text.ids[at] != edited.ids[edited_at],
        values={stage: of(text.activations[stage], edited.activations[stage]) for stage in STAGES},
        gain=of(text.gain, edited.gain),
    )
