"""Training, conversion, probes and report through the real commands, in a temporary folder, without network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT, command
from nbclient.exceptions import CellExecutionError

from soluscope import plugins, results
from soluscope.evaluation import suite
from soluscope.results import (
    OUTPUT_SIZE,
    SCALED_SIZE,
    Comparison,
    FalsePositives,
    GateResult,
    LeftOut,
    Measurement,
    ProbeWords,
    Setting,
    Term,
    TokenValue,
    of_kind,
)

pytestmark = pytest.mark.slow

VARIANTS = ["gelu", "solu", "solu_frozen_ln", "solu_ln"]
"""A baseline, the start of solu_ln's chain, and solu_ln with its static twin."""


WORDS = ["n_tokens=600", "n_loss_tokens=2000", "n_draws=200"]
"""Settings of each evaluation."""


def run(folder, *words):
    """Run a command in `folder` as a process without network: its proxy does not exist."""
    nowhere = dict.fromkeys(
        ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9"
    )
    env = os.environ | nowhere | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def study(tmp_path_factory, gates):
    """Launch a small demo twice; return its folder and both outputs. Only engagement has no control results yet."""
    folder = tmp_path_factory.mktemp("end_to_end")
    here = folder / "runs" / "e2e"
    suite._calibrated(
        "controls", ["gain_variation"], here, print
    )  # also stores the hash of its code
    for probe in {*plugins.names("soluscope.probes")} - {"gain_variation", "engagement"}:
        shutil.copy(gates(probe), here / suite.CONTROLS)
    words = ["study=e2e", "size=tiny", "train.lr=4e-3", "train.steps=25", "corpus.max_mb=2", "train.threads=1",
             *(f"eval.{word}" for word in WORDS)]  # fmt: skip
    sweep = yaml.safe_load((ROOT / "sweeps" / "demo.yaml").read_text())
    del sweep["parameters"]["arm"]
    sweep["parameters"]["variant"] = {"values": VARIANTS}
    (folder / "demo.yaml").write_text(yaml.safe_dump(sweep))
    first = run(folder, ROOT / "sweeps" / "launch.py", "demo.yaml", *words)
    again = command("sweep", "demo.yaml", *words, cwd=folder)
    return here, first, again


def test_every_run_leaves_what_design_says(study):
    folder, _, _ = study
    for variant in VARIANTS:
        for seed in (0, 1):
            here = folder / f"{variant}-s{seed}"
            for name in ("config.yaml", "model.safetensors", "model.json", "metrics.jsonl", "done.json",
                         "checkpoints/last.ckpt", "probes/engagement.parquet", "probes/loss.parquet"):  # fmt: skip
                assert (here / name).is_file(), name
    for name in ("tokenizer.json", "data.json", "results.jsonl", "report.html"):
        assert (folder / name).is_file(), name


def test_results_hold_every_probe_for_every_run_and_the_comparisons(study):
    records = results.read(study[0] / "results.jsonl")
    runs = {f"{variant}-s{seed}" for variant in VARIANTS for seed in (0, 1)}
    probes = plugins.names("soluscope.probes")
    about_runs = [each for each in records if isinstance(each, Measurement | LeftOut)]
    for probe in (*probes, "loss", "training"):
        assert {each.run for each in about_runs if each.probe == probe} == runs, probe
    assert {each.run for each in of_kind(records, TokenValue)} == runs
    compared = {each.term for each in of_kind(records, Comparison)}
    of_line = {Term.SENSITIVITY, Term.SENSITIVITY_STEP, Term.SENSITIVITY_PART}
    assert compared == set(Term) - of_line - {Term.GAP, Term.SINCE}  # one rate, and no snapshots
    assert {each.arm for each in of_kind(records, Setting)} == set(VARIANTS)
    assert all(each.commit for each in records)
    assert all(each.config for each in about_runs)
    assert {each.probe for each in of_kind(records, GateResult)} == set(probes)


def test_the_size_of_the_mlps_output_that_every_run_has_is_that_of_p4(study):
    found = of_kind(results.read(study[0] / "results.jsonl"), Measurement)
    sizes = {row.run: row for row in found if row.probe == OUTPUT_SIZE}
    of_p4 = {
        row.run: row
        for row in found
        if (row.probe, row.quantity, row.statistic) == ("scale_freeze", SCALED_SIZE, "median")
        and (row.positions, row.group) == ("not BOS", "")
    }
    assert sizes.keys() == of_p4.keys() == {f"{v}-s{seed}" for v in VARIANTS for seed in (0, 1)}
    for run, row in of_p4.items():
        here = sizes[run]
        assert (here.value, here.n, here.n_clusters) == (row.value, row.n, row.n_clusters)


