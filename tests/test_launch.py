"""Launches: finished jobs are skipped, states come from run folders, mistakes are found before any job starts."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _launching import until
from conftest import HANGS_AFTER_S, ROOT, command, run_python
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from soluscope.config import load_config, read_config
from soluscope.data.cache import cache_key
from soluscope.errors import UserError
from soluscope.launching import jobs
from soluscope.launching.jobs import Job, job_of, read_list, standing
from soluscope.launching.launch import launch
from soluscope.launching.sweep import read_sweep
from soluscope.runs.folder import lock
from soluscope.runs.weights import build_model

LAUNCH = ROOT / "sweeps" / "launch.py"
SMOKE = ROOT / "sweeps" / "smoke.yaml"


def here(runs_dir: Path, *words: str) -> list[str]:
    """Return the smoke sweep's words, with runs and tokens in `runs_dir`."""
    places = (f"runs_dir={runs_dir}", f"tokens.cache_dir={runs_dir / '.tokens'}")
    return [*places, "wandb=off", "train.threads=1", "train.precision=fp32", *words]


def launch_here(runs_dir: Path, *words: str, retry: bool = False) -> None:
    """Launch the smoke sweep without a report, in this process."""
    launch(SMOKE, here(runs_dir, "report=off", "inline.jobs=1", *words), retry=retry)


