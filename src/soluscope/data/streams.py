"""The texts that models are probed on, as rows of tokens. A seed determines all random choices.

natural   rows of the report split, on which the loss is reported
prefixes  beginnings of the report split's documents (the sentences of the hackathon study)
prose     English: docstrings of Python's standard library
code      Python: source files of the standard library
sentences plain English sentences of 3 to about 60 words: prompts/sentences.txt
repeated  BOS w w w ..., one word per string (Figure 2 of the study): prompts/repeatable.txt
random    strings of random words (Figure 3 of the study): prompts/words.txt
pairs: …  clean prompts, each with five corruptions; pairs.py lists the families

`prose` and `code` use only files whose hash assigns them to the report share, so that a model trained
on the standard library has not seen them. Of the words in prompts/, a stream uses the words that are one
token with a space before them. If these are too few, other whole words of the tokenizer are added.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from soluscope import plugins
from soluscope.data import pairs
from soluscope.data.cache import Split, TokenCache, evenly_spaced, split_of
from soluscope.data.tokenizer import SPACES, encode, from_bytes, texts_of
from soluscope.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

N_RANDOM_STRINGS = 200
N_RANDOM_WORDS = 200
"""Minimum number of different words in random strings, if the tokenizer has as many."""
N_ROWS = 40
"""Rows are shortened so that a stream has at least this many, because intervals resample documents and need 30."""
FEWEST_TOKENS = 64
"""Length in tokens below which rows are not shortened."""
DOCUMENT_TOKENS = 500
"""Tokens at the beginning of each document from which rows are taken. If long documents counted in full, a few of
them would decide a mean, and its interval would be too narrow (protocol.md section 5)."""
MADE_UP = ("sentences", "repeated", "random")
"""Streams whose units are strings instead of documents."""
PROMPTS = ("sentences", "repeatable", "words")
"""The lists in prompts/."""
PAIRS = "pairs: "
"""Prefix of the names of streams of prompt pairs."""


@dataclass(frozen=True)
class Stream:
    """Rows of tokens, each with BOS first."""

    name: str
    tokens: Tensor
    """int64 [row pos], padded at the end."""
    string: Tensor
    """int64 [row pos]: number of the document or string of each token. BOS counts to the row's first document."""
    keep: Tensor
    """bool [row pos]: False at padding."""
    bos: int
    vocab: tuple[str, ...] = ()
    """Text of each token of the vocabulary; empty if unknown."""

    @property
    def n_tokens(self) -> int:
        return int(self.keep.sum())


