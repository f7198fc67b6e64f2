"""A sweep file and its jobs. Each job is a configuration, and its id is the configuration's hash.

The file is a wandb sweep (program, command, method: grid, parameters with dotted or nested keys), so
that wandb's own agents can use the same file.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soluscope import plugins
from soluscope.config import Config, check, load_config, shipped_dir, short_name
from soluscope.errors import UserError
from soluscope.launching.search import Search, every, read_search
from soluscope.reading import AsWritten, as_word, read_yaml

if TYPE_CHECKING:  # the comparison imports numpy and scipy
    from soluscope.comparison.compare import Choices

MOST_JOBS = 10_000
_NAMED = ("variant", "arm", "seed", "study", "tag")
"""Parameters that a run's path already contains."""


@dataclass(frozen=True)
class Sweep:
    """A grid of jobs of one study."""

    path: Path
    """Path of the sweep file."""
    words: tuple[str, ...]
    """Overrides for every job, `key=value`."""
    parameters: Mapping[str, tuple[Any, ...]]
    """The grid: values by dotted key, without the keys that `words` overrides and with the tag."""
    configs: tuple[Config, ...]
    """One configuration per job, in the order of the parameters; the last parameter varies fastest. With a search:
    the arms before it, at the reported seeds."""
    search: Search | None = None
    """The search for each arm's best settings at the select seeds."""
    predictions: tuple[str, ...] = ()
    """Predictions with their reasons, one sentence each, for the registration."""

    @property
    def study_dir(self) -> Path:
        return self.configs[0].study_dir

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def select_seeds(self) -> list[int]:
        """Return the seeds at which arms are chosen; empty if the sweep has one stage."""
        return self.configs[0].select_seeds


def shipped_sweeps() -> list[str]:
    """Return the names of the sweeps that ship with soluscope, sorted."""
    return sorted(path.stem for path in shipped_dir("sweeps").glob("*.yaml"))


def find_sweep(word: str) -> Path:
    """Return the sweep file that a command's word means.

    Args:
        word: path of a file (with a suffix or a folder in it), or the name of a shipped sweep.

    Raises:
        UserError: if no shipped sweep has this name; the nearest name is suggested.
    """
    path = Path(word)
    if path.suffix or len(path.parts) > 1 or path.is_file():
        return path
    plugins.check_name("sweep", word, shipped_sweeps())
    return shipped_dir("sweeps") / f"{word}.yaml"


def read_sweep(path: Path, words: Sequence[str]) -> Sweep:
    """Return the sweep in a sweep file, with its jobs.

    Parameters with several values that a run's name does not contain go into the tag, unless the file or a
    word sets the tag. A word that sets a parameter replaces all its values.

    Args:
        path: a wandb sweep file with `method: grid`.
        words: `key=value` for every job.

    Raises:
        UserError: if the file is not a grid or the grid is empty, a parameter is unknown, two jobs have the
            same id or folder, the jobs have several studies, or a seed is also a select seed.
    """
    file, words = _preset(path, read_yaml(path, AsWritten), words)
    grid: Any = file.get("parameters")
    check(file.get("method") == "grid" and isinstance(grid, dict),
          f"{path} is not a sweep: it needs 'method: grid' and 'parameters:'")  # fmt: skip
    overridden = {word.split("=", 1)[0] for word in words}
    axes = {key: values for key, values in _axes(path, grid) if key not in overridden}
    check(
        bool(axes),
        f"{path} is an empty grid: it needs a parameter that no word of the command sets",
    )
    n_jobs = math.prod(len(values) for values in axes.values())
    check(
        n_jobs <= MOST_JOBS,
        f"{path} has {n_jobs:,} jobs, but at most {MOST_JOBS:,} are possible: give its parameters fewer values",
    )
    tag_keys = [key for key, values in axes.items() if len(values) > 1 and key not in _NAMED]
    if tag_keys and not {"tag"} & (axes.keys() | overridden):
        axes["tag"] = ("-".join(short_name(key, f"${{{key}}}") for key in tag_keys),)
    sweep = _grid(path, words, axes)
    asked, seeds = sweep.select_seeds, {config.seed for config in sweep.configs}
    both = sorted(seeds & set(asked))
    predictions = file.get("predictions") or []
    check(
        isinstance(predictions, list) and all(isinstance(each, str) for each in predictions),
        f"{path}: predictions must be a list of sentences, not {predictions}",
    )
    sweep = replace(sweep, predictions=tuple(predictions))
    if "tune" in file:
        check(
            bool(asked), f"{path} has tune:, which needs select_seeds: give some in its parameters"
        )
        sweep = replace(sweep, search=read_search(path, file["tune"]))
        if not overridden & {"arm", "variant", "tag"}:
            _check_named(sweep)
    check(not both, f"seed {', '.join(map(str, both))} is among seed= and select_seeds=: a seed at which arms are "
          "chosen must not be reported")  # fmt: skip
    return sweep


def _check_named(sweep: Sweep) -> None:
    """Refuse an axis that names an arm which the sweep does not have."""
    assert sweep.search is not None
    arms = list(dict.fromkeys(config.arm for config in sweep.configs))
    for key, axis in sweep.search.axes.items():
        unknown = [name for name in axis.arms if name not in arms]
        check(
            not unknown,
            f"{sweep.path}: tune: {key} has arms: {', '.join(unknown)}, but the sweep has {', '.join(arms)}",
        )


