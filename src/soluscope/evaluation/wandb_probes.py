"""What the probes found on a run, sent to the wandb run that it was trained in: tables and figures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from soluscope import plugins, results
from soluscope.files import digest, write_text
from soluscope.report.figures import draw
from soluscope.results import Row
from soluscope.runs.folder import Run
from soluscope.training.wandb_run import IDENTITY, identity, start
from soluscope.wandb_client import package

CURVES = {"training"}
"""Files of probes/ that are not sent: the training curves are in wandb already."""
PROBES = "soluscope.probes"


def send_probes(run_dir: Path) -> None:
    """Send what the probes have found on a run to the wandb run that it was trained in.

    A table and figures a probe; what was sent already and has not changed since is left out. Nothing
    where the run was trained without wandb.
    """
    known = identity(run_dir)
    if not known:
        return
    paths = {path.stem: path for path in sorted((run_dir / "probes").glob("*.jsonl"))}
    now = {name: digest(paths[name].read_text(encoding="utf8")) for name in paths.keys() - CURVES}
    sent: dict[str, str] = known.get("probes", {})
    waiting = [name for name in sorted(now) if now[name] != sent.get(name)]
    if not waiting:
        return
    tracker = start(Run(run_dir).config, run_dir)
    taken = {n: now[n] for n in waiting if tracker.send(partial(_logged, n, paths[n]))}
    tracker.close()
    if taken:
        write_text(
            run_dir / IDENTITY, json.dumps(identity(run_dir) | {"probes": sent | taken}) + "\n"
        )


def _logged(name: str, path: Path) -> dict[str, Any]:
    """Return a probe's rows as a table, and its figures, by their keys in wandb."""
    rows = results.read(path)
    return {f"probes/{name}": _table(rows), **_figures(name, rows)}


def _table(rows: Iterable[Row]) -> Any:
    return package().Table(
        columns=[field.name for field in fields(Row)],
        data=[list(asdict(row).values()) for row in rows],
        allow_mixed_types=True,
    )


def _figures(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The figures that a probe asks for, by `probe/title`."""
    if name not in plugins.names(PROBES):
        return {}
    specs = {
        f"{name}/{re.sub('/', ' per ', s.title)}": s for s in plugins.pick(PROBES, name).figures
    }
    drawn = {title: draw(rows, spec) for title, spec in specs.items()}
    return {title: package().Plotly(figure) for title, figure in drawn.items() if figure.data}
