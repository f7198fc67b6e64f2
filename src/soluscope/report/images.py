"""The page's main figures as SVG and PNG, drawn by a browser on this machine without the network."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from soluscope.errors import UserError
from soluscope.files import reason, write_text
from soluscope.report import answer, figures, sections
from soluscope.report.blocks import Paragraph, Plot, Section
from soluscope.report.findings import at_best_rate, tuned
from soluscope.report.names import file_name
from soluscope.results import Record
from soluscope.terminal import shown

WHOLE = ("answer", "terms", "differences", "tuning", "dose", "gain", "entropy", "width", "size")
"""Sections of which every figure in view is drawn. Of a probe, only the headline figure is."""
SCALE = 3
"""Pixels of the PNG per pixel of the SVG: some 300 per inch at the width of a column."""
ONE_PANEL = 400
"""Width of a figure of one panel in pixels. At the width of a column, its smallest text then has about 6 points."""
ROOM = 130
"""Pixels for the labels beside panels."""
CAPTIONS = "captions.md"


@dataclass(frozen=True)
class Image:
    """A figure of the page and its files' name without the ending."""

    name: str
    plot: Plot
    lead: str = ""
    """Text of the section that explains its figures."""

    @property
    def width(self) -> int:
        """Return the width in pixels: narrow enough that text stays legible at the width of a column."""
        return max(ONE_PANEL, figures.min_width(self.plot.figure))


def choose(records: list[Record], identifiers: Mapping[str, str]) -> list[Image]:
    """Return the figure of the first screen, those of the comparison, and the headline figure of each probe.

    Args:
        records: the study's records.
        identifiers: the identifiers of the arms, by their names in the records.
    """
    look = figures.styles(at_best_rate(records))
    first = Section("answer", "answer", answer.blocks(records, tuned(records), look))
    result: list[Image] = []
    for section in (first, *sections.build(records, identifiers)):
        is_probe = section.tab == "probes"
        for plot in _in_view(section):
            words = f"probe {section.heading}" if is_probe else f"{section.heading} {plot.caption}"
            name = file_name(words, {image.name for image in result})
            result.append(Image(name, plot, "" if section is first else _lead(section, is_probe)))
    return result


def _in_view(section: Section) -> Iterator[Plot]:
    plots = [block for block in section.blocks if isinstance(block, Plot)]
    if section.name in WHOLE:
        yield from plots
    elif section.tab == "probes":
        yield from plots[:1]


def _lead(section: Section, is_probe: bool) -> str:
    """Return the paragraph that explains a section's figures; of a probe, its question and failed controls."""
    found = [block for block in section.blocks if isinstance(block, Paragraph)]
    if is_probe:
        warned = [each.text for each in found if each.style == "warn"]
        return " ".join([*(each.lead for each in found[:1]), *warned])
    return next((each.text for each in found if not each.style), "")


def check() -> None:
    """Refuse to draw without kaleido or without a browser.

    Raises:
        UserError: naming the missing one, and the command or the variable that supplies it.
    """
    try:
        import kaleido  # noqa: F401
    except ImportError as error:
        raise UserError("figures= needs kaleido: pip install 'soluscope[figures]'") from error
    from choreographer.browsers.chromium import Chromium

    found = Chromium.find_browser(skip_local=False)
    if found is None or not Path(found).is_file():
        where = f"none at BROWSER_PATH={found}" if found else "there is none"
        raise UserError(
            f"figures= needs Chrome or Chromium, and {where}: install one, or set BROWSER_PATH to its path"
        )


def write(folder: Path, images: Sequence[Image]) -> None:
    """Draw each image as SVG and PNG into the folder, and write their captions.

    Raises:
        UserError: if the browser does not draw an image.
    """
    import kaleido

    drawn = [
        {
            "fig": image.plot.figure,
            "path": str(folder / f"{image.name}.{ending}"),
            "opts": {
                "format": ending, "width": image.width, "height": image.plot.figure.layout.height,
                "scale": scale,
            },
        }
        for image in images
        for ending, scale in (("svg", 1), ("png", SCALE))
    ]  # fmt: skip
    try:
        # MathJax would be fetched over the network.
        kaleido.write_fig_from_object_sync(drawn, cancel_on_error=True, kopts={"mathjax": False})
    except Exception as error:  # the browser's own errors have no common class
        raise UserError(
            f"the browser has not drawn the figures ({reason(error)}): try again, or set BROWSER_PATH to another "
            "browser"
        ) from error
    write_text(folder / CAPTIONS, captions(images))


def captions(images: Sequence[Image]) -> str:
    """Return the captions as Markdown: for each file the heading of its figure, and the page's words about it."""
    parts = []
    for image in images:
        texts = (image.plot.caption, image.plot.remark.strip(), image.lead)
        parts.append(
            "\n\n".join([f"## {image.name}", *(_markdown(text) for text in texts if text)])
        )
    return "\n\n".join([*parts, ""])


def _markdown(text: str) -> str:
    """Return text on one line, with escapes for the characters that Markdown interprets."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&!$])", r"\\\1", shown(" ".join(text.split())))
