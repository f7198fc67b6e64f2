"""Write a finished study's tables, figures and checksums into a folder of docs/studies.

    python docs/studies/publish.py runs/small-solu docs/studies/2026-small-solu

tables/documents.parquet   loss by run and document, which every comparison rests on
tables/runs.parquet        settings, losses, time and checksum of the weights of each run
tables/comparisons.parquet the comparisons of the arms, as the report shows them
tables/probes.parquet      the probes' numbers on the trained models, beside those before training
lineages.json              each variant's role in the comparison
figures/                   the report's main figures as SVG

The notebook beside them computes the comparisons again from documents.parquet.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pandas as pd

import soluscope
from soluscope.commands import report
from soluscope.evaluation.suite import finished_runs, losses_of
from soluscope.runs.folder import Run

PROBE_COLUMNS = [
    "run", "arm", "seed", "probe", "quantity", "unit", "stream", "statistic", "positions", "value", "low", "high",
]  # fmt: skip


def main(study_dir: Path, out: Path) -> None:
    """Publish a study."""
    tables = out / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    losses, study = losses_of(study_dir), soluscope.study(study_dir)
    store(by_document(losses.table), tables / "documents.parquet")
    store(pd.DataFrame(map(about, finished_runs(study_dir))), tables / "runs.parquet")
    store(study.comparisons.drop(columns=["study", "commit"]), tables / "comparisons.parquet")
    store(probes(study), tables / "probes.parquet")
    lineages = {name: asdict(each) for name, each in losses.lineages.items()}
    (out / "lineages.json").write_text(json.dumps(lineages, indent=1) + "\n", encoding="utf8")
    figures(study_dir, out / "figures")


def by_document(losses: pd.DataFrame) -> pd.DataFrame:
    """Return the losses without what a run's row in runs.parquet says too.

    Choices use the mean loss of the select split only, so that split is one row of each run.
    """
    chosen = losses[losses["split"] == "select"].groupby("run", sort=False)
    sums = chosen[["loss_sum", "n_tokens"]].transform("sum")
    select = (
        losses[losses["split"] == "select"].assign(document="all", **sums).drop_duplicates("run")
    )
    return pd.concat([select, losses[losses["split"] == "report"]], ignore_index=True)


def about(run: Run) -> dict[str, object]:
    """Return a run's row in runs.parquet."""
    facts, end = run.facts, run.done()
    assert end is not None
    return {
        "run": facts.run, "arm": facts.arm, "variant": facts.variant, "seed": facts.seed, "id": facts.config,
        "select_loss": end["select_loss"], "report_loss": end["report_loss"], "tokens": end["tokens"],
        "seconds": end["seconds"], "weights_sha256": end["weights_sha256"],
    }  # fmt: skip


def probes(study: soluscope.Study) -> pd.DataFrame:
    """Return the probes' means, medians and estimates, with their values before training."""
    whole = study.probes[(study.probes["group"] == "") & study.probes["x"].isna()]
    keys = ["run", "probe", "quantity", "stream", "statistic", "positions"]
    twins = study.untrained[study.untrained["group"] == ""] if len(study.untrained) else whole[:0]
    before = twins[[*keys, "value"]].rename(columns={"value": "untrained"}).drop_duplicates(keys)
    beside: pd.DataFrame = whole[PROBE_COLUMNS].merge(before, on=keys, how="left")
    return beside


def store(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False, compression="zstd", compression_level=19)


def figures(study_dir: Path, out: Path) -> None:
    """Write the report's main figures as SVG, in place of those that are there."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "figures"
        report.run([str(study_dir), f"out={folder}", f"figures={drawn}"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for path in sorted(drawn.glob("*.svg")):
            shutil.copy(path, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
