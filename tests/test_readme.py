"""The README's commands are commands, and its lists are the folders'."""

import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from soluscope import plugins
from soluscope.config import load_config
from soluscope.norms import PerTokenNorm, check_norm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf8")
COMMANDS = re.findall(r"^    python (.+)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("train/run.py")])
def test_a_training_command_is_one(command):
    words = [*shlex.split(command), *([] if "--help" in command else ["--cfg"])]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SWEEPS = README + (ROOT / "docs" / "sweeps.md").read_text(encoding="utf8")
LAUNCHES = re.findall(r"^    python (sweeps/launch.py sweeps/.+)$", SWEEPS, flags=re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(LAUNCHES)))
def test_a_command_that_launches_a_sweep_is_one(command, tmp_path):
    words = [*shlex.split(command), f"runs_dir={tmp_path}", "--dry-run"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to go:" in done.stdout


def test_the_other_commands_are_those_that_the_end_to_end_test_runs():
    scripts = {command.split()[0] for command in COMMANDS}
    assert scripts == {
        "train/run.py", "train/export.py", "eval/run.py", "eval/report.py", "sweeps/launch.py"
    }  # fmt: skip
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.parametrize("package", ["soluscope.variants", "soluscope.probes"])
def test_every_member_of_an_open_set_is_in_its_table(package):
    assert all(f"| `{name}`" in README for name in plugins.names(package))


def test_the_python_example_is_valid_and_its_configuration_loads():
    (code,) = re.findall(r"^```python\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
    compile(code, "README.md", "exec")
    (words,) = re.findall(r"load_config\((\[.*?\])\)", code)
    assert load_config(eval(words)).variant == "solu_ln"


def test_the_norm_of_the_recipe_computes_what_it_declares():
    (code,) = re.findall(r"^   ```python\n(.*?)```", README, flags=re.DOTALL | re.MULTILINE)
    names = {"PerTokenNorm": PerTokenNorm}
    exec(textwrap.dedent(code), names)
    check_norm(names["BiasedRMSNorm"](8, 1e-5), 8)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(
        f"\n{target}:" in makefile
        for target in re.findall(r"^    make (\w+)", README, re.MULTILINE)
    )


def test_linked_documents_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).is_file() for link in links)


def test_every_control_is_in_its_table():
    table = (ROOT / "docs" / "controls.md").read_text(encoding="utf8")
    assert all(f"| `{name}`" in table for name in plugins.names("soluscope.controls"))
