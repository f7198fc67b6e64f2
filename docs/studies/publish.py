"""Write a finished study's tables, figures and checksums into a folder of docs/studies.

    python docs/studies/publish.py runs/small-solu docs/studies/2026-small-solu

tables/documents.parquet   loss by run and document, which every comparison rests on
tables/runs.parquet        settings, losses, time and checksum of the weights of each run
tables/comparisons.parquet the comparisons of the arms, as the report shows them
tables/probes.parquet      the probes' numbers on the trained models, beside those before training
study.json, lineages.json  the study's name and select seeds, and each variant's role in the comparison
figures/                   the report's main figures as SVG
rebuild.ipynb              the comparisons, computed again from documents.parquet
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import nbformat
import pandas as pd
from nbclient import NotebookClient

import soluscope
from soluscope.commands import report
from soluscope.evaluation.suite import finished_runs, losses_of, select_seeds
from soluscope.runs.folder import Run

PROBE_COLUMNS = [
    "run", "arm", "seed", "probe", "quantity", "unit", "stream", "statistic", "positions", "value", "low", "high",
]  # fmt: skip


def main(study_dir: Path, out: Path) -> None:
    """Publish a study."""
    write_tables(study_dir, out)
    figures(study_dir, out / "figures")
    rebuild(out)


def write_tables(study_dir: Path, out: Path) -> None:
    """Write all files but the figures and the notebook."""
    tables = out / "tables"
    tables.mkdir(parents=True, exist_ok=True)
    losses, study, runs = losses_of(study_dir), soluscope.study(study_dir), finished_runs(study_dir)
    store(by_document(losses.table), tables / "documents.parquet")
    store(pd.DataFrame(map(about, runs)), tables / "runs.parquet")
    store(study.comparisons.drop(columns=["study", "commit"]), tables / "comparisons.parquet")
    store(probes(study), tables / "probes.parquet")
    lineages = {name: asdict(each) for name, each in losses.lineages.items()}
    write_json(lineages, out / "lineages.json")
    about_study = {"study": study_dir.name, "select_seeds": sorted(select_seeds(runs))}
    write_json(about_study, out / "study.json")


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


def rebuild(out: Path) -> None:
    """Run the notebook on the published tables, and store it with its outputs.

    Raises:
        CellExecutionError: if a number that it computes is not the published one.
    """
    notebook = nbformat.read(Path(__file__).parent / "rebuild.ipynb", as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(out)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ at each call
    nbformat.write(notebook, out / "rebuild.ipynb")


def write_json(content: object, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")


def store(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False, compression="zstd", compression_level=19)


def figures(study_dir: Path, out: Path) -> None:
    """Write the report's main figures as SVG. Figures of an earlier time are removed."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "figures"
        report.run([str(study_dir), f"out={folder}", f"figures={drawn}"])
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for path in sorted(drawn.glob("*.svg")):
            shutil.copy(path, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
