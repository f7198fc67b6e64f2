"""Records and their files: a file is complete or absent, and records read back equal."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
from dataclasses import fields, replace
from pathlib import Path

import pytest
from conftest import run_python

from soluscope import files, results
from soluscope.errors import UserError
from soluscope.files import (
    check_links,
    digest,
    file_lock,
    read_json,
    remove_litter,
    replacing,
    replacing_folder,
    write_bytes,
    write_text,
)
from soluscope.results import (
    KINDS,
    Answer,
    AtDose,
    Bound,
    Bounded,
    ChoicePoint,
    ClaimTested,
    Comparison,
    Curve,
    FalsePositives,
    Figure,
    Gate,
    GateResult,
    Grid,
    Ladder,
    LeftOut,
    Located,
    Measurement,
    Multiplier,
    NeuronFound,
    NoChoice,
    Order,
    Part,
    ProbeWords,
    Provenance,
    Proxied,
    ProxyTerm,
    Quantity,
    Rated,
    Rating,
    Record,
    Registered,
    Removal,
    RemovalOfArm,
    Removed,
    ScalingCurve,
    Setting,
    Step,
    Term,
    TokenValue,
    Untrained,
    Verdict,
    Where,
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
    "n_effective": 5.5,
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
        n_candidates=3, optimism=0.001, p=0.25, p_adj=0.5, size="d_model 64", design="alpha 1", lr=0.001,
        tuned_arm="solu_ln-lr2", step=("solu", "solu_gain"),
        adds="a scale", probe="engagement", quantity="r", group="log gain Q4", x=2.0, part=Part.SCALE,
    ),
    ChoicePoint(
        **ALL, **NUMBER, setting="lr", x=0.001, chosen_arm="solu_ln", eligible=False,
        grid=Grid.LOWER_EDGE, out_scale=0.5, design="alpha 1", size="d_model 64",
    ),
    NoChoice(**ALL, arms=("solu_ln-a", "solu_ln-b"), size="d_model 64"),
    Setting(
        **ALL, values={"lr": 0.001, "kappa": 41.9}, role="per_token", twin="solu_frozen_ln", label="SoLU + LN",
        chain=(Step("solu"), Step("solu_ln", "a per-token scale")), size="d_model 64", n=8,
        rate="was set by hand", matched=True, after="solu", family="0123", only_tried=True,
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
        answers=(Answer("Little.", None, 0.5), Answer("Far.", 0.5, None)),
    ),
    Provenance(
        **ALL, source="stdlib", documents={"train": 72}, tokens={"train": 564215}, d_vocab=512, n_copies=1,
        n_overlapping={"train": 2}, versions={"torch": "2.13.0"}, commits=("abc", "def"),
        apart=("mid.kappa",), unclaimed=("train.weight_decay",),
    ),
    AtDose(
        **ALL, **NUMBER, setting=Ladder.GAIN, x=16.0, since=1.0, quantity="max p", statistic="median",
        fixed="kappa 41.9", proxy=True, untrained=True,
    ),
    ScalingCurve(
        **ALL, arms=("a", "b"), n_weights=(1000, 4000), n=4, losses=(5.0, 4.0), floor=3.0, scale=1.0, exponent=0.3,
        centre=2000.0, misfit=0.01,
    ),
    Multiplier(
        **ALL, **NUMBER, curve=Curve.POWER_LAW, against="gelu", n_weights=1000, bound=Bound.AT_LEAST,
        low_is_bound=True, high_is_bound=True, size="d_model 64",
    ),
    Located(
        **ALL, against="solu_gain", where=Where.DIFFUSE, n=3, agreement=0.5, size="d_model 64", design="alpha 1",
    ),
    NeuronFound(
        **ALL, **RUN, quantity="most readable", place=2, neuron=42, rule="capitals", f1_mid=0.9, f1_post=0.5,
        drop=0.25, before="import ", text="os", after="\n",
    ),
    Rated(
        **ALL, **NUMBER, term=Rating.DIFFERENCE, mode="top", stage="mid", against="solu", rater="A",
        untrained=True,
    ),
    Registered(**ALL, sha256="0123", at="2026-11-29", departures=("seeds",)),
    Removal(
        **ALL, **NUMBER, **RUN, step=Removed.REFIT, before=Removed.FROZEN, against="same adaptation", n_tuned=700,
        final_norm="frozen", untrained=True, order=Order.HOLDS,
    ),
    RemovalOfArm(
        **ALL, **NUMBER, step=Removed.FINE_TUNED, before=Removed.REFIT, against="solu_frozen_ln", n_tuned=700,
        final_norm="frozen", untrained=True, order=Order.VIOLATED,
    ),
    ClaimTested(
        **ALL, **RUN, probe="exact_dla", quantity="nmae", unit="", claim="DLA is exact", within=1e-6, n_tuned=700,
        before=Bounded(0.9, 0.8, 1.0), kept=Bounded(0.8, 0.7, 0.9), after=Bounded(0.0, 0.0, 0.0),
        change=Bounded(-0.9, -1.0, -0.8), holds=True,
    ),
    Proxied(
        **ALL, **NUMBER, proxy="rule_f1", label="F1 of the best rule", term=ProxyTerm.TWIN, stage="mid",
        against="solu", untrained=True,
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
    for remedy, wanted in (
        ("", f"create it with 'soluscope probe {path.parent}'"),
        ("create it with 'soluscope rate runs/x --analyse'",) * 2,
    ):
        with pytest.raises(UserError) as refused:
            results.read(path, remedy)
        message = str(refused.value)
        assert message.startswith(f"{path} was written by another version (line 2 has kind")
        assert message.endswith(wanted)
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


HUGE = "1" + "0" * 400
HOSTILE_VALUES = [
    '"4.0"', "[4.0]", '{"x": 4.0}', "true", HUGE, f"-{HUGE}", "1e400", "NaN", "Infinity", '"\\ud800"',
    "[" * 100_000, '{"a":' * 10_000 + "1" + "}" * 10_000,
]  # fmt: skip


@pytest.mark.parametrize("key", ["value", "n", "arm", "x", "seed", "constant", "kind", "study"])
def test_a_row_with_a_value_of_another_type_is_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = tmp_path / "r.jsonl"
    before, after = results.line(SMALL).split('"value": 0.25')
    texts = {"arm": {'"4.0"'}, "study": {'"4.0"'}, "kind": {'"4.0"'}, "constant": {"true"}}
    values = [value for value in HOSTILE_VALUES if value not in texts.get(key, ())]
    rows = [f'{before}"value": 0.25{after[:-1]}, "{key}": {value}}}' for value in values]
    path.write_text("\n".join([results.line(SMALL), *rows]) + "\n")
    assert results.read(path) == [SMALL]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == len(values)
    for number, warning in enumerate(warnings, start=2):
        assert warning.startswith(f"warning: {path} line {number} is not a record and is skipped (")
        assert len(warning) < 400
    with pytest.raises(UserError, match=r"line 2 is not a record .*: create it with"):
        results.read(path, whole=True)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_no_kind_accepts_a_list_for_a_text_or_a_number(tmp_path: Path, kind: str) -> None:
    (record,) = (each for each in FULL if each.kind == kind)
    written = json.loads(results.line(record))
    path = tmp_path / "r.jsonl"
    for key, value in written.items():
        wrong = {dict: "x", list: 3}.get(type(value), [value])
        if key != "kind":
            path.write_text(json.dumps(written | {key: wrong}) + "\n")
            with pytest.raises(UserError, match=r"line 1 is not a record|contains no records"):
                results.read(path, whole=True)


# Litter of killed processes, links, and checksums


def killed_in(folder: Path, code: str) -> str:
    """Run code that ends its process without clean-up, and return the name of the file that it leaves."""
    program = f"import os, sys\nfrom pathlib import Path\nfrom soluscope.files import *\n{code}"
    assert run_python("-c", program, folder).returncode == 9
    (left,) = (path.name for path in folder.iterdir() if path.name.endswith(".part"))
    return left


REPLACING = """
with replacing(Path(sys.argv[1], "a")) as beside:
    beside.write_text("half")
    os._exit(9)
