"""Planted neurons: examples with a known answer, made from the text and the activations of the study's neurons.

A neuron of one rule fires at tokens of one class, so a person should call it interpretable. A neuron of four
rules fires at four unrelated classes, a quarter of its examples each, so no rule covers 80% of them. The classes
are those of the planted models C10 and C11 (protocol.md section 6), in text. Their examples have the length, and
their firings the sizes, of the examples of a real neuron, so that they look like any other item.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from soluscope.rating.shown import Example

RULES = {
    "a number": r"\A\s*\d+\Z",
    "a word in capitals": r"\A\s*[A-Z][a-z]+\Z",
    "an opening bracket": r"\A\s*[(\[{]+\Z",
    "a closing bracket": r"\A\s*[)\]}]+\Z",
    "a comma": r"\A\s*,\Z",
    "a full stop": r"\A\s*\.\Z",
    "an equals sign": r"\A\s*=+\Z",
    "a quotation mark": r"\A\s*[\"'`]+\Z",
    "a colon": r"\A\s*:\Z",
    "an underscore": r"\A\s*_+\Z",
    "a line end": r"\A\s*\n\s*\Z",
    "an article": r"\A\s*(?:the|a|an)\Z",
    "a preposition": r"\A\s*(?:of|in|on|at|to|by|for|from|with)\Z",
    "a form of be": r"\A\s*(?:is|are|was|were|be|been)\Z",
    "a conjunction": r"\A\s*(?:and|or|but)\Z",
    "self": r"\A\s*self\Z",
    "return": r"\A\s*return\Z",
    "if": r"\A\s*if\Z",
    "not": r"\A\s*not\Z",
}
"""Classes of tokens by name: no token is in two of them."""
_PATTERNS = {name: re.compile(pattern) for name, pattern in RULES.items()}
N_OF_NO_ANSWER = 4
"""Rules of a neuron that no rule explains: a quarter of its examples each."""
BESIDE = 0.25
"""Largest activation of a token outside the rule, as a share of the example's largest."""


class Text:
    """Examples from the study's text, by the rule that their marked token follows."""

    def __init__(self, examples: Iterable[Example]) -> None:
        """Sort examples of the study's neurons; their activations are not used.

        Only the marked token counts. So a planted neuron's mark is as far from the ends of an example as a real
        neuron's mark.
        """
        self.by_rule: dict[str, list[Example]] = {}
        known: set[tuple[tuple[str, ...], int]] = set()
        for each in examples:
            key = (each.tokens, each.at)
            rule = rule_of(each.tokens[each.at])
            if rule and key not in known:
                known.add(key)
                self.by_rule.setdefault(rule, []).append(each)

    def rules(self, n: int) -> list[str]:
        """Return the rules with at least `n` examples in different windows."""
        return [
            name
            for name, found in self.by_rule.items()
            if len({each.tokens for each in found}) >= n
        ]

    def draw(self, rule: str, n: int, rng: np.random.Generator) -> list[Example]:
        """Return `n` examples of a rule in different windows."""
        found = self.by_rule[rule]
        drawn: dict[tuple[str, ...], Example] = {}
        for i in rng.permutation(len(found)):
            if len(drawn) == n:
                break
            drawn.setdefault(found[i].tokens, found[i])
        return list(drawn.values())


def rule_of(token: str) -> str | None:
    """Return the name of the rule that a token follows, or None."""
    return next((name for name, pattern in _PATTERNS.items() if pattern.match(token)), None)


def of_one_rule(
    text: Text, template: Sequence[Example], rng: np.random.Generator
) -> tuple[str, list[Example]] | None:
    """Return a rule's name and examples that fire at its tokens, or None without a rule that has enough examples.

    Args:
        text: windows of the study's text.
        template: examples of a real neuron, whose activations the planted neuron gets.
    """
    usable = text.rules(len(template))
    if not usable:
        return None
    rule = usable[rng.integers(len(usable))]
    drawn = text.draw(rule, len(template), rng)
    rules = [rule] * len(drawn)
    return rule, _fired(drawn, rules, template, rng)


def of_many_rules(
    text: Text, template: Sequence[Example], rng: np.random.Generator
) -> tuple[str, list[Example]] | None:
    """Return the names of four rules and examples that fire at the tokens of one of them each; else None."""
    share = -(-len(template) // N_OF_NO_ANSWER)
    usable = text.rules(share * N_OF_NO_ANSWER)
    if len(usable) < N_OF_NO_ANSWER:
        return None
    chosen = [usable[i] for i in rng.permutation(len(usable))[:N_OF_NO_ANSWER]]
    drawn: list[Example] = []
    rules: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for number, rule in enumerate(chosen):
        n = len(range(number, len(template), N_OF_NO_ANSWER))
        fresh = [
            each for each in text.draw(rule, share * N_OF_NO_ANSWER, rng) if each.tokens not in seen
        ]
        seen |= {each.tokens for each in fresh[:n]}
        drawn += fresh[:n]
        rules += [rule] * len(fresh[:n])
    if len(drawn) < len(template):
        return None
    order = rng.permutation(len(drawn))  # so that each rule has large and small firings
    mixed = _fired([drawn[i] for i in order], [rules[i] for i in order], template, rng)
    return ", ".join(chosen), mixed


def _fired(
    drawn: Sequence[Example],
    rules: Sequence[str],
    template: Sequence[Example],
    rng: np.random.Generator,
) -> list[Example]:
    """Return the examples with activations at the tokens of each example's rule, as large as the template's."""
    return [
        _with_activations(example, rule, like, rng)
        for example, rule, like in zip(drawn, rules, template, strict=True)
    ]


def _with_activations(
    example: Example, rule: str, like: Example, rng: np.random.Generator
) -> Example:
    """Return an example that fires fully at its marked token, nearly so at others of the rule, little elsewhere."""
    largest = like.activations[like.at]
    others = [value for place, value in enumerate(like.activations) if place != like.at]
    beside = rng.choice(np.array(others or [0.0]), len(example.tokens))
    values = np.minimum(beside, BESIDE * largest)
    for place, token in enumerate(example.tokens):
        if rule_of(token) == rule:
            values[place] = largest * rng.uniform(0.7, 1.0)
    values[example.at] = largest
    return replace(example, activations=tuple(map(float, values)))
