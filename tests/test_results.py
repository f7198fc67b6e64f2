"""Rows and the files they lie in: whole or absent, and read back as they were."""

from __future__ import annotations

import json
import math
import resource
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import run_python

from soluscope import results
from soluscope.errors import UserError
from soluscope.files import digest, replacing, write_bytes, write_text
from soluscope.results import Row

ROW = Row(study="s", probe="engagement", quantity="r", value=0.25, unit="share")
FULL = replace(
    ROW, run="solu_ln-s1", arm="solu_ln", variant="solu_ln", seed=1, statistic="q05", low=0.1,
    high=0.4, p=0.25, p_adj=0.5, n=90, n_clusters=7, cluster="document", stream="natural", positions="2-15",
    group="gain Q1", x=3.5, commit="abc", config="def",
    note='words "quoted"\nin two lines, with Greek κ and a separator \u2028 inside',
)  # fmt: skip


def test_rows_read_back_equal(tmp_path: Path) -> None:
    assert not [f.name for f in fields(Row) if f.default == getattr(FULL, f.name)]
    results.write(tmp_path / "r.jsonl", [ROW, FULL])
    assert results.read(tmp_path / "r.jsonl") == [ROW, FULL]


def test_each_line_is_one_row_in_plain_json(tmp_path: Path) -> None:
    results.write(tmp_path / "r.jsonl", [ROW, FULL])
    lines = (tmp_path / "r.jsonl").read_text().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line)["probe"] for line in lines] == ["engagement"] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(tmp_path: Path, value: float) -> None:
    results.write(tmp_path / "r.jsonl", [replace(ROW, value=value, low=value)])
    (row,) = results.read(tmp_path / "r.jsonl")
    assert (row.value, row.low) == (None, None)
    assert "NaN" not in (tmp_path / "r.jsonl").read_text()


@pytest.mark.parametrize(
    "line",
    [
        b'{"study": "s", "probe": "lo',
        b"3",
        b'["study"]',
        b"{}",
        b'{"study": "s"}',
        b'{"note": "\xc3',  # cut inside a letter
        b"",
    ],
)
def test_broken_last_line_is_skipped_with_a_warning_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "r.jsonl"
    results.write(path, [ROW, FULL])
    with path.open("ab") as file:
        file.write(line + b"\n")
    assert results.read(path) == [ROW, FULL]
    assert capsys.readouterr().err.startswith(f"warning: {path} line 3 is not a row and is skipped")


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(
        json.dumps(
            {"study": "s", "probe": "p", "quantity": "q", "value": None, "unit": "", "new": 1}
        )
    )
    assert results.read(path) == [Row(study="s", probe="p", quantity="q", value=None, unit="")]


def test_results_that_are_missing_or_hold_no_row_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(UserError, match=r"no results at .*: make them with 'python eval/run.py"):
        results.read(path)
    for content in ("", "{broken\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"holds no rows: make them with"):
            results.read(path)


# Files


def test_failure_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as beside:  # noqa: PT012
        beside.write_text("ne")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


def test_rows_that_cannot_be_made_leave_the_old_results(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results.write(path, [ROW])
    with pytest.raises(ZeroDivisionError):
        results.write(path, (replace(ROW, seed=1 // (1 - i)) for i in range(3)))
    assert results.read(path) == [ROW]


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_full_disk_is_a_user_error_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    code = """
import sys
from pathlib import Path
from soluscope.errors import UserError
from soluscope.files import write_text
try:
    write_text(Path(sys.argv[1]), "n" * 10_000)
except UserError as error:
    print(error)
"""
    done = run_python(
        "-c", code, path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )  # fmt: skip
    assert done.stdout == f"cannot write {path}: File too large; free it or choose another place\n"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


def test_folders_are_made_and_a_file_in_the_way_is_a_user_error(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b" / "c", b"x")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"
    with pytest.raises(UserError, match=r"cannot write .*/c/d: File exists"):
        write_text(tmp_path / "a" / "b" / "c" / "d", "y")


def test_digest_depends_on_values_not_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2.5, None]}) == digest({"b": [2.5, None], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": 1}) == "f9d86028c6e0"  # the same on every machine and in every session
