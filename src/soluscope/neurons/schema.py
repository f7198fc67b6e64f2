"""Names and numbers that the computation, the files and their readers share."""

from __future__ import annotations

from typing import Literal

Stage = Literal["pre", "mid", "post"]
"""Activation of a neuron: before the nonlinearity, after it, or after the mid norm."""
STAGES: tuple[Stage, ...] = ("pre", "mid", "post")
SIDES: tuple[Stage, Stage] = ("mid", "post")
"""The stages before and after the mid norm. Without a mid norm they are the same."""
N_RANGES = 10
"""Number of ranges of activation."""
N_TOP = 20
"""Number of top examples of a neuron, at most one of each document."""
N_OF_RANGE = 5
"""Number of examples of a range."""
CONTEXT = 20
"""Number of tokens on either side of an example, fewer at the bounds of its document and its row."""
BINS_OF_RANGE = 4
"""Number of a histogram's bars in each range."""
BINS_BELOW = 20
"""Number of a histogram's bars below the first range's lower bound."""
N_BINS = BINS_BELOW + BINS_OF_RANGE * N_RANGES
TOP = -1
"""Number, in place of a range's, of the examples that are the largest of their documents."""
FOLDER = "neurons"
"""Folder of a run with a folder for each of `PARTS`."""
Part = Literal["trained", "untrained"]
PARTS: tuple[Part, ...] = ("trained", "untrained")
"""The run's model, and its initialisation."""
SUMS = "SHA256SUMS"
"""File with the checksums of a part, written last: without it the part is not complete."""
