"""`soluscope.top_examples`: the tokens at which a neuron is most active, with the text around them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from soluscope.config import EvalConfig
from soluscope.errors import UserError
from soluscope.hooked.activations import rows_at_once
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.neurons.selection import TopByDocument
from soluscope.notebook.arguments import check_loaded, vocabulary, whole
from soluscope.notebook.tokens import rows_of
from soluscope.plugins import check_name
from soluscope.terminal import shown
from soluscope.text import readable

HOOKS = ["hook_mid", "hook_post"]
WANTED = "whole numbers [row pos]: use model.to_tokens(texts)"
LEFT = 'style="text-align: left"'
TEXT = 'style="text-align: left; white-space: pre-wrap; font-family: monospace"'
PLAIN = "tex2jax_ignore mathjax_ignore"
"""Classes of elements whose dollar signs notebooks do not take for formulas."""


@dataclass(frozen=True)
class Example:
    """A token and the text around it; characters that cannot be seen are written as escapes."""

    activation: float
    document: str
    """Name of the document; for your own tokens, the row."""
    row: int
    """Row of the tokens."""
    pos: int
    """Position in the row; 0 is BOS."""
    before: str
    token: str
    after: str


class Examples(list[Example]):
    """Examples, the largest activation first. `pandas.DataFrame(examples)` is a table of them."""

    def __init__(self, title: str, examples: Iterable[Example]) -> None:
        super().__init__(examples)
        self.title = title

    def __repr__(self) -> str:
        lines = [
            f"{each.activation:10.4g}  {each.document}:  {each.before}\u00ab{each.token}\u00bb{each.after}"
            for each in self
        ]
        return "\n".join(map(shown, [self.title, *lines]))

    def _repr_html_(self) -> str:
        """Return a table with all text escaped, for notebooks."""
        lines = []
        for each in self:
            document, before, token, after = map(
                html.escape, (shown(each.document), each.before, each.token, each.after)
            )
            lines.append(
                f"<tr><td>{each.activation:.4g}</td><td {LEFT}>{document}</td>"
                f"<td {TEXT}>{before}<mark>{token}</mark>{after}</td></tr>"
            )
        heads = f"<tr><th>activation</th><th {LEFT}>document</th><th {LEFT}>text</th></tr>"
        table = f"<table><thead>{heads}</thead><tbody>{''.join(lines)}</tbody></table>"
        return f'<div class="{PLAIN}"><p>{html.escape(shown(self.title))}</p>{table}</div>'


def top_examples(
    model: SoluscopeTransformer,
    neuron: int,
    n: int = 10,
    tokens: Int[Tensor, "row pos"] | None = None,
    *,
    hook: str = "hook_post",
    context: int = 20,
) -> Examples:
    """Return the `n` tokens at which a neuron of the last layer is most active, at most one of each document.

    BOS and padding are left out.

    Args:
        model: a model from `soluscope.load`.
        neuron: index of the neuron, from 0.
        n: number of examples; there are fewer if there are fewer documents.
        tokens: tokens to search, such as `model.to_tokens(texts)`. A document ends at EOS and at the end of
            its row. By default, the tokens of the report split on which the loss is measured.
        hook: `hook_post`, the activation after the mid norm, or `hook_mid`, the one before. In a model without a
            mid norm they are the same.
        context: number of tokens to show on either side, at most up to the bounds of the document and the row.

    Raises:
        UserError: if the model cannot be read, there is no such neuron or hook, `tokens` are not tokens of the
            model, or the model belongs to no study and `tokens` is not given.
    """
    check_loaded(model)
    neuron = whole("neuron", neuron, 0, model.cfg.d_mlp - 1)
    n, context = whole("n", n, 1), whole("context", context, 0)
    check_name("hook", hook, HOOKS)
    if getattr(model.blocks[-1].mlp, "ln", None) is None:
        hook = "hook_post"  # TransformerLens has no hook_mid without a mid norm
    name = f"blocks.{model.cfg.n_layers - 1}.mlp.{hook}"
    rows, owner, name_of = _of_study(model) if tokens is None else _given(model, tokens)
    kept = (rows != model.facts.bos) & (rows != model.facts.pad)
    if not kept.any():
        raise UserError("tokens= holds only BOS and padding: give rows with text")
    activation = _activations(model, rows, name, neuron)
    texts = vocabulary(model)
    examples = []
    for row, pos in _largest(activation, owner, kept, n):
        same = (owner[row] == owner[row, pos]) & kept[row]
        around = [at for at in range(pos - context, pos + context + 1) if 0 <= at < len(same)]
        sides = [[at for at in around if at < pos], [at for at in around if at > pos]]
        before, token, after = (
            _joined(texts[rows[row, at]] for at in places if same[at])
            for places in (sides[0], [pos], sides[1])
        )
        value, document = float(activation[row, pos]), name_of(int(owner[row, pos]))
        examples.append(Example(value, document, row, pos, before, token, after))
    title = f"{name}, neuron {neuron} of {model.facts.run}: largest activations, one example of each document"
    return Examples(title, examples)


Found = tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"], Callable[[int], str]]
"""Tokens, the number of each token's document, and a function from that number to the document's name."""


def _of_study(model: SoluscopeTransformer) -> Found:
    """Return the rows of the report split on which the loss is measured."""
    if model.run_dir is None:
        raise UserError(
            f"{model.facts.run} was loaded from no study: set tokens=, as in tokens=model.to_tokens(texts)"
        )
    rows, chosen = rows_of(model, "report", EvalConfig().n_loss_tokens)
    names = rows.document_names
    documents = torch.from_numpy(rows.documents(chosen))
    return torch.from_numpy(rows[chosen]), documents, names.__getitem__


def _given(model: SoluscopeTransformer, tokens: Any) -> Found:
    """Check a user's tokens, and divide their rows into documents.

    Raises:
        UserError: if they are not tokens of the model.
    """
    d_vocab = model.cfg.d_vocab
    try:
        rows = torch.as_tensor(tokens).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"tokens= is of type {type(tokens).__name__}, wanted {WANTED}") from error
    whole_numbers = not (rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool)
    if rows.ndim != 2 or not rows.numel() or not whole_numbers:
        raise UserError(f"tokens= is {rows.dtype} {list(rows.shape)}, wanted {WANTED}")
    if int(rows.min()) < 0 or int(rows.max()) >= d_vocab:
        raise UserError(
            f"tokens= has tokens from {int(rows.min())} to {int(rows.max())}, but the model's are 0 to "
            f"{d_vocab - 1}: use model.to_tokens(texts)"
        )
    rows = rows.long()
    ends = (rows == model.facts.eos).long()
    width = rows.shape[1] + 1  # more than a row can have documents
    owner = torch.arange(len(rows))[:, None] * width + ends.cumsum(1) - ends
    return rows, owner, lambda number: f"row {number // width}"


@torch.no_grad()
def _activations(
    model: SoluscopeTransformer, tokens: Int[Tensor, "row pos"], name: str, neuron: int
) -> Float[Tensor, "row pos"]:
    """Return the neuron's activations at the hook `name`, on the CPU in fp64."""
    parts = []
    step = rows_at_once(tokens.shape[1], model.cfg.d_vocab)
    for some in tokens.split(step):
        _, cache = model.run_with_cache(
            some.to(model.cfg.device), names_filter=name, stop_at_layer=model.cfg.n_layers
        )
        parts.append(cache[name][..., neuron].double().cpu())
    return torch.cat(parts)


def _largest(
    activation: Float[Tensor, "row pos"],
    owner: Int[Tensor, "row pos"],
    kept: Tensor,
    n: int,
) -> list[tuple[int, int]]:
    """Return row and position of the largest kept activation of each document, for the `n` largest of these.

    Of equal activations the first in reading order is chosen.
    """
    places = kept.nonzero()  # [place 2], in reading order
    top = TopByDocument(n, 1, activation)
    top.add(activation[kept][:, None], owner[kept], torch.arange(len(places)))
    _, chosen = top.result()
    return [(row, pos) for row, pos in places[chosen[:, 0]].tolist()]


def _joined(texts: Iterable[str]) -> str:
    """Return the text of consecutive tokens; bytes of a character that is in several tokens are joined to it."""
    joined = "".join(texts).encode("utf8", "surrogateescape").decode("utf8", "surrogateescape")
    return readable(joined)
