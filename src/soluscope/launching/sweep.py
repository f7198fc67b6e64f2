"""A sweep file and its jobs: each a configuration, its id the hash of that.

The file is a wandb sweep (program, command, method: grid, parameters with dotted or nested keys), so
that the same file also serves wandb's own agents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from soluscope.config import Config, check, load_config, read_yaml, short_name
from soluscope.errors import UserError

_NAMED = ("variant", "arm", "seed", "study", "tag")
"""Parameters that are in a run's path already."""


@dataclass(frozen=True)
class Sweep:
    """A grid of jobs of one study."""

    path: Path
    """The file it was read from."""
    words: tuple[str, ...]
    """Overrides for every job, `key=value`."""
    parameters: Mapping[str, tuple[Any, ...]]
    """The grid: values by dotted key, those that `words` override left out, the tag put in."""
    configs: tuple[Config, ...]
    """One a job, in the order of the parameters, the last one fastest."""

    @property
    def study_dir(self) -> Path:
        return self.configs[0].study_dir

    @property
    def name(self) -> str:
        return self.path.stem


def read_sweep(path: Path, words: Sequence[str]) -> Sweep:
    """The jobs of a sweep file.

    Parameters with several values that are in no run's name go into the tag, unless the file has a tag
    of its own. A word that overrides a parameter takes the place of its values.

    Args:
        path: a wandb sweep file with `method: grid`.
        words: `key=value` for every job.

    Raises:
        UserError: not a grid, an empty one, a parameter that no configuration has, two jobs with one id
            or one folder, or several studies.
    """
    file: Any = OmegaConf.to_container(read_yaml(path))
    grid = file.get("parameters")
    check(file.get("method") == "grid" and isinstance(grid, dict),
          f"{path} is not a sweep: wanted 'method: grid' and 'parameters:'")  # fmt: skip
    overridden = {word.split("=", 1)[0] for word in words}
    axes = {key: values for key, values in _axes(path, grid) if key not in overridden}
    check(bool(axes), f"{path} is an empty grid: wanted parameters that no word overrides")
    tag_keys = [key for key, values in axes.items() if len(values) > 1 and key not in _NAMED]
    if tag_keys and not {"tag"} & (axes.keys() | overridden):
        axes["tag"] = ("-".join(short_name(key, f"${{{key}}}") for key in tag_keys),)
    configs = [load_config([*chosen, *words]) for chosen in _points(axes)]
    _check_apart(path, configs)
    return Sweep(path, tuple(words), axes, tuple(configs))


def _axes(path: Path, grid: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple]]:  # type: ignore[type-arg]
    """(dotted key, values) of wandb's parameters, nested ones included."""
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
                    f"{path} is an empty grid at {key}: wanted 'values: [...]' or 'value: ...' below it, "
                    f"not {spec}"
                )
            yield key, tuple(values)


def _points(axes: Mapping[str, Sequence[Any]]) -> Iterator[list[str]]:
    for values in itertools.product(*axes.values()):
        chosen = zip(axes, values, strict=True)
        yield [f"{key}={'null' if value is None else value}" for key, value in chosen]


def _check_apart(path: Path, configs: Sequence[Config]) -> None:
    """Each job in a folder of its own, none twice, all of one study."""
    studies = sorted({config.study for config in configs})
    check(len(studies) == 1, f"{path} is of several studies, wanted one: {', '.join(studies)}")
    ids: dict[str, Config] = {}
    folders: dict[Path, Config] = {}
    for config in configs:
        if config.run_dir in folders:
            raise UserError(
                f"{path} gives two jobs the folder {config.run_dir}: they differ in nothing that names it; "
                "put what differs into tag, as in tag: {value: 'lr${train.lr}'}"
            )
        if config.hash in ids:
            raise UserError(
                f"{path} gives two jobs the id {config.hash}: {ids[config.hash].run_name} and "
                f"{config.run_name} differ in nothing that moves a number"
            )
        folders[config.run_dir] = ids[config.hash] = config
