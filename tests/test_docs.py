"""The documents: references resolve, the tutorial runs, and the site builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import HANGS_AFTER_S, ROOT
from nbclient import NotebookClient
from test_pretrained import config_of, repository, tokenizer_files, weights_of

from soluscope import plugins

PROTOCOL = (ROOT / "docs" / "protocol.md").read_text(encoding="utf8")
HEADINGS = re.findall(r"^#+ (\d+(?:\.\d+)?|P\d+)\b", PROTOCOL, re.MULTILINE)
KEYS = set(re.findall(r"^\| `\w+` \| (C\d+)", PROTOCOL, re.MULTILINE))

ITEM = r'\d+(?:\.\d+)?(?: \([a-d]\))?(?:,? [PC]\d+)?(?: \("[^"]*"\)|, "[^"]*")?'
REFERENCE = re.compile(rf"protocol\.md,? sections? ({ITEM}(?:(?:, and |, | and ){ITEM})*)")


def read(path: Path) -> str:
    """Return a file's text with comment marks and line breaks taken out."""
    return " ".join(re.sub(r"^\s*#", "", path.read_text(encoding="utf8"), flags=re.M).split())


CITING = [
    path
    for folder in ("src", "tests", "configs", "sweeps", "benchmarks", "docs", "train", "eval")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".yaml", ".md", ".j2"} and REFERENCE.search(read(path))
]


@pytest.mark.parametrize("path", CITING, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_section_of_the_protocol_that_is_cited_exists(path: Path) -> None:
    for reference in REFERENCE.findall(read(path)):
        assert not set(re.findall(r"(?<![PC\d.])\d+(?:\.\d+)?", reference)) - set(HEADINGS), (
            reference
        )
        assert not set(re.findall(r"P\d+", reference)) - set(HEADINGS), reference
        assert not set(re.findall(r"C\d+", reference)) - KEYS, reference
        assert all(quoted in PROTOCOL for quoted in re.findall(r'"([^"]*)"', reference)), reference


def test_many_files_cite_the_protocol_and_none_cites_a_note_that_does_not_ship() -> None:
    assert len(CITING) > 60
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"\b(science|design|audit|pilots|redesign)\.md", read(path)), path


def test_the_protocol_has_every_member_of_the_open_sets() -> None:
    sections = PROTOCOL.split("\n## ")
    variants, controls, probes = sections[4], sections[7], sections[8]
    assert all(f"| `{name}` |" in variants for name in plugins.names("soluscope.variants"))
    assert all(f"| `{name}` |" in controls for name in plugins.names("soluscope.controls"))
    for name in plugins.names("soluscope.probes"):
        probe = plugins.pick("soluscope.probes", name)
        assert f"### {probe.section} {name}\n" in probes


def test_every_link_between_documents_resolves() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf8")):
            assert (page.parent / link).is_file(), f"{page.name}: {link}"


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pretrained model is a small one in SoLU-1L's layout, since no network is there."""
    config = config_of(d_vocab=1500)
    folder = tmp_path / "solu-tiny"
    folder.mkdir()
    for name, content in (repository(config, weights_of(config)) | tokenizer_files(1500)).items():
        (folder / name).write_bytes(content)
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"solu-1l"', repr(str(folder)))
        cell.metadata.pop("tags", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = NotebookClient(
        notebook, timeout=HANGS_AFTER_S, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert (tmp_path / "runs" / "tutorial" / "solu_ln-s0" / "done.json").is_file()


def test_the_tutorial_is_stored_with_its_outputs() -> None:
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    shown = [
        cell for cell in notebook.cells
        if cell.cell_type == "code" and "skip-execution" not in cell.metadata.get("tags", ())
    ]  # fmt: skip
    assert sum(bool(cell.outputs) for cell in shown) >= len(shown) - 2  # imports print nothing
    text = nbformat.writes(notebook)
    assert '"output_type": "error"' not in text
    assert str(Path.home()) not in text
    assert "/tmp/" not in text


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True,
        text=True, timeout=HANGS_AFTER_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in plugins.names("soluscope.probes"):
        page = (tmp_path / "probes" / name / "index.html").read_text(encoding="utf8")
        assert "Planted" in page or "planted model" in page
    assert "What does LayerNorm do in SoLU language models?" in (tmp_path / "index.html").read_text(
        encoding="utf8"
    )
