"""The terminal shows names and messages of other people's files, and runs nothing that is in them."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import command

from soluscope import terminal
from soluscope.commands import run_command
from soluscope.errors import UserError
from soluscope.launching import jobs

HOSTILE = {
    "title": ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    "colour": ("\x1b[31mred", r"\x1b[31mred"),
    "one-byte CSI": ("\x9b31m", r"\x9b31m"),
    "link": ("\x1b]8;;http://evil\x1b\\here", r"\x1b]8;;http://evil\x1b\here"),
    "line start": ("safe\roverwritten", r"safe\roverwritten"),
    "erased": ("a\b\b\bb", r"a\x08\x08\x08b"),
    "forged line": ("a\nerror: forged", r"a\nerror: forged"),
    "other line ends": ("a\x0b\x0c\x85\u2028\u2029b", r"a\x0b\x0c\x85\u2028\u2029b"),
    "right to left": ("\u202egpj.exe\u202c", r"\u202egpj.exe\u202c"),
    "isolate": ("\u2066a\u2069\u200f", r"\u2066a\u2069\u200f"),
    "nothing to see": ("a\u200b\u200d\ufeff\u00adb", r"a\u200b\u200d\ufeff\xadb"),
    "tags": ("\U000e0041", r"\U000e0041"),
    "delete and NUL": ("\x7f\x00", r"\x7f\x00"),
    "half a character": ("\udce9", r"\xe9"),
}
PLAIN = "naïve 日本語 😀 ␣ [bold]x[/bold] :smile: {a}\tb"


@pytest.mark.parametrize("name", HOSTILE)
def test_character_that_cannot_be_seen_is_escaped(name: str) -> None:
    text, seen = HOSTILE[name]
    assert terminal.shown(text) == seen
    assert terminal.shown(seen) == seen
    assert terminal.shown(PLAIN + text) == PLAIN + seen


@pytest.mark.parametrize("name", HOSTILE)
def test_messages_answers_errors_and_tables_show_the_escape(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, seen = HOSTILE[name]
    terminal.say(text)
    terminal.answer(text)
    assert capsys.readouterr() == (f"{seen}\n", f"{seen}\n")

    def fails(words: list[str]) -> None:
        raise UserError(text)

    with pytest.raises(SystemExit):
        run_command(fails, [])
    assert capsys.readouterr().err == f"error: {seen}\n"
    from rich.table import Table
    from rich.text import Text

    monkeypatch.setenv("COLUMNS", "200")
    table = Table(title=PLAIN + text.replace("\n", ""))
    table.add_row(Text(PLAIN), text.replace("\n", ""))
    for force in (True, False):
        monkeypatch.setenv("FORCE_COLOR" if force else "NO_COLOR", "1")
        console = terminal.console()
        console.file = io.StringIO()
        console.print(table, f"{PLAIN}{text}")
        printed = console.file.getvalue()
        assert "[bold]x[/bold] :smile:" in printed
        for character in text:
            if not character.isprintable() and character not in "\n\x1b":
                assert character not in printed
        assert "\x1b]" not in printed


def test_status_shows_the_escapes_of_failed_json(tiny_study: Path, tmp_path: Path) -> None:
    study = Path(shutil.copytree(tiny_study, tmp_path / "study"))
    text = "".join(text for text, _ in HOSTILE.values() if "\udce9" not in text)
    for run_dir in study.glob("*-s0"):
        (run_dir / "done.json").unlink()
        (run_dir / "failed.json").write_text(json.dumps({"error": text}))
    shown = command("sweep", "--status", study)
    assert "owned" in shown.stdout
    unseen = {c for c in shown.stdout + shown.stderr if not c.isprintable()}
    assert unseen <= {"\n"}


def test_names_of_folders_are_shown_escaped(tiny_study: Path, tmp_path: Path) -> None:
    study = tmp_path / "\x1b]0;owned\x07[red]\u202e"
    shutil.copytree(tiny_study / "solu-s0", study / "solu-s0")
    for words in (("sweep", "--status", study), ("probe", study), ("report", study),
                  ("probe", study / "nowhere"), ("export", study, tmp_path / "out")):  # fmt: skip
        told = command(*words, status=None)
        assert "Traceback" not in told.stderr
        assert "owned" in told.stdout + told.stderr
        assert {c for c in told.stdout + told.stderr if not c.isprintable()} <= {"\n"}


def test_live_table_has_no_text_of_a_file_as_it_is(tiny_study: Path, tmp_path: Path) -> None:
    study = Path(shutil.copytree(tiny_study, tmp_path / "study"))
    (study / "solu-s0" / "done.json").unlink()
    (study / "solu-s0" / "failed.json").write_text(json.dumps({"error": "\x1b]0;owned\x07 [red]"}))
    console = terminal.console(width=200)
    console.file = io.StringIO()
    console.print(jobs.table(study, jobs.listed(study)))
    assert r"\x1b]0;owned\x07 [red]" in console.file.getvalue()


def test_escapes_of_rich_itself_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal.console().print(Text("red", style="red"))
    assert sys.stdout.getvalue() == "\x1b[31mred\x1b[0m\n"


@pytest.mark.parametrize(("name", "write"), [("stdout", terminal.answer), ("stderr", terminal.say)])
def test_a_reader_that_leaves_early_ends_no_command(
    name: str, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as stream:
        monkeypatch.setattr(sys, name, stream)
        write("one", "two")
