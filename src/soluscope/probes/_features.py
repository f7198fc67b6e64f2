"""Labelled features of tokens, and how well a number separates the tokens with a feature from the rest.

A feature is a property that can be read from the text: the token's identity, its characters (a bank of
regular expressions), or the text before it (the preceding token, open brackets).

Source: protocol.md section 7, P11.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from soluscope.hooked.activations import HookedRun
from soluscope.probes._tokens import array

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

N_TOKEN_CLASSES = 50
"""Number of the most frequent tokens that each define a feature."""
MIN_TOKENS = 10
"""Fewest tokens with a feature, and fewest without it, in each half of the documents, for it to be used."""
MIN_DOCUMENTS = 4
"""Fewest documents. With fewer, a half can be a single document, and a choice made on it fits only that
document."""

KEYWORDS = (
    "and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|"
    "if|import|in|is|lambda|not|or|pass|raise|return|try|while|with|yield|None|True|False"
)
TEXT = {
    "starts with a space": r"\A ",
    "new line": r"\n",
    "white space": r"\A\s+\Z",
    "digit": r"\d",
    "number": r"\A\s*\d+\Z",
    "starts with a capital": r"\A\s*[A-Z]",
    "all capitals": r"\A\s*[A-Z]{2,}\Z",
    "lower-case letters": r"\A\s*[a-z]+\Z",
    "rest of a word": r"\A[a-z]+\Z",
    "mixed case": r"[a-z][A-Z]",
    "single letter": r"\A\s*[A-Za-z]\Z",
    "ends in -ing, -ed or -ly": r"[a-z](?:ing|ed|ly)\Z",
    "punctuation": r"\A\s*[^\w\s]+\Z",
    "comma": r",",
    "full stop": r"\.",
    "comma, stop or colon": r"[,.:;]",
    "quotation mark": r"[\"'`]",
    "opening bracket": r"[(\[{<]",
    "closing bracket": r"[)\]}>]",
    "operator": r"\A\s*[-=+*/%&|^~<>!@]+\Z",
    "underscore": r"_",
    "keyword": rf"\A\s*(?:{KEYWORDS})\Z",
    "hexadecimal": r"\A\s*(?:0x[0-9a-fA-F]*|(?=[a-fA-F]*\d)(?=\d*[a-fA-F])[0-9a-fA-F]{2,})\Z",
    "base64": r"\A(?=.*[a-z])(?=.*[A-Z])(?=.*\d)[A-Za-z0-9+/=]{3,}\Z",
    "not ASCII": r"[^\x00-\x7f]",
}
"""Regular expressions for a token's text, by feature. A space before a word belongs to the token."""
BEFORE = (
    "starts with a space", "new line", "digit", "starts with a capital", "lower-case letters",
    "punctuation", "comma", "opening bracket", "closing bracket", "operator", "quotation mark",
    "keyword",
)  # fmt: skip
"""Names in `TEXT` that are also matched against the preceding token."""