def standings(runs_dir: Path, *words: str) -> dict[str, jobs.Standing]:
    configs = read_sweep(SMOKE, here(runs_dir, *words)).configs
    return {config.run_name: standing(config.study_dir, job_of(config)) for config in configs}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return runs of the smoke sweep, launched once inline without a report. Copy them before you change them."""
    runs_dir = tmp_path_factory.mktemp("launched")
    launch_here(runs_dir)
    return runs_dir


@pytest.fixture
def runs_dir(launched: Path, tmp_path: Path) -> Path:
    """Return a copy of the launched runs."""
    return Path(shutil.copytree(launched, tmp_path / "runs"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def weights(runs_dir: Path) -> dict[str, bytes]:
    return {
        path.parent.name: path.read_bytes() for path in runs_dir.glob("smoke/*/model.safetensors")
    }


def test_every_job_is_done_and_its_run_is_of_the_sweeps_configuration(launched: Path) -> None:
    assert {now.state for now in standings(launched).values()} == {"done"}
    for config in read_sweep(SMOKE, here(launched)).configs:
        assert read_config(config.run_dir / "config.yaml") == config
        done = json.loads((config.run_dir / "done.json").read_text())
        assert standing(config.study_dir, job_of(config)).loss == done["report_loss"]


def test_what_is_done_is_not_done_again_and_what_was_lost_is(
    runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(runs_dir)
    lost, kept = runs_dir / "smoke" / "solu-s1", runs_dir / "smoke" / "solu-s0" / "done.json"
    shutil.rmtree(lost)
    made = kept.stat().st_mtime_ns
    launch_here(runs_dir)
    assert "smoke: 4 jobs: 3 done, 1 waiting" in capsys.readouterr().err
    assert kept.stat().st_mtime_ns == made
    assert weights(runs_dir) == before


def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, fresh = runs_dir / "smoke" / "solu-s0", runs_dir / "smoke" / "solu_ln-s1"
    shutil.rmtree(fresh)
    for name in ("done.json", "model.safetensors", "model.json"):
        (begun / name).unlink()
    rows = (begun / "metrics.jsonl").read_text().splitlines()
    (begun / "metrics.jsonl").write_text(rows[0] + "\n")  # step 10 of 12
    before = contents(tmp_path)
    launch(SMOKE, here(runs_dir), dry_run=True)
    printed = capsys.readouterr().out
    assert contents(tmp_path) == before
    assert re.search(r"solu-s0 .* resume 10/12", printed)
    assert re.search(r"solu_ln-s1 .* waiting", printed)
    assert re.search(r"solu_ln-s0 .* done", printed)
    assert (
        "4 jobs: 2 done, 1 resume, 1 waiting; to go: 3,584 tokens" in printed
    )  # 8 * 32 * (2 + 12)
    for config in read_sweep(SMOKE, here(runs_dir)).configs:
        assert re.search(rf"{config.run_name} .* {config.hash}", printed)


def test_the_estimated_flops_are_those_that_torch_counts() -> None:
    config = load_config(["variant=solu_ln", "size=demo", "model.n_layers=2"])
    model = build_model(config, config.tokens.d_vocab)
    tokens = torch.randint(3, config.tokens.d_vocab, (4, config.model.ctx))
    # The counter counts matrix products, but not the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.loss(tokens, bos=0).backward()
    estimated = config.model.training_flops(config.tokens.d_vocab) * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(estimated, rel=0.01)


JOB = {"id": "0", "run": "solu-s0", "steps": 1, "tokens_a_step": 1}


@pytest.mark.parametrize(
    "content",
    [
        *({"sweep": "s", "jobs": [JOB | {"run": name}]} for name in ("../x", "/tmp", "a/b", "", "..", "a\nb", 5)),
        {"sweep": "s", "jobs": [JOB | {"steps": "many"}]},
        {"sweep": "s", "jobs": [JOB | {"steps": True}]},
        {"sweep": "s", "jobs": {"a": 1}},
        {"sweep": ["s"], "jobs": []},
        {"jobs": []},
        [],
        None,
    ],
)  # fmt: skip
def test_a_list_of_jobs_that_others_have_changed_is_refused_in_one_line(
    content: Any, tmp_path: Path
) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"sweep.json is broken \(.*\): delete it") as caught:
        read_list(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "sweep.json").write_text(json.dumps({"sweep": "s", "jobs": [JOB]}))
    assert read_list(tmp_path) == ("s", [Job(**JOB)])


def test_states_are_read_from_the_run_folders_alone(runs_dir: Path) -> None:
    study = runs_dir / "smoke"
    (study / "sweep.json").unlink()
    for name in ("done.json", "model.safetensors"):
        (study / "solu-s0" / name).unlink()
    (study / "solu-s1" / "model.safetensors").write_bytes(b"cut")
    (study / "solu-s1" / "checkpoints" / "last.ckpt").unlink()
    (study / "solu_ln-s0" / "done.json").unlink()
    (study / "solu_ln-s0" / "failed.json").write_text('{"error": "the last line"}')
    with lock(study / "solu_ln-s1"):
        (study / "solu_ln-s1" / "done.json").unlink()
        found = standings(runs_dir)
        assert {name: now.state for name, now in found.items()} == {
            "solu-s0": "resume", "solu-s1": "waiting", "solu_ln-s0": "failed", "solu_ln-s1": "running"
        }  # fmt: skip
        assert found["solu_ln-s0"].error == "the last line"
        running = found["solu_ln-s1"]
    row = json.loads((study / "solu_ln-s1" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (running.step, running.loss, running.seconds_left) == (12, row["loss"], 0)
    (job,) = (job for job in jobs.listed(study) if job.run == "solu_ln-s1")
    (study / "solu_ln-s1" / "metrics.jsonl").write_text(json.dumps(row | {"step": 2}) + "\n")
    with lock(study / "solu_ln-s1"):
        left = standing(study, job).seconds_left
    assert left == pytest.approx(10 * 8 * 32 / row["tokens_per_s"])


def test_the_status_shows_jobs_that_have_no_folder_yet_and_runs_made_by_hand(
    runs_dir: Path,
) -> None:
    study = runs_dir / "smoke"
    shutil.rmtree(study / "solu-s1")
    hand = Path(shutil.copytree(study / "solu_ln-s1", study / "by-hand"))
    saved = (hand / "config.yaml").read_text()
    (hand / "config.yaml").write_text(saved.replace("tag: ''", "tag: hand"))
    hand.rename(study / "solu_ln-s1-hand")
    shown = command("sweep", "--status", study).stdout
    assert "5 jobs: 4 done, 1 waiting" in shown
    assert "solu_ln-s1-hand" in shown
    assert re.search(r"solu-s1 .*waiting.* 0/12", shown)


FAILING = ("train.lr=1e9", "train.lr_rest=1e9", "train.log_every=1")
"""Words with which every job diverges at once."""


def test_a_job_that_fails_stops_no_other_and_is_run_again_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as told:
        launch_here(tmp_path, *FAILING)
    assert "4 jobs: 4 failed" in str(told.value)
    assert "--retry-failed" in str(told.value)
    assert "\n" not in str(told.value)
    found = standings(tmp_path, *FAILING)
    assert {now.state for now in found.values()} == {"failed"}
    assert all("lower train.lr" in str(now.error) for now in found.values())
    config = tmp_path / "smoke" / "solu-s0" / "config.yaml"
    before = config.stat().st_mtime_ns
    with pytest.raises(UserError, match="4 failed"):
        launch_here(tmp_path, *FAILING)
    assert config.stat().st_mtime_ns == before, (
        "a failed job was tried again without --retry-failed"
    )
    with pytest.raises(UserError, match="4 failed"):
        launch_here(tmp_path, *FAILING, retry=True)
    assert config.stat().st_mtime_ns > before
    capsys.readouterr()


def test_more_seeds_join_a_study_of_the_same_sweep(runs_dir: Path) -> None:
    launch_here(runs_dir, "seed=2")
    names = [job.run for job in jobs.listed(runs_dir / "smoke")]
    assert sorted(names) == sorted(f"{v}-s{s}" for v in ("solu", "solu_ln") for s in (0, 1, 2))


RACE = """
import sys, time
from pathlib import Path
from soluscope.config import load_config
from soluscope.data import cache as caches
from soluscope.data.cache import prepare, share_with_study
caches._PATIENCE_S = 0  # each process that waits says so at once
config = load_config(sys.argv[3:])
meet = Path(sys.argv[1])
(meet / sys.argv[2]).touch()
while not (meet / "go").exists():
    time.sleep(0.01)
