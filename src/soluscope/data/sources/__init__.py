"""Sources of documents: each file in this folder defines one SOURCE.

A source streams: only one document (or one batch of a file format) is in memory at a time. No slow package
is imported before `documents` is called, so that `--help` can list every source's parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from soluscope.terminal import say

Skip = Callable[[str, str], None]
"""A function that receives the name of a skipped item (a file, or a line of a file) and the reason."""


@dataclass(frozen=True)
class Document:
    """One text, and a name by which a person can find the text again."""

    name: str
    text: str


def warn(what: str, why: str) -> None:
    """Print the name of a skipped item and the reason on stderr."""
    say(f"skipped {what}: {why}")


def text_at(record: Any, field: str) -> str | None:
    """Return the text at a key of a record, or None for a value that is not text.

    A dot leads into a nested record: `meta.text` is the key text of the record at the key meta. Bytes are
    decoded as UTF-8.

    Raises:
        KeyError: if the record has no such key.
    """
    if not isinstance(record, Mapping):
        return None
    if field not in record:
        key, _, rest = field.partition(".")
        if not rest:
            raise KeyError(field)
        return text_at(record[key], rest)
    value = record[field]
    if isinstance(value, bytes):
        try:
            return value.decode("utf8")
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


def keys_of(record: Mapping[str, Any]) -> list[str]:
    """Return the keys of a record as `text_at` reads them, with those of the records directly in it."""
    keys = []
    for key, value in record.items():
        nested = isinstance(value, Mapping) and value
        keys += [f"{key}.{inner}" for inner in value] if nested else [key]
    return keys


class Documents(Protocol):
    def __call__(self, params: Any, skip: Skip = warn, /) -> Iterator[Document]:
        """Yield the documents that `params` describe, always in the same order.

        The name of a document that cannot be read is passed to `skip`, and reading continues with the next.

        Raises:
            UserError: if `params` match no document source that exists.
        """
        ...


@dataclass(frozen=True)
class Source:
    """The object that each file in this folder defines."""

    params: type
    """Frozen dataclass of the source's own parameters (`corpus.*`), checked in its __post_init__."""
    documents: Documents
    """Function that streams the documents."""
    fingerprint: Callable[[Any], Any]
    """Function from the parameters to a JSON value that differs if the documents differ.

    It must be fast: it reads no file contents and uses no network.
    """
    more: Callable[[Any], str]
    """Function from the parameters to the change of a setting that gives more documents, as a request."""
