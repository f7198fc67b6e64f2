"""The neurons that the report shows: found on one half of the documents, described by the other half."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from soluscope.neurons.schema import SIDES, TOP, Part
from soluscope.results import READABILITY, Measurement, NeuronFound, Record, Untrained

N_FOUND = 10
"""Number of neurons in each list."""
LISTS = {"most readable": "chosen_f1", "most changed by the norm": "chosen_drop"}
"""Column of the rules, computed on half 0 of the documents, by which the neurons of each list are found."""


def of_part(
    part: Part, tables: dict[str, pd.DataFrame], texts: list[str], about: dict[str, Any]
) -> list[Record]:
    """Return the records of a stored part: how readable the neurons are, and the lists of the trained part."""
    rules = tables["rules"]
    f1 = rules.loc[rules["side"] == SIDES[0], "f1_mid"].dropna()
    number = about | {
        "probe": "neurons", "quantity": READABILITY, "statistic": "median", "stream": "natural", "unit": "F1",
        "value": float(f1.median()) if len(f1) else None, "n": len(f1),
        "note": "neurons without a rule are left out; neurons of one model are not independent: no interval",
    }  # fmt: skip
    if part == "untrained":
        return [Untrained(**number)]
    return [Measurement(**number), *found(tables, texts, about)]


def found(
    tables: dict[str, pd.DataFrame], texts: list[str], about: dict[str, Any]
) -> Iterator[NeuronFound]:
    """Yield the neurons of each list, the best first.

    Args:
        tables: the tables of a stored part.
        texts: readable text of each token.
        about: the fields that all records about the run share.
    """
    rules = tables["rules"]
    before_norm = rules[(rules["side"] == SIDES[0]) & (rules["rule"] != "")]
    for name, column in LISTS.items():
        best = before_norm.dropna(subset=[column]).nlargest(N_FOUND, column)
        for place, row in enumerate(best.to_dict("records")):
            before, text, after = _example(tables["examples"], row["neuron"], texts)
            yield NeuronFound(
                **about, quantity=name, place=place, neuron=row["neuron"], rule=row["rule"],
                f1_mid=row["f1_mid"], f1_post=row["f1_post"], drop=row["drop"],
                before=before, text=text, after=after,
            )  # fmt: skip


def _example(examples: pd.DataFrame, neuron: int, texts: list[str]) -> tuple[str, str, str]:
    """Return the text before, at and after the neuron's largest activation after the norm, in half 1."""
    of_neuron = examples[(examples["neuron"] == neuron) & (examples["half"] == 1)]
    top = of_neuron[(of_neuron["stage"] == SIDES[1]) & (of_neuron["range"] == TOP)]
    if top.empty:
        return "", "", ""
    words, peak = [texts[token] for token in top["tokens"].iloc[0]], int(top["peak"].iloc[0])
    return "".join(words[:peak]), words[peak], "".join(words[peak + 1 :])