def test_results_hold_each_probes_words_once(study):
    words = of_kind(results.read(study[0] / "results.jsonl"), ProbeWords)
    assert sorted(each.probe for each in words) == sorted(plugins.names("soluscope.probes"))
    for each in words:
        probe = plugins.pick("soluscope.probes", each.probe)
        assert (each.name, each.question, each.figures) == (
            probe.name,
            probe.question,
            probe.figures,
        )
        assert each.quantities == probe.quantities | probe.estimates
        here = study[0] / "solu-s0" / "probes" / f"{each.probe}.jsonl"
        assert results.read(here)[0] == each


def test_the_second_time_nothing_is_trained_or_probed_and_it_says_so(study):
    _, first, again = study
    assert f"demo: {2 * len(VARIANTS)} jobs: {2 * len(VARIANTS)} waiting" in first.stderr
    assert first.stderr.count("controls of") == 1
    assert "controls of" not in again.stderr
    assert f"{2 * len(VARIANTS)} of {2 * len(VARIANTS)} runs: probed already" in first.stderr
    assert f"demo: {2 * len(VARIANTS)} jobs: {2 * len(VARIANTS)} done" in again.stderr
    assert "begins" not in again.stderr
    assert f"{2 * len(VARIANTS)} of {2 * len(VARIANTS)} runs: probed already" in again.stderr


def test_a_sweep_ends_with_five_lines_and_soluscope_report_shows_the_table(study):
    folder, first, again = study
    begins = [
        "answer: ",
        "how sure: ",
        "report: runs/e2e/report.html",
        "table: soluscope report runs/e2e",
        "states of the runs: soluscope sweep --status runs/e2e",
    ]
    lines = first.stdout.splitlines()
    assert len(lines) == len(begins)
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True))
    assert first.stdout == again.stdout
    shown = command("report", "runs/e2e", cwd=folder.parents[1])
    assert "solu_frozen_ln" in shown.stdout
    assert "report: runs/e2e/report.html" in shown.stdout


def test_the_report_is_rebuilt_from_results_alone_without_torch(study, tmp_path):
    (tmp_path / "e2e").mkdir()
    (tmp_path / "e2e" / "results.jsonl").write_bytes((study[0] / "results.jsonl").read_bytes())
    blocked = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run(tmp_path, "-c", blocked, ROOT / "eval" / "report.py", "e2e")
    assert (tmp_path / "e2e" / "report.html").read_bytes() == (
        study[0] / "report.html"
    ).read_bytes()


def test_probing_the_same_models_again_gives_the_same_rows_bit_for_bit(study, tmp_path):
    copy = tmp_path / "runs" / "e2e"
    shutil.copytree(study[0], copy)
    shutil.rmtree(copy / "solu_ln-s0" / "probes")
    cache = json.loads((copy / "data.json").read_text())["path"]
    shutil.copytree(study[0].parents[1] / Path(cache).parent, tmp_path / Path(cache).parent)
    command("probe", "runs/e2e", *WORDS, cwd=tmp_path)
    assert (copy / "results.jsonl").read_bytes() == (study[0] / "results.jsonl").read_bytes()


def test_one_run_trains_by_the_readmes_command(tmp_path):
    words = "variant=solu_ln seed=1 size=tiny data=stdlib train.steps=5 train.warmup_steps=0 corpus.max_mb=1"
    done = run(tmp_path, ROOT / "train" / "run.py", *words.split())
    assert done.stdout == "runs/default/solu_ln-s1 is finished\n"
    assert "loss" in done.stderr
    assert "tok/s" in done.stderr


def test_probing_one_probe_again_leaves_the_others_alone(study, tmp_path):
    copy = tmp_path / "runs" / "e2e"
    shutil.copytree(study[0], copy)
    (copy / "solu-s0" / "probes" / "engagement.jsonl").unlink()
    tokens = Path(json.loads((copy / "data.json").read_text())["path"])
    prepared = f"prepared={study[0].parents[1] / tokens}"
    done = command("probe", "runs/e2e", "probes=[engagement]", *WORDS, prepared, cwd=tmp_path)
    n_runs = 2 * len(VARIANTS)
    assert f"{n_runs - 1} of {n_runs} runs: probed already" in done.stderr
    assert (copy / "results.jsonl").read_bytes() == (study[0] / "results.jsonl").read_bytes()


def test_other_tokens_than_those_trained_on_are_refused(study, tmp_path):
    copy = tmp_path / "runs" / "e2e"
    shutil.copytree(study[0], copy)
    data = json.loads((copy / "data.json").read_text())
    (copy / "data.json").write_text(json.dumps(data | {"key": "another"}))
    (copy / "solu-s0" / "probes" / "loss.jsonl").unlink()
    tokens = study[0].parents[1] / data["path"]
    words = [*WORDS, f"prepared={tokens}"]
    done = command("probe", "runs/e2e", *words, cwd=tmp_path, status=2)
    assert "was trained on the tokens another" in done.stderr.splitlines()[-1]


