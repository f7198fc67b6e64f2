"""Records and their files: a file is complete or absent, and records read back equal."""

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
from soluscope.results import (
    KINDS,
    ChoicePoint,
    Comparison,
    FalsePositives,
    Figure,
    Gate,
    GateResult,
    Grid,
    LeftOut,
    Measurement,
    NoChoice,
    ProbeWords,
    Quantity,
    Record,
    Setting,
    Step,
    Term,
    TokenValue,
    Untrained,
    Verdict,
)

SMALL = Measurement(
    study="s", run="solu-s0", probe="engagement", quantity="r", value=0.25, unit="share"
)
NOTE = 'words "quoted"\nin two lines, with Greek κ and a separator \u2028 inside'
ALL = {
    "study": "s",
    "arm": "solu_ln",
    "variant": "solu_ln",
    "note": NOTE,
    "commit": "abc",
    "config": "def",
}
NUMBER = {
    "value": 0.25,
    "unit": "share",
    "low": 0.1,
    "high": 0.4,
    "n": 90,
    "n_clusters": 7,
    "cluster": "document",
}
RUN = {"run": "solu_ln-s1", "seed": 1, "pretrained": True}
FULL: list[Record] = [
    Measurement(
        **ALL, **NUMBER, **RUN, probe="engagement", quantity="r", statistic="q05", stream="natural",
        positions="2-15", group="gain Q1", x=3.5, constant=True,
    ),
    Untrained(
        **ALL, **NUMBER, **RUN, probe="engagement", quantity="r", statistic="q05", stream="natural",
        positions="2-15", group="gain Q1", difference=-0.5,
    ),
    LeftOut(**ALL, **RUN, probe="scale_freeze", stream="code"),
    TokenValue(**ALL, **RUN, quantity="r", value=0.5, unit="share", place=3, text="\n", stream="natural"),
    Comparison(
        **ALL, **NUMBER, term=Term.STEP, against="solu", verdict=Verdict.DIFFERENT, choice="chosen so",
        p=0.25, p_adj=0.5, size="d_model 64", lr=0.001, tuned_arm="solu_ln-lr2", step=("solu", "solu_gain"),
        adds="a scale", probe="engagement", quantity="r",
    ),
    ChoicePoint(
        **ALL, **NUMBER, setting="lr", x=0.001, chosen_arm="solu_ln", eligible=False,
        grid=Grid.LOWER_EDGE, size="d_model 64",
    ),
    NoChoice(**ALL, arms=("solu_ln-a", "solu_ln-b"), size="d_model 64"),
    Setting(
        **ALL, values={"lr": 0.001, "kappa": 41.9}, role="per_token", twin="solu_frozen_ln",
        chain=(Step("solu"), Step("solu_ln", "a per-token scale")), size="d_model 64", n=8,
        rate="was set by hand",
    ),
    GateResult(
        **ALL, **NUMBER, probe="engagement", control="pinned", section="C3", passed=True,
        sign="positive", measured="r (median)", asked="above 0.5", stream="natural", positions="BOS",
    ),
    FalsePositives(
        **ALL, **NUMBER, probe="engagement", tested="r", source="shuffled labels", passed=False
    ),
    ProbeWords(
        **ALL, probe="engagement", name="Engagement", section="P1", question="How far?", formula="r = …",
        reading="0: pinned", pitfalls="none", source="a paper", tested="r",
        quantities={
            "r": Quantity("share", "how far", ("median", "q05"), True, ("gain",), "lower"),
            "g": Quantity("1", "a gain"),
        },
        figures=(Figure("r by token", ("r",), "curve", streams=("natural", "code"), relative=True),),
        gates=(Gate("pinned", "r", above=0.5, truth=0.9, x=2.0), Gate("uniform", "r", within=0.01)),
    ),
]  # fmt: skip
"""One record of each kind, with no field left at its default."""


def test_records_of_every_kind_read_back_equal(tmp_path: Path) -> None:
    assert sorted(each.kind for each in FULL) == sorted(KINDS)
    for each in FULL:
        assert not [f.name for f in fields(each) if f.default == getattr(each, f.name)], each.kind
    results.write(tmp_path / "r.jsonl", [SMALL, *FULL])
    assert results.read(tmp_path / "r.jsonl") == [SMALL, *FULL]


def test_each_line_is_one_record_in_plain_json_with_its_kind(tmp_path: Path) -> None:
    results.write(tmp_path / "r.jsonl", [SMALL, *FULL])
    lines = (tmp_path / "r.jsonl").read_text().split("\n")
    assert lines.pop() == ""
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == [each.kind for each in (SMALL, *FULL)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(tmp_path: Path, value: float) -> None:
    results.write(tmp_path / "r.jsonl", [replace(SMALL, value=value, low=value)])
    (row,) = results.of_kind(results.read(tmp_path / "r.jsonl"), Measurement)
    assert (row.value, row.low) == (None, None)
    assert "NaN" not in (tmp_path / "r.jsonl").read_text()


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "measurement", "study": "s", "probe": "lo',
        b"3",
        b'["study"]',
        b'{"kind": "measurement", "study": "s"}',
        b'{"kind": "comparison", "study": "s", "value": 1, "unit": "", "term": "no term"}',
        b'{"note": "\xc3',  # cut inside a character
        b"",
    ],
)
def test_broken_last_line_is_skipped_with_a_warning_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "r.jsonl"
    results.write(path, [SMALL, FULL[0]])
    with path.open("ab") as file:
        file.write(line + b"\n")
    assert results.read(path) == [SMALL, FULL[0]]
    warning = f"warning: {path} line 3 is not a record and is skipped"
    assert capsys.readouterr().err.startswith(warning)


def test_keys_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(json.loads(results.line(SMALL)) | {"new": 1}))
    assert results.read(path) == [SMALL]


def test_results_that_are_missing_or_hold_no_record_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with pytest.raises(UserError, match=r"no results at .*: create it with 'soluscope probe"):
        results.read(path)
    for content in ("", "{broken\n"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"contains no records: create it with"):
            results.read(path)


@pytest.mark.parametrize(
    "line",
    [
        '{"study": "demo", "probe": "loss", "quantity": "loss", "value": 4.0, "unit": "nats / token",'
        ' "run": "gelu-s0"}',
        '{"study": "demo", "kind": "a kind of a later version"}',
    ],
)
def test_results_of_another_version_are_refused_in_one_line_that_says_how_to_make_them(
    tmp_path: Path, line: str
) -> None:
    path = tmp_path / "demo" / "results.jsonl"
    write_text(path, f"{results.line(SMALL)}\n{line}\n")
    for study, command in (
        (None, f"'soluscope probe {path.parent}'"),
        (Path("runs/x"), "'soluscope probe runs/x'"),
    ):
        with pytest.raises(UserError) as refused:
            results.read(path, study)
        message = str(refused.value)
        assert message.startswith(f"{path} was written by another version (line 2 has kind")
        assert message.endswith(f"create it with {command}")
        assert "\n" not in message


# Files


def test_failure_while_writing_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as beside:  # noqa: PT012
        beside.write_text("ne")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


def test_records_that_cannot_be_made_leave_the_old_results(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results.write(path, [SMALL])
    with pytest.raises(ZeroDivisionError):
        results.write(path, (replace(SMALL, seed=1 // (1 - i)) for i in range(3)))
    assert results.read(path) == [SMALL]


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
    assert (
        done.stdout
        == f"cannot write {path}: File too large; free disk space or choose another folder\n"
    )
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
