"""Stored neurons as files that an own Neuronpedia can import: its documented folders, and its database's columns.

    FOLDER/MODEL/SOURCE/model.jsonl  release.jsonl  source.jsonl  sourceset.jsonl
    FOLDER/MODEL/SOURCE/features/batch-0.jsonl.gz      one line per neuron
    FOLDER/MODEL/SOURCE/activations/batch-0.jsonl.gz   one line per example

A model is a run's model or its initialisation, and a source is its last MLP before or after the mid norm.
Neuronpedia has no place for rules, effects, D and pre-activations, so they are not in the files.

Source: docs.neuronpedia.org/api-and-data/exports for the folders, and the tables Model, SourceRelease, SourceSet,
Source, Neuron and Activation of apps/webapp/prisma/schema.prisma in hijohnnylin/neuronpedia for the columns.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from soluscope.errors import UserError
from soluscope.files import replacing_folder, write_text
from soluscope.neurons import site, stored
from soluscope.neurons.schema import BINS_BELOW, BINS_OF_RANGE, N_BINS, SIDES, TOP, Stage
from soluscope.neurons.stored import Neurons
from soluscope.runs.folder import Run

BATCH = 1024
"""Number of neurons in a file."""
CREATOR = "clkht01d40000jv08hvalcvly"
"""Id of the user to whom a new Neuronpedia attributes imported data."""
RELEASE = "soluscope"
NOTES = (
    "Made by soluscope from {text}. frac_nonzero is the share of tokens in the upper half of the neuron's range, "
    "since its activations are hardly ever 0. Tokens have escapes for characters that cannot be seen."
)

Line = dict[str, Any]


def export(source: Path, folder: Path) -> None:
    """Write the stored neurons of a study or of a run into a new folder.

    Raises:
        UserError: if no neurons are stored, the folder exists or cannot be written, or a run cannot be read.
    """
    is_run = (source / "model.json").is_file()
    if is_run:
        found = [stored.read(source, part) for part in stored.parts_of(source)]
    else:
        found = site.parts(source) if source.is_dir() else []
    if not found:
        raise UserError(f"no neurons are stored in {source}: see 'soluscope neurons {source}'")
    if folder.exists():
        raise UserError(f"{folder} exists: give a new folder")
    try:
        with replacing_folder(folder) as beside:
            for neurons in found:
                for stage in SIDES if neurons.about.has_mid_norm else SIDES[1:]:
                    _write_source(beside, neurons, stage)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror}; free disk space, or give another folder"
        ) from error


def _write_source(folder: Path, neurons: Neurons, stage: Stage) -> None:
    facts = Run(neurons.folder.parent.parent).facts
    keys = {"modelId": model_id(neurons), "layer": f"{facts.n_layers - 1}-{RELEASE}-{stage}"}
    place = folder / keys["modelId"] / keys["layer"]
    for name, line in _about(neurons, stage, keys, facts.n_layers).items():
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / f"{name}.jsonl", json.dumps(line, allow_nan=False) + "\n")
    _write_batches(place / "features", _features(neurons, stage, keys))
    _write_batches(place / "activations", _activations(neurons, stage, keys))


def model_id(neurons: Neurons) -> str:
    """Return a model's name in addresses: lower-case letters, digits, dots and dashes."""
    about = neurons.about
    parts = [about.study, about.run] + ([] if about.part == "trained" else [about.part])
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-.")


def _about(neurons: Neurons, stage: Stage, keys: Line, n_layers: int) -> dict[str, Line]:
    """Return the single lines about the model, the release, the source set and the source."""
    about, model = neurons.about, keys["modelId"]
    named = f"{RELEASE}-{stage}"
    when = "before the mid norm" if stage == SIDES[0] else "after the mid norm, if there is one"
    own: Line = {"creatorId": CREATOR, "visibility": "UNLISTED"}
    return {
        "model": own | {
            "id": model, "instruct": False, "displayName": model, "displayNameShort": about.run,
            "layers": n_layers, "neuronsPerLayer": about.n_neurons, "inferenceEnabled": False,
        },
        "release": own | {"name": RELEASE, "description": "MLP neurons of SoLU models", "creatorName": RELEASE},
        "sourceset": own | {
            "modelId": model, "name": named, "description": f"MLP neurons, {when}", "type": "neurons",
            "creatorName": RELEASE, "releaseName": RELEASE, "hasDashboards": True, "allowInferenceSearch": False,
        },
        "source": own | {
            "id": keys["layer"], "modelId": model, "setName": named, "hasDashboards": True,
            "inferenceEnabled": False, "dataset": about.text, "notes": NOTES.format(text=about.text),
        },
    }  # fmt: skip


