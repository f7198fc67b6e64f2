"""Proxy (c): a language model explains a neuron from examples, then detects other texts in which it is active.

The model sees up to `N_SHOWN` texts from half 0 of the documents, the largest activation first, in which active
tokens are marked, and writes one line. Then it sees this line and up to `N_TESTED` unmarked texts from half 1, half
of them with an active token, in random order, and names the texts in which the neuron is active. The number is its
balanced accuracy: the mean of the shares of right answers to texts with and without an active token. Guessing
gives .5.

This proxy is off unless a language model is given. The model receives texts of the study.

Source: detection scoring of Paulo et al. 2024, "Automatically Interpreting Millions of Features in Large Language
Models"; the prompts are ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from soluscope.proxies import Complete, Proxy, Seen, Window

N_SHOWN = 10
"""Most texts from which the neuron is explained."""
N_TESTED = 10
"""Most texts on which the explanation is tested."""
MIN_TEXTS = 3
"""Fewest texts with an active token in half 0, and of each kind in half 1."""
LONGEST = 400
"""Most characters of an explanation."""
EXPLAIN = """\
A unit of a language model is active at the tokens between << and >> in the texts below. Say in one line of at \
most 20 words which rule or category of tokens or texts makes it active. Answer with that line alone.

{texts}"""
DETECT = """\
A unit of a language model is active at some tokens. A possible description of these tokens: {explanation}

Which of the texts below contain a token at which the unit is active? Answer with the numbers of these texts, \
separated by commas, or with the word none.

{texts}"""


def lm_detection(seen: Seen, complete: Complete) -> float | None:
    """Return the balanced accuracy, in [0, 1]; None with fewer than `MIN_TEXTS` texts of a kind."""
    shown = [each for each in _by_activation(seen, 0) if _is_active(each, seen)][:N_SHOWN]
    tested = list(_tested(seen))
    answers = np.array([_is_active(each, seen) for each in tested], bool)
    if min(len(shown), answers.sum(), (~answers).sum()) < MIN_TEXTS:
        return None
    texts = _numbered([_marked(each, seen) for each in shown])
    explanation = " ".join(complete(EXPLAIN.format(texts=texts)).split())[:LONGEST]
    texts = _numbered([_plain(each, seen) for each in tested])
    reply = complete(DETECT.format(explanation=explanation, texts=texts))
    named = {int(number) for number in re.findall(r"\b\d{1,3}\b", reply)}
    found = np.array([number in named for number in range(1, len(tested) + 1)])
    return float((found[answers].mean() + (~found[~answers]).mean()) / 2)


def _by_activation(seen: Seen, half: int) -> list[Window]:
    """Return the windows of a half that share no token, the largest activation at the example's token first."""
    chosen: list[Window] = []
    taken: set[tuple[int, int]] = set()
    of_half = (each for each in seen.windows if each.half == half)
    for window in sorted(of_half, key=lambda each: -each.activations[each.peak]):
        places = {(window.row, window.start + at) for at in range(len(window.tokens))}
        if not taken & places:
            taken |= places
            chosen.append(window)
    return chosen


def _tested(seen: Seen) -> Iterator[Window]:
    """Yield windows of half 1 in random order, as many with an active token as without one."""
    windows = _by_activation(seen, 1)
    rng = np.random.default_rng(0)
    kinds = [[each for each in windows if _is_active(each, seen) is kind] for kind in (True, False)]
    n = min(N_TESTED // 2, *map(len, kinds))
    drawn = [of[i] for of in kinds for i in rng.permutation(len(of))[:n]]
    yield from (drawn[i] for i in rng.permutation(len(drawn)))


def _is_active(window: Window, seen: Seen) -> bool:
    return bool((window.activations >= seen.level).any())


def _marked(window: Window, seen: Seen) -> str:
    parts = zip(window.tokens, window.activations, strict=True)
    return "".join(
        f"<<{seen.vocabulary[token]}>>" if value >= seen.level else seen.vocabulary[token]
        for token, value in parts
    )


def _plain(window: Window, seen: Seen) -> str:
    return "".join(seen.vocabulary[token] for token in window.tokens)


def _numbered(texts: Sequence[str]) -> str:
    """Return one line per text, in which line ends and tabs are escapes."""
    lines = (text.replace("\n", "\\n").replace("\t", "\\t") for text in texts)
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


PROXY = Proxy(
    label="detection by a language model", unit="balanced accuracy", measure=lm_detection, asks=True
)
