"""The neurons of runs: computed, stored in the run folders, and resumed after an interruption."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from soluscope import results
from soluscope.config import NeuronsConfig, PretrainedNeuronsConfig
from soluscope.data.cache import Split, TokenCache, study_facts
from soluscope.data.streams import Stream
from soluscope.data.tokenizer import from_bytes, texts_of
from soluscope.errors import UserError
from soluscope.evaluation.one_run import check_device, device_of, n_threads, threads, tokens_of
from soluscope.evaluation.pretrained_run import load_again, make_run, read_origin
from soluscope.evaluation.suite import finished_runs, write_results
from soluscope.evaluation.summaries import about_run
from soluscope.files import digest, remove_folder, replacing_folder, write_text
from soluscope.hooked.activations import check_model
from soluscope.hooked.convert import SoluscopeTransformer, load_run, load_untrained
from soluscope.neurons import describe, logits, look
from soluscope.neurons.found import of_part
from soluscope.neurons.scan import Scanned, scan
from soluscope.neurons.schema import PARTS, STAGES, SUMS, Part
from soluscope.neurons.stored import About, Neurons, is_complete, place, sums_of
from soluscope.results import Record
from soluscope.runs.folder import Run, lock
from soluscope.runs.weights import code_hash
from soluscope.terminal import answer
from soluscope.text import plural, readable

N_LOGITS = 10
"""Number of the highest and of the lowest logits that are stored for a neuron."""
COMPUTES = (
    "data/", "hooked/", "model.py", "norms.py", "text.py", "variants/", "probes/_features.py",
    "probes/low_activation_impact.py",
    *(f"neurons/{name}.py" for name in
      ("compute", "describe", "found", "logits", "look", "rules", "scale", "scan", "schema", "selection")),
)  # fmt: skip
"""Source files that decide the stored numbers."""
SPLIT: Split = "report"
NEURONS_OF_GROUP = 16
"""Number of neurons whose lines are written, and can be read, together."""


def compute(folder: Path, config: NeuronsConfig, say: Callable[[str], None] = answer) -> list[Run]:
    """Compute and store the neurons of every finished run below `folder`, and return the runs.

    Stored results from the same model, text, settings and code are kept.

    Args:
        folder: a study or a run.
        config: number of tokens, device, and tokens to read.
        say: function called with a line about each model.

    Raises:
        Busy: if another process is at work in a run.
        UserError: if there is no finished run, or a run or its tokens cannot be read.
    """
    check_device(config)
    runs = finished_runs(folder, say)
    for run in runs:
        with run.lock(), threads(n_threads()):
            _of_run(run, config, say)
    study_dir = runs[0].dir.parent
    if (study_dir / "results.jsonl").is_file():
        with lock(study_dir):
            write_results(study_dir)
        say(f"'soluscope report {study_dir}' shows the most readable neurons in the report")
    return runs


def compute_pretrained(
    name: str, config: PretrainedNeuronsConfig, say: Callable[[str], None] = answer
) -> list[Run]:
    """Compute and store the neurons of a pretrained model in its own study, and return its run.

    Raises:
        UserError: if there is no such model, its MLP cannot be read, or there is no text.
    """
    check_device(config)
    return compute(make_run(name, config.probing(), say), config, say)


def _of_run(run: Run, config: NeuronsConfig, say: Callable[[str], None]) -> None:
    origin = read_origin(run.dir)
    parts: tuple[Part, ...] = PARTS if origin is None and run.config.init_dir is None else PARTS[:1]
    cache = tokens_of(run, config.prepared)
    hashes = {part: _rests_on(run, part, config, cache) for part in parts}
    stream: Stream | None = None
    names: list[str] = []
    for part in parts:
        folder = place(run.dir, part)
        if is_complete(folder) and _made_with(folder) == hashes[part]:
            say(f"{run.dir.name}, {part}: stored already")
            continue
        if stream is None:
            stream, names = text_of(cache, run.facts.ctx, config.n_tokens)
        if part == "untrained":
            model = load_untrained(run, device_of(config))
        else:
            device = device_of(config)
            model = load_again(run, origin, device) if origin else load_run(run, device)
        assert model is not None  # only runs with random initial weights have both parts
        check_model(model)
        scanned, tables = of_model(model, stream)
        about = _about(model, part, scanned, cache, hashes[part])
        texts = [readable(text) for text in stream.vocab]
        of_run = about_run(model.facts, pretrained=origin is not None)
        _write(folder, about, tables, texts, names, of_part(part, tables, texts, of_run))
        say(
            f"{run.dir.name}, {part}: {about.n_neurons} neurons on {scanned.n_tokens:,} tokens of "
            f"{scanned.n_documents} {plural(scanned.n_documents, 'document')}"
        )


def text_of(cache: TokenCache, ctx: int, n_tokens: int) -> tuple[Stream, list[str]]:
    """Return whole rows of the report split, evenly spaced, with the tokens' texts; and the documents' names."""
    tokenizer = from_bytes(cache.tokenizer_path.read_bytes(), f"cannot read {cache.tokenizer_path}")
    rows = cache.rows(SPLIT, ctx)
    chosen = rows.spread(n_tokens, len(rows) * ctx)
    string = rows.documents(chosen)
    string[:, 0] = string[:, 1]
    tokens = torch.from_numpy(rows[chosen])
    keep = torch.ones_like(tokens, dtype=torch.bool)
    stream = Stream(
        SPLIT, tokens, torch.from_numpy(string), keep, cache.meta["bos"], texts_of(tokenizer)
    )
    return stream, rows.document_names


def of_model(model: Any, stream: Stream) -> tuple[Scanned, dict[str, pd.DataFrame]]:
    """Return what a stream shows about each neuron of a model's last MLP: a scan, and the tables of stored.py."""
    scanned = scan(model, stream)
    examples = look.examples(model, stream, scanned)
    norm = getattr(model.blocks[-1].mlp, "ln", None)
    gamma = getattr(norm, "w", None)
    gamma = torch.ones(model.cfg.d_mlp) if gamma is None else gamma.detach()
    statistics = describe.statistics(scanned, gamma, examples)
    for stage in STAGES:
        statistics[f"histogram_{stage}"] = list(scanned.histogram[stage].numpy(force=True))
    return scanned, {
        "examples": examples, "neurons": statistics, "rules": describe.best_rules(scanned),
        "logits": logits.table(model, min(N_LOGITS, model.cfg.d_vocab)),
    }  # fmt: skip


