"""Checks of arguments that several functions of this folder share."""

from __future__ import annotations

import operator
from typing import Any

from tokenizers import Tokenizer

from soluscope.data.tokenizer import texts_of
from soluscope.errors import UserError
from soluscope.hooked.activations import check_model
from soluscope.hooked.convert import SoluscopeTransformer


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return the argument `name` as an int.

    Raises:
        UserError: if it is not a whole number from `least` to `most`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least or (most is not None and number > most):
        wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
        raise UserError(f"{name}={value!r:.60} is not a whole number {wanted}: set {name}= to one")
    return number


def check_loaded(model: Any) -> None:
    """Refuse everything but a model that soluscope has loaded and the probes can read.

    Raises:
        UserError: naming the type, or the part of the model that cannot be read.
    """
    if not isinstance(model, SoluscopeTransformer):
        raise UserError(
            f"model is of type {type(model).__name__}, wanted a model: load a run's with soluscope.load(folder)"
        )
    check_model(model)


def vocabulary(model: SoluscopeTransformer) -> tuple[str, ...]:
    """Return the text of each row of the model's unembedding; empty for a row without a token."""
    n_rows: int = model.cfg.d_vocab
    texts = texts_of(Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str()))
    return texts + ("",) * (n_rows - len(texts))
