"""Every file of a finished study, damaged in every way: no traceback, no hang, nothing written elsewhere.

The study is trained with snapshots, probed and reported; neurons are stored, a per-token gain is removed, and some
neurons are rated. In each case one of its files or folders is damaged, and the commands that read it run again.
They must give the same results, or name the file or its run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import signal
import sqlite3
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import tiny_config, train_silently

from soluscope.commands import run
from soluscope.files import checksum
from soluscope.rating.database import NAME, Database
from soluscope.runs import registration
from soluscope.serving import server

pytestmark = pytest.mark.slow

SEED = 13
N_PARTS = 32
"""Parts into which the cases are divided, so that several processes can share them."""
HANGS_AFTER_CPU_S = 30
HANGS_AFTER_S = 300
"""Limits of one command. Both are far above its usual few seconds, because a machine may be busy."""
RUN = "solu_ln-s0"
PROBE = ("probes=[engagement,gain_variation]", "n_tokens=600", "n_loss_tokens=1000", "n_draws=100")
NEURONS = ("n_tokens=600", "device=cpu")
REMOVE = ("n_tokens=600", "n_fit_tokens=600", "fine_tune_tokens=512", "n_draws=100", "device=cpu")
RATE = ("n_neurons=2", "modes=[full]", "n_examples=10", "planted=0")
N_RATINGS = 2
HOSTILE = "../../x\x1b]0;title\x07\x1b[31m<script>alert(1)</script>${oc.env:HOME}{seed}'\"\\\u202e"
VALUES: dict[str, Any] = {
    "null": None, "true": True, "negative": -1, "huge": 10**400, "large": 10**30, "float": 1e308,
    "hostile": HOSTILE, "surrogate": "\ud800", "list": [1], "object": {"a": {"b": []}},
}  # fmt: skip
"""Values that are put in the place of a value of a file."""
FREE = {"commit", "versions", "device", "role", "twin", "chain", "hooked_act_fn", "departures"}
"""Keys that state an origin; another plausible value cannot be recognised."""

OPTIONAL = {registration.NAME}
"""Files that a study need not have, so that nobody can tell that one was removed."""
OUTPUTS = ("neurons/", "report.html")
"""Files that are written and not read, so that other content has no effect."""
WHOLE = ("solu-s0/", f"{RUN}/neurons/untrained/")
"""Files that stay as they are, because they are like those of the other run and of the other part."""


@dataclass(frozen=True)
class Case:
    file: str
    """Path in the study."""
    damage: str
    apply: Callable[[Path], None]


# --- damages --------------------------------------------------------------------------------------


def whole_file(content: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Yield what a file may contain instead of `content`."""
    half = rng.randrange(1, max(2, len(content)))
    flipped = bytearray(content)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    yield "empty", b""
    yield "cut", content[:half]
    yield "cut by a byte", content[:-1]
    yield "longer", content + b"\0"
    yield "zeros", bytes(len(content))
    yield "noise", rng.randbytes(len(content))
    yield "a flipped bit", bytes(flipped)
    yield "no UTF-8", b"\xff\xfe" + content
    yield "another type", b"[3]\n"
    yield "an empty object", b"{}\n"
    yield "a text", json.dumps(HOSTILE).encode()
    yield "a huge number", b"1" + b"0" * 400 + b"\n"
    yield "deep nesting", b"[" * 100_000
    yield "deep objects", b'{"kind":' * 50_000 + b"1" + b"}" * 50_000 + b"\n"


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(content))


def void(_: object) -> None:
    """Make an expression of a call whose value is not needed."""


def linked_outside(path: Path) -> None:
    """Move a file out of the study, and leave a link to it."""
    target = _outside(path) / path.name
    shutil.move(path, target)
    path.symlink_to(target)


def _outside(path: Path) -> Path:
    root = next(each for each in path.parents if each.name == "runs").parent
    return root / "outside"


def linked_to_secret(path: Path) -> None:
    path.unlink()
    path.symlink_to(_outside(path) / "secret.txt")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(_outside(path) / "not there")


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