def from_cache(cache: TokenCache, split: Split, ctx: int, n_tokens: int, name: str) -> Stream:
    """Return rows spread evenly over a split, with few tokens of each document, so that documents count alike."""
    import torch

    rows = cache.rows(split, ctx)
    chosen = rows.spread(n_tokens, DOCUMENT_TOKENS)
    string = rows.documents(chosen)
    string[:, 0] = string[:, 1]
    tokens = torch.from_numpy(rows[chosen])
    return Stream(
        name,
        tokens,
        torch.from_numpy(string),
        torch.ones_like(tokens, dtype=torch.bool),
        cache.meta["bos"],
    )


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Yield the tokens of each text; a <|BOS|> spelt out in a text is plain text."""
    tokenizer.encode_special_tokens = True
    for text in texts:
        yield encode(tokenizer, text)


def from_tokens(
    texts: Iterable[Sequence[int]],
    tokenizer: Tokenizer,
    bos: int,
    ctx: int,
    n_tokens: int,
    name: str,
    fewest: int = 2,
) -> Stream:
    """Cut each text's tokens into its own rows, and return about `n_tokens` tokens from as many texts as possible.

    Texts are read until their first rows are enough. Rows of fewer than `fewest` tokens are left out: a single
    token after BOS has no target.

    Raises:
        UserError: if no text has 2 tokens or more.
    """
    n_rows = max(1, n_tokens // ctx)
    n_texts, parts = 0, list[tuple[int, int, Sequence[int]]]()
    for number, ids in enumerate(texts):
        cuts = range(0, len(ids), ctx - 1)
        of_text = [(turn, number, ids[cut : cut + ctx - 1]) for turn, cut in enumerate(cuts)]
        parts += (part for part in of_text if len(part[2]) >= fewest)
        n_texts += len(ids) >= fewest
        if n_texts == n_rows:
            break
    # The first row of every text, then every second row: even few tokens come from many texts.
    parts = sorted(parts, key=lambda part: part[:2])[:n_rows]
    rows = [(number, ids) for turn, number, ids in sorted(parts, key=lambda part: part[1::-1])]
    if all(len(ids) < 2 for _, ids in rows):
        raise UserError(
            f"every text for {name!r} is shorter than 2 tokens: give at least one longer text"
        )
    return replace(from_rows(rows, bos, ctx, name), vocab=texts_of(tokenizer))


def unit_of(name: str) -> str:
    """Return the unit of a stream that its intervals resample: pair, string or document."""
    if name.startswith(PAIRS):
        return "pair"
    return "string" if name in MADE_UP else "document"


def from_rows(rows: Sequence[tuple[int, Sequence[int]]], bos: int, ctx: int, name: str) -> Stream:
    """Return the stream of rows that are given as (number of the string, its tokens without BOS).

    Raises:
        UserError: if no row is given.
    """
    import torch

    if not rows:
        raise UserError(
            f"the stream {name!r} is empty, because no text of the report split fills a row: give longer "
            "documents, or raise tokens.report_share"
        )
    width = min(ctx, 1 + max(len(ids) for _, ids in rows))
    tokens = torch.full((len(rows), width), bos)
    string = torch.zeros_like(tokens)
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (number, ids) in enumerate(rows):
        tokens[row, 1 : 1 + len(ids)] = torch.tensor(ids)
        keep[row, : 1 + len(ids)] = True
        string[row] = number
    return Stream(name, tokens, string, keep, bos)


def make(
    name: str, cache: TokenCache, tokenizer: Tokenizer, ctx: int, n_tokens: int, seed: int
) -> Stream:
    """Return one of the named streams, of at most about `n_tokens` tokens in rows of at most `ctx`.

    Raises:
        UserError: if no stream has that name, or the text or the tokenizer's words are too few for it.
    """
    ctx = min(ctx, max(FEWEST_TOKENS, n_tokens // N_ROWS))
    stream = _make(name, cache, tokenizer, ctx, n_tokens, seed)
    return stream if stream.vocab else replace(stream, vocab=texts_of(tokenizer))


def _make(
    name: str, cache: TokenCache, tokenizer: Tokenizer, ctx: int, n_tokens: int, seed: int
) -> Stream:
    bos = cache.meta["bos"]
    match name:
        case "natural":
            return from_cache(cache, "report", ctx, n_tokens, name)
        case "prefixes":
            return from_rows(list(_prefixes(cache, ctx, n_tokens)), bos, ctx, name)
        case "prose" | "code":
            shares = tuple(sorted(cache.meta["shares"].items()))
            return _from_library(name, shares, tokenizer.to_str(), bos, ctx, n_tokens)
        case "sentences":
            return from_rows(_sentences(tokenizer, ctx, n_tokens), bos, ctx, name)
        case "repeated" | "random":
            rng = np.random.default_rng([seed, len(name)])
            if name == "repeated":
                words = _words("repeatable", N_ROWS, cache, tokenizer, rng)[:N_ROWS]
                rows = [(i, [word] * (ctx - 1)) for i, word in enumerate(words)]
            else:
                words = _words("words", N_RANDOM_WORDS, cache, tokenizer, rng)
                n_rows = max(N_ROWS, min(N_RANDOM_STRINGS, n_tokens // ctx))
                rows = [(i, rng.choice(words, size=ctx - 1).tolist()) for i in range(n_rows)]
            return from_rows(rows, bos, ctx, name)
        case _ if name.startswith(PAIRS) and name.removeprefix(PAIRS) in pairs.FAMILIES:
            words, family = single_token_words(tokenizer), name.removeprefix(PAIRS)
            rows = pairs.make(family, cache, tokenizer, words, ctx, n_tokens, seed)
            return from_rows(rows, bos, ctx, name)
    raise UserError(f"no stream called {name!r}")


def single_token_words(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that are one word of at least 3 lower-case letters a to z with a space before it."""
    return sorted(
        token
        for text, token in tokenizer.get_vocab().items()
        if re.fullmatch(f"[{SPACES}][a-z]{{3,}}", text)
    )


