"""engine=wandb, with the real client and the real agent, against our server on 127.0.0.1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from _wandb_server import USER, WandbServer, grid, violations
from conftest import HANGS_AFTER_S, ROOT

from soluscope.config import load_config
from soluscope.engines.wandb import ENGINE, Params, described
from soluscope.errors import UserError
from soluscope.launching.sweep import Sweep, read_sweep
from soluscope.runs.folder import Run

wandb = pytest.importorskip("wandb", reason="wandb is not installed")

SHIPPED = sorted((ROOT / "sweeps").glob("*.yaml"))
FEW_JOBS = {"demo", "smoke"}
"""Sweeps of few jobs; reading the others takes up to half a minute."""
COMMAND = ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
TWO_JOBS = {
    "study": {"value": "two"},
    "size": {"value": "tiny"},
    "corpus.max_mb": {"value": 1},
    "train.steps": {"value": 12},
    "model.ln_eps": {"value": 1e-12},
    "train.lr": {"value": 4e-5},
    "train.compile": {"value": None},
    "tag": {"value": "lr${train.lr}"},
    "arm": {"values": ["solu", "solu_ln mid.kappa=0.42"]},
}


def written(tmp_path: Path, parameters: dict[str, Any], **others: Any) -> Path:
    path = tmp_path / "two.yaml"
    file = {"program": "train/run.py", "command": COMMAND, "method": "grid", **others}
    path.write_text(yaml.safe_dump(file | {"parameters": parameters}, sort_keys=False))
    return path


def words_of_agents(config: dict[str, Any]) -> list[list[str]]:
    """Return the words with which wandb's own agent starts each job of a sweep that was sent to a server."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    there = yaml.safe_load(yaml.dump(json.loads(json.dumps(config))))
    assert violations(there) == []
    return [
        create_sweep_command_args({"args": {key: {"value": one} for key, one in point.items()}})[
            "args_no_hyphens"
        ]
        for point in grid(there["parameters"])
    ]


def jobs(words: list[list[str]]) -> set[tuple[str, Path]]:
    """Return the id and the folder of each job."""
    configs = [load_config(one) for one in words]
    return {(config.hash, config.run_dir) for config in configs}


def jobs_of(sweep: Sweep) -> set[tuple[str, Path]]:
    return {(config.hash, config.run_dir) for config in sweep.configs}


# The jobs that agents start


@pytest.mark.parametrize(
    "path",
    [
        each if each.stem in FEW_JOBS else pytest.param(each, marks=pytest.mark.long)
        for each in SHIPPED
    ],
    ids=lambda path: path.stem,
)
def test_agents_of_a_shipped_sweep_run_the_launchers_jobs(path: Path) -> None:
    sweep = read_sweep(path, [])
    if sweep.select_seeds:
        with pytest.raises(UserError, match="engine=wandb registers a whole grid"):
            ENGINE.check(Params(), sweep)
        return
    words = words_of_agents(yaml.safe_load(path.read_text()))
    assert len(words) == len(sweep.configs)
    assert jobs(words) == jobs_of(sweep)
    assert words_of_agents(described(sweep)) == words


GRIDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "numbers": (
        {"variant": {"value": "solu"}, "train.lr": {"values": [4e-5, 0.001, 1e-12, 1.0]},
         "train.clip": {"values": [float("inf"), 3]}},
        ["seed=3", "study=other", "model.ln_eps=1e-6", "train.beta1=0.5", "train.beta1=0"],
    ),
    "none and booleans": (
        {"variant": {"value": "solu"}, "size": {"value": "demo"}, "train.lr": {"values": [None, 0.5]},
         "tokens.prepared": {"value": None}, "train.compile": {"value": True}, "wandb": {"value": "off"}},
        ["train.threads=null", "wandb=online"],
    ),
    "arms": (
        {"arm": {"values": ["solu", "solu_ln mid.kappa=4e-5", "solu_gain mid.gain=init"]},
         "seed": {"values": [0, 1]}},
        ["tag=mine", "train.schedule=constant"],
    ),
    "an arm by hand": ({"arm": {"value": "solu"}, "seed": {"values": [0, 1]}}, ["arm=solu_gain mid.gain=2.5"]),
    "its own tag": (
        {"variant": {"values": ["solu", "gelu"]}, "train.lr": {"values": [4e-5, 0.1]},
         "tag": {"value": "${size}-${train.lr}"}},
        ["data=files", "corpus.paths=[a b.txt,c.txt]"],
    ),
    "nested": (
        {"variant": {"value": "solu"},
         "train": {"parameters": {"lr": {"values": [4e-5, 0.1]}, "clip": {"value": 2.0}}}},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GRIDS)
