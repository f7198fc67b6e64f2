"""A grid of runs from one file, trained one after another, then probed and reported.

The file is a wandb sweep (program, method: grid, parameters with dotted keys), so that the same file
also serves wandb's own agents. What is done is known from the run folders alone.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from soluscope.config import Config, EvalConfig, check, load_config, load_typed, read_yaml
from soluscope.errors import UserError

_NAMED = ("variant", "seed", "study", "tag")
"""Parameters that are in a run's path already."""


def expand(path: Path, overrides: Sequence[str]) -> list[Config]:
    """The configurations of a sweep file, in the order of its parameters, the last one fastest.

    A parameter with several values, other than variant and seed, goes into the run's name. An
    override of a parameter takes the place of its values.

    Raises:
        UserError: not a grid, a parameter that no configuration has, two runs of one name, or two studies.
    """
    sweep: Any = OmegaConf.to_container(read_yaml(path))
    parameters = sweep.get("parameters")
    check(sweep.get("method") == "grid" and isinstance(parameters, dict) and bool(parameters),
          f"{path} is not a sweep: wanted 'method: grid' and 'parameters:'")  # fmt: skip
    overridden = {word.split("=", 1)[0] for word in overrides}
    axes = {k: _values(path, k, spec) for k, spec in parameters.items() if k not in overridden}
    configs: dict[Path, Config] = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        words = [f"{key}={'null' if value is None else value}" for key, value in chosen.items()]
        tag = "-".join(
            f"{key.rsplit('.', 1)[-1]}{value}"
            for key, value in chosen.items()
            if len(axes[key]) > 1 and key not in _NAMED
        )
        config = load_config([*words, *([f"tag={tag}"] if tag else []), *overrides])
        if config.run_dir in configs:
            raise UserError(
                f"{path} gives two runs the folder {config.run_dir}: they differ in nothing that names it"
            )
        configs[config.run_dir] = config
    studies = sorted({config.study for config in configs.values()})
    check(len(studies) == 1, f"{path} is of several studies, wanted one: {', '.join(studies)}")
    return list(configs.values())


def _values(path: Path, key: str, spec: Any) -> list[Any]:
    """The values of one parameter."""
    if isinstance(spec, dict) and "value" in spec:
        return [spec["value"]]
    values = spec.get("values") if isinstance(spec, dict) else None
    if not isinstance(values, list) or not values:
        raise UserError(f"{path}: wanted 'values: [...]' or 'value: ...' below {key}, not {spec}")
    return values


def run(path: Path, words: Sequence[str]) -> Path:
    """Train what is not finished, then probe and report the study.

    Args:
        path: a sweep file.
        words: overrides for every run; those that begin with `eval.` are for the evaluation.

    Returns:
        The report.
    """
    configs = expand(path, [word for word in words if not word.startswith("eval.")])
    evaluation = load_typed(
        EvalConfig, [w.removeprefix("eval.") for w in words if w.startswith("eval.")], "eval.yaml"
    )
    waiting = [config for config in configs if not (config.run_dir / "done.json").is_file()]
    done = len(configs) - len(waiting)
    _say(f"{path.stem}: {len(configs)} runs, {done} finished already, {len(waiting)} to train")
    from soluscope import report, suite  # here, so that a mistake above is answered at once
    from soluscope.training import progress_bars, train

    with progress_bars() as progress:
        for config in configs:  # finished ones too: it checks that they are of this configuration
            train(config, progress)
    study_dir = configs[0].study_dir
    suite.evaluate(study_dir, evaluation, _say)
    return report.publish(study_dir)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
