"""Progress: bars and a total with the time left on a terminal, and few lines elsewhere."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import HANGS_AFTER_S, ROOT

from soluscope.bars import Bars, bars

SHOW = """
import sys, time
from soluscope.bars import bars
from soluscope.terminal import answer, say
with bars({"solu-s0": 1.0, "solu_ln-s0": 3.0, "gelu-s0": 4.0}, say, {"gelu-s0": 0.5}) as shown:
    for name in ("solu-s0", "solu_ln-s0"):
        shown.begin(name, f"{name} begins")
    for step in range(1, 5):
        shown.update("solu-s0", step, 4, f"loss {step}.5")
        shown.update("solu_ln-s0", step, 8, "engagement")
        time.sleep(0.3)
    shown.end("solu-s0", "solu-s0 done")
    say("warning: seen above the bars")
    time.sleep(0.3)
answer("answer: yes")
"""


def on_a_terminal(columns: int) -> str:
    """Return everything that SHOW writes to a terminal of so many columns."""
    leader, follower = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "COLUMNS": str(columns),
        "TERM": "xterm",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW], stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    written = b""
    try:
        while part := os.read(leader, 1 << 16):
            written += part
    except OSError:  # on Linux, the end of a terminal is an error
        pass
    os.close(leader)
    assert process.wait(timeout=HANGS_AFTER_S) == 0
    return written.decode()


@pytest.mark.parametrize("columns", [100, 60])
def test_a_terminal_shows_a_bar_per_run_and_a_total_and_keeps_only_the_messages(
    columns: int,
) -> None:
    written = on_a_terminal(columns)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written)
    assert re.search(r"solu-s0 .*100% .*loss 4\.5", shown)
    assert re.search(r"solu_ln-s0 .*50% .*engagement", shown)
    # gelu is half done, solu done and solu_ln half done: 2 + 1 + 1.5 of 8
    assert re.search(r"total .*56% .*1 of 3 runs", shown)
    assert ("0:00" in shown) == (columns == 100), "the time left needs a wide terminal"
    assert "begins" not in shown
    # The bars are erased. Only the text after the last erased line stays.
    kept = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.rpartition("\x1b[2K")[2])
    assert kept.split() == ["answer:", "yes"]
    assert shown.count("warning: seen above the bars") == 1


def test_without_a_terminal_a_run_has_one_line_when_it_begins_and_one_when_it_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []
    with bars({"a": 1.0, "b": 1.0}, said.append) as shown:
        for name in "ab":
            shown.begin(name, f"{name} begins")
            for step in range(50):
                shown.update(name, step, 50, "loss")
            shown.end(name, f"{name} ends" if name == "a" else "")
    assert said == ["a begins", "a ends", "b begins"]
    assert capsys.readouterr() == ("", "")


def test_a_run_that_is_not_at_work_cannot_move_the_total() -> None:
    shown = Bars({"a": 1.0}, {}, print, None)
    shown.update("a", 1, 2)
    shown.update("elsewhere", 1, 2)
    assert shown._of_all()["completed"] == 0