def test_a_run_whose_evaluation_was_interrupted_at_its_start_waits_for_its_turn(study, tmp_path):
    copy = tmp_path / "runs" / "e2e"
    shutil.copytree(study[0], copy)
    for path in (copy / "solu-s0" / "probes").glob("*"):
        if path.name not in ("made_with.json", "training.jsonl"):
            path.unlink()
    command("probe", "runs/e2e/gelu-s0", *WORDS, cwd=tmp_path)
    records = results.read(copy / "results.jsonl")
    assert {each.run for each in of_kind(records, Measurement)} == {
        f"{variant}-s{seed}" for variant in VARIANTS for seed in (0, 1)
    } - {"solu-s0"}


@pytest.mark.long
def test_false_positives_are_kept_for_the_report_and_controls_are_not_asked_twice(study, tmp_path):
    copy = tmp_path / "runs" / "e2e"
    shutil.copytree(study[0], copy)
    words = ("probes=[scale_invariance]", "runs/e2e")
    asked = command("probe", "--false-positives", *words, cwd=tmp_path)
    assert "false-positives of scale_invariance" in asked.stderr
    again = command("probe", "--false-positives", *words, cwd=tmp_path)
    assert again.stderr == ""
    assert again.stdout == asked.stdout
    kept = of_kind(results.read(copy / "results.jsonl"), FalsePositives)
    assert {each.source for each in kept} == {"untrained models", "shuffled labels"}
    assert all(each.n == 200 for each in kept)
    controls = command("probe", "--controls", *words, cwd=tmp_path)
    assert controls.stderr == ""
    assert "pinned" in controls.stdout


def test_a_changed_probe_is_made_anew_and_the_others_stay(study, tmp_path):
    copy = tmp_path / "runs" / "e2e"
    shutil.copytree(study[0], copy)
    mark = copy / "solu-s0" / "probes" / "made_with.json"
    stamps = json.loads(mark.read_text())
    mark.write_text(json.dumps(stamps | {"probes/engagement.py": "another"}))
    tokens = Path(json.loads((copy / "data.json").read_text())["path"])
    prepared = f"prepared={study[0].parents[1] / tokens}"
    done = command("probe", "runs/e2e", *WORDS, prepared, cwd=tmp_path)
    assert "solu-s0: engagement has changed and is recomputed" in done.stderr
    assert "solu-s0: 1 result to compute" in done.stderr
    assert (copy / "results.jsonl").read_bytes() == (study[0] / "results.jsonl").read_bytes()


OLD = (
    '{"study": "e2e", "probe": "loss", "quantity": "loss", "value": 4.0, "unit": "nats / token",'
    ' "run": "solu-s0"}\n'
)
"""A row of an older version, in which records had no kind."""


def test_what_an_older_version_left_in_a_run_is_made_again_and_refused_elsewhere(study, tmp_path):
    copy = tmp_path / "runs" / "e2e"
    shutil.copytree(study[0], copy)
    tokens = study[0].parents[1] / json.loads((copy / "data.json").read_text())["path"]
    old = copy / "solu-s0" / "probes"
    for path in old.glob("*.jsonl"):
        path.write_text(OLD)
    (old / "made_with.json").write_text('{"shared": "of the older version"}')
    words = [*WORDS, f"prepared={tokens}"]
    done = command("probe", "runs/e2e/gelu-s0", *words, cwd=tmp_path, status=2)
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "was written by another version" in line
    assert line.endswith("create it with 'soluscope probe runs/e2e'")
    command("probe", "runs/e2e", *words, cwd=tmp_path)
    assert (copy / "results.jsonl").read_bytes() == (study[0] / "results.jsonl").read_bytes()


def test_a_folder_without_runs_is_refused_before_anything_is_asked(tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("probe", "--controls", "empty", cwd=tmp_path, status=2)
    assert done.stderr.splitlines()[-1].startswith("error: no finished run in empty")
    assert not (tmp_path / "empty" / ".controls").exists()


def test_a_published_study_is_computed_again_from_its_tables(study, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "studies"))
    import publish

    publish.write_tables(study[0], tmp_path)
    publish.rebuild(tmp_path)
    shown = (tmp_path / "rebuild.ipynb").read_text(encoding="utf8")
    assert "comparisons are the published ones" in shown
    assert "text/html" in shown
    path = tmp_path / "tables" / "comparisons.parquet"
    numbers = pd.read_parquet(path)
    is_benefit = numbers["term"] == Term.BENEFIT
    assert is_benefit.any()
    publish.store(numbers.assign(value=numbers["value"] + 1e-4 * is_benefit), path)
    with pytest.raises(CellExecutionError, match="Mismatched elements"):
        publish.rebuild(tmp_path)
