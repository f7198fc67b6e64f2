"""The wheel works without the clone, and its dependencies are pinned and explained."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import HANGS_AFTER_S, ROOT

from soluscope.config import configs_dir, shipped_dir

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*words: str | Path, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python words` in `cwd`, with only `path` on the search path besides the installed packages."""
    environment = {**os.environ, "PYTHONPATH": path, "PIP_NO_INDEX": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANGS_AFTER_S
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--quiet", "--wheel-dir", folder)
    run("-m", "pip", "wheel", *options, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Return the folder into which only the wheel was installed."""
    target = wheel.parent / "installed"
    run("-m", "pip", "install", "--no-deps", "--quiet", "--target", target, wheel, cwd=wheel.parent)
    return target


def test_wheel_holds_every_module_configuration_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    modules = {
        path.relative_to(source).as_posix()
        for kind in ("py", "txt", "bib")
        for path in source.rglob(f"*.{kind}")
    }
    shipped = (configs_dir(), shipped_dir("sweeps"))
    files = {
        f"soluscope/{path.relative_to(folder.parent).as_posix()}"
        for folder in shipped
        for path in folder.rglob("*.yaml")
    }
    assert len(files) >= 20
    assert not {
        name
        for name in names
        if name.startswith("soluscope/sweeps/") and not name.endswith(".yaml")
    }
    assert modules | files | {"soluscope/py.typed"} <= names
    outside = {name for name in names if not name.startswith(("soluscope/", "soluscope-"))}
    assert not outside
    assert any(name.endswith("licenses/LICENSE") for name in names)


USE = """
import sys
from pathlib import Path
import soluscope
from soluscope import config

assert Path(soluscope.__file__).is_relative_to(sys.argv[1]), soluscope.__file__
assert config.configs_dir().is_relative_to(sys.argv[1])
words = ["variant=solu_ln", "size=tiny", "train.steps=3", "train.warmup_steps=1", "corpus.max_mb=1"]
run_dir = soluscope.train(soluscope.load_config(words))
model = soluscope.load(run_dir)
assert model.facts.commit == "v" + model.facts.versions["soluscope"], model.facts.commit
text = "some text of a few words, and then " + "a few more of them " * 30
table, figures = soluscope.probe(model, text, probes=["engagement"])
assert set(table["probe"]) == {"engagement"} and {"r", "gain"} <= set(table["quantity"])
assert table["value"].notna().any() and len(table) > 30
assert figures and all(figure.data for figure in figures.values())
shown = "".join(table[table["quantity"] == "r"]["text"]).replace("\\u2423", " ")  # lone spaces
assert "some text of a few words" in shown
try:
    soluscope.nothing
except AttributeError:
    print(run_dir)
"""


@pytest.mark.long
def test_wheel_trains_loads_and_probes_outside_the_clone(installed: Path, tmp_path: Path) -> None:
    done = run("-c", USE, installed, cwd=tmp_path, path=str(installed))
    assert done.stdout.splitlines()[-1] == "runs/default/solu_ln-s0"
    assert (tmp_path / "runs/default/solu_ln-s0/done.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_command_of_the_wheel_sweeps_probes_and_reports_outside_the_clone(
    installed: Path, tmp_path: Path
) -> None:
    command, path = installed / "bin" / "soluscope", str(installed)
    helped = run(command, "--help", cwd=tmp_path, path=path).stdout
    assert all(f"\n  {name} " in helped for name in ("train", "probe", "report", "sweep", "export"))
    small = (
        "eval.probes=[engagement]",
        "eval.n_tokens=300",
        "eval.n_loss_tokens=1000",
        "eval.n_draws=100",
    )
    one = ("seed=0", "variant=solu_ln", "train.steps=3", "train.warmup_steps=1", "wandb=off")
    run(command, "sweep", "smoke", *one, *small, cwd=tmp_path, path=path)
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()
    (tmp_path / "runs" / "smoke" / "report.html").unlink()
    run(command, "report", "runs/smoke", cwd=tmp_path, path=path)
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


# Dependencies


def names_in(requirements: list[str]) -> dict[str, str]:
    """Return the required version of each package, by normalised name."""
    found = (re.match(r"([\w.-]+)\s*(?:\[.*\])?\s*(.*)", line) for line in requirements)
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in found if m}


PINS = names_in(
    [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
)


def test_every_dependency_has_a_floor() -> None:
    for name, asked in names_in(PROJECT["dependencies"]).items():
        assert asked.startswith(">="), name


def test_every_cap_has_its_reason_beside_it() -> None:
    for line in (ROOT / "pyproject.toml").read_text().splitlines():
        if re.match(r'\s*"[\w-]+>=[\d.]+,<', line):
            assert "  # " in line, line


def test_constraints_pin_one_version_of_every_dependency() -> None:
    groups = PROJECT["optional-dependencies"].values()
    extras = [name for group in groups for name in group if not name.startswith("soluscope[")]
    wanted = names_in([*PROJECT["dependencies"], *extras])
    assert sorted(wanted.keys() - PINS.keys()) == []
    assert all(re.fullmatch(r"==[\w.+!]+", pin) for pin in PINS.values())


def test_torch_is_pinned_to_the_build_that_the_package_index_serves() -> None:
    assert PINS["torch"] == "==2.13.0"


def test_the_lock_file_has_the_same_versions_each_with_its_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text()
    locked = names_in(re.findall(r"^([\w.-]+==[^ ;\\]+)", text, re.MULTILINE))
    assert sorted(PINS.keys() - locked.keys()) == []
    assert {name: pin for name, pin in PINS.items() if locked[name] != pin} == {}
    assert all("--hash=sha256:" in block for block in re.split(r"\n(?=\w)", text) if "==" in block)
    assert "://" not in text


def test_pins_satisfy_the_floors() -> None:
    def parts(version: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", version)]

    for name, asked in names_in(PROJECT["dependencies"]).items():
        for bound in asked.split(","):
            pin = parts(PINS[name])
            floor = bound.startswith(">=")
            assert pin >= parts(bound) if floor else pin < parts(bound), (name, bound)
