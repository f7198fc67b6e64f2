"""A neuron's activations at each token of a text, and the mid norm's gain there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from soluscope.data.streams import Stream
from soluscope.errors import UserError
from soluscope.hooked.activations import observe
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.neurons.schema import STAGES, Stage
from soluscope.notebook.arguments import vocabulary
from soluscope.text import readable


@dataclass(frozen=True)
class OnText:
    """A neuron on the tokens of a text, without BOS."""

    ids: tuple[int, ...]
    """Numbers of the tokens in the vocabulary."""
    tokens: tuple[str, ...]
    """The tokens' texts; characters that cannot be seen are written as escapes."""
    activations: dict[Stage, tuple[float, ...]]
    """The neuron's activation at each token, at `pre`, `mid` and `post`."""
    gain: tuple[float, ...]
    """The mid norm's gain at each token: 1 without a mid norm, nan if neurons of a token have different gains."""


def on_text(model: SoluscopeTransformer, neuron: int, text: str) -> OnText:
    """Return the tokens of a text and a neuron's activations at them.

    Args:
        model: a model from `soluscope.load`.
        neuron: index of a neuron of the last layer, which the model has.
        text: a text of at most the model's context, BOS included.

    Raises:
        UserError: if the text has no tokens or too many, or the model cannot be read.
    """
    if not isinstance(text, str) or not text:
        raise UserError(f"text={text!r:.60} has no tokens: give a text")
    rows = model.to_tokens(text, truncate=False).cpu()  # a text that is too long must be refused
    if rows.shape[1] > model.cfg.n_ctx:
        raise UserError(
            f"text= has {rows.shape[1]} tokens with BOS, and the model has ctx={model.cfg.n_ctx}: shorten the text"
        )
    kept = torch.ones_like(rows, dtype=torch.bool)
    run = observe(model, Stream("text", rows, torch.zeros_like(rows), kept, model.facts.bos))
    ids = tuple(run.tokens[1:].tolist())
    texts = vocabulary(model)
    activations: dict[Stage, tuple[float, ...]] = {
        stage: tuple(getattr(run, stage)[1:, neuron].double().tolist()) for stage in STAGES
    }
    gain = tuple(run.gain[1:].double().tolist())
    return OnText(ids, tuple(readable(texts[token]) for token in ids), activations, gain)
