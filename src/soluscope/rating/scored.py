"""The numbers of the automatic proxies: of neurons of a study's runs, and of planted neurons.

They are stored in the study's folder rating/proxies, so that only new or changed ones are computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from soluscope import plugins
from soluscope.errors import UserError
from soluscope.files import digest, read_json, write_text
from soluscope.neurons import stored
from soluscope.neurons.compute import of_model
from soluscope.neurons.describe import UPPER
from soluscope.neurons.schema import SIDES, Stage
from soluscope.proxies import Complete, Proxy, Seen, Window
from soluscope.rating.settings import ProxyConfig
from soluscope.runs.weights import code_hash

PACKAGE = "soluscope.proxies"
ONE_CLASS, FOUR_CLASSES = "monosemantic", "polysemantic"
"""Planted models (protocol.md section 6, C10 and C11): a person should call the neurons of the first one
interpretable, and those of the second one not."""
PLANTED = (ONE_CLASS, FOUR_CLASSES)
SOURCE = ("proxies/", "rating/scored.py")
SOURCE_OF_PLANTED = (*SOURCE, "controls/", "hooked/", "neurons/")
"""Source files that decide the numbers of runs, and of planted neurons."""

Cell = tuple[int, Stage]
"""A neuron and a stage."""
Rated = tuple[str, bool, int]
"""A neuron that people have rated: its run, whether the run was trained, and its number."""


@dataclass(frozen=True)
class Score:
    """One number of one proxy."""

    proxy: str
    arm: str
    """Arm of a run, or name of a planted model."""
    run: str
    trained: bool
    neuron: int
    stage: str
    value: float | None
    drawn: bool = True
    """False for a neuron that was added because a person has rated it; it is not in the means."""


@dataclass(frozen=True)
class Kept:
    """Content of a stored file."""

    made_with: str
    values: list[float | None]
    """Numbers of the neurons and stages that `made_with` was computed from, in their order."""


def proxies(asks: bool) -> dict[str, Proxy]:
    """Return the proxies by name, and a proxy that asks a language model only if `asks`."""
    known: dict[str, Proxy] = {name: plugins.pick(PACKAGE, name) for name in plugins.names(PACKAGE)}
    return {name: proxy for name, proxy in known.items() if asks or not proxy.asks}


def of_runs(
    study_dir: Path,
    folder: Path,
    config: ProxyConfig,
    complete: Complete | None,
    rated: Iterable[Rated],
    say: Callable[[str], None],
) -> list[Score]:
    """Return the numbers of drawn neurons of every run, trained and not, and of rated ones.

    Args:
        study_dir: a study with stored neurons.
        folder: folder of the stored numbers.
        config: neurons to draw, and stages.
        complete: a language model; None: no language model is asked.
        rated: neurons that are added.
        say: function called with a line about each run.

    Raises:
        UserError: if no run has stored neurons, or a file cannot be read or written.
    """
    found: list[Score] = []
    more = {*rated}
    for run_dir in sorted(each for each in study_dir.glob("*") if each.is_dir()):
        for part in stored.parts_of(run_dir):
            neurons = stored.read(run_dir, part)
            about, trained = neurons.about, part == "trained"
            drawn = _drawn(config, f"{about.run} {part}", about.n_neurons)
            added = {
                i
                for run, was, i in more
                if (run, was) == (about.run, trained) and 0 <= i < about.n_neurons
            }
            cells = cells_of(sorted(drawn | added), config, about.has_mid_norm)
            seen = [*_of_stored(neurons, cells)]
            place, made_with = folder / run_dir.name / part, about.made_with + code_hash(*SOURCE)
            for name, values in _values(place, made_with, cells, seen, config, complete):
                found += [
                    Score(name, about.arm, about.run, trained, i, stage, value, i in drawn)
                    for (i, stage), value in zip(cells, values, strict=True)
                ]
            say(f"{about.run}, {part}: {len(drawn | added)} neurons")
    if not found:
        raise UserError(
            f"{study_dir} has no stored neurons: compute them with 'soluscope neurons {study_dir}'"
        )
    return found


def of_planted(folder: Path, config: ProxyConfig, complete: Complete | None) -> list[Score]:
    """Return the numbers of all neurons of the planted models `PLANTED`."""
    found: list[Score] = []
    for name in PLANTED:
        planted = plugins.pick("soluscope.controls", name).build()
        stream = planted.streams["natural"]
        _, tables = of_model(planted.model, stream)
        cells = cells_of(range(len(tables["neurons"])), config, has_mid_norm=True)
        seen = [*seen_of(tables, tables["examples"], stream.vocab, cells)]
        place, made_with = folder / "planted" / name, code_hash(*SOURCE_OF_PLANTED)
        for proxy, values in _values(place, made_with, cells, seen, config, complete):
            found += [
                Score(proxy, name, name, True, i, stage, value)
                for (i, stage), value in zip(cells, values, strict=True)
            ]
    return found


def cells_of(neurons: Iterable[int], config: ProxyConfig, has_mid_norm: bool) -> list[Cell]:
    """Return the neurons at each wanted stage; without a mid norm, mid is post."""
    stages = [each for each in SIDES if each in config.stages]
    return [*product(neurons, stages if has_mid_norm else SIDES[1:])]


def seen_of(
    tables: Mapping[str, pd.DataFrame],
    examples: pd.DataFrame,
    vocabulary: Sequence[str],
    cells: Iterable[Cell],
) -> Iterator[Seen]:
    """Yield what the proxies see of each neuron and stage.

    Args:
        tables: the tables `neurons` and `rules` of stored neurons.
        examples: the lines of the table `examples` of these neurons.
        vocabulary: text of each token.
        cells: neurons and stages.
    """
    lines = dict([*examples.groupby("neuron")])
    statistics = {row["neuron"]: row for row in tables["neurons"].to_dict("records")}
    rules = {(row["neuron"], row["side"]): row for row in tables["rules"].to_dict("records")}
    for neuron, stage in cells:
        low, width = (float(statistics[neuron][f"{name}_{stage}"]) for name in ("low", "width"))
        f1 = float(rules[neuron, stage][f"f1_{stage}"])
        windows = _windows(lines[neuron], stage) if neuron in lines else []
        level = low + UPPER * width if np.isfinite(width) else np.nan
        yield Seen(windows, level, f1 if np.isfinite(f1) else None, vocabulary)


def _windows(lines: pd.DataFrame, stage: Stage) -> list[Window]:
    """Return the windows of a neuron's examples of all stages, each once."""
    unique = lines.drop_duplicates(["row", "pos"])
    return [
        Window(
            int(row["row"]), int(row["pos"]) - int(row["peak"]), np.asarray(row["tokens"], np.int64),
            np.asarray(row[stage], np.float64), int(row["peak"]), int(row["half"]),
        )
        for row in unique.to_dict("records")
    ]  # fmt: skip


