"""The commands in README and guide are accepted, and the recipe's example is right."""

import re
import shlex
import subprocess
import sys
import textwrap

import pytest
from conftest import ROOT, command

from soluscope import plugins
from soluscope.config import load_config
from soluscope.norms import PerTokenNorm, check_norm

README = (ROOT / "README.md").read_text(encoding="utf8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf8")
PAGES = README + "".join(
    (ROOT / "docs" / name).read_text(encoding="utf8")
    for name in ("guide.md", "sweeps.md", "tuning.md")
)
COMMANDS = sorted(set(re.findall(r"^    soluscope (.+)$", PAGES, flags=re.MULTILINE)))
OF = {
    name: [c for c in COMMANDS if c.startswith(f"{name} ")]
    for name in plugins.names("soluscope.commands")
}


@pytest.mark.parametrize("line", OF["train"])
def test_a_training_command_is_one(line):
    words = [*shlex.split(line), *([] if "--help" in line or "--cfg" in line else ["--cfg"])]
    command(*words, cwd=ROOT)


@pytest.mark.parametrize("line", [line for line in OF["sweep"] if "--status" not in line])
def test_a_command_that_launches_a_sweep_is_one(line, tmp_path):
    words = [*shlex.split(line), f"runs_dir={tmp_path}"]
    stops = "--dry-run" in line or "--preregister" in line
    done = command(*words, *([] if stops else ["--dry-run"]), cwd=ROOT)
    assert ("sha256 of the plan:" if "--preregister" in line else "to go:") in done.stdout


@pytest.mark.parametrize(
    "line",
    [
        each
        for name in ("probe", "remove", "neurons", "rate", "proxy", "report", "export", "sweep")
        for each in OF[name]
    ],
)
def test_the_words_of_other_commands_are_accepted_by_their_parsers(line):
    name, *words = shlex.split(line)
    plugins.pick("soluscope.commands", name).build_parser().parse_intermixed_args(words)


@pytest.mark.long
def test_the_readmes_commands_run_as_they_stand(tmp_path):
    """The block under "Use it" runs line by line in an empty folder, and the Python example after it."""
    block = README.split("## Use it")[1].split("## Read on")[0]
    lines = re.findall(r"^    soluscope (.+)$", block, flags=re.MULTILINE)
    # The pretrained model needs the hub, the page of ratings waits for people, and planted neurons take minutes.
    left_out = ("rate ", "proxy ", "probe solu-1l")
    ours = [line for line in lines if not line.startswith(left_out)]
    names = "train sweep probe remove report neurons plan export"
    assert [line.split()[0] for line in ours] == names.split()
    for line in ours:
        words = [sys.executable, "-m", "soluscope", *shlex.split(line)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
    assert (tmp_path / "runs/first/report.html").is_file()
    assert (tmp_path / "out/README.md").is_file()
    (code,) = re.findall(r"^```python\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_command_is_shown_in_the_readme():
    assert all(f"    soluscope {name} " in README for name in plugins.names("soluscope.commands"))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_the_python_example_is_valid_and_its_configuration_loads():
    (code,) = re.findall(r"^```python\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
    compile(code, "README.md", "exec")
    (words,) = re.findall(r"load_config\((\[.*?\])\)", code)
    assert load_config(eval(words)).variant == "solu_ln"


def test_the_norm_of_the_recipe_computes_what_it_declares():
    (code,) = re.findall(r"^   ```python\n(.*?)```", CONTRIBUTING, flags=re.DOTALL | re.MULTILINE)
    names = {"PerTokenNorm": PerTokenNorm}
    exec(textwrap.dedent(code), names)
    check_norm(names["BiasedRMSNorm"](8, 1e-5), 8)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z][\w-]+)", README + CONTRIBUTING)
    assert {"demo", "test", "smoke", "docs", "test-slow"} <= set(targets)
    assert all(f"\n{target}:" in makefile for target in targets)