def prompts(name: str) -> list[str]:
    """Return the lines of one of `PROMPTS`."""
    path = Path(__file__).parent / "prompts" / f"{name}.txt"
    return path.read_text(encoding="utf8").splitlines()


def _sentences(tokenizer: Tokenizer, ctx: int, n_tokens: int) -> list[tuple[int, list[int]]]:
    """Return at least `N_ROWS` sentences of all lengths, of about `n_tokens` tokens in all, as (index, tokens)."""
    texts = prompts("sentences")
    ids = [encode(tokenizer, text)[: ctx - 1] for text in texts]
    mean = sum(1 + len(each) for each in ids) / len(ids)
    n = max(N_ROWS, int(n_tokens / mean))
    return [(int(index), ids[index]) for index in evenly_spaced(len(ids), n)]


def _words(
    name: str, n_wanted: int, cache: TokenCache, tokenizer: Tokenizer, rng: np.random.Generator
) -> list[int]:
    """Return the words of a list that are one token, and random whole words if the list has fewer than `n_wanted`.

    Raises:
        UserError: if the list has too few words and no token of the tokenizer is a whole word.
    """
    words = pairs.one_token(tokenizer, prompts(name))
    if len(words) >= n_wanted:
        return words
    additional = rng.permutation(sorted({*single_token_words(tokenizer)} - {*words}))
    if not (words or len(additional)):
        raise UserError(
            f"no token of the tokenizer is a whole word: {pairs.more_words(cache, tokenizer)}"
        )
    return [*words, *additional[: n_wanted - len(words)].tolist()]


@lru_cache(maxsize=4)
def _from_library(
    kind: str,
    shares: tuple[tuple[str, float], ...],
    tokenizer_json: str,
    bos: int,
    ctx: int,
    n_tokens: int,
) -> Stream:
    """Return the stream of `standard_library`'s texts, which all runs of a study share."""
    tokenizer = from_bytes(tokenizer_json.encode(), "cannot read the tokenizer")
    texts = encoded(standard_library(kind, **dict(shares)), tokenizer)
    return from_tokens(texts, tokenizer, bos, ctx, n_tokens, kind)


def standard_library(kind: str, select: float, report: float) -> Iterator[str]:
    """Yield texts of the standard library's report share: the files for `code`, their docstrings for `prose`."""
    source = plugins.pick("soluscope.data.sources", "stdlib")
    for document in source.documents(source.params(), lambda name, why: None):
        if split_of(document.text, select, report) != "report":
            continue
        if kind == "code":
            yield document.text
        elif prose := docstrings(document.text):
            yield prose


def docstrings(code: str) -> str:
    """Return the docstrings of a module, its classes and its functions, joined in the order of `ast.walk`."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(text for text in texts if text)


def _prefixes(cache: TokenCache, ctx: int, n_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Yield the beginnings of the report split's documents that fill a row, as (document, tokens)."""
    offsets, stream = cache.offsets("report"), cache.stream("report")
    fills_a_row = np.flatnonzero(np.diff(offsets) >= ctx - 1)
    for document in fills_a_row[: max(N_ROWS, n_tokens // ctx)]:
        start = offsets[document]
        yield int(document), stream[start : start + ctx - 1].tolist()
