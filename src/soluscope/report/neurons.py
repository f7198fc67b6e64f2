"""The Neurons tab: a link to the neurons' pages, and the neurons that are most readable or most changed."""

from __future__ import annotations

from soluscope.report.blocks import Block, Fold, Link, Paragraph, Table
from soluscope.report.findings import settings
from soluscope.results import NeuronFound, Record, of_kind

PAGES = "neurons/index.html"
NONE = "This study has no pages about its neurons yet. To make them: 'soluscope neurons DIR'."
HEADS = ("neuron", "rule before the norm", "F1 before", "F1 after", "drop", "example")
EXPLAINED = (
    "A neuron's best rule, and its place in a list, are found on one half of the documents. The numbers and the "
    "example, the token in guillemets at which the neuron is most active after the norm, are of the other half. F1 "
    "compares the tokens with the rule and the tokens at which the neuron is active. Drop is the share of active "
    "tokens that fit the rule, before minus after the norm: the signature of section 6.4 of the SoLU paper."
)


def blocks(records: list[Record]) -> list[Block]:
    """Return the tab's content: for each arm's first run with stored neurons, its two lists."""
    found = of_kind(records, NeuronFound)
    if not found:
        return [Paragraph(NONE, style="soft")] if settings(records) else []
    first: dict[str, str] = {}
    for each in found:
        first.setdefault(each.arm, each.run)
    content: list[Block] = [Link("Pages of all neurons", PAGES), Paragraph(EXPLAINED, style="soft")]
    for arm, run in first.items():
        of_run = [each for each in found if each.run == run]
        tables: list[Block] = []
        for name in dict.fromkeys(each.quantity for each in of_run):
            lines = [_line(each) for each in of_run if each.quantity == name]
            tables += [Paragraph("", lead=f"The {name}"), Table(HEADS, lines, styles=STYLES)]
        content.append(Fold(f"{arm} ({run})", tables))
    return content


STYLES = ("", "text", "", "", "", "text")
"""Style of each column: the texts wrap."""


def _line(each: NeuronFound) -> list[str]:
    numbers = [
        "" if value is None else f"{value:.2f}" for value in (each.f1_mid, each.f1_post, each.drop)
    ]
    example = f"{each.before}\u00ab{each.text}\u00bb{each.after}"
    return [str(each.neuron), each.rule, *numbers, example]