@dataclass(frozen=True)
class Features:
    """Labels of a run's tokens, by feature."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """`token` (the token's identity), `text` (its characters) or `context` (the text before the token)."""
    holds: Bools
    """[feature token], for the run's tokens; False at BOS."""


def label(run: HookedRun) -> Features:
    """Return all features that enough tokens have and enough tokens lack, in both halves of the documents.

    If several features hold at the same tokens, only the first is kept. Without the vocabulary's texts,
    the only features are token identities. With fewer than `MIN_DOCUMENTS` documents there is no
    feature.
    """
    content = ~array(run.is_bos)
    enough = len(np.unique(array(run.string)[content])) >= MIN_DOCUMENTS
    halves = [measured for _, measured in folds(run, content)]
    distinct: dict[bytes, tuple[str, str, Bools]] = {}
    for name, kind, everywhere in _candidates(run) if enough else ():
        holds = everywhere & content
        counts = [(int((holds & half).sum()), int((~holds & half).sum())) for half in halves]
        if min(min(pair) for pair in counts) >= MIN_TOKENS:
            distinct.setdefault(np.packbits(holds).tobytes(), (name, kind, holds))
    kept = list(distinct.values())
    return Features(
        names=tuple(name for name, _, _ in kept),
        kinds=tuple(kind for _, kind, _ in kept),
        holds=np.array([holds for _, _, holds in kept], dtype=bool).reshape(
            len(kept), len(content)
        ),
    )


def first_half(run: HookedRun, among: Bools | None = None) -> Bools:
    """Return whether each token's document has an even rank, [token].

    Ranks are over the run's documents, or over the documents of the tokens `among`.
    """
    string = array(run.string)
    documents = np.unique(string if among is None else string[among])
    even: Bools = np.searchsorted(documents, string) % 2 == 0
    return even


def folds(run: HookedRun, among: Bools) -> Iterator[tuple[Bools, Bools]]:
    """Yield both assignments of two halves of some documents, one to choose on and one to measure on.

    Every document is measured, and none by a choice that it contributed to. The set of features is the
    only exception: the counts of both halves decide it, see `label`.

    Args:
        run: activations.
        among: [token], the tokens whose documents are halved.

    Yields:
        (tokens to choose on, tokens to measure on), each [token], for each of the two folds.
    """
    first = first_half(run, among)
    yield among & first, among & ~first
    yield among & ~first, among & first


def _candidates(run: HookedRun) -> Iterator[tuple[str, str, Bools]]:
    """Yield (name, kind, [token]) for each feature, before its tokens are counted."""
    tokens, starts = array(run.tokens), array(run.is_bos)
    ids, counts = np.unique(tokens[~starts], return_counts=True)
    for token in ids[np.argsort(-counts, kind="stable")][:N_TOKEN_CLASSES]:
        name = repr(run.vocab[token]) if run.vocab else str(token)
        yield f"token {name}", "token", tokens == token
    if not run.vocab:
        return
    used, index = np.unique(tokens, return_inverse=True)
    texts = [run.vocab[token] for token in used]
    looks = {
        name: np.array([bool(re.search(pattern, text)) for text in texts])[index] & ~starts
        for name, pattern in TEXT.items()
    }
    for name, holds in looks.items():
        yield name, "text", holds
    for name in BEFORE:
        yield f"after: {name}", "context", np.roll(looks[name], 1) & ~starts
    yield from in_brackets([texts[i] for i in index], starts)


def in_brackets(texts: list[str], starts: Bools) -> Iterator[tuple[str, str, Bools]]:
    """Yield features of brackets: inside one, before a comma in it (left in a list), and after a comma (right)."""
    inside, later = (np.zeros(len(texts), dtype=bool) for _ in range(2))
    commas: list[bool] = []  # one entry per open bracket: True after a comma in it
    for i, text in enumerate(texts):
        if starts[i]:
            commas = []
            continue
        inside[i], later[i] = bool(commas), bool(commas) and commas[-1]
        for character in text:
            if character in "([{":
                commas.append(False)
            elif character in ")]}" and commas:
                commas.pop()
            elif character == "," and commas:
                commas[-1] = True
    yield "inside brackets", "context", inside
    yield "first in a list", "context", inside & ~later
    yield "later in a list", "context", later


def sums_by_document(columns: NDArray[Any], string: NDArray[np.int64]) -> Floats:
    """Sum over each document's tokens, [document part], for hundreds of columns [token part]."""
    order = np.argsort(string, kind="stable")
    starts = np.flatnonzero(np.diff(string[order], prepend=-1))
    ordered = columns if (np.diff(order) == 1).all() else columns[order]
    sums: Floats = np.add.reduceat(ordered.astype(np.float64, copy=False), starts, axis=0)
    return sums


def levels(values: NDArray[np.floating]) -> Floats:
    """Round each column to millionths of its largest |value|, so that rounding errors break no ties.

    A step is at least a billionth of the largest |value| of all columns: a column far below that
    contains only rounding errors.

    Returns:
        Values as numbers of steps.
    """
    numbers = np.asarray(values, dtype=np.float64)
    largest = np.abs(numbers).max(axis=0, initial=0.0)  # [column]
    unit = np.maximum(1e-6 * largest, 1e-9 * largest.max(initial=0.0))
    rounded: Floats = np.round(numbers / np.where(unit > 0, unit, 1.0))
    return rounded


def auroc(values: NDArray[np.floating], holds: Bools) -> Floats:
    """Return the probability that a token with the feature has the higher value; ties count half.

    Args:
        values: [token column].
        holds: [feature token].

    Returns:
        [feature column]; nan where all tokens or none have the feature.
    """
    ranks = rankdata(levels(values), axis=0)
    n = holds.sum(axis=1, keepdims=True).astype(np.float64)
    above = holds.astype(np.float64) @ ranks - n * (n + 1) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = above / (n * (holds.shape[1] - n))
    return result


def auroc_sums(values: NDArray[np.floating], holds: Bools, string: NDArray[np.int64]) -> Floats:
    """Return sums by document from which `auroc_of` computes AUROCs, [string column*4].

    A token's placement is the share of the other class that lies on the correct side of it: below a
    token with the feature, above a token without it. The AUROC is the mean placement of the tokens with
    the feature, and also that of the tokens without it. Its interval needs only the two sums and the
    two counts, and no scores.

    Args:
        values: [token column].
        holds: [token], the same for all columns.
        string: [token], the index of each token's document.

    Source: DeLong, DeLong and Clarke-Pearson 1988, "structural components".
    """
    absent_below, present_below = _n_below(levels(values).T, holds)
    n_holds = int(holds.sum())
    placed = np.where(
        holds, absent_below / max(1, len(holds) - n_holds), 1 - present_below / max(1, n_holds)
    )  # [column token]
    parts = [part for column in placed for part in (column * holds, holds, column * ~holds, ~holds)]
    return sums_by_document(np.stack(parts, axis=1), string)


def _n_below(values: Floats, holds: Bools) -> tuple[Floats, Floats]:
    """Return the numbers of tokens without and with the feature below each token; ties count half. [column token]

    Args:
        values: [column token].
        holds: [token].
    """
    order = np.argsort(values, axis=1)
    ordered = np.take_along_axis(values, order, axis=1)
    is_first = np.ones(values.shape, dtype=bool)  # of the tokens that share a value
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    block = np.cumsum(is_first, axis=1) - 1
    block += block[:, -1:].cumsum(axis=0) - block[:, -1:] + np.arange(len(values))[:, None]
    starts = np.flatnonzero(is_first)
    present = np.add.reduceat(holds[order].ravel(), starts, dtype=np.float64)
    sizes = np.diff(starts, append=values.size)
    result = []
    for of_block in (sizes - present, present):
        before = np.cumsum(of_block) - of_block
        column = starts // values.shape[1]
        before -= before[np.searchsorted(column, np.arange(len(values)))][column]
        below = np.empty_like(values)
        np.put_along_axis(below, order, (before + of_block / 2)[block], axis=1)
        result.append(below)
    return result[0], result[1]


def auroc_of(sums: Floats, everything: Floats) -> Floats:
    """Return AUROCs from weighted sums of the rows of `auroc_sums`, [draw column].

    Args:
        sums: [draw column*4].
        everything: the unweighted sum of the rows, [column*4]. With unit weights the result is exact.
            With other weights it is the AUROC to first order in the weights: the sum of the two mean
            placements minus the AUROC of all tokens.
    """

    def means(sums: Floats) -> tuple[Floats, Floats]:
        present, n_present, absent, n_absent = np.moveaxis(sums.reshape(len(sums), -1, 4), -1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return present / n_present, absent / n_absent

    present, absent = means(sums)
    return present + absent - means(everything[None])[0]


def mean_of_defined(values: Floats) -> Floats:
    """Return the mean over the last axis of the values that are not nan; nan if all are nan."""
    defined = ~np.isnan(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        result: Floats = np.where(defined, values, 0.0).sum(axis=-1) / defined.sum(axis=-1)
    return result


def median_of_defined(values: Floats) -> Floats:
    """Return the median over the last axis of the values that are not nan; nan if all are nan."""
    ordered = np.sort(values, axis=-1)  # nan comes last
    n = (~np.isnan(ordered)).sum(axis=-1, keepdims=True)
    middle = np.concatenate([(n - 1) // 2, n // 2], axis=-1).clip(0)
    result: Floats = np.take_along_axis(ordered, middle, axis=-1).mean(axis=-1)
    return result
