"""Upload of a run's probe results, as tables and figures, to the wandb run of its training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from soluscope import results
from soluscope.files import digest
from soluscope.report.figures import draw
from soluscope.results import Measurement, OfRun, ProbeWords, Record, of_kind
from soluscope.runs.folder import Run
from soluscope.training.wandb_run import identity, start, write_identity
from soluscope.wandb_client import Mode, package

CURVES = {"training"}
"""Files of probes/ that are not sent, because the training curves are in wandb already."""


def send_probes(run: Run, asked: Mode | None = None) -> None:
    """Send a run's probe results to the wandb run of its training: a table and figures per probe.

    Results that were sent before and have not changed are skipped. Without `asked`, nothing is sent unless this
    user trained the run here with wandb. With it, a run of another person gets a new wandb run of this user.

    Args:
        run: the run.
        asked: the setting `wandb=` of the evaluation.
    """
    known = identity(run.dir)
    if asked == "off" or not (asked or known):
        return
    paths = {path.stem: path for path in sorted((run.dir / "probes").glob("*.jsonl"))}
    now = {name: digest(paths[name].read_text(encoding="utf8")) for name in paths.keys() - CURVES}
    sent: dict[str, str] = known.get("probes", {})
    waiting = [name for name in sorted(now) if now[name] != sent.get(name)]
    if not waiting:
        return
    tracker = start(replace(run.config, wandb=asked or known.get("wandb")), run.dir)
    taken = {n: now[n] for n in waiting if tracker.send(partial(_logged, n, paths[n]))}
    tracker.close()
    if taken:
        write_identity(run.dir, identity(run.dir) | {"probes": sent | taken})


def _logged(name: str, path: Path) -> dict[str, Any]:
    """Return a probe's results as a table, and its figures, by their keys in wandb."""
    records = results.read(path)
    return {f"probes/{name}": _table(records), **_figures(name, records)}


def _table(records: Sequence[Record]) -> Any:
    """Return a table with one row per record about the run, without the probe's description."""
    rows = [each for each in records if isinstance(each, OfRun)]
    kinds: list[type[OfRun]] = [type(row) for row in rows] or [Measurement]
    columns = list(dict.fromkeys(field.name for kind in kinds for field in fields(kind)))
    return package().Table(
        columns=columns,
        data=[[getattr(row, column, None) for column in columns] for row in rows],
        allow_mixed_types=True,
    )


def _figures(name: str, records: Sequence[Record]) -> dict[str, Any]:
    """Return the figures that a probe defines, by `probe/title`."""
    specs = {
        f"{name}/{re.sub('/', ' per ', spec.title)}": spec
        for words in of_kind(records, ProbeWords)
        for spec in words.figures
    }
    drawn = {title: draw(records, spec) for title, spec in specs.items()}
    return {title: package().Plotly(figure) for title, figure in drawn.items() if figure.data}