"""
REPLACING_FOLDER = """
with replacing_folder(Path(sys.argv[1], "a")) as beside:
    (beside / "b").write_text("half")
    os._exit(9)
"""


@pytest.mark.parametrize("code", [REPLACING, REPLACING_FOLDER])
def test_the_next_writer_in_a_folder_removes_what_a_killed_process_left(
    tmp_path: Path, code: str
) -> None:
    killed_in(tmp_path, code)
    write_text(tmp_path / "other", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_temporary_files_of_living_processes_and_other_machines_stay_for_a_day(
    tmp_path: Path,
) -> None:
    with replacing(tmp_path / "mine") as beside:
        beside.write_text("half")
        place = beside.name.split(".")[2].split("-")[0]
        dead, foreign, users = (
            tmp_path / name
            for name in (
                f".x.{place}-{2**31 - 1}-00000000.part",
                ".x.00000000-1-00000000.part",
                ".x.20240101",
            )
        )
        for path in (dead, foreign, users):
            path.touch()
        write_text(tmp_path / "other", "new")
        assert not dead.exists()
        assert beside.exists()
        assert foreign.exists()
        os.utime(foreign, (0, 0))
        os.utime(users, (0, 0))
        write_text(tmp_path / "other", "new")
        assert not foreign.exists()
        assert users.exists()
    assert (tmp_path / "mine").read_text() == "half"


def test_two_writers_of_one_file_have_different_temporary_files(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the writer that ended last


def test_litter_that_is_a_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").touch()
    link = tmp_path / "study" / ".x.00000000-1-00000000.part"
    link.parent.mkdir()
    link.symlink_to(target)
    remove_litter(link.parent, name="*")
    assert not link.is_symlink()
    assert (target / "file").exists()


def test_a_folder_and_its_files_are_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real, rename = os.fsync, os.replace

    def recorded(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", renamed)
    with replacing_folder(tmp_path / "a") as beside:
        (beside / "b").write_text("content")
    assert done == ["b", beside.name, "renamed", tmp_path.name]


def test_links_that_lead_out_are_refused_and_others_are_not(tmp_path: Path) -> None:
    study, outside = tmp_path / "study", tmp_path / "outside"
    (study / "run" / "probes").mkdir(parents=True)
    outside.mkdir()
    (study / "run" / "model.json").touch()
    (study / "run" / "again.json").symlink_to("model.json")
    check_links(study / "run", study)
    for name in ("done.json", "probes/a.jsonl", "probes/folder"):
        link = study / "run" / name
        for target in (outside, outside / "missing", Path("/dev/zero")):
            link.symlink_to(target)
            with pytest.raises(UserError, match=rf"{name} is a link that leads out of .*study"):
                check_links(study / "run", study)
            link.unlink()
    (study / "run" / "wandb").mkdir()
    (study / "run" / "wandb" / "debug.log").symlink_to(outside)  # wandb's own
    check_links(study / "run", study)
    as_named = tmp_path / "as named"
    as_named.symlink_to(study)
    check_links(as_named / "run", as_named)


def test_a_folder_of_links_may_lead_only_to_the_same_place_in_the_study_that_it_names(
    tmp_path: Path,
) -> None:
    study, out, secret = tmp_path / "study", tmp_path / "out", tmp_path / "secret"
    for folder in (study / "run", out / "run"):
        folder.mkdir(parents=True)
    (study / "run" / "done.json").touch()
    secret.touch()
    link = out / "run" / "done.json"
    link.symlink_to(study / "run" / "done.json")
    with pytest.raises(UserError, match="leads out"):
        check_links(out / "run", out)
    (out / ".study").write_text(f"{study}\n")
    check_links(out / "run", out)
    for target in (secret, study / "run" / "model.json", study):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(UserError, match="leads out"):
            check_links(out / "run", out)
    (study / "run" / "done.json").unlink()
    (study / "run" / "done.json").symlink_to(secret)  # the named study is hostile too
    link.unlink()
    link.symlink_to(study / "run" / "done.json")
    with pytest.raises(UserError, match="leads out"):
        check_links(out / "run", out)


def test_a_lock_that_is_a_link_is_refused_and_its_target_unchanged(tmp_path: Path) -> None:
    target, lock = tmp_path / "target", tmp_path / ".lock"
    target.write_text("precious")
    lock.symlink_to(target)
    with pytest.raises(UserError, match=r"\.lock is a link"):
        file_lock(lock)
    lock.unlink()
    os.link(target, lock)
    with file_lock(lock):
        pass
    assert target.read_text() == "precious"


def test_json_that_is_no_file_or_of_another_type_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"^no file .*a\.json: make it$"):
        read_json(path, dict[str, int], "make it")
    os.mkfifo(path)  # reading it would never end
    with pytest.raises(UserError, match=r"^no file .*a\.json: make it$"):
        read_json(path, dict[str, int], "make it")
    path.unlink()
    for content in (
        "",
        "{",
        "[]",
        '{"a": "b"}',
        '{"a": 1.5}',
        "[" * 100_000,
        '{"a": null}',
        "\ud800",
    ):
        path.write_bytes(content.encode("utf8", "surrogatepass"))
        with pytest.raises(UserError, match=r"^.*a\.json is broken \([^\n]*\): make it$"):
            read_json(path, dict[str, int], "make it")


def test_a_checksum_is_computed_once_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[Path] = []

    def counted(path: Path) -> str:
        computed.append(path)
        return real(path)

    real = files.checksum
    monkeypatch.setattr(files, "checksum", counted)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    sha256 = hashlib.sha256(b"one").hexdigest()
    assert files.has_checksum(path, sha256)
    assert files.has_checksum(path, sha256)
    assert len(computed) == 1
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(
        path, ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # the size and this time are as before
    assert not files.has_checksum(path, sha256)
    assert len(computed) == 2
