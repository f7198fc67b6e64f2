"""Passages that documents share: runs of 50 words that occur in both.

Two files of code with one licence, or two versions of an article, are different documents with passages in
common. If one is held out and the model is trained on the other, the model has seen a part of the held-out text.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

WORDS = 50
"""Number of words of a passage. A shorter text is one passage."""
MOST_KEPT = 2**25
"""Largest number of passages to remember: 256 MB. With more, a share of them is remembered, chosen by hash."""

_MOST_WORDS = 2_000_000
_BASE = 6364136223846793005  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 2**64)

Hashes = NDArray[np.uint64]


class Passages:
    """The passages of a set of documents, as 64-bit hashes."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._limit = np.uint64(2**64 - 1)  # only hashes up to this one are kept
        self._kept: Hashes = np.empty(0, dtype=np.uint64)
        self._new: list[Hashes] = []
        self._n_new = 0

    def add(self, hashes: Hashes) -> None:
        """Add the passages of a document, as `hashes_of` gives them."""
        self._new.append(hashes[hashes <= self._limit])
        self._n_new += len(self._new[-1])
        if self._n_new > max(2**20, len(self._kept)):
            self._merge()

    def any_of(self, hashes: Hashes) -> bool:
        """Return whether one of these passages is in the set."""
        self._merge()
        asked = hashes[hashes <= self._limit]
        if not len(self._kept):
            return False
        places = np.minimum(np.searchsorted(self._kept, asked), len(self._kept) - 1)
        return bool((self._kept[places] == asked).any())

    def _merge(self) -> None:
        if self._new:
            self._kept = np.unique(np.concatenate([self._kept, *self._new]))
            self._new, self._n_new = [], 0
        while len(self._kept) > self._most:
            self._limit //= np.uint64(2)
            self._kept = self._kept[self._kept <= self._limit]


class Hasher:
    """A function from a text to the hashes of its passages; it remembers the hashes of words."""

    def __init__(self) -> None:
        self._words: dict[str, int] = {}
        self._powers: Hashes = np.ones(1, dtype=np.uint64)
        self._inverses: Hashes = np.ones(1, dtype=np.uint64)

    def hashes_of(self, text: str) -> Hashes:
        """Return a hash of each run of 50 words of a text, uint64 [run]; case and white space do not matter.

        The hash of words w_i to w_(i+49) is the sum of hash(w_(i+k)) * base^k modulo 2^64, from running sums.
        """
        words = text.lower().split()
        if len(self._words) > _MOST_WORDS:
            self._words.clear()
        known = self._words
        for word in words:
            if word not in known:
                digest = hashlib.blake2b(word.encode("utf8"), digest_size=8).digest()
                known[word] = int.from_bytes(digest)
        values = np.fromiter((known[word] for word in words), np.uint64, len(words))
        self._extend(len(words))
        run = min(WORDS, len(words))
        sums = np.zeros(len(words) + 1, dtype=np.uint64)
        np.cumsum(values * self._powers[: len(words)], out=sums[1:])
        result: Hashes = (sums[run:] - sums[: len(sums) - run]) * self._inverses[: len(sums) - run]
        return result

    def _extend(self, n: int) -> None:
        if len(self._powers) <= n:
            self._powers, self._inverses = (
                np.multiply.accumulate(np.append(np.uint64(1), np.full(2 * n, base, np.uint64)))
                for base in (_BASE, _INVERSE)
            )
