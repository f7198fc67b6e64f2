"""Pairs of prompts that differ in one thing: a clean prompt and five corruptions, each with an answer.

name swap      BOS Mary and John met. John told | Mary        corruption: another first name replaces Mary
subject swap   BOS The file of this | is                      corruption: a subject of the other number | are
prefix         BOS seven tokens of the report split | the next token    corruption: random words before the seventh
induction      BOS A B C D A | B                              corruption: another word replaces the first A | C

The last token of each row is its answer. A corruption of `prefix` or `induction` removes the evidence for
the clean answer and supplies no other. The answer of the corrupt row is then, for `prefix`, the token that
most often follows the last token of the prompt, and for `induction` C, a word of the prompt that does not
follow A. Each token is replaced by one token, so all rows of a pair have the same length. Each pair has
five corruptions, because the choice of the corrupt word matters (Heimersheim, in the comments on "A circuit
for Python docstrings").

Names and subjects are common words that are one token each. A tokenizer trained on code has few of them.
If it has fewer than a pair needs, its whole words replace them; for subjects, the words are divided at
random into two kinds. The family then tests the positions of words, not names or grammar.

Source: protocol.md section 7, P6.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from soluscope.data.tokenizer import SPACES, encode
from soluscope.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from soluscope.data.cache import TokenCache

FAMILIES = ("name swap", "subject swap", "prefix", "induction")
N_CORRUPTIONS = 5
N_PAIRS = (30, 200)
"""Minimum and maximum number of pairs: intervals need 30, and more than 200 would cost more time than they add."""

N_WORDS = 2 * N_CORRUPTIONS
"""Maximum number of different words that a pair needs."""
N_PREFIX = 7
"""Tokens of a natural prefix, BOS not counted."""
N_SEARCHED = 2**20
"""Number of tokens at the start of the report split from which the prefixes are drawn."""

NAMES = (
    "Mary John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony "
    "Mark Paul Steven Andrew George Kevin Brian Edward Peter Henry Adam Scott Eric Frank Jack Simon "
    "Martin Alex Sam Tom Bob Jim Bill Joe Tim Ben Max Lisa Sarah Anna Emma Laura Karen Susan Linda Jane "
    "Alice Kate Amy Anne Helen Maria Julia Rachel Rose Grace"
)
NOUNS = (
    "file name value line method object string function argument error option item type header "
    "attribute result character element word number test key node page place year day group "
    "thing friend girl boy house book car dog cat tree road river teacher student player king song "
    "letter question"
)
"""Nouns with a plural in -s. A noun is used only if both forms are one token."""
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))

Pair = list[list[int]]
"""A clean row and then its corruptions, each without BOS and with its answer as the last token."""


def make(
    family: str, cache: TokenCache, tokenizer: Tokenizer, words: list[int], ctx: int, n_tokens: int,
    seed: int,
) -> list[tuple[int, list[int]]]:  # fmt: skip
    """Return the rows of as many pairs as `n_tokens` allows, within the bounds `N_PAIRS`.

    Args:
        family: one of `FAMILIES`.
        cache: the token cache; its report split supplies the natural prefixes.
        tokenizer: the tokenizer of the model.
        words: the tokenizer's whole words, as tokens.
        ctx: length of the longest row that the model reads, BOS included.
        n_tokens: approximate maximum number of tokens, BOS included.
        seed: seed of all random choices.

    Returns:
        (number of the pair, tokens without BOS) for the clean row of each pair and then its corruptions.

    Raises:
        UserError: if the tokenizer has too few words, the report split has no prefix, or the rows are longer
            than `ctx`.
    """
    fixed = _fixed(tokenizer)
    words = [word for word in words if word not in fixed]
    if len(words) < N_WORDS:
        raise UserError(
            f"{len(words)} tokens of the tokenizer are whole words, but pairs of prompts need "
            f"{N_WORDS}: {more_words(cache, tokenizer)}"
        )
    rng = np.random.default_rng([seed, FAMILIES.index(family)])
    drawn = {
        "name swap": lambda: _name_swap(tokenizer, words, rng),
        "subject swap": lambda: _subject_swap(tokenizer, words, rng),
        "prefix": lambda: _prefix(cache, words, rng),
        "induction": lambda: _induction(words, rng),
    }[family]()
    pairs = list(islice(drawn, N_PAIRS[1]))
    if not pairs:
        raise UserError(
            f"the report split is too small for prefixes of {N_PREFIX} tokens: give more text, or raise "
            "tokens.report_share"
        )
    width = 1 + len(pairs[0][0])
    if width > ctx:
        raise UserError(
            f"pairs of prompts ({family}) are {width} tokens long, but the model reads only {ctx}: raise "
            "model.ctx"
        )
    fewest, most = N_PAIRS
    n_pairs = min(most, max(fewest, n_tokens // (width * (1 + N_CORRUPTIONS))))
    return [(number, row) for number, pair in enumerate(pairs[:n_pairs]) for row in pair]


def more_words(cache: TokenCache, tokenizer: Tokenizer) -> str:
    """Return the change that gives the tokenizer more whole words of the letters a to z, as a request."""
    if cache.meta["tokenizer"] != "bpe":
        return "use a tokenizer (tokens.tokenizer=) whose tokens are English words with a space before them"
    is_full = cache.meta["d_vocab"] == cache.meta["asked"]["tokens.d_vocab"]
    if is_full and any(re.fullmatch("Ġ[a-z]+", token) for token in tokenizer.get_vocab()):
        return "raise tokens.d_vocab, or give text with more English words"
    return "give text with English words"


def _name_swap(tokenizer: Tokenizer, words: list[int], rng: np.random.Generator) -> Iterator[Pair]:
    """Yield `A and B met. B told | A`, and corruptions with C instead of A."""
    names = one_token(tokenizer, NAMES.split())
    if len(names) < 2 + N_CORRUPTIONS:
        names = words
    and_, met, told = (_ids(tokenizer, text) for text in (" and", " met.", " told"))
    while True:
        other, *swapped = _draw(rng, names, 2 + N_CORRUPTIONS)
        yield [[name, *and_, other, *met, other, *told, name] for name in swapped]


def _subject_swap(
    tokenizer: Tokenizer, words: list[int], rng: np.random.Generator
) -> Iterator[Pair]:
    """Yield `The subject of this | is`; the clean subject is singular in one pair and plural in the next."""
    forms = [one_token(tokenizer, (noun, f"{noun}s")) for noun in NOUNS.split()]
    kinds = [[form[i] for form in forms if len(form) == 2] for i in (0, 1)]
    verbs = [tokens for pair in VERBS if len(tokens := one_token(tokenizer, pair)) == 2]
    shuffled = rng.permutation(words).tolist()
    if len(kinds[0]) < N_CORRUPTIONS:
        kinds = [shuffled[0::2], shuffled[1::2]]
    verbs = verbs or [shuffled[:2]]
    the, of = _ids(tokenizer, " The"), _ids(tokenizer, " of")
    while True:
        for clean, corrupt in ((0, 1), (1, 0)):
            filler = _draw(rng, words, 1)
            subjects = [(clean, subject) for subject in _draw(rng, kinds[clean], 1)]
            subjects += [
                (corrupt, subject) for subject in _draw(rng, kinds[corrupt], N_CORRUPTIONS)
            ]
            yield [[*the, subject, *of, *filler, verbs[0][kind]] for kind, subject in subjects]


def _prefix(cache: TokenCache, words: list[int], rng: np.random.Generator) -> Iterator[Pair]:
    """Yield prefixes from the report split, and corruptions with random words before the last token.

    Prefixes do not overlap and do not cross documents. The last token of a prefix must be followed elsewhere
    by a token other than the prefix's answer, because the corrupt rows need an answer.
    """
    stream = cache.stream("report")[:N_SEARCHED].astype(np.int64)
    eos = cache.meta["eos"]
    starts = np.arange(0, len(stream) - N_PREFIX, N_PREFIX + 1)
    for start in rng.permutation(starts):
        *prefix, last, answer = stream[start : start + N_PREFIX + 1].tolist()
        usual = _usual(stream, last, but=(answer, eos))
        if usual is None or eos in (*prefix, last, answer):
            continue
        corrupt = rng.choice(words, size=(N_CORRUPTIONS, len(prefix))).tolist()
        yield [[*prefix, last, answer], *([*random, last, usual] for random in corrupt)]


def _usual(stream: NDArray[np.int64], token: int, but: tuple[int, ...]) -> int | None:
    """Return the token, not in `but`, that follows `token` most often, or None without such a successor."""
    counts = np.bincount(stream[1:][stream[:-1] == token], minlength=max(but) + 1)
    counts[list(but)] = 0
    return int(counts.argmax()) if counts.max() else None


def _induction(words: list[int], rng: np.random.Generator) -> Iterator[Pair]:
    """Yield `A B C D A | B`, and corruptions with another word instead of the first A and the answer C."""
    while True:
        a, b, c, d, *others = _draw(rng, words, 4 + N_CORRUPTIONS)
        yield [[a, b, c, d, a, b], *([other, b, c, d, a, c] for other in others)]


def _draw(rng: np.random.Generator, tokens: list[int], n: int) -> list[int]:
    drawn: list[int] = rng.choice(tokens, size=n, replace=False).tolist()
    return drawn


def _fixed(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens of the prompts' fixed words, which must not be drawn as other words."""
    return {*_ids(tokenizer, " and met. told The of"), *one_token(tokenizer, sum(VERBS, ()))}


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return encode(tokenizer, text)


def one_token(tokenizer: Tokenizer, words: Iterable[str]) -> list[int]:
    """Return the tokens of the words that are one token with a space before them."""
    vocab = tokenizer.get_vocab()
    return [vocab[space + word] for word in words for space in SPACES if space + word in vocab]