def test_agents_get_each_job_as_the_launcher_reads_it(tmp_path: Path, case: str) -> None:
    parameters, words = GRIDS[case]
    parameters = {"study": {"value": "mine"}, "size": {"value": "tiny"}, **parameters}
    sweep = read_sweep(written(tmp_path, parameters), words)
    assert len(sweep.configs) > 1
    assert jobs(words_of_agents(described(sweep))) == jobs_of(sweep)
    assert described(sweep)["name"] == sweep.configs[0].study


def test_numbers_stay_numbers_for_wandbs_axes(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path, TWO_JOBS), ["seed=2", "train.clip=0.5"])
    parameters = described(sweep)["parameters"]
    assert parameters["seed"] == {"value": 2}
    assert parameters["train.clip"] == {"value": 0.5}
    assert parameters["train.lr"] == {"value": 4e-5}


def test_agents_start_torchrun_for_jobs_of_several_processes(tmp_path: Path) -> None:
    sweep = read_sweep(written(tmp_path, TWO_JOBS), ["train.devices=2"])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert described(sweep)["command"] == [*COMMAND[:2], *torchrun, *COMMAND[2:]]
    assert described(read_sweep(sweep.path, []))["command"] == COMMAND


@pytest.mark.parametrize(
    ("command", "parameters", "wanted"),
    [
        (
            COMMAND,
            {"arm": {"values": ["solu", "solu_ln train.devices=2"]}},
            "use one value of train.devices",
        ),
        (
            ["python", *COMMAND[2:]],
            {"train.devices": {"value": 2}},
            r"interpreter\} into the command",
        ),
        (COMMAND, {"train.nodes": {"value": 2}}, "train.nodes is above 1, but with engine=wandb"),
    ],
)
def test_processes_that_agents_cannot_start_are_refused(
    tmp_path: Path, command: list[str], parameters: dict[str, Any], wanted: str
) -> None:
    sweep = read_sweep(written(tmp_path, TWO_JOBS | parameters, command=command), [])
    with pytest.raises(UserError, match=wanted) as refusal:
        ENGINE.check(Params(), sweep)
    assert "\n" not in str(refusal.value)


def test_the_schema_here_says_no_where_wandbs_does() -> None:
    good = {"method": "grid", "parameters": {"seed": {"values": [0]}, "size": {"value": None}}}
    assert violations(good) == []
    for wrong in (
        {"engine": "ray"},
        {"method": "greed"},
        {"program": ["train/run.py"]},
        {"command": "soluscope train"},
        {"parameters": {}},
        {"parameters": {"seed": {"values": []}}},
        {"parameters": {"seed": {"values": [0], "value": 0}}},
        {"parameters": {"seed": 0}},
        {"parameters": {"se ed": {"value": 0}}},
    ):
        assert violations({**good, **wrong}) != [], wrong


# Refusals before any job starts


@pytest.mark.parametrize(
    ("words", "others", "says"),
    [
        (["wandb=offline"], {}, "wandb=offline, but with engine=wandb the runs report to the server"),
        ([], {"program": None}, "is not a wandb sweep: it needs 'program: train/run.py' and 'command: ["),
        ([], {"command": ["python", "${program}"]}, "is not a wandb sweep: it needs 'program: train/run.py'"),
    ],
)  # fmt: skip
def test_what_agents_could_not_run_is_refused(
    tmp_path: Path, words: list[str], others: dict[str, Any], says: str
) -> None:
    sweep = read_sweep(written(tmp_path, TWO_JOBS, **others), words)
    with pytest.raises(UserError) as refused:
        ENGINE.check(Params(), sweep)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as running:
        yield running
    assert running.unknown == []


@pytest.fixture
def environment(server: WandbServer, tmp_path: Path) -> dict[str, str]:
    """Return the environment of a machine without a login, but with a key in WANDB_API_KEY."""
    rest = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    home = tmp_path / "home"
    home.mkdir()
    places = {"HOME": str(home), "WANDB_DIR": str(home), "NETRC": str(home / ".netrc"),
              "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
              "PYTHONPATH": str(ROOT / "src")}  # fmt: skip
    return rest | places | server.environment()


