"""Where documents come from: one file a source, each defining a SOURCE.

A source streams: it holds one document (or one batch of a file format) at a time. Nothing heavy is
imported before `documents` is called, so that `--help` can list every source's parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

Skip = Callable[[str, str], None]
"""Told what was left out (a file, a line of it) and why."""


@dataclass(frozen=True)
class Document:
    """One text, and a name by which a person can find it again."""

    name: str
    text: str


def warn(what: str, why: str) -> None:
    """Say on stderr what was left out, and why."""
    print(f"skipped {what}: {why}", file=sys.stderr)


class Documents(Protocol):
    def __call__(self, params: Any, skip: Skip = warn, /) -> Iterator[Document]:
        """The documents that `params` describe, in an order that is always the same.

        What cannot be read is passed to `skip`, and reading goes on with the next.

        Raises:
            UserError: if `params` describe nothing that is there.
        """
        ...


@dataclass(frozen=True)
class Source:
    """What a file in this folder defines."""

    params: type
    """A frozen dataclass of the source's own parameters, checked in __post_init__: `corpus.*`."""
    documents: Documents
    """Streams the documents."""
    fingerprint: Callable[[Any], Any]
    """Of the parameters: what JSON can hold and differs where the documents differ.

    Cheap: reads no contents and asks no network.
    """
