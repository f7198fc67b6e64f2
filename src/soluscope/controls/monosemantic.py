"""C10: one neuron for every class of tokens. Interpretability probes must give it a perfect score.

32 neurons, eps 1e-12. There are 31 classes of 4 tokens: 13 classes that are defined by their characters
(numbers, closing brackets, words in -ing, ...) and 18 syllables with 4 endings each. A token of class c has
x = 6 on neuron c and 0 elsewhere; BOS has x = 6 on the last neuron. So hook_mid is
6 e^6 / (e^6 + 31) = 5.5718 on the neuron of the class and 0 on the others, and hook_post is
sqrt(31) = 5.5678 and -1 / sqrt(31) = -.1796. Each neuron fires for every token of one class and for no
other token, at one level, before and after the norm: its specificity is 1, and one rule per neuron reaches
F1 1. The gain is one number, 1.0315. The logits are a random readout, equal for the tokens of a class.

Source: protocol.md section 6, C10.
"""

from __future__ import annotations

from torch import Tensor

from soluscope.controls import Control, Planted, _shell

N, EPS, LEVEL = 32, 1e-12, 6.0
CLASSES = (
    ("0", "1", "22", "333"),
    ("AB", "CD", "EFG", "HI"),
    ("(", "[", "{", "(("),
    (")", "]", "}", "))"),
    ("+", "*", "/", "%"),
    ("'", '"', "`", "''"),
    (",", ",,", ",;", ",:"),
    (".", "..", "...", ".;"),
    ("\n", "\n\n", "\n ", "\n\t"),
    ("_", "__", "_x", "_y"),
    ("é", "ñ", "ü", "ß"),
    ("if", "for", "while", "def"),
    ("going", "making", "asking", "saying"),
    *(
        tuple(consonant + vowel + end for end in ("d", "ft", "g", "nk"))
        for consonant in ("b", "d", "f", "l", "m", "p")
        for vowel in ("a", "e", "i")
    ),
)
VOCAB = (_shell.BOS_TEXT, *(token for members in CLASSES for token in members))
CLASS_OF = (N - 1, *(c for c, members in enumerate(CLASSES) for _ in members))
"""Class of each token of the vocabulary; BOS is the only member of its class."""


def planted(levels: Tensor) -> Planted:
    """Return the model whose tokens of class c have the pre-activations `levels`[c]. [n_classes + 1, d_mlp]"""
    pre = levels[list(CLASS_OF)]
    model = _shell.anchored(pre, _shell.random_effect(1, _shell.post(pre, EPS), len(VOCAB)), EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB, n_rows=192)})


def build() -> Planted:
    return planted(LEVEL * _shell.one_hot(N, N))


CONTROL = Control(
    section="C10",
    truth="Each neuron fires for exactly one class of tokens, at one level, before and after the norm.",
    build=build,
)