def _preset(
    path: Path, file: dict[str, Any], words: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Return a sweep file and the words after the preset that `size=` names has replaced parts of both.

    A preset has parameters and axes that replace those of the file, and may have `words` for every job.
    """
    presets: Any = file.pop("presets", {})
    kept, chosen = [], None
    for word in words:
        key, _, value = word.partition("=")
        if key == "size" and value in presets:
            chosen = presets[value]
        else:
            kept.append(word)
    if chosen is None:
        return file, [*words]
    unknown = sorted(chosen.keys() - {"parameters", "tune", "words"})
    check(
        not unknown,
        f"{path}: a preset has {', '.join(unknown)}, but only parameters, tune and words are known",
    )
    for key in ("parameters", "tune"):
        file[key] = {**file.get(key, {}), **chosen.get(key, {})}
    return file, [*chosen.get("words", []), *kept]


def _grid(path: Path, words: Sequence[str], axes: Mapping[str, tuple[Any, ...]]) -> Sweep:
    configs = _configs(words, axes)
    _check_apart(path, configs)
    return Sweep(path, tuple(words), axes, tuple(configs))


def _configs(words: Sequence[str], axes: Mapping[str, tuple[Any, ...]]) -> list[Config]:
    """Return the configuration of each job. Jobs that differ only in their seed are read once: reading takes 30 ms.

    Every job is read where the seed is no plain number, or a value or a file may refer to it.
    """
    points = [*_points(axes)]
    plain = all(re.fullmatch(r"\d{1,9}", as_word(seed)) for seed in axes.get("seed", ()))
    refers = any(
        ("${" in word and "seed" in word) or "=" not in word
        for word in [*words, *itertools.chain(*points)]
    )
    if refers or not plain:
        return [load_config([*point, *words]) for point in points]
    read: dict[tuple[str, ...], Config] = {}
    configs = []
    for point in points:
        arm = tuple(word for word in point if not word.startswith("seed="))
        seed = [int(word.removeprefix("seed=")) for word in point if word not in arm]
        if arm not in read:
            read[arm] = load_config([*point, *words])
        configs.append(replace(read[arm], seed=seed[0]) if seed else read[arm])
    return configs


def choosing(sweep: Sweep) -> Sweep:
    """Return the first stage of a sweep with select seeds: all its arms, at these seeds only."""
    words = [word for word in sweep.words if not word.startswith("seed=")]
    return _grid(sweep.path, words, {**sweep.parameters, "seed": tuple(sweep.select_seeds)})


def searching(sweep: Sweep, losses: Mapping[str, float]) -> Sweep:
    """Return the first stage of a sweep with a search: all points tried so far and the next ones, at select seeds.

    Args:
        sweep: a sweep with a search.
        losses: loss of each arm that has one, on the select split at the select seeds.
    """
    assert sweep.search is not None
    tried = [sweep.search.tried(arm, losses) for arm in choosing(sweep).configs]
    configs = tuple(every(point for known, new in tried for point in [*known, *new]))
    _check_apart(sweep.path, configs)
    return replace(sweep, configs=configs)


def reporting(sweep: Sweep, choices: Choices) -> Sweep:
    """Return the second stage of a sweep with select seeds: the chosen arms at its own seeds.

    With a search, these are points of the arms' surfaces, and the points of the line. Only the best point of each
    surface is probed; the losses of the other points are measured.
    """
    search = sweep.search
    if search is None:
        configs = [config for config in sweep.configs if config.arm in choices.arms]
    else:
        configs = []
        for arm in sweep.configs:
            points, _ = search.tried(arm, choices.losses)
            configs += [
                replace(point, probes=point.arm in choices.best)
                for point in points
                if point.arm in choices.arms
            ]
            configs += search.on_line(arm)
    found = tuple(every(configs))
    _check_apart(sweep.path, found)
    return replace(sweep, configs=found)


def _axes(path: Path, grid: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple]]:  # type: ignore[type-arg]
    """Yield (dotted key, values) for wandb's parameters, nested parameters included."""
    for name, spec in grid.items():
        key = f"{prefix}{name}"
        if isinstance(spec, dict) and isinstance(spec.get("parameters"), dict):
            yield from _axes(path, spec["parameters"], f"{key}.")
        elif isinstance(spec, dict) and "value" in spec:
            yield key, (spec["value"],)
        else:
            values = spec.get("values") if isinstance(spec, dict) else None
            if not isinstance(values, list) or not values:
                raise UserError(
                    f"{path} is an empty grid at {key}: it needs 'values: [...]' or 'value: ...' below it, "
                    f"not {spec}"
                )
            yield key, tuple(values)


def _points(axes: Mapping[str, Sequence[Any]]) -> Iterator[list[str]]:
    for values in itertools.product(*axes.values()):
        chosen = zip(axes, values, strict=True)
        yield [f"{key}={as_word(value)}" for key, value in chosen]


def _check_apart(path: Path, configs: Sequence[Config]) -> None:
    """Refuse jobs that share a folder or an id, or differ in their study or their select seeds."""
    studies = sorted({config.study for config in configs})
    check(
        len(studies) == 1,
        f"{path} has the studies {', '.join(studies)}, but a sweep must have one study: set study=",
    )
    check(
        all(config.select_seeds == configs[0].select_seeds for config in configs),
        f"{path} has several select_seeds, but all jobs of a sweep must have the same",
    )
    ids: dict[str, Config] = {}
    folders: dict[Path, Config] = {}
    for config in configs:
        if config.run_dir in folders:
            raise UserError(
                f"{path} gives two jobs the folder {config.run_dir}, because its name contains none of the "
                "parameters in which they differ: add them to the tag, as in tag: {value: 'lr${train.lr}'}"
            )
        if config.hash in ids:
            raise UserError(
                f"{path} gives two jobs the id {config.hash}: {ids[config.hash].run_name} and "
                f"{config.run_name} differ in no setting that affects results; remove one of them"
            )
        folders[config.run_dir] = ids[config.hash] = config
