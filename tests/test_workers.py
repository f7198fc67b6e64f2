"""Workers: side by side, each piece of work ends alone, and no process outlives the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _launching import until
from conftest import HANGS_AFTER_S, ROOT

from soluscope import workers
from soluscope.workers import Work, ending, side_by_side

ECHO = """
import os, signal, sys, time
from pathlib import Path
from soluscope.workers import STOPPED, tell, works
def save(word):
    print(word, flush=True)
    Path(word).write_text(str(os.getpid()))
try:
    for line in works():
        word, *others = line.split()
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "exit":
            sys.exit(int(others[0]))
        elif word == "long":
            try:
                save(f"begun-{others[0]}")
                time.sleep(600)
            except KeyboardInterrupt:
                time.sleep(.5)  # the end of stdin sends another SIGTERM
                save(f"saved-{others[0]}")
                raise
        else:
            tell(got=line)
            print("for the user", file=sys.stderr)
except KeyboardInterrupt:
    sys.exit(STOPPED)
"""
DRIVER = """
import sys
from tests_watcher import Seen
from soluscope.workers import Work, side_by_side
side_by_side("echo", [Work(n, f"long {n}") for n in sys.argv[1:]], 2, Seen())
"""


class Seen:
    """A watcher that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.most_at_once = 0
        self.at_once: set[str] = set()

    def began(self, name: str) -> None:
        self.at_once.add(name)
        self.most_at_once = max(self.most_at_once, len(self.at_once))
        self.calls.append(("began", name, None))

    def said(self, name: str, text: str) -> None:
        self.calls.append(("said", name, text))

    def heard(self, name: str, message: dict[str, Any]) -> None:
        self.calls.append(("heard", name, message))

    def ended(self, name: str, status: int | None) -> None:
        self.at_once.discard(name)
        self.calls.append(("ended", name, status))

    def look(self) -> None: ...

    def of(self, call: str) -> dict[str, Any]:
        return {name: value for kind, name, value in self.calls if kind == call}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make tmp_path the working directory, with the module `echo`, whose workers need no torch."""
    (tmp_path / "echo.py").write_text(ECHO)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "POLL_S", 0.05)
    return tmp_path


def is_there(path: Path) -> bool:
    """Return whether the process whose id a file holds still runs."""
    status = Path(f"/proc/{path.read_text()}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("n_workers", [1, 2, 9])
def test_each_work_is_done_once_and_only_so_many_at_once(n_workers: int) -> None:
    seen = Seen()
    names = [str(number) for number in range(5)]
    side_by_side("echo", [Work(name, f"say {name}") for name in names], n_workers, seen)
    assert seen.of("heard") == {name: {"got": f"say {name}"} for name in names}
    assert seen.of("said") == dict.fromkeys(names, "for the user")
    assert seen.of("ended") == dict.fromkeys(names)
    assert [name for call, name, _ in seen.calls if call == "began"] == names
    assert seen.most_at_once <= n_workers


def test_a_worker_that_dies_ends_its_own_work_only() -> None:
    seen = Seen()
    lines = {"a": "die", "b": "say b", "c": "exit 3", "d": "say d", "e": "exit 0"}
    side_by_side("echo", [Work(name, line) for name, line in lines.items()], 2, seen)
    ended = seen.of("ended")
    assert ended == {"a": -signal.SIGKILL, "b": None, "c": 3, "d": None, "e": 0}
    assert ending(ended["a"]) == "its process was ended by SIGKILL"
    assert ending(ended["c"]) == "its process ended with exit status 3"


def test_a_module_that_cannot_start_ends_each_work_and_says_why() -> None:
    seen = Seen()
    side_by_side("nowhere", [Work("a", "say a"), Work("b", "say b")], 2, seen)
    assert seen.of("ended") == {"a": 1, "b": 1}
    assert "No module named nowhere" in seen.of("said")["a"]


def test_work_waits_for_the_works_that_it_needs() -> None:
    seen = Seen()
    needs = {"a": {"c"}, "b": {"a", "elsewhere"}, "c": set(), "x": {"y"}, "y": {"x"}}
    works = [Work(name, f"say {name}", frozenset(after)) for name, after in needs.items()]
    side_by_side("echo", works, 5, seen)
    order = [(call, name) for call, name, _ in seen.calls if call in ("began", "ended")]
    assert order.index(("ended", "c")) < order.index(("began", "a"))
    assert order.index(("ended", "a")) < order.index(("began", "b"))
    assert seen.of("ended").keys() == needs.keys(), "works that wait for each other are done too"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stop_of_the_launching_process_saves_each_work_and_leaves_no_process(
    folder: Path, number: signal.Signals
) -> None:
    search_path = os.pathsep.join([str(ROOT / "src"), str(folder)])
    (folder / "tests_watcher.py").write_text(
        "class Seen:\n    def __getattr__(self, name): return lambda *words: None\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, "a", "b", "c"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": search_path}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    begun = [folder / "begun-a", folder / "begun-b"]
    until(lambda: all(path.is_file() and path.read_text() for path in begun), "both begin")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=HANGS_AFTER_S)
    assert ("KeyboardInterrupt" in errors) == (number != signal.SIGKILL)
    until(lambda: not any(is_there(path) for path in begun), "the workers end")
    assert (folder / "saved-a").is_file()
    assert (folder / "saved-b").is_file()
    assert not (folder / "begun-c").exists()
