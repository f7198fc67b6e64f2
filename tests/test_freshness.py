"""Stored numbers are discarded when the code that computes them changes, and only then."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from soluscope import plugins
from soluscope.config import EvalConfig
from soluscope.evaluation import stored, suite
from soluscope.runs import weights
from soluscope.runs.folder import Run

SOURCE = weights.SOURCE
STORED = {f"{name}.jsonl" for name in ("engagement", "rotation", "loss", "training")}

Edit = Callable[[str], str]


def with_other_docstrings(source: str) -> str:
    """Return the same program without comments, with another docstring in each function, class and module."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            if ast.get_docstring(node) is not None:
                del node.body[0]
            node.body.insert(0, ast.Expr(ast.Constant("Something else.")))
    return f"# A comment.\n{ast.unparse(tree)}"


def with_another_number(source: str) -> str:
    """Return the program with its first number changed, or with one more statement if it has no number."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            node.value += 1
            return ast.unparse(tree)
    return f"{source}\nNUMBER = 1\n"


def edit_source(folder: Path, paths: set[str], edit: Edit, patch: pytest.MonkeyPatch) -> None:
    """Copy the package's source into `folder`, edit some files, and let the suite read the copy."""
    copy = folder / "soluscope"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in paths:
        before = (copy / path).read_text()
        after = edit(before)
        assert after != before
        (copy / path).write_text(after)
    patch.setattr(weights, "SOURCE", copy)


def kept(tmp_path: Path, paths: set[str], edit: Edit, patch: pytest.MonkeyPatch) -> set[str]:
    """Return the names of a run's probe files that remain after an edit of the package's source."""
    run_dir = tmp_path / "run"
    (run_dir / "probes").mkdir(parents=True)
    (run_dir / "done.json").write_text("{}")

    def discard_stale() -> None:
        shared = stored.rests_on(Run(run_dir), EvalConfig())
        with stored.current(run_dir / "probes", shared, lambda text: None):
            pass

    discard_stale()
    for name in STORED:
        (run_dir / "probes" / name).write_text("numbers")
    discard_stale()
    edit_source(tmp_path, paths, edit, patch)
    discard_stale()
    return {path.name for path in (run_dir / "probes").glob("*.jsonl")}


def test_comments_and_docstrings_discard_nothing(tmp_path, monkeypatch):
    every = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")}
    assert len(every) > 80
    assert kept(tmp_path, every, with_other_docstrings, monkeypatch) == STORED


@pytest.mark.parametrize(
    "path",
    ["hooked/ablation/edits.py", "probes/_features.py", "comparison/stats.py", "evaluation/summaries.py",
     "data/streams.py", "norms.py", "model.py", "variants/_parts.py", "results.py"],
)  # fmt: skip
def test_a_changed_number_in_what_computes_discards_all(path, tmp_path, monkeypatch):
    assert kept(tmp_path, {path}, with_another_number, monkeypatch) == set()


def test_a_changed_probe_discards_its_own_numbers_alone(tmp_path, monkeypatch):
    left = kept(tmp_path, {"probes/engagement.py"}, with_another_number, monkeypatch)
    assert left == STORED - {"engagement.jsonl"}


def test_what_shows_trains_or_launches_discards_nothing(tmp_path, monkeypatch):
    others = {path.relative_to(SOURCE).as_posix()
              for folder in ("report", "training", "launching", "engines", "controls")
              for path in (SOURCE / folder).glob("*.py")}  # fmt: skip
    assert len(others) > 20
    paths = others | {"export.py", "wandb_client.py"}
    assert kept(tmp_path, paths, with_another_number, monkeypatch) == STORED


def test_a_changed_control_asks_the_probes_again_and_a_changed_probe_itself(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(suite, "check_gates", lambda name, study: iter(asked.append(name) or ()))

    def ask_both() -> list[str]:
        asked.clear()
        for name in ("engagement", "rotation"):
            suite._calibrated("controls", [name], tmp_path / "study", lambda text: None)
        return list(asked)

    assert ask_both() == ["engagement", "rotation"]
    assert ask_both() == []
    edit_source(tmp_path / "a", {"controls/pinned.py"}, with_another_number, monkeypatch)
    assert ask_both() == ["engagement", "rotation"]
    both = {"controls/pinned.py", "probes/rotation.py"}
    edit_source(tmp_path / "b", both, with_another_number, monkeypatch)
    assert ask_both() == ["rotation"]


def test_what_computes_is_there_and_each_probe_counts_for_itself():
    for path in (*stored.COMPUTES, *stored.probe_files()):
        assert (SOURCE / path).exists(), path
    assert len(stored.probe_files()) == len(plugins.names("soluscope.probes"))
