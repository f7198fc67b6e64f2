"""Commands that are killed at random moments, and given again, end with the files of commands that were not killed.

A command runs in a fork of this process, which has imported everything, because an import takes longer than most
commands and writes nothing. SOLUSCOPE_KILLS_EACH is the number of kills of each command; 25 of each are 200 in all.
test_rating_survival.py kills the server of `soluscope rate`.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from _launching import words_for
from conftest import HANGS_AFTER_S, ROOT

from soluscope.commands import run
from soluscope.runs.weights import commit

pytestmark = pytest.mark.slow

N_KILLS = int(os.environ.get("SOLUSCOPE_KILLS_EACH", "2"))
RUN = "solu_ln-s0"
EVALUATION = ("n_tokens=600", "n_loss_tokens=1000", "n_draws=200")
PROBES = "probes=[engagement,gain_variation,scale_freeze]"
VOLATILE = {
    "made_with.json",
    ".lock",
    ".held.json",
    ".checked.json",
    "last.ckpt",
    "train.log",
    "holder.json",
}
"""Files that name a process or a time, and the hash of such a file."""
TIMES = {"tokens_per_s", "seconds", "wall_s", "started", "finished"}
"""Keys of JSON whose values are times."""
SAMPLED = ("train",)
"""Commands that CI kills; the others are marked `long`."""
COMMANDS = ("cache", "train", "probe", "report", "export", "sweep", "neurons", "remove")
NEEDS = {
    "probe": "train",
    "report": "probe",
    "export": "train",
    "neurons": "probe",
    "remove": "probe",
}
"""Commands that follow another one."""
IMPORTED = (
    "evaluation.removing", "evaluation.suite", "export", "hooked.convert", "launching.launch", "neurons.compute",
    "neurons.site", "report", "training.run",
)  # fmt: skip


def words(command: str, folder: Path) -> list[str]:
    """Return the words of a command in `folder`, with relative paths: the folder is its working directory."""
    places = [
        *words_for(Path("runs")),
        "train.steps=60",
        "train.checkpoint_every=5",
        "tokens.d_vocab=600",
    ]
    sweep = folder / "killed.yaml"
    if command == "sweep":
        sweep.write_text(
            "method: grid\nparameters:\n  study: {value: swept}\n  seed: {values: [0]}\n"
            "  variant: {values: [solu, solu_ln]}\n"
        )
    evaluation = [f"eval.{word}" for word in (*EVALUATION, "probes=[engagement]")]
    train = ["train", "variant=solu_ln", "study=one", *places]
    return {
        "cache": [*train, "train.steps=6", "corpus.max_mb=4", "study=tokens"],
        "train": train,
        "probe": ["probe", "runs/one", *EVALUATION, PROBES],
        "report": ["report", "runs/one"],
        "export": ["export", f"runs/one/{RUN}", "exported"],
        "sweep": ["sweep", "killed.yaml", *places, *evaluation],
        "neurons": ["neurons", "runs/one", "n_tokens=1000", "device=cpu"],
        "remove": [
            "remove", "runs/one", "n_tokens=600", "n_fit_tokens=600", "fine_tune_tokens=2048", "n_draws=200",
        ],
    }[command]  # fmt: skip


def start(command: str, folder: Path) -> ForkProcess:
    """Start a command in `folder`, with its output in a file beside it."""
    process = multiprocessing.get_context("fork").Process(target=_run, args=(command, folder))
    process.start()
    return process


def _run(command: str, folder: Path) -> None:
    os.setsid()  # so that its own processes are killed with it
    os.chdir(folder)
    said = said_by(folder).open("w", buffering=1)
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    sys.stdout = sys.stderr = said
    search_path = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(search_path)
    name, *rest = words(command, folder)
    run(name, rest)


def said_by(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def finish(command: str, folder: Path) -> float:
    """Run a command until it ends, and return the seconds that it took."""
    begun = time.monotonic()
    process = start(command, folder)
    process.join(HANGS_AFTER_S)
    assert process.exitcode == 0, said_by(folder).read_text()
    return time.monotonic() - begun


def kill(process: ForkProcess) -> None:
    """Kill a command and its own processes."""
    assert process.pid
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has just begun, and is not the first of its group yet
        os.kill(process.pid, signal.SIGKILL)
    process.join(HANGS_AFTER_S)


def contents(folder: Path) -> dict[str, object]:
    """Return the contents of all files, without the values that are times; files of killed processes count."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in VOLATILE or not path.is_file() or path.name.startswith(".lock"):
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            found[name] = [_timeless(json.loads(line)) for line in _documents(path, data)]
        else:
            found[name] = data
    return found


def _documents(path: Path, data: bytes) -> list[bytes]:
    return data.splitlines() if path.suffix == ".jsonl" else [data]


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in TIMES}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


class Calm:
    """Folders with the states before and after each command, none killed, and the commands' durations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.here = folder / "here"
        """Folder of all commands, killed or not, because a run that starts from another names that run's folder."""
        self.durations: dict[str, float] = {}

    def run(self, command: str) -> float:
        """Run a command, and before it the command that it follows, unless it has run; return its duration."""
        if command not in self.durations:
            before, after = self.before(command), self.after(command)
            if command in NEEDS:
                self.run(NEEDS[command])
                shutil.copytree(self.after(NEEDS[command]), before)
            else:
                before.mkdir()
            self.durations[command] = finish(command, self.fresh(command))
            self.here.rename(after)
        return self.durations[command]

    def fresh(self, command: str) -> Path:
        """Return the folder `here` in the state before a command."""
        shutil.rmtree(self.here, ignore_errors=True)
        return Path(shutil.copytree(self.before(command), self.here))

    def before(self, command: str) -> Path:
        return self.folder / f"before-{command}"

    def after(self, command: str) -> Path:
        return self.folder / f"after-{command}"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    for name in IMPORTED:
        importlib.import_module(f"soluscope.{name}")
    commit()  # known before the forks, so that a commit during the test changes no file
    return Calm(tmp_path_factory.mktemp("calm"))


@pytest.mark.parametrize(
    "command",
    [each if each in SAMPLED else pytest.param(each, marks=pytest.mark.long) for each in COMMANDS],
)
def test_a_command_that_is_killed_again_and_again_leaves_the_files_of_one_that_was_not(
    command: str, calm: Calm
) -> None:
    duration = calm.run(command)
    moments = random.Random(f"{command} 0")
    here = calm.fresh(command)
    kills, n_whole = [], 0
    while len(kills) < N_KILLS:
        process = start(command, here)
        wait = moments.uniform(0, 1.05) * duration
        process.join(wait)
        if process.exitcode is None:
            kill(process)
            kills.append(f"{wait:.2f} s")
            exported = here / "exported"
            if (
                exported.is_dir()
            ):  # whole, since it gets its name in one step; a second export is refused
                assert contents(exported) == contents(calm.after("export") / "exported")
                shutil.rmtree(exported)
            continue
        assert process.exitcode == 0, f"{said_by(here).read_text()}; kills: {kills}"
        n_whole += 1  # it ended before it was killed: begin again
        assert n_whole < 3 * N_KILLS + 10
        calm.fresh(command)
    finish(command, here)
    wanted, found = contents(calm.after(command)), contents(here)
    assert found.keys() == wanted.keys(), f"kills: {kills}"
    differing = [name for name in wanted if wanted[name] != found[name]]
    assert not differing, f"{differing} differ; kills: {kills}"
