"""The row: one number with its interval and all that is needed to say where it came from.

`results.jsonl` holds one row a line and is the only input of the report.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from soluscope.errors import UserError
from soluscope.files import write_text

MARGIN = 0.005
"""Nats a token: a smaller difference of losses does not matter, and a gain of LN must be above it.

Source: science.md section 4."""

ONE_NUMBER = "one number, the same at every token"
"""Note of a row that has no interval because nothing varies."""


LEFT_OUT = "left out"
"""Quantity of a row that says in its note why a probe has no numbers for a run, or on a stream."""

PRETRAINED = "pretrained "
"""How the variant of a pretrained model's rows begins: it is none that was trained here to be compared."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number. Rows about a model name its `run`; rows about a comparison have none."""

    study: str
    probe: str
    """Name of a file in probes/, or `loss`, `training`, `tokens`, `comparison`, `controls`,
    `false positives`, `pretrained`."""
    quantity: str
    """What was measured: `r`, `gain`, `loss`, `gain of LN`, …"""
    value: float | None
    """The estimate. None: undefined, and `note` says why."""
    unit: str
    run: str = ""
    """Run folder's name, such as `solu_ln-s0`; empty for a comparison of runs."""
    arm: str = ""
    """The run's name without its seed: what is trained more than once, once a seed."""
    variant: str = ""
    seed: int | None = None
    statistic: str = "mean"
    """How tokens became one number: `mean`, `median`, `q05`, `share above 0.5`, …"""
    stream: str = ""
    """Text it was measured on: `natural`, `prose`, `code`, `repeated`, `random`; or `select`."""
    positions: str = "not BOS"
    """`all`, `BOS`, `not BOS`, `1`, `2-15`, `>=16`."""
    group: str = ""
    """Which line of a figure, or which split of the tokens, where `quantity` alone does not say."""
    x: float | None = None
    """Place on the figure's horizontal axis, for a row that is a point of a curve."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95% interval. None: no interval can be given."""
    p: float | None = None
    """Two-sided p of "no difference", where it was tested."""
    p_adj: float | None = None
    """The same after Holm's correction within its family."""
    n: int = 0
    """How many values went in: tokens, or strings; for comparisons, seeds."""
    n_clusters: int = 0
    """How many independent units they fall into, resampled for the interval."""
    cluster: str = ""
    """What such a unit is: `document`, `string`, `seed`."""
    note: str = ""
    """What a reader must know to read the number; shown with it."""
    commit: str = ""
    config: str = ""
    """Hash of the run's configuration."""


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write `rows` to `path`, wholly or not at all."""
    write_text(path, "".join(json.dumps(_finite(asdict(row))) + "\n" for row in rows))


def read(path: Path) -> list[Row]:
    """Rows of `path`. A line that cannot be read is skipped with a warning on stderr.

    Raises:
        UserError: if there is no such file, or no line of it can be read.
    """
    if not path.is_file():
        raise UserError(f"no results at {path}: make them with 'python eval/run.py {path.parent}'")
    known = {field.name for field in fields(Row)}
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            rows.append(Row(**{key: record[key] for key in record if key in known}))
        except (ValueError, TypeError) as error:
            print(
                f"warning: {path} line {number} is not a row and is skipped ({error})",
                file=sys.stderr,
            )
    if not rows:
        raise UserError(f"{path} holds no rows: make them with 'python eval/run.py {path.parent}'")
    return rows


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan or inf: None in their place."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
