"""Checks of the stored tables of neurons, which others may have written: columns, types, and bounds of numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

from soluscope.neurons.schema import N_RANGES, SIDES, STAGES, TOP

WHOLE, NUMBER, TEXT, WHOLES, NUMBERS = "whole number", "number", "text", "whole numbers", "numbers"
_BY_SIDE = ("precision", "recall", "f1", "above")
COLUMNS: dict[str, dict[str, str]] = {
    "examples": (
        dict.fromkeys(("neuron", "range", "rank", "row", "half", "document", "pos", "peak"), WHOLE)
        | dict.fromkeys(("effect", "D", "k_eff", "gain", "engagement"), NUMBER)
        | {"stage": TEXT, "tokens": WHOLES}
        | dict.fromkeys(STAGES, NUMBERS)
    ),
    "neurons": (
        {"neuron": WHOLE}
        | dict.fromkeys(("gamma", "effect", "D"), NUMBER)
        | {f"{name}_{stage}": NUMBER for name in ("kurtosis", "share") for stage in STAGES}
        | {f"{name}_{side}": NUMBER for name in ("k_eff", "engagement") for side in SIDES}
        | {f"histogram_{stage}": WHOLES for stage in STAGES}
    ),
    "rules": (
        {"neuron": WHOLE, "side": TEXT, "rule": TEXT, "drop": NUMBER}
        | {f"{name}_{side}": NUMBER for name in _BY_SIDE for side in SIDES}
        | {f"consistent_{side}": NUMBERS for side in SIDES}
    ),
    "logits": {"neuron": WHOLE, "side": TEXT, "rank": WHOLE, "token": WHOLE, "logit": NUMBER},
}
"""The columns of each table that are read, and the type of their values."""
_IS: dict[str, tuple[str, ...]] = {
    WHOLE: ("is_integer",), NUMBER: ("is_floating",), TEXT: ("is_string", "is_large_string"),
    WHOLES: ("is_integer",), NUMBERS: ("is_floating",),
}  # fmt: skip


def check_columns(name: str, schema: pa.Schema) -> None:
    """Refuse a table that lacks a column, or has a column of another type.

    Raises:
        ValueError: naming the column.
    """
    for column, kind in COLUMNS[name].items():
        if schema.names.count(column) != 1:
            raise ValueError(f"it has {schema.names.count(column)} columns {column!r} instead of 1")
        found = schema.field(column).type
        inner = found.value_type if kind in (WHOLES, NUMBERS) and pa.types.is_list(found) else found
        is_list = inner is not found
        if is_list != (kind in (WHOLES, NUMBERS)) or not any(
            getattr(pa.types, each)(inner) for each in _IS[kind]
        ):
            raise ValueError(f"its column {column!r} has no {kind}")


def check_values(
    name: str, table: pd.DataFrame, bounds: Mapping[str, int], whole: bool = True
) -> None:
    """Refuse a table with numbers that are out of bounds, or with other lines than one per neuron and side.

    Args:
        name: the table.
        table: lines of the table, with the columns of `COLUMNS`.
        bounds: number of neurons, tokens of the vocabulary, and documents: `neuron`, `token`, `document`.
        whole: False for some lines of the table.

    Raises:
        ValueError: with the reason.
    """
    n = bounds["neuron"]
    for column, most in bounds.items():
        if column in table and not table[column].between(0, most - 1).all():
            raise ValueError(f"its column {column!r} has a number that is not from 0 to {most - 1}")
    if name == "examples":
        _check_examples(table, bounds["token"])
    if not whole:
        return
    if name == "neurons" and table["neuron"].tolist() != list(range(n)):
        raise ValueError(f"it has not one line for each of {n} neurons")
    if name == "rules":
        lines = set(zip(table["neuron"], table["side"], strict=True))
        if len(table) != len(lines) or lines != {(i, side) for i in range(n) for side in SIDES}:
            raise ValueError(f"it has not one line for each of {n} neurons and each side")


def _check_examples(table: pd.DataFrame, n_vocab: int) -> None:
    """Refuse examples that are not in groups of neurons, or whose windows do not fit.

    Raises:
        ValueError: with the reason.
    """
    if not table["neuron"].is_monotonic_increasing:
        raise ValueError("its lines are not ordered by neuron")
    if not table["range"].between(TOP, N_RANGES - 1).all() or not table["stage"].isin(STAGES).all():
        raise ValueError("it has an unknown range or stage")
    lengths = table["tokens"].map(len)
    if not table["peak"].between(0, lengths - 1).all():
        raise ValueError("a peak is outside of its window")
    for stage in STAGES:
        if not lengths.equals(table[stage].map(len)):
            raise ValueError(f"windows have other numbers of tokens than of activations {stage}")
    windows = [*table["tokens"]]
    tokens = np.concatenate(windows) if windows else np.zeros(0, int)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < n_vocab:
        raise ValueError(f"it has a token that is not from 0 to {n_vocab - 1}")
