"""Measurements of which every value depends on its own row of text alone, so that a text is read in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from soluscope.hooked.activations import HookedRun, Text
from soluscope.probes import Estimate, Measured

FEWEST = 2**16
"""Number of values for which a column has room from the start."""


@dataclass(frozen=True)
class PerToken:
    """The `measure` of such a probe. Of each block only the columns are kept, a few numbers per token."""

    columns: Callable[[HookedRun], dict[str, Tensor]]
    """Function from a run, or from some whole rows of it, to values per token, which are the same either way."""
    estimates: Callable[[Text, dict[str, Tensor]], Iterable[Estimate]]
    """Function from the text and all its columns, on the CPU, to the estimates."""

    def __call__(self, run: HookedRun) -> Measured:
        """Measure a whole run."""
        return self.of_blocks([run])[1]

    def of_blocks(self, blocks: Iterable[HookedRun]) -> tuple[Text, Measured]:
        """Measure a run that is given in blocks of whole rows, and return its text too."""
        of_text, of_probe = _Columns(), _Columns()
        stream = ""
        for block in blocks:
            values = {field.name: getattr(block, field.name) for field in fields(Text)}
            stream = values.pop("stream")
            of_text.add(values)
            of_probe.add(self.columns(block))
        text, columns = Text(stream, **of_text.all()), of_probe.all()
        return text, Measured(columns, tuple(self.estimates(text, columns)))


class _Columns:
    """Columns on the CPU that grow by blocks, each in one buffer.

    If the blocks' columns were kept as they are, they would lie between the places in memory that the large tensors
    of each block leave free. Larger tensors would no longer fit there, and memory would grow with each block.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._n = 0

    def add(self, block: Mapping[str, Tensor]) -> None:
        """Append a block's values to each column."""
        end = self._n
        for name, values in block.items():
            end = self._n + len(values)
            buffer = self._buffers.get(name)
            if buffer is None or len(buffer) < end:
                larger = torch.empty(max(FEWEST, 2 * end), dtype=values.dtype)
                if buffer is not None:
                    larger[: self._n] = buffer[: self._n]
                buffer = self._buffers[name] = larger
            buffer[self._n : end] = values
        self._n = end

    def all(self) -> dict[str, Tensor]:
        """Return the columns."""
        return {name: buffer[: self._n] for name, buffer in self._buffers.items()}
