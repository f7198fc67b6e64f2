"""The style's measurable rules hold in every file that people read; what the tool finds is tested too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plain_english import docstrings, files, offences, starts_with_a_verb

FILES = files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_sentence_uses_a_phrase_that_the_style_forbids(path: Path) -> None:
    assert [f"{each.line}: {each.phrase} -> {each.advice}" for each in offences(path)] == []


def test_docstrings_of_functions_start_with_a_verb() -> None:
    texts = [text for path in FILES if path.suffix == ".py" for text in docstrings(path)]
    others = [f"{t.path.name}:{t.line}" for t in texts if not starts_with_a_verb(t.text)]
    assert len(texts) > 500
    assert others == []


def test_the_tool_finds_each_kind_of_text(tmp_path: Path) -> None:
    code = tmp_path / "a.py"
    code.write_text(
        'def f():\n    """What is lost."""\n    # made\n    # anew\n    raise E(f"{x} goes on here")\n'
    )
    assert [(each.line, each.phrase) for each in offences(code)] == [
        (2, "What is lost."), (5, "goes on"), (3, "anew"),
    ]  # fmt: skip
    assert [starts_with_a_verb(text.text) for text in docstrings(code)] == [False]
    page = tmp_path / "a.md"
    page.write_text("Fine.\n\n```\nmade anew\n```\n\nA gain of\nits own.\n\n    go on\n")
    assert [(each.line, each.phrase) for each in offences(page)] == [(7, "of its own")]
    notebook = tmp_path / "a.ipynb"
    cells = [
        {"cell_type": kind, "source": ["Fine.\n", "Made anew."]} for kind in ("markdown", "code")
    ]
    notebook.write_text(json.dumps({"cells": cells}))
    assert [(each.line, each.phrase) for each in offences(notebook)] == [(1, "anew")]
    settings = tmp_path / "a.yaml"
    settings.write_text("a: anew  # computed anew\n")
    assert [each.phrase for each in offences(settings)] == ["anew"]


def test_a_question_may_start_with_what(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text("What does LayerNorm do?\n")
    assert offences(page) == []