cache = prepare(config)
share_with_study(cache, config.study_dir)
print(cache.path)
"""


def test_four_processes_that_start_together_make_the_tokens_once(tmp_path: Path) -> None:
    words = [*here(tmp_path, "variant=solu", "size=tiny", "corpus.max_mb=1")]
    meet = tmp_path / "meet"
    meet.mkdir()
    commands = [
        [sys.executable, "-c", RACE, str(meet), str(i), *words, f"study=s{i % 2}"] for i in range(4)
    ]
    started = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for c in commands
    ]
    until(lambda: len(list(meet.iterdir())) == 4, "all four have imported")
    (meet / "go").touch()
    ended = [process.communicate(timeout=HANGS_AFTER_S) for process in started]
    assert [process.returncode for process in started] == [0] * 4, ended
    places = {out.strip() for out, _ in ended}
    assert places == {str(tmp_path / ".tokens" / cache_key(load_config(words)))}
    made = [err for _, err in ended if "waiting: another process is preparing" not in err]
    assert len(made) == 1, "each of the others waits for the one that makes the tokens"
    left = {path.name for path in (tmp_path / ".tokens").iterdir() if not path.name.startswith(".")}
    assert left == {Path(places.pop()).name}
    for study in ("s0", "s1"):
        cache = tmp_path / ".tokens" / next(iter(left))
        shared = (tmp_path / study / "tokenizer.json").read_bytes()
        assert shared == (cache / "tokenizer.json").read_bytes()
        assert json.loads((tmp_path / study / "data.json").read_text())["path"] == str(cache)


def test_a_job_waits_while_another_process_is_at_work_on_it(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (config, *_) = read_sweep(SMOKE, here(runs_dir)).configs
    held = lock(config.run_dir)
    held.__enter__()
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if looks.count(jobs.POLL_S) == 3:
            held.__exit__(None, None, None)

    monkeypatch.setattr(jobs.time, "sleep", sleep)
    assert jobs.execute(jobs.Task(config))
    assert looks.count(jobs.POLL_S) == 3
    assert "waiting, because another process is at work on it" in capsys.readouterr().err


@pytest.mark.long
def test_a_full_disk_is_no_failure_of_the_runs_and_the_same_command_goes_on(runs_dir: Path) -> None:
    before = weights(runs_dir)
    for config in read_sweep(SMOKE, here(runs_dir)).configs:
        shutil.rmtree(config.run_dir)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    code = (
        limited
        + "from soluscope.launching.launch import launch; import sys; from pathlib import Path; "
        + ("launch(Path(sys.argv[1]), sys.argv[2:])")
    )
    told = run_python("-c", code, SMOKE, *here(runs_dir, "report=off"))
    assert told.returncode == 1
    assert told.stderr.count(" stopped: cannot save the checkpoint") == 4
    assert {now.state for now in standings(runs_dir).values()} <= {"waiting", "resume"}
    launch(SMOKE, here(runs_dir, "report=off"))
    assert weights(runs_dir) == before


def test_what_keeps_a_job_from_starting_is_in_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config, *_) = read_sweep(SMOKE, here(tmp_path, "train.nodes=2")).configs
    assert not jobs.execute(jobs.Task(config))
    now = standing(config.study_dir, job_of(config))
    assert now.state == "failed"
    assert "or with srun" in str(now.error)
    assert f"{config.run_name} failed: " in capsys.readouterr().err


def test_auto_precision_is_that_in_which_the_run_or_its_study_was_begun(runs_dir: Path) -> None:
    words = [word for word in here(runs_dir) if not word.startswith("train.precision")]
    begun = runs_dir / "smoke" / "solu-s0"
    shutil.rmtree(runs_dir / "smoke" / "solu-s1")
    for path in runs_dir.glob("smoke/*/config.yaml"):
        path.write_text(path.read_text().replace("precision: fp32", "precision: bf16"))
    (begun / "done.json").unlink()
    launch(SMOKE, [*words, "report=off", "inline.jobs=1"])
    for name in ("solu-s0", "solu-s1"):
        assert read_config(runs_dir / "smoke" / name / "config.yaml").train.precision == "bf16"


def test_a_long_table_shows_what_is_at_work_and_what_failed_first(runs_dir: Path) -> None:
    study = runs_dir / "smoke"
    (study / "solu_ln-s1" / "done.json").unlink()
    (study / "solu_ln-s1" / "failed.json").write_text('{"error": "the last line"}')
    made = jobs.table(study, jobs.listed(study), most=2)
    assert made.row_count == 2
    assert str(made.columns[0]._cells[0]) == "solu_ln-s1"
    assert made.caption == "and 2 more, counted above"
    assert jobs.table(study, jobs.listed(study), most=4).caption is None


def test_a_status_is_given_where_one_configuration_was_cut(runs_dir: Path) -> None:
    study = runs_dir / "smoke"
    (study / "sweep.json").unlink()
    cut = study / "solu-s0" / "config.yaml"
    cut.write_text(cut.read_text()[:50])
    (study / "solu-s1" / "done.json").write_text("{}")
    shown = command("sweep", "--status", study)
    assert "4 jobs: 3 done, 1 resume" in shown.stdout  # a done.json without losses is broken


MISTAKES = {
    ("engine=rya",): "no engine called 'rya'. Did you mean 'ray'?",
    ("ray.cpus=2",): "ray.cpus=2 applies only to engine=ray, but engine=inline",
    ("engine=ray", "ray.cpu=2"): "no key called 'cpu'. Did you mean 'cpus'?",
    ("train.stepz=2",): "no key called 'train.stepz'",
    ("eval.n_tokens=2",): "n_tokens=2 must be 100 or more",
    ("train.device=cuda",): "train.device=cuda needs 1 GPUs, but torch finds 0 here",
    ("train.nodes=2",): "engine=inline cannot train with train.nodes above 1",
    ("report=maybe",): "report: Value 'maybe'",
    ("inline.jobs=0",): "inline.jobs=0 must be 1 or more",
    ("eval.jobs=0",): "jobs=0 must be 1 or more",
    ("--dry",): "unrecognized arguments: --dry",
    ("tokens.d_vocab=1",): "tokens.d_vocab=1 must be 260 or more",
    ("variant=solu", "seed=0", "size=tiny", "study=x", "corpus.max_mb=1", "train.steps=12",
     "train.checkpoint_every=5"): "is an empty grid",
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES, ids=lambda words: words[0])
def test_a_mistake_is_one_line_and_status_2_before_any_job_starts(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    told = command("sweep", SMOKE, *here(tmp_path / "runs"), *words, status=2)
    assert told.stderr.startswith("error: ")
    assert told.stderr.count("\n") == 1
    assert MISTAKES[words] in told.stderr
    assert not (tmp_path / "runs").exists()


def test_a_sweep_is_launched_once_and_not_by_each_of_torchruns_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(
        UserError, match="a sweep must be launched once, but torchrun starts it several times"
    ):
        launch(SMOKE, here(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_study_of_another_sweep_is_refused_and_untouched(runs_dir: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in runs_dir.rglob("*")}
    with pytest.raises(
        UserError,
        match=r"is a study of the sweep 'smoke', but this sweep is 'demo': choose another",
    ):
        launch(ROOT / "sweeps" / "demo.yaml", here(runs_dir, "study=smoke", "size=tiny"))
    assert files == {path: path.stat().st_mtime_ns for path in runs_dir.rglob("*")}


def test_a_run_of_another_configuration_is_refused_before_any_job_starts(runs_dir: Path) -> None:
    shutil.rmtree(runs_dir / "smoke" / "solu-s0")
    with pytest.raises(
        UserError, match=r"has a different configuration \(train.clip=1.0 there, 2.0 here\)"
    ):
        launch(SMOKE, here(runs_dir, "train.clip=2"))
    assert not (runs_dir / "smoke" / "solu-s0").exists()


def test_jobs_of_several_vocabularies_are_refused_before_any_job_starts(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMOKE.read_text() + "  tokens.d_vocab: {values: [400, 500]}\n")
    with pytest.raises(UserError, match="have different tokens, but runs of one study must share"):
        launch(path, here(tmp_path / "runs", "report=off"))
    assert not (tmp_path / "runs" / "smoke").exists()


def test_a_status_of_nothing_is_refused(tmp_path: Path) -> None:
    for words, message in (
        ((tmp_path / "none",), "no folder"),
        ((tmp_path,), "no runs in"),
        ((tmp_path, "a=b"), "takes a study and nothing else"),
    ):
        assert message in command("sweep", "--status", *words, status=2).stderr


@pytest.mark.slow
def test_sigterm_to_a_launch_saves_where_it_was_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    words = here(tmp_path, "report=off", "train.steps=3000", "variant=solu")
    process = subprocess.Popen(
        [sys.executable, LAUNCH, SMOKE, *words], stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "smoke" / "solu-s0" / "metrics.jsonl"
    until(lambda: metrics.is_file() and metrics.stat().st_size, "training begins")
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=HANGS_AFTER_S)
    assert process.returncode == 130, told
    assert "the same command resumes from here" in told
    now = standing(metrics.parents[1], jobs.Job("", "solu-s0", 3000, 256))
    assert now.state == "resume"


def test_a_narrow_terminal_shows_whole_names_and_states(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    for width in (40, 80):
        plan = jobs.new_table("smoke", "run", "id", "state")
        plan.add_column("FLOPs", no_wrap=True)
        plan.add_row("solu_ln-s0", "576bfda6f7e9", "waiting", "5.57e+08")
        Console(width=width, file=sys.stdout).print(jobs.fitted(plan, width))
        lines = capsys.readouterr().out.splitlines()
        (row,) = [line for line in lines if "solu_ln-s0" in line]
        assert "waiting" in row
        assert ("5.57e+08" in row) == (width == 80)
        assert max(map(len, lines)) <= width


def test_progress_of_a_narrow_terminal_shows_the_whole_name_and_the_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from soluscope.training.progress import progress_bars

    name = "solu-s0-a-long-tag-for-a-line"
    for width in ("40", "100"):
        monkeypatch.setenv("COLUMNS", width)
        with progress_bars() as bars:
            bars.add_task(name, total=12, completed=12, loss="loss 5.206", speed="0.3k tok/s")
        shown = "".join(capsys.readouterr().err.split())
        assert "12/12" in shown
        assert "loss5.206" in shown
        assert shown.replace("12/12loss5.206", "").startswith(name)
