"""What a notebook calls: `soluscope.probe`, one model and a text of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from tokenizers import Tokenizer

from soluscope import plugins
from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.errors import UserError
from soluscope.evaluation.summaries import about_run, stored_words, summarise, token_table
from soluscope.hooked.activations import observe
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.probes import Probe
from soluscope.results import Figure, Measurement, Record

PACKAGE = "soluscope.probes"


class Figures(dict[str, Any]):
    """Plotly figures by title; a notebook shows them all."""

    def _ipython_display_(self) -> None:
        for figure in self.values():
            figure.show()


def probe(
    model: SoluscopeTransformer, text: str | Sequence[str], probes: Sequence[str] | None = None
) -> tuple[pd.DataFrame, Figures]:
    """Run probes on a text of your own.

    Args:
        model: from `soluscope.load`.
        text: one text, or several; each is a unit of its own for intervals.
        probes: names of files in probes/; all of them if not given.

    Returns:
        A table with one row for each probe, quantity and token; and figures by title, which show
        themselves in a notebook.

    Raises:
        UserError: unknown probe, a text shorter than 2 tokens, or a model that cannot be probed.
    """
    names = list(probes) if probes is not None else plugins.names(PACKAGE)
    chosen = {name: plugins.pick(PACKAGE, name) for name in names}
    for name, why in _cannot(chosen, model.cfg.n_layers).items():
        if probes is not None:
            raise UserError(f"{name} is {why}")
        del chosen[name]
    texts = [text] if isinstance(text, str) else list(text)
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    stream = streams.from_texts(texts, tokenizer, model.facts.bos, model.facts.ctx, 10**9, "text")
    run = observe(model, stream)
    about, defaults = about_run(model.facts), EvalConfig()
    tables, figures = [], Figures()
    for name, chosen_probe in chosen.items():
        measured = chosen_probe.measure(run)
        table = token_table(run, measured)
        base = Measurement(**about, probe=name, quantity="", value=None, unit="", stream="text")
        summaries = summarise(
            chosen_probe, table, measured.estimates, base, defaults.n_draws, defaults.seed
        )
        records = [stored_words(name, chosen_probe, base.study), *summaries]
        figures.update(_draw(records, chosen_probe.figures))
        long = table.melt(["string", "pos", "token"], list(chosen_probe.quantities), "quantity")
        tables.append(long.assign(probe=name))
    frame = pd.concat(tables, ignore_index=True)
    frame["text"] = [
        tokenizer.decode([token], skip_special_tokens=False) for token in frame["token"]
    ]
    return frame[["probe", "quantity", "string", "pos", "token", "text", "value"]], figures


def _cannot(chosen: dict[str, Probe], n_layers: int) -> dict[str, str]:
    """Return which probes have nothing to say about a text of one's own, and why."""
    why = {}
    for name, chosen_probe in chosen.items():
        if all(stream.startswith(streams.PAIRS) for stream in chosen_probe.streams):
            why[name] = "measured on pairs of prompts, and not on a text of your own"
        elif chosen_probe.one_layer and n_layers > 1:
            why[name] = f"exact for one layer only, and the model has {n_layers}"
    return why


def _draw(records: list[Record], figures: Sequence[Figure]) -> dict[str, Any]:
    from soluscope.report.figures import draw

    drawn = {spec.title: draw(records, replace(spec, streams=())) for spec in figures}
    return {title: figure for title, figure in drawn.items() if figure.data}