def launch(
    path: Path, *words: str, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "sweeps/launch.py"), str(path), "engine=wandb", *words]
    return subprocess.run(
        command,
        env=environment,
        cwd=path.parent,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
    )


@pytest.mark.parametrize("key", ["refused", "missing", "short"])
def test_a_key_that_will_not_do_is_one_line_before_anything_is_written(
    tmp_path: Path, server: WandbServer, environment: dict[str, str], key: str
) -> None:
    path = written(tmp_path, TWO_JOBS)
    server.refusing = True
    if key == "missing":
        del environment["WANDB_API_KEY"]
    if key == "short":
        environment["WANDB_API_KEY"] = "abc"
    done = launch(path, environment=environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert (server.url in done.stderr) == (key == "refused")
    assert "'wandb login'" in done.stderr
    assert "WANDB_API_KEY" in done.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["home", "two.yaml"]
    assert server.sweeps == server.runs == {}


def test_a_team_that_is_not_the_keys_is_one_line(
    tmp_path: Path, server: WandbServer, environment: dict[str, str]
) -> None:
    path = written(tmp_path, TWO_JOBS)
    done = launch(path, f"runs_dir={tmp_path / 'runs'}", f"tokens.cache_dir={tmp_path / 'tokens'}",
                  "wandb.entity=others", environment=environment)  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: wandb: ")
    assert "others" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert server.sweeps == {}


# A sweep from end to end


def wandb_id(run_dir: Path) -> str:
    found: str = json.loads((run_dir / "wandb.json").read_text())["id"]
    return found


def test_what_follows_is_done_where_no_agent_has_anything_to_do(tmp_path: Path) -> None:
    class After:
        calls = 0

        def __call__(self) -> None:
            self.calls += 1

    after = After()
    ENGINE.run(read_sweep(written(tmp_path, TWO_JOBS), []), [], Params(), after)
    assert after.calls == 1


@pytest.mark.long
def test_an_agent_trains_a_registered_sweep_from_end_to_end(
    tmp_path: Path, server: WandbServer, environment: dict[str, str]
) -> None:
    path = written(tmp_path, TWO_JOBS)
    places = [f"runs_dir={tmp_path / 'runs'}", f"tokens.cache_dir={tmp_path / 'tokens'}",
              "train.threads=1", "train.precision=fp32"]  # fmt: skip
    done = launch(path, *places, "wandb.project=ours", environment=environment)
    assert done.returncode == 0, done.stderr
    ((name, registered),) = server.sweeps.items()
    assert (registered.entity, registered.project) == (USER, "ours")
    assert registered.config["name"] == "two"
    assert registered.warnings == []
    assert server.runs == {}, "it only registers"

    sweep = read_sweep(path, places)
    study = tmp_path / "runs" / "two"
    told = [line.strip() for line in done.stdout.splitlines()]
    assert f"wandb agent {USER}/ours/{name}" in told
    assert f"soluscope probe {study}" in told
    assert f"soluscope report {study}" in told
    agent = next(line for line in told if line.startswith("wandb agent ")).split()
    ran = subprocess.run(
        [sys.executable, "-m", *agent],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
    )
    assert ran.returncode == 0, ran.stderr

    assert {config.run_name for config in sweep.configs} == {
        "solu-s0-lr4e-05",
        "solu_ln-s0-kappa0.42-lr4e-05",
    }
    for config in sweep.configs:
        assert Run(config.run_dir).is_done(), ran.stderr
        facts = json.loads((config.run_dir / "model.json").read_text())
        assert facts["config"] == config.hash

        run = server.runs[wandb_id(config.run_dir)]
        assert (run.sweep, run.project, run.group) == (name, "ours", "two")
        assert (run.display_name, run.exit_code) == (config.run_name, 0)
        flat = {key: run.config[key] for key in ("variant", "seed", "study", "size")}
        assert flat == {"variant": config.variant, "seed": 0, "study": "two", "size": "tiny"}
        assert run.history[-1]["step"] == 12
    assert len(server.runs) == 2

    again = launch(path, *places, "report=false", environment=environment)
    assert again.returncode == 0, again.stderr
    assert "2 jobs: 2 done" in again.stdout
    assert len(server.sweeps) == 1, "nothing is left for an agent"