def _features(neurons: Neurons, stage: Stage, keys: Line) -> Iterator[tuple[int, list[Line]]]:
    """Yield each neuron and its line of the table Neuron."""
    words = neurons.vocabulary
    logits = {
        key: list(rows) for key, rows in groupby(
            neurons.logits.to_dict("records"), itemgetter("neuron", "side")
        )
    }  # fmt: skip
    largest = {
        neuron: max((float(row["value"]) for row in rows), default=0.0)
        for neuron, rows in _examples(neurons, stage)
    }
    for row in neurons.statistics.to_dict("records"):
        index, width = int(row["neuron"]), row[f"width_{stage}"]
        line = keys | {
            "index": str(index), "creatorId": CREATOR, "sourceSetName": f"{RELEASE}-{stage}",
            "maxActApprox": largest.get(index, 0.0), "frac_nonzero": row[f"share_{stage}"],
            "hookName": f"blocks.{keys['layer'].partition('-')[0]}.mlp.hook_{stage}",
        }  # fmt: skip
        for side, name in (("highest", "pos"), ("lowest", "neg")):
            tokens = logits.get((index, side), [])
            line[f"{name}_str"] = [words[each["token"]] for each in tokens]
            line[f"{name}_values"] = [float(each["logit"]) for each in tokens]
        if math.isfinite(width):
            middle = [(bar + 0.5 - BINS_BELOW) / BINS_OF_RANGE for bar in range(N_BINS)]
            line["freq_hist_data_bar_values"] = [row[f"low_{stage}"] + width * at for at in middle]
            line["freq_hist_data_bar_heights"] = [int(count) for count in row[f"histogram_{stage}"]]
        yield index, [line]


def _activations(neurons: Neurons, stage: Stage, keys: Line) -> Iterator[tuple[int, list[Line]]]:
    """Yield each neuron and its lines of the table Activation."""
    words, documents = neurons.vocabulary, neurons.documents
    of_neuron: dict[Any, Line] = {
        row["neuron"]: {str(name): cell for name, cell in row.items()}
        for row in neurons.statistics.to_dict("records")
    }
    for neuron, rows in _examples(neurons, stage):
        facts = of_neuron[neuron]
        lines = []
        for number, row in enumerate(rows):
            values = [float(value) for value in row[stage]]
            at = max(range(len(values)), key=values.__getitem__)
            lines.append(
                keys | {
                    "id": f"{keys['modelId']}-{keys['layer']}-{neuron}-{number}", "index": str(neuron),
                    "creatorId": CREATOR, "dataSource": documents[row["document"]],
                    "tokens": [words[token] for token in row["tokens"]], "values": values,
                    "maxValue": values[at], "maxValueTokenIndex": at, "minValue": min(values),
                    "qualifyingTokenIndex": int(row["peak"]),
                    **_bin(row["range"], facts, stage, neurons.about.n_tokens),
                }
            )  # fmt: skip
        yield neuron, lines


def _bin(number: int, facts: Line, stage: Stage, n_tokens: int) -> Line:
    """Return the bounds of an example's range and the share of tokens in it; nothing for a top example."""
    low, width = facts[f"low_{stage}"], facts[f"width_{stage}"]
    if number == TOP or not math.isfinite(width):
        return {}
    first = (
        BINS_BELOW + BINS_OF_RANGE * number if number else 0
    )  # range 1 holds everything below, too
    inside = facts[f"histogram_{stage}"][first : BINS_BELOW + BINS_OF_RANGE * (number + 1)]
    return {
        "binMin": low + width * number, "binMax": low + width * (number + 1),
        "binContains": float(inside.sum()) / n_tokens,
    }  # fmt: skip


def _examples(neurons: Neurons, stage: Stage) -> Iterator[tuple[int, list[Line]]]:
    """Yield each neuron with its examples at a stage; each has its activation as `value`."""
    for table in neurons.groups():
        rows = table[table["stage"] == stage].to_dict("records")
        for neuron, of_neuron in groupby(rows, itemgetter("neuron")):
            lines: list[Line] = [
                {str(name): cell for name, cell in row.items()} for row in of_neuron
            ]
            for line in lines:
                line["value"] = line[stage][line["peak"]]
            yield int(neuron), lines


def _write_batches(folder: Path, neurons: Iterable[tuple[int, list[Line]]]) -> None:
    """Write lines in compressed files of `BATCH` neurons each."""
    folder.mkdir(parents=True)
    for batch, group in groupby(neurons, lambda pair: pair[0] // BATCH):
        text = "".join(
            json.dumps(line, allow_nan=False) + "\n" for _, lines in group for line in lines
        )
        (folder / f"batch-{batch}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