PLACES = {
    "link to a copy": linked_outside, "link to a secret": linked_to_secret, "dangling link": dangling,
    "folder": made_a_folder, "pipe": made_a_pipe, "removed": Path.unlink,
}  # fmt: skip
FOLDERS = (
    f"{RUN}/snapshots", f"{RUN}/neurons", f"{RUN}/neurons/trained", f"{RUN}/removal", "neurons", "rating",
)  # fmt: skip
"""Folders of the later stages, whose place something else takes."""


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a damage that removes a folder and makes something else in its place."""

    def apply(path: Path) -> None:
        shutil.rmtree(path)
        make(path)

    return apply


PLACES_OF_FOLDERS = {
    "link to a copy": linked_outside,
    "dangling link": instead(lambda path: path.symlink_to(_outside(path) / "not there")),
    "file": instead(Path.touch),
    "pipe": instead(os.mkfifo),
}


def with_value(content: Any, keys: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of nested dicts and lists with another value at the place `keys`."""
    if not keys:
        return value
    changed = dict(content) if isinstance(content, dict) else list(content)
    changed[keys[0]] = with_value(content[keys[0]], keys[1:], value)
    return changed


def leaves(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places of all values in nested dicts, and in the first item of lists."""
    items = content.items() if isinstance(content, dict) else list(enumerate(content))[:1]
    for key, value in items:
        yield (*above, key)
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*above, key))


def dumped(content: Any) -> bytes:
    return json.dumps(content).encode() + b"\n"


def values_of(path: Path, rng: random.Random, n: int) -> Iterator[tuple[str, bytes]]:
    """Yield `n` versions of a JSON, JSONL or YAML file with one other value each."""
    text = path.read_text()
    for _ in range(n):
        name = rng.choice([*VALUES])
        if path.suffix == ".jsonl":
            lines = text.splitlines()
            number = rng.randrange(len(lines))
            row = json.loads(lines[number])
            keys = rng.choice([*leaves(row)]) if isinstance(row, dict) else ()
            lines[number] = json.dumps(with_value(row, keys, VALUES[name]))
            yield f"{number}/{keys} {name}", "\n".join(lines).encode() + b"\n"
            continue
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        places = [keys for keys in leaves(content) if not {*keys} & FREE]
        keys = rng.choice(places)
        changed = with_value(content, keys, VALUES[name])
        if path.suffix == ".yaml":
            yield f"{keys} {name}", yaml.safe_dump(changed, allow_unicode=False).encode()
        else:
            yield f"{keys} {name}", dumped(changed)


class Command:
    """An object whose unpickling runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ('touch "$TAMPERED"',)


def of_format(path: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield damages that keep a binary file's format."""
    if path.name.endswith(".tokens"):
        tokens = np.fromfile(path, np.uint16)
        yield "shuffled", written(np.random.default_rng(SEED).permutation(tokens).tobytes())
        yield "tokens beyond the vocabulary", written(np.full_like(tokens, 65_535).tobytes())
    if path.suffix == ".npy":
        offsets = np.load(path)
        yield "objects", lambda at: np.save(at, np.array([{}] * len(offsets), dtype=object))
        yield "decreasing", lambda at: np.save(at, np.r_[offsets[:1], -offsets[1:-1], offsets[-1:]])
        yield "floats", lambda at: np.save(at, offsets.astype(float))
        yield "wide", lambda at: np.save(at, np.stack([offsets, offsets]))
        head = b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999,), }"
        yield "huge shape", written(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
        yield "pickle", written(pickle.dumps(Command()))
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        head = json.loads(content[8 : 8 + size])
        name = next(key for key in head if key != "__metadata__")
        for what, value in (
            ("shape", [2**40, 2**40]),
            ("dtype", "U8"),
            ("data_offsets", [0, 2**62]),
        ):
            changed = json.dumps(with_value(head, (name, what), value)).encode().ljust(size)
            yield (
                f"other {what}",
                written(struct.pack("<Q", len(changed)) + changed + content[8 + size :]),
            )
        yield "huge header", written(struct.pack("<Q", 2**63) + content[8:])
        nan = np.full((len(content) - 8 - size) // 4, np.nan, np.float32).tobytes()
        yield "nan", written(content[: 8 + size] + nan)
        yield (
            "negated",
            written(
                content[: 8 + size] + (-np.frombuffer(content[8 + size :], np.float32)).tobytes()
            ),
        )
        yield "pickle", written(pickle.dumps(Command()))
    if path.name == "loss.parquet":
        table = pd.read_parquet(path)
        for column, value in (
            ("loss_sum", np.nan), ("loss_sum", "x"), ("loss_sum", np.inf), ("n_tokens", 0), ("n_tokens", -5),
            ("split", HOSTILE), ("arm", HOSTILE), ("seed", 10**9), ("document", 3), ("variant", None),
            ("run", "other"),
        ):  # fmt: skip
            changed = table.assign(**{column: value})
            yield f"{column}={value!r:.20}", changed.to_parquet
        yield "no column", table.drop(columns="n_tokens").to_parquet
        yield "no rows", table.iloc[:0].to_parquet
        yield "half the rows", table[table["split"] == "select"].to_parquet
    if path.suffix == ".sqlite":
        yield from of_database(path)
    if path.parent.name == "trained" and path.suffix == ".parquet":
        yield from of_neurons(path)
    if path.parent.name == "removal" and path.suffix == ".parquet":
        table = pd.read_parquet(path)
        for what, changed in (
            ("no documents", table.drop(columns="document")), ("text", table.astype(str)),
            ("nan", table.assign(**{"one gain": np.nan})), ("half the rows", table.iloc[::2]),
            ("no rows", table.iloc[:0]),
        ):  # fmt: skip
            yield f"{what}, resealed", resealed(changed)
    if path.suffix == ".ckpt":
        yield "pickle", written(pickle.dumps(Command()))
        yield "pickled object", written(pickle.dumps({"state_dict": Command()}))


def resealed(table: pd.DataFrame) -> Callable[[Path], None]:
    """Return a damage that writes another table, and its checksum."""

    def apply(path: Path) -> None:
        table.to_parquet(path)
        sums = path.with_name("SHA256SUMS")
        lines = [line.partition("  ") for line in sums.read_text().splitlines()]
        kept = [f"{of_file}  {name}" for of_file, _, name in lines if name != path.name]
        sums.write_text("\n".join([*kept, f"{checksum(path)}  {path.name}"]) + "\n")

    return apply


def of_neurons(path: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield tables of neurons with other columns, types and numbers, whose checksums fit."""
    table = pd.read_parquet(path)
    yield "no neurons, resealed", resealed(table.drop(columns="neuron"))
    yield "no rows, resealed", resealed(table.iloc[:0])
    yield "neurons twice, resealed", resealed(pd.concat([table, table]))
    for column in table.columns:
        value = table[column].iloc[0]
        others: list[Any] = [HOSTILE, 10**12, -7, [1], None]
        if isinstance(value, np.ndarray):
            others = ["x", [], [10**9]]
        for other in others:
            changed = table.assign(**{column: [other] * len(table)})
            yield f"{column}={other!r:.20}, resealed", resealed(changed)


def of_database(path: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Yield databases of ratings with other values, tables and files beside them."""

    def edited(*statements: str) -> Callable[[Path], None]:
        def apply(at: Path) -> None:
            with closing(sqlite3.connect(at)) as connection:
                for each in statements:
                    connection.execute(each)
                connection.commit()

        return apply

    quoted = HOSTILE.replace("'", "''")
    for column in ("rater", "hypothesis", "at"):
        yield (
            f"{column} is hostile",
            edited(f"UPDATE rating SET {column} = '{quoted}' WHERE id = 1"),
        )
    yield (
        "another answer",
        edited("UPDATE rating SET interpretable = 1 - interpretable WHERE id = 2"),
    )
    yield "taken back", edited("UPDATE rating SET undone = 1 WHERE id = 2")
    yield "endless", edited("UPDATE rating SET seconds = 9e999")
    yield "fewer ratings", edited("DELETE FROM rating WHERE id = 2")
    yield "no ratings", edited("DELETE FROM rating")
    for column in ("arm", "run", "kind", "shown", "mode"):
        yield f"{column} of an item is hostile", edited(f"UPDATE item SET {column} = '{quoted}'")
    yield "another neuron", edited("UPDATE item SET neuron = neuron + 1")
    yield "fewer items", edited("PRAGMA foreign_keys = OFF", "DELETE FROM item WHERE id = 0")
    for name in ("version", "study", "identity", "plan", "silent", "checksum"):
        yield (
            f"{name} is hostile",
            edited(f"UPDATE fact SET value = '{quoted}' WHERE name = '{name}'"),
        )
        yield f"no {name}", edited(f"DELETE FROM fact WHERE name = '{name}'")
    yield "trigger", edited("CREATE TRIGGER t AFTER INSERT ON rating BEGIN DELETE FROM rating; END")
    yield (
        "view",
        edited("ALTER TABLE item RENAME TO other", "CREATE VIEW item AS SELECT * FROM other"),
    )
    yield "no index", edited("DROP INDEX one_rating")
    yield "not recognised", edited("PRAGMA application_id = 0")
    for end in ("-wal", "-shm", "-journal"):
        yield (
            f"noise in {end}",
            lambda at, end=end: void(Path(f"{at}{end}").write_bytes(b"\xff" * 9000)),
        )
        yield f"folder {end}", lambda at, end=end: Path(f"{at}{end}").mkdir()
        yield f"pipe {end}", lambda at, end=end: os.mkfifo(f"{at}{end}")
        yield (
            f"link {end}",
            lambda at, end=end: Path(f"{at}{end}").symlink_to(_outside(at) / "secret.txt"),
        )


N_VALUES = {
    "model.json": 14, "results.jsonl": 14, "config.yaml": 10, "meta.json": 10, "done.json": 8, "data.json": 6,
}  # fmt: skip
"""Number of single values that are replaced in a file of this name; 4 in any other."""


def cases(study: Path, every: bool = False) -> list[Case]:
    """Return the cases, the same ones every time: of each file some damages, or with `every` all of them."""
    rng = random.Random(SEED)
    found: list[Case] = []
    for path in sorted(path for path in study.rglob("*") if path.is_file()):
        name = path.relative_to(study).as_posix()
        if name.startswith(WHOLE) or path.name.endswith("lock"):
            continue
        damages = [(what, written(content)) for what, content in whole_file(path.read_bytes(), rng)]
        damages = damages if every else rng.sample(damages, 5)
        damages = damages[: 1 if name.startswith(OUTPUTS) else None]
        places = [
            (what, apply)
            for what, apply in PLACES.items()
            if name not in OPTIONAL or what != "removed"
        ]
        damages += places if every else rng.sample(places, 2)
        formats = [*of_format(path)]
        few = path.suffix == ".parquet" and path.parent.name == "trained" and not every
        damages += rng.sample(formats, 6) if few else formats
        if path.suffix in {".json", ".jsonl", ".yaml"} and path.name != "tokenizer.json":
            n_values = N_VALUES.get(path.name, 4) * (4 if every else 1)
            damages += [(what, written(new)) for what, new in values_of(path, rng, n_values)]
        found += [Case(name, what, apply) for what, apply in damages]
    for name in FOLDERS:
        found += [Case(name, what, apply) for what, apply in PLACES_OF_FOLDERS.items()]
    return found


# --- commands -------------------------------------------------------------------------------------


class Hangs(BaseException):
    """The error of a command that does not end."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs

    before = [signal.signal(each, stop) for each in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, HANGS_AFTER_CPU_S)
    signal.alarm(HANGS_AFTER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def answer(name: str, *words: str | Path) -> int:
    """Run a command in this process and return its exit status."""
    try:
        with limited():
            run(name, [str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)


def commands_for(case: Case, study: Path, out: Path) -> list[tuple[str | Path, ...]]:
    """Return the commands that read the damaged file."""
    name, run_dir = Path(case.file).name, study / RUN
    probe = ("probe", study, *PROBE)
    if name in {"results.jsonl", "report.html"}:
        return [("report", study)]
    if name == "last.ckpt":
        (run_dir / "done.json").unlink()
        return [("train", run_dir / "config.yaml", f"runs_dir={study.parent}")]
    if name == "metrics.jsonl":
        (run_dir / "probes" / "training.jsonl").unlink()
        return [("sweep", "--status", study), probe, ("report", study)]
    if "probes" in case.file or ".controls" in case.file:
        return [probe]
    if case.file.startswith((f"{RUN}/neurons", "neurons")):
        return [("rate", study, *RATE), ("neurons", run_dir, *NEURONS)]
    if case.file.startswith(f"{RUN}/removal"):
        return [probe, ("remove", run_dir, *REMOVE)]
    if case.file.startswith("rating"):
        return [
            ("rate", study, *RATE),
            ("rate", study, "--analyse"),
            *([probe] if name == "rating.jsonl" else []),
        ]
    if case.file.startswith(f"{RUN}/snapshots"):
        (run_dir / "probes" / "dynamics.jsonl").unlink()
        return [probe]
    (run_dir / "probes" / "loss.jsonl").unlink()  # so that the model and the tokens are read
    if name in {"done.json", "config.yaml"}:
        return [probe, ("export", run_dir, out), ("sweep", "--status", study)]
    if name in {"model.json", "model.safetensors", "tokenizer.json"}:
        return [probe, ("export", run_dir, out)]
    return [probe]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module", autouse=True)
def no_page() -> Iterator[None]:
    """Let `soluscope rate` end where it would wait for a browser."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.uvicorn.Server, "run", lambda server, sockets: None)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of two runs with all stages, of which one run has neurons and a removal."""
    runs = tmp_path_factory.mktemp("tampering") / "runs"
    study = runs / "small"
    for variant in ("solu", "solu_ln"):
        words = (f"variant={variant}", "model.d_mlp=16", "train.snapshots=2")
        train_silently(tiny_config(runs, "study=small", *words))
    plan = {"arms": ["solu", "solu_ln"], "seeds": [0], "select_seeds": [1], "estimand": {"a": 0.1}}
    registration.register(study, plan)
    assert answer("probe", study, *PROBE) == 0
    assert answer("neurons", study / RUN, *NEURONS) == 0
    assert answer("remove", study / RUN, *REMOVE) == 0
    assert answer("rate", study, *RATE) == 0
    database = Database(study / "rating" / NAME)
    for number in range(N_RATINGS):
        for rater in ("ann", "bob"):
            assert database.rate(rater, number, number == 0, "a rule", 2.0)
    assert answer("rate", study, "--analyse") == 0
    assert answer("report", study) == 0
    return study


def test_there_are_enough_cases(study: Path) -> None:
    assert len(cases(study)) >= 300
    assert [(case.file, case.damage) for case in cases(study)] == [
        (case.file, case.damage) for case in cases(study)
    ]


def problems_of(case: Case, study: Path, root: Path) -> Iterator[str]:
    """Yield the problems of the commands after a copy of the study in the new folder `root` was damaged."""
    expected = (study / "results.jsonl").read_bytes()
    copy, outside = root / "runs" / study.name, root / "outside"
    results = copy / "results.jsonl"
    shutil.copytree(study, copy)
    tuned = study.with_name("small-removed")
    shutil.copytree(tuned, copy.with_name(tuned.name))
    outside.mkdir()
    (outside / "secret.txt").write_text("aws_secret_access_key = hunter2\n")
    case.apply(copy / case.file)
    before = snapshot(outside)
    for command in commands_for(case, copy, root / "exported"):
        told = f"{case.file}, {case.damage}, {command[0]}"
        errors = io.StringIO()
        try:
            with redirect_stderr(errors), redirect_stdout(io.StringIO()):
                status = answer(*command)  # type: ignore[arg-type]
        except Hangs:
            yield f"{told}: hangs"
            return
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            yield f"{told}: {type(error).__name__}: {str(error)[:200]} at {place}"
            continue
        text = errors.getvalue()
        refusals = [line for line in text.splitlines() if line.startswith("error: ")]
        if status not in (0, 2):
            yield f"{told}: status {status}"
        if status == 2 and (len(refusals) != 1 or not text.endswith(refusals[0] + "\n")):
            yield f"{told}: the error is not one line: {text[-300:]!r}"
        is_named = Path(case.file).name in text or RUN in text
        if status == 2 and not is_named:
            yield f"{told}: does not name the file: {text[-300:]!r}"
        if command[0] in ("rate", "remove"):  # they always name the run
            is_named = status == 2 or "resealed" in case.damage
        computes = command[0] in ("probe", "rate", "remove")
        if computes and not is_named and results.read_bytes() != expected:
            yield f"{told}: silently other results"
    if snapshot(outside) != before:
        yield f"{case.file}, {case.damage}: wrote outside"
    if Path(os.environ["TAMPERED"]).exists():
        yield f"{case.file}, {case.damage}: executed"
    exported = snapshot(root / "exported") if (root / "exported").is_dir() else {}
    if any(b"hunter2" in content for content in exported.values()):
        yield f"{case.file}, {case.damage}: the secret was exported"
    if left := [path.name for path in copy.rglob("*.part")]:
        yield f"{case.file}, {case.damage}: litter {left}"


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, N_PARTS))]
)
def test_a_damaged_file_is_named_and_changes_no_number(
    part: int, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMPERED", str(tmp_path / "executed"))
    problems: list[str] = []
    for case in cases(study)[part::N_PARTS]:
        problems += problems_of(case, study, tmp_path / "case")
        shutil.rmtree(tmp_path / "case")
    assert not problems, "\n".join(problems)
