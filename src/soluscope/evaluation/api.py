"""`soluscope.probe` for notebooks: probes on one model and your own text."""

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
from soluscope.evaluation.fitting import misfit
from soluscope.evaluation.summaries import about_run, stored_words, summarise, token_table
from soluscope.hooked.activations import observe
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.probes import Probe
from soluscope.results import Figure, Measurement, Record
from soluscope.text import readable

PACKAGE = "soluscope.probes"


class Figures(dict[str, Any]):
    """Plotly figures by title; a notebook shows all figures."""

    def _ipython_display_(self) -> None:
        for figure in self.values():
            figure.show()


def probe(
    model: SoluscopeTransformer, text: str | Sequence[str], probes: Sequence[str] | None = None
) -> tuple[pd.DataFrame, Figures]:
    """Run probes on your own text.

    Args:
        model: a model from `soluscope.load`.
        text: one text, or several; each text is a separate unit for intervals.
        probes: names of files in probes/; all by default.

    Returns:
        A table with one row per probe, quantity and token, in which each ctx - 1 tokens of a text come after a
        BOS; and figures by title, which a notebook displays.

    Raises:
        UserError: if a probe is unknown, every text is shorter than 2 tokens, or the model cannot be probed.
    """
    names = list(probes) if probes is not None else plugins.names(PACKAGE)
    chosen = {name: plugins.pick(PACKAGE, name) for name in names}
    for name, why in _cannot(chosen, model).items():
        if probes is not None:
            raise UserError(f"{name} is {why}")
        del chosen[name]
    texts = [text] if isinstance(text, str) else list(text)
    tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_truncation()  # `model.to_tokens` has set it to ctx tokens
    tokenizer.no_padding()
    bos, ctx = model.facts.bos, model.facts.ctx
    stream = streams.from_tokens(
        streams.encoded(texts, tokenizer), tokenizer, bos, ctx, 10**9, "text", fewest=1
    )
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
    frame["text"] = [readable(stream.vocab[token]) for token in frame["token"]]
    return frame[["probe", "quantity", "string", "pos", "token", "text", "value"]], figures


def _cannot(chosen: dict[str, Probe], model: Any) -> dict[str, str]:
    """Return the probes that cannot be measured on your own text, each with the reason."""
    why = {}
    for name, chosen_probe in chosen.items():
        if all(stream.startswith(streams.PAIRS) for stream in chosen_probe.streams):
            why[name] = (
                "measured on pairs of prompts, not on your own text: leave it out of probes="
            )
        elif reason := misfit(chosen_probe, model):
            why[name] = reason
    return why


def _draw(records: list[Record], figures: Sequence[Figure]) -> dict[str, Any]:
    from soluscope.report.figures import draw

    drawn = {spec.title: draw(records, replace(spec, streams=())) for spec in figures}
    return {title: figure for title, figure in drawn.items() if figure.data}
