"""Pages of the site that are made from other files: README and its neighbours, and one page per probe."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from soluscope import plugins
from soluscope.probes import Gate, Probe

ROOT = Path(__file__).parents[1]
COPIED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
NAVIGATION = [
    {"Guide": ["index.md", "tutorial.ipynb", "guide.md", "sweeps.md", "tuning.md"]},
    {"Protocol": ["protocol.md", "intervals.md"]},
    {"Probes": []},
    {"Reference": ["api.md", "contributing.md", "security.md", "changelog.md"]},
]


def on_config(config: MkDocsConfig) -> None:
    """Set the navigation, with one entry per probe in the protocol's order."""
    probes = {name: _probe(name) for name in plugins.names("soluscope.probes")}
    order = sorted(probes, key=lambda name: int(probes[name].section.removeprefix("P")))
    NAVIGATION[2]["Probes"] = [
        {f"{probes[name].section} {probes[name].name}": f"probes/{name}.md"} for name in order
    ]
    config.nav = NAVIGATION


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages."""
    for source, page in COPIED.items():
        text = (ROOT / source).read_text(encoding="utf8")
        files.append(File.generated(config, page, content=_relinked(text)))
    for name in plugins.names("soluscope.probes"):
        files.append(File.generated(config, f"probes/{name}.md", content=_page(name)))


def _relinked(text: str) -> str:
    """Return a root document's text with its links as the site needs them."""
    text = re.sub(r"\]\(docs/", "](", text).replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[([^]]+)\]\((CITATION\.cff|LICENSE)\)", r"`\1`", text)


def _probe(name: str) -> Probe:
    probe: Probe = plugins.pick("soluscope.probes", name)
    return probe


def _page(name: str) -> str:
    """Return a probe's page: its words, its quantities and its controls."""
    probe = _probe(name)
    lines = [f"# {probe.section} {_escaped(probe.name)}", "", f"*{_escaped(probe.question)}*", ""]
    lines += ["```console", f"soluscope probe STUDY probes=[{name}]", "```", ""]
    introduction = str(probe.docstring).split("\nQuestion:\n")[0].partition("\n")[2].strip()
    lines += [_escaped(introduction), "", "## Formula", ""]
    formula = re.search(r"^Formula:\n(.*?)^\w", str(probe.docstring), re.MULTILINE | re.DOTALL)
    lines += ["```text", textwrap.dedent(formula[1]).strip() if formula else "", "```", ""]
    lines += ["## Answers", "", f"By the number {_escaped(probe.tested)}:", ""]
    lines += [f"- {answer.label}: {_escaped(answer.text)}" for answer in probe.answers]
    lines.append("")
    for heading in ("reading", "pitfalls", "source"):
        lines += [f"## {heading.capitalize()}", "", _escaped(getattr(probe, heading)), ""]
    lines += ["## Quantities", "", "| quantity | unit | meaning |", "| --- | --- | --- |"]
    for quantity, spec in (probe.quantities | probe.estimates).items():
        lines.append(_row(quantity, spec.unit, spec.meaning))
    lines += [
        "",
        "## Controls",
        "",
        "| planted model | quantity | must be |",
        "| --- | --- | --- |",
    ]
    lines += [_row(f"`{gate.control}`", gate.quantity, _wanted(gate)) for gate in probe.gates]
    return "\n".join(lines) + "\n"


def _wanted(gate: Gate) -> str:
    """Return in words what a gate asks of the number."""
    if gate.within is not None:
        return f"within {gate.within:g} of {gate.around:g}"
    beyond = f"above {gate.above:g}" if gate.above is not None else f"below {gate.below:g}"
    return beyond + (f" and within 5% of {gate.truth:.4g}" if gate.truth is not None else "")


def _row(*cells: str) -> str:
    return "| " + " | ".join(_escaped(cell).replace("|", "\\|") for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Return text in which only backticks are Markdown."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_\[\]<>#~])", r"\\\1", part)
        for part in parts
    )
