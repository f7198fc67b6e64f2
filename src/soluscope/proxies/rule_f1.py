"""Proxy (a): F1 of the neuron's best rule about its token, the text around it, or its position.

The rule and the level of activation are chosen on one half of the documents; F1 is of the other half. It is stored
with the neurons (`neurons/rules.py` lists the rules). A neuron that one rule describes has F1 near 1. A readable
neuron whose rule is not in the list has a low F1.

Source: the regular expressions of Elhage et al. 2022, section 6.3.2; the choice on one half is ours.
"""

from __future__ import annotations

from soluscope.proxies import Complete, Proxy, Seen


def rule_f1(seen: Seen, _: Complete) -> float | None:
    """Return the stored F1."""
    return seen.rule_f1


PROXY = Proxy(label="F1 of the best rule", unit="F1", measure=rule_f1)