def _of_stored(neurons: stored.Neurons, cells: Sequence[Cell]) -> Iterator[Seen]:
    wanted = {neuron for neuron, _ in cells}
    examples = pd.concat([group[group["neuron"].isin(wanted)] for group in neurons.groups()])
    tables = {"neurons": neurons.statistics, "rules": neurons.rules}
    return seen_of(tables, examples, neurons.vocabulary, cells)


def _drawn(config: ProxyConfig, name: str, n_neurons: int) -> set[int]:
    """Return the neurons that are drawn for a part of a run."""
    rng = np.random.default_rng([config.seed, int(digest(name)[:12], 16)])
    return {*rng.permutation(n_neurons)[: config.n_neurons].tolist()}


def _values(
    folder: Path,
    made_with: str,
    cells: Sequence[Cell],
    seen: Sequence[Seen],
    config: ProxyConfig,
    complete: Complete | None,
) -> Iterator[tuple[str, list[float | None]]]:
    """Yield each proxy's name and its numbers of the cells, stored ones where they are current."""
    for name, proxy in proxies(asks=complete is not None).items():
        asked = [config.lm_url, config.lm_model] if proxy.asks else []
        now, path = digest([made_with, [*cells], asked]), folder / f"{name}.json"
        values = _kept(path, now)
        if values is None:
            values = [proxy.measure(each, complete or _no_model) for each in seen]
            _keep(path, Kept(now, values))
        yield name, values


def _kept(path: Path, made_with: str) -> list[float | None] | None:
    try:
        kept = read_json(path, Kept, "")
    except UserError:  # missing or damaged: computed again
        return None
    return kept.values if kept.made_with == made_with else None


def _keep(path: Path, kept: Kept) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(kept)) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free disk space") from error


def _no_model(_: str) -> str:
    raise AssertionError("only a proxy with asks=True may ask a language model")
