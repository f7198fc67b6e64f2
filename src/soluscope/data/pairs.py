"""Pairs of prompts that differ in one thing: a clean prompt, five corruptions of it, an answer to each.

name swap      BOS Mary and John met. John told | Mary        another first name takes Mary's place
subject swap   BOS The file of this | is                      a subject of the other number: | are
prefix         BOS seven tokens of the report split | the next one        random words before the seventh
induction      BOS A B C D A | B                              another word in place of the first A: | C

The last token of each row is its answer; where a corruption leaves none (`prefix`, `induction`), the
answer is what would be said without what it took away: the token that most often follows the last
one, and a word that the prompt has too but not after A. Tokens are swapped one for one, so all rows of
a pair are equally long. Five corruptions, since the choice of the corrupt word matters (Heimersheim,
in the comments on "A circuit for Python docstrings").

Names and subjects are common ones that the tokenizer has as one token. A tokenizer of code has few:
where there are fewer than a pair needs, its whole words stand in for them (for subjects, the words
are dealt into two kinds), and then the family asks which word stood where, and nothing about
names or grammar.

Source: science.md section 7, P6.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from soluscope.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from soluscope.data.cache import TokenCache

FAMILIES = ("name swap", "subject swap", "prefix", "induction")
N_CORRUPTIONS = 5
N_PAIRS = (20, 200)
"""At least and at most: intervals need 20, and more than 200 are not worth their time."""

N_WORDS = 2 * N_CORRUPTIONS
"""Different words that a pair takes at most."""
N_PREFIX = 7
"""Tokens of a natural prefix, BOS not counted."""
N_SEARCHED = 2**20
"""Of how many tokens of the report split the prefixes are."""

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
"""With a plural in -s, where the tokenizer has that as one token too."""
VERBS = (("is", "are"), ("was", "were"), ("has", "have"))

Pair = list[list[int]]
"""A clean row and then its corruptions, each without BOS and with its answer last."""


def make(
    family: str, cache: TokenCache, tokenizer: Tokenizer, words: list[int], ctx: int, n_tokens: int,
    seed: int,
) -> list[tuple[int, list[int]]]:  # fmt: skip
    """The rows of as many pairs as `n_tokens` allow, within `N_PAIRS`.

    Args:
        family: one of `FAMILIES`.
        cache: whose report split has the natural prefixes.
        tokenizer: whose words the prompts are of.
        words: its whole words, as tokens.
        ctx: the longest row that the model reads, BOS included.
        n_tokens: about how many tokens there may be, BOS included.
        seed: of all that is drawn.

    Returns:
        (number of the pair, tokens without BOS), the clean row of each pair and then its corruptions.

    Raises:
        UserError: if the tokenizer has too few words, the report split no prefix, or the rows are longer
            than `ctx`.
    """
    fixed = _fixed(tokenizer)
    words = [word for word in words if word not in fixed]
    if len(words) < N_WORDS:
        raise UserError(
            f"the tokenizer has {len(words)} whole words among its tokens, and pairs of prompts take "
            f"{N_WORDS}: raise tokens.d_vocab"
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
            f"pairs of prompts ({family}) are {width} tokens long, and the model reads {ctx}: raise "
            "model.ctx"
        )
    fewest, most = N_PAIRS
    n_pairs = min(most, max(fewest, n_tokens // (width * (1 + N_CORRUPTIONS))))
    return [(number, row) for number, pair in enumerate(pairs[:n_pairs]) for row in pair]


def _name_swap(tokenizer: Tokenizer, words: list[int], rng: np.random.Generator) -> Iterator[Pair]:
    """A and B met. B told | A, and C in place of A."""
    names = one_token(tokenizer, NAMES.split())
    if len(names) < 2 + N_CORRUPTIONS:
        names = words
    joined, met, told = (_ids(tokenizer, text) for text in (" and", " met.", " told"))
    while True:
        other, *swapped = _draw(rng, names, 2 + N_CORRUPTIONS)
        yield [[name, *joined, other, *met, other, *told, name] for name in swapped]


def _subject_swap(
    tokenizer: Tokenizer, words: list[int], rng: np.random.Generator
) -> Iterator[Pair]:
    """The subject of this | is; the clean subject is singular in one pair and plural in the next."""
    forms = [one_token(tokenizer, (noun, f"{noun}s")) for noun in NOUNS.split()]
    kinds = [[form[i] for form in forms if len(form) == 2] for i in (0, 1)]
    verbs = [tokens for pair in VERBS if len(tokens := one_token(tokenizer, pair)) == 2]
    dealt = rng.permutation(words).tolist()
    if len(kinds[0]) < N_CORRUPTIONS:
        kinds = [dealt[0::2], dealt[1::2]]
    verbs = verbs or [dealt[:2]]
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
    """The report split's own tokens, and random words before the last of them.

    Prefixes do not overlap, lie within a document, and have a last token that something else than
    the next one follows elsewhere.
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
    """What follows `token` most often, of all `but` these."""
    counts = np.bincount(stream[1:][stream[:-1] == token], minlength=max(but) + 1)
    counts[list(but)] = 0
    return int(counts.argmax()) if counts.max() else None


def _induction(words: list[int], rng: np.random.Generator) -> Iterator[Pair]:
    """A B C D A | B, and another word in place of the first A: | C."""
    while True:
        a, b, c, d, *others = _draw(rng, words, 4 + N_CORRUPTIONS)
        yield [[a, b, c, d, a, b], *([other, b, c, d, a, c] for other in others)]


def _draw(rng: np.random.Generator, tokens: list[int], n: int) -> list[int]:
    drawn: list[int] = rng.choice(tokens, size=n, replace=False).tolist()
    return drawn


def _fixed(tokenizer: Tokenizer) -> set[int]:
    """Words of the prompts that stay as they are: no other word may be one of them."""
    return {*_ids(tokenizer, " and met. told The of"), *one_token(tokenizer, sum(VERBS, ()))}


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def one_token(tokenizer: Tokenizer, words: Iterable[str]) -> list[int]:
    """Those of the words that are one token with a space before them."""
    vocab = tokenizer.get_vocab()
    spaces = "Ġ▁"  # as byte-level BPE or SentencePiece writes it
    return [vocab[space + word] for word in words for space in spaces if space + word in vocab]
