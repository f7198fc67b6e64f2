"""`soluscope.neuron`: a neuron's card, its activations on a text before and after the mid norm, and its effects."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.neurons import stored
from soluscope.neurons.schema import STAGES, Stage
from soluscope.neurons.stored import Example
from soluscope.notebook.arguments import check_loaded, whole
from soluscope.notebook.examples import LEFT, PLAIN, TEXT
from soluscope.notebook.logits import logit_effect
from soluscope.notebook.on_text import on_text
from soluscope.terminal import shown

if TYPE_CHECKING:
    import pandas as pd

N_EXAMPLES = 10
"""Number of stored examples on a card."""
STRONGEST = "213, 94, 0"
LOWEST = "0, 114, 178"
"""Colours of the largest positive and negative activations."""


@dataclass(frozen=True)
class Card:
    """A neuron on a text, with the tokens that it writes. A notebook shows it as tables with coloured tokens."""

    title: str
    tokens: tuple[str, ...]
    """Tokens of the text after BOS; characters that cannot be seen are written as escapes."""
    activations: dict[Stage, tuple[float, ...]]
    """The neuron's activation at each token, at `pre`, `mid` and `post`."""
    logits: pd.DataFrame = field(repr=False)
    """Tokens that the neuron raises and lowers most; see `soluscope.logit_effect`."""
    rules: pd.DataFrame | None = field(default=None, repr=False)
    """Best rules before and after the norm. None: 'soluscope neurons' has not been run."""
    examples: tuple[Example, ...] = field(default=(), repr=False)
    """Stored examples of the largest activations after the norm."""

    def __repr__(self) -> str:
        lines = [self.title, f"{'token':>20} " + " ".join(f"{stage:>10}" for stage in STAGES)]
        for place, token in enumerate(self.tokens):
            values = " ".join(f"{self.activations[stage][place]:10.4g}" for stage in STAGES)
            lines.append(f"{token!r:>20} {values}")
        return "\n".join(map(shown, lines))

    def _repr_html_(self) -> str:
        """Return the card with all text escaped, for notebooks."""
        parts = [f"<p>{html.escape(shown(self.title))}</p>"]
        if self.tokens:
            lines = ((stage, _coloured(self.tokens, self.activations[stage])) for stage in STAGES)
            parts.append(_table(("stage", "text"), lines))
        for side, table in self.logits.groupby("side", sort=False):
            pairs = zip(table["text"].tolist(), table["logit"].tolist(), strict=True)
            texts = ", ".join(f"{html.escape(text)} {logit:.3g}" for text, logit in pairs)
            parts.append(f"<p>{side} logits: {texts}</p>")
        if self.rules is not None:
            rows = (
                (
                    row["side"],
                    html.escape(row["rule"]),
                    *(f"{row[name]:.2f}" for name in ("f1_mid", "f1_post", "drop")),
                )
                for row in self.rules.to_dict("records")
            )
            parts.append(_table(("found at", "rule", "F1 before", "F1 after", "drop"), rows))
        if self.examples:
            found = (
                (f"{each.activation:.4g}", _coloured(each.tokens, each.activations["post"]))
                for each in self.examples
            )
            parts.append(_table(("post", "largest activations"), found))
        return f'<div class="{PLAIN}">{"".join(parts)}</div>'


def neuron(model: SoluscopeTransformer, neuron: int, text: str | None = None) -> Card:
    """Return the card of a neuron of the last layer.

    Args:
        model: a model from `soluscope.load`.
        neuron: index of the neuron, from 0.
        text: a text whose tokens are shown with the neuron's activation at each stage, at most the model's context.
            None: only the stored part of the card.

    Returns:
        The card. With the results of 'soluscope neurons' in the run's folder, it also has the neuron's rules and
        examples. Change one token of the text and compare the cards.

    Raises:
        UserError: if the model cannot be read, there is no such neuron, or the text has no tokens.
    """
    check_loaded(model)
    number = whole("neuron", neuron, 0, model.cfg.d_mlp - 1)
    tokens: tuple[str, ...] = ()
    activations: dict[Stage, tuple[float, ...]] = {}
    if text is not None:
        seen = on_text(model, number, text)
        tokens, activations = seen.tokens, seen.activations
    rules: pd.DataFrame | None = None
    examples: tuple[Example, ...] = ()
    if model.run_dir is not None and "trained" in stored.parts_of(model.run_dir):
        neurons = stored.read(model.run_dir)
        rules = neurons.rules[neurons.rules["neuron"] == number]
        examples = tuple(neurons.top(number, "post")[:N_EXAMPLES])
    title = f"neuron {number} of {model.facts.run}"
    return Card(title, tokens, activations, logit_effect(model, number), rules, examples)


def _coloured(tokens: tuple[str, ...], values: tuple[float, ...]) -> str:
    """Return tokens as escaped HTML with a colour for each activation."""
    largest = max(map(abs, values), default=0.0) or 1.0
    spans = []
    for token, value in zip(tokens, values, strict=True):
        colour = f"rgba({STRONGEST if value > 0 else LOWEST}, {abs(value) / largest * 0.6:.2f})"
        spans.append(
            f'<span style="background: {colour}" title="{value:.4g}">{html.escape(token)}</span>'
        )
    return "".join(spans)


def _table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are HTML already."""
    head = "".join(f'<th {LEFT} scope="col">{name}</th>' for name in heads)
    body = "".join(
        f"<tr>{''.join(f'<td {TEXT}>{cell}</td>' for cell in line)}</tr>" for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
