"""Rules about tokens that may describe a neuron: its token, its characters, the text around it, and its position.

The patterns are those of the probes P11 and P12, and further ones that the SoLU paper found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from soluscope.hooked.activations import HookedRun
from soluscope.probes._features import BEFORE, TEXT, in_brackets
from soluscope.text import readable

N_TOKENS, N_BEFORE = 128, 64
"""Largest numbers of rules about a single token, and about a single token before."""
MORE = {
    "one capital, then lower case": r"\A\s*[A-Z][a-z]+\Z",
    "vowels only": r"\A\s*[aeiouAEIOU]+\Z",
    "a line's indentation": r"\n[ \t]+\Z",
    "indentation of 8 or more spaces": r"\n {8,}\Z",
    "double underscore": r"__",
    "hash sign": r"#",
    "slash or backslash": r"[/\\]",
}
HELPERS = {
    "ends a line": r"\n[ \t]*\Z",
    "ends in a letter": r"[^\W\d_]\Z",
    "starts with a letter": r"\A[^\W\d_]",
    "starts with a comma": r"\A,",
}
"""Patterns that only rules about several tokens use."""
PATTERNS = TEXT | MORE | HELPERS
AROUND = (
    "inside brackets", "first in a list", "later in a list", "start of a line", "number before a comma",
    "continues a word", "ends a word of several tokens", "starts a word of several tokens",
)  # fmt: skip
POSITIONS = ("first token of the row", "first 4 tokens of the row", "first half of the row")

Labels = Callable[[HookedRun], Bool[Tensor, "token rule"]]


@dataclass(frozen=True)
class Rules:
    """All rules, and a function that labels the tokens of a block of whole rows."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """`token` (its identity), `text` (its characters), `context` (the text around it) or `position`."""
    labels: Labels


def make(vocab: Sequence[str], tokens: Sequence[int], before: Sequence[int]) -> Rules:
    """Return the rules for a vocabulary.

    Args:
        vocab: text of each token; empty if unknown, so that only rules about tokens and positions are made.
        tokens: tokens that may each be a rule, the most promising first.
        before: tokens that may be a rule about the token before.
    """
    table = _table(vocab)
    own, previous = list(tokens[:N_TOKENS]), list(before[:N_BEFORE])

    def name(token: int) -> str:
        return repr(readable(vocab[token])) if vocab else str(token)

    groups = {
        "text": [*TEXT, *MORE] if vocab else [],
        "context": [
            *((*(f"after: {each}" for each in BEFORE), *AROUND) if vocab else ()),
            *(f"after the token {name(token)}" for token in previous),
        ],
        "position": POSITIONS,
        "token": [f"the token {name(token)}" for token in own],
    }

    def labels(run: HookedRun) -> Tensor:
        of_text = _of_text(run, vocab, table) if vocab else []
        parts = [
            *of_text, _equal(run.tokens.roll(1), previous), _positions(run), _equal(run.tokens, own)
        ]  # fmt: skip
        return torch.cat([part.to(run.device) for part in parts], dim=1) & ~run.is_bos[:, None]

    return Rules(
        tuple(each for names in groups.values() for each in names),
        tuple(kind for kind, names in groups.items() for _ in names),
        labels,
    )


def _table(vocab: Sequence[str]) -> Bool[Tensor, "d_vocab pattern"]:
    """Return the patterns that each token's text matches."""
    patterns = [re.compile(pattern) for pattern in PATTERNS.values()]
    rows = [[bool(pattern.search(text)) for pattern in patterns] for text in vocab]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(vocab), len(patterns))


def _of_text(
    run: HookedRun, vocab: Sequence[str], table: Bool[Tensor, "d_vocab pattern"]
) -> list[Bool[Tensor, "token rule"]]:
    """Return the labels of the rules of the kinds `text` and `context`, in their order."""
    tokens, starts = run.tokens.cpu(), run.is_bos.cpu()
    # No pattern matches BOS, so that `roll` finds nothing before the first token of a row and after the last one.
    matches = table[tokens] & ~starts[:, None]
    column = dict(zip(PATTERNS, matches.T, strict=True))
    texts = [vocab[token] for token in tokens.tolist()]
    listed = [torch.from_numpy(holds) for _, _, holds in in_brackets(texts, starts.numpy())]
    continues = column["starts with a letter"] & column["ends in a letter"].roll(1)
    goes_on = continues.roll(-1)
    around = [
        *listed, column["ends a line"].roll(1), column["number"] & column["starts with a comma"].roll(-1),
        continues, continues & ~goes_on, goes_on & ~continues,
    ]  # fmt: skip
    before = torch.stack([column[each].roll(1) for each in BEFORE], dim=1)
    return [matches[:, : len(TEXT) + len(MORE)], before, torch.stack(around, dim=1)]


def _positions(run: HookedRun) -> Tensor:
    pos = run.pos
    return torch.stack([pos == 1, pos <= 4, pos <= int(pos.max()) // 2], dim=1)


def _equal(tokens: Tensor, wanted: Sequence[int]) -> Tensor:
    return tokens[:, None] == torch.tensor(wanted, dtype=torch.long, device=tokens.device)