def _about(
    model: SoluscopeTransformer, part: Part, scanned: Scanned, cache: TokenCache, made_with: str
) -> About:
    facts = model.facts
    return About(
        study=facts.study, run=facts.run, arm=facts.arm, variant=facts.variant, seed=facts.seed,
        part=part, has_mid_norm=getattr(model.blocks[-1].mlp, "ln", None) is not None,
        n_neurons=facts.d_mlp, n_tokens=scanned.n_tokens, n_documents=scanned.n_documents,
        text=f"{cache.meta['source']}, {SPLIT} split", gain=math.exp(scanned.log_gain), made_with=made_with,
    )  # fmt: skip


def _write(
    folder: Path, about: About, tables: dict[str, pd.DataFrame], texts: list[str], names: list[str],
    records: Iterable[Record],
) -> None:  # fmt: skip
    """Store a part in place of an earlier one."""
    contents = {
        "vocabulary": texts, "documents": names, "about": asdict(about),
    }  # fmt: skip
    try:
        folder.parent.mkdir(exist_ok=True)
        with replacing_folder(folder) as beside:
            for name, content in contents.items():
                write_text(beside / f"{name}.json", json.dumps(content) + "\n")
            for name, table in tables.items():
                _write_table(beside / f"{name}.parquet", table)
            results.write(beside / "found.jsonl", records)
            write_text(beside / SUMS, sums_of(beside))
            remove_folder(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free disk space or delete it"
        ) from error


def _write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table in groups of whole neurons, which a reader can read alone."""
    content = pa.Table.from_pandas(table, preserve_index=False)
    firsts = np.arange(0, int(table["neuron"].max()) + 1, NEURONS_OF_GROUP)
    bounds = [*np.searchsorted(table["neuron"], firsts).tolist(), len(table)]
    with pq.ParquetWriter(path, content.schema, compression="zstd") as writer:
        for start, stop in pairwise(bounds):
            writer.write_table(content.slice(start, stop - start))


def _rests_on(run: Run, part: Part, config: NeuronsConfig, cache: TokenCache) -> str:
    """Return a hash of the model, the text, the settings and the code of a stored part."""
    origin = read_origin(run.dir)
    made_from = "model.json" if origin else "done.json"
    trained = (run.dir / made_from).read_text(encoding="utf8", errors="replace")
    key = study_facts(run.dir.parent)["key"]
    return digest([part, config.n_tokens, trained, key, cache.meta["key"], code_hash(*COMPUTES)])


def _made_with(folder: Path) -> str:
    """Return the hash with which a part was stored, or nothing for a part that cannot be read."""
    try:
        return Neurons(folder).about.made_with
    except UserError:
        return ""
