"""Exact selections from a stream of activations: the largest of each document, and a sample of each range."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from soluscope.neurons.schema import N_RANGES

NONE = -1
"""Place of an example that does not exist."""


class TopByDocument:
    """The largest activation of each document, for the k documents where it is largest; for many neurons at once.

    Of equal activations the first in reading order is chosen. A document's tokens must follow each other.
    """

    def __init__(self, k: int, n_neurons: int, like: Tensor) -> None:
        self.k = k
        self._values = like.new_full((0, n_neurons), -torch.inf)
        self._places = like.new_full((0, n_neurons), NONE, dtype=torch.long)
        self._open: tuple[int, Tensor, Tensor] | None = None

    def add(
        self,
        values: Float[Tensor, "token neuron"],
        owner: Int[Tensor, " token"],
        places: Int[Tensor, " token"],
    ) -> None:
        """Add tokens, which follow all earlier ones.

        Args:
            values: activations.
            owner: number of each token's document.
            places: numbers by which the caller finds the tokens again, in increasing order.
        """
        if not len(values):
            return
        closed = []
        numbers, counts = owner.unique_consecutive(return_counts=True)
        start = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            part, of_part = values[start : start + count], places[start : start + count]
            start += count
            best = part.amax(0)
            at = of_part[(part == best).to(torch.uint8).argmax(0)]  # the first of equal values
            if self._open and self._open[0] == number:
                _, value, place = self._open
                best, at = torch.maximum(value, best), place.where(value >= best, at)
            elif self._open:
                closed.append(self._open)
            self._open = (number, best, at)
        self._close(closed)

    def result(self) -> tuple[Float[Tensor, "rank neuron"], Int[Tensor, "rank neuron"]]:
        """Return values and places, the largest first; fewer than k if there are fewer documents."""
        self._close([self._open] if self._open else [])
        self._open = None
        return self._values, self._places

    def _close(self, documents: list[tuple[int, Tensor, Tensor]]) -> None:
        """Merge documents that are complete, in reading order."""
        if not documents:
            return
        values = torch.cat([self._values, torch.stack([value for _, value, _ in documents])])
        places = torch.cat([self._places, torch.stack([place for _, _, place in documents])])
        order = values.argsort(dim=0, descending=True, stable=True)[: self.k]
        self._values, self._places = values.gather(0, order), places.gather(0, order)


class SampleByRange:
    """A uniform sample without replacement of each range's tokens, for many neurons at once.

    Every token has a random priority, which is turned by a random number for each neuron, so that neurons get
    different samples. The k tokens of a range with the lowest priority are its sample. So the sample depends on the
    seed and the text only, and not on the blocks in which the text is read.
    """

    def __init__(self, k: int, n_neurons: int, n_places: int, like: Tensor, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed)
        self.k, self._n = k, n_neurons
        self._of_place, self._of_neuron = (
            torch.from_numpy(drawn.random(n, dtype=np.float32)).to(like.device)
            for n in (n_places, n_neurons)
        )
        n_kept = N_RANGES * n_neurons * k
        self._priority = torch.full((n_kept,), torch.inf, device=like.device)
        self._places = torch.full((n_kept,), NONE, device=like.device)
        self._cells = torch.arange(n_kept, device=like.device) // k

    def priorities(self, places: Int[Tensor, " token"]) -> Float[Tensor, "token neuron"]:
        """Return the random number of each token and neuron."""
        return (self._of_place[places, None] + self._of_neuron).frac_()

    def add(self, ranges: Int[Tensor, "token neuron"], places: Int[Tensor, " token"]) -> None:
        """Add tokens, which follow all earlier ones, given the range of each activation."""
        priority = self.priorities(places)
        last = self._priority.view(N_RANGES, self._n, self.k)[..., -1]
        token, neuron = (priority < last.gather(0, ranges)).nonzero(as_tuple=True)
        if not len(token):
            return
        cells = torch.cat([self._cells, ranges[token, neuron] * self._n + neuron])
        drawn = torch.cat([self._priority, priority[token, neuron]])
        found = torch.cat([self._places, places[token]])
        order = drawn.argsort(stable=True)
        order = order[cells[order].argsort(stable=True)]
        first = torch.searchsorted(cells[order], self._cells[:: self.k].contiguous())
        kept = order[(first[:, None] + torch.arange(self.k, device=first.device)).flatten()]
        self._priority, self._places = drawn[kept], found[kept]

    def result(self) -> Int[Tensor, "range rank neuron"]:
        """Return places in random order; `NONE` where a range has fewer tokens than its sample."""
        return self._places.view(N_RANGES, self._n, self.k).transpose(1, 2)
