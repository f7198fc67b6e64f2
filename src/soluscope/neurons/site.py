"""A study's neurons as a static site: runs/STUDY/neurons/index.html and data files that it loads when needed.

The site opens from disk and from any web server, and asks for nothing else. A page opened from disk may not read
files, but may load scripts. So each data file is a script of one call, which hands over a compressed text; the page
unpacks it as data. All text from data is inserted as text nodes.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, PrefixLoader

from soluscope.errors import UserError
from soluscope.files import check_folder, check_links, remove_folder, replacing_folder, write_text
from soluscope.neurons import stored
from soluscope.neurons.schema import BINS_BELOW, FOLDER, N_RANGES, SIDES, STAGES, TOP, Stage
from soluscope.neurons.stored import Neurons
from soluscope.report.templates import environment, hashes

PAGE = "index.html"
DATA = "data"
"""Folder of the data files, beside the page."""
N_WORDS = 12
"""Number of a neuron's most frequent peak tokens that the search finds, for each stage."""
DIGITS = 4
"""Significant digits of the site's numbers."""
GROUP = 16
"""Number of neurons in a data file."""
LISTED = (
    "kurtosis_mid", "kurtosis_post", "share_mid", "share_post", "effect", "D",
)  # fmt: skip
"""Columns of the statistics that the list shows."""
HELP = (
    "Each line is a neuron of the last MLP. Its activation is shown at three stages: before the nonlinearity "
    "(pre), after it (mid, before the norm) and after the mid norm (post). Ten ranges of equal width cover "
    "the activations of a neuron, from a typical token (the median; range 1 also holds everything below) to "
    "the maximum.",
    "A rule says that the neuron is active, above some range, exactly where the rule holds. Rule and range "
    "are chosen on one half of the documents, and precision, recall and F1 are measured on the other. Drop: "
    "the share of active tokens that fit the rule, before minus after the norm. A high drop is the signature "
    "of section 6.4 of the SoLU paper (Elhage et al. 2022).",
    "Effect: change of a token's loss in nats when the neuron is set to 0 after the norm, exact in the last "
    "layer. D: the effect minus the same effect in the model with one gain for all tokens. Orange tokens have "
    "positive activations, blue tokens negative ones; the outlined token is the example.",
    "Keys: j and k go to the next and the previous neuron, / to the search, s to the next stage, Esc leaves a "
    "field. The address of the page is a link to the neuron. Beside: the neuron of the same rank in another "
    "model.",
)
"""Paragraphs that explain the page."""


def build(study_dir: Path) -> Path:
    """Write the site of all stored neurons of a study, and return its page.

    Raises:
        UserError: if no neurons are stored, the runs have different tokens, or the files cannot be written.
    """
    found = parts(study_dir)
    place = study_dir / FOLDER
    check_folder(place)
    if place.exists():
        check_links(place, study_dir)
    try:
        with replacing_folder(place) as beside:
            write_data(beside, found)
            write_text(beside / PAGE, page(study_dir.name, found, report=report_of(study_dir)))
            remove_folder(place)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}; free disk space") from error
    return place / PAGE


def parts(study_dir: Path) -> list[Neurons]:
    """Return all stored neurons of a study, in the order of the site's models.

    Raises:
        UserError: if no neurons are stored, or the runs have different tokens.
    """
    found = [
        stored.read(path, part)
        for path in sorted(study_dir.iterdir())
        if (path / "model.json").is_file()
        for part in stored.parts_of(path)
    ]
    if not found:
        raise UserError(
            f"no neurons are stored in {study_dir}: see 'soluscope neurons {study_dir}'"
        )
    for neurons in found:
        if neurons.vocabulary != found[0].vocabulary:
            raise UserError(
                f"{neurons.folder} and {found[0].folder} have different tokens: delete one of the two"
            )
    return found


def report_of(study_dir: Path) -> str:
    """Return the address of a study's report, seen from the page; empty if there is none."""
    return "../report.html" if (study_dir / "report.html").is_file() else ""


def page(study: str, found: list[Neurons], *, report: str = "", editor: str = "") -> str:
    """Return the site's page.

    Args:
        study: name of the study.
        found: the stored neurons that the data files describe, in the same order.
        report: address of the study's report; empty for no link.
        editor: address at which a server shows a neuron on any text; empty without a server.
    """
    manifest = {
        "runs": [
            {"key": key(number), "label": label(each), "hasNorm": each.about.has_mid_norm,
             "madeWith": each.about.made_with}
            for number, each in enumerate(found)
        ],
        "group": GROUP, "below": BINS_BELOW,
    }  # fmt: skip
    script, style = _script_and_style()
    rendered: str = _environment().get_template("neurons/neurons.html.j2").render(
        study=study, manifest=_packed(manifest), help=HELP, hashes=hashes, report=report, editor=editor,
        script=script, style=style,
    )  # fmt: skip
    return rendered


def key(number: int) -> str:
    """Return the name by which addresses and data files call a model."""
    return f"m{number}"


def label(neurons: Neurons) -> str:
    """Return the name of a model on the site."""
    about = neurons.about
    return about.run if about.part == "trained" else f"{about.run}, untrained"


def policy() -> str:
    """Return the content security policy under which a server may send the page."""
    script, style = map(hashes, _script_and_style())
    return (
        f"default-src 'none'; script-src 'self' {script}; style-src {style}; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


def _script_and_style() -> tuple[str, str]:
    template = _environment().get_template
    style = template("report/style.css").render() + template("neurons/neurons.css").render()
    return template("neurons/neurons.js").render(), style


def write_data(folder: Path, found: list[Neurons]) -> None:
    """Write the data files into the folder of the page."""
    data = folder / DATA
    data.mkdir()
    _data(data, "vocabulary", found[0].vocabulary)
    for number, neurons in enumerate(found):
        name = key(number)
        _data(data, name, _listed(neurons))
        _data(data, f"{name}-documents", neurons.documents)
        for group, details in enumerate(_details(neurons)):
            _data(data, f"{name}-{group}", details)


def _listed(neurons: Neurons) -> dict[str, list[Any]]:
    """Return the columns of the list, for display, order and search."""
    table = neurons.statistics
    columns: dict[str, list[Any]] = {"neuron": table["neuron"].tolist()}
    columns |= {name: _numbers(table[name]) for name in LISTED}
    by_side = {side: of_side.set_index("neuron") for side, of_side in neurons.rules.groupby("side")}
    for side in SIDES:
        columns[f"rule_{side}"] = by_side[side]["rule"].tolist()
        columns[f"f1_{side}"] = _numbers(by_side[side][f"f1_{side}"])
    columns["drop"] = _numbers(by_side[SIDES[0]]["drop"])
    words = _frequent(neurons)
    columns["words"] = [
        " ".join([*(columns[f"rule_{side}"][neuron] for side in SIDES), *words.get(neuron, ())])
        for neuron in columns["neuron"]
    ]
    return columns


def _frequent(neurons: Neurons) -> dict[int, list[str]]:
    """Return the tokens at the peaks of each neuron's top examples, the most frequent first."""
    found: dict[int, list[str]] = {}
    for table in neurons.groups():
        top = table[table["range"] == TOP]
        rows = zip(top["neuron"].tolist(), top["tokens"], top["peak"], strict=True)
        for neuron, of_neuron in groupby(rows, itemgetter(0)):
            counted = Counter(int(tokens[peak]) for _, tokens, peak in of_neuron)
            most = counted.most_common(len(STAGES) * N_WORDS)
            found[neuron] = [neurons.vocabulary[token] for token, _ in most]
    return found


def _details(neurons: Neurons) -> Iterator[list[dict[str, Any]]]:
    """Yield the cards' content in groups of neurons."""
    statistics = neurons.statistics.to_dict("records")
    rules = {(row["neuron"], row["side"]): row for row in neurons.rules.to_dict("records")}
    logits: dict[int, dict[str, list[Any]]] = {row["neuron"]: {} for row in statistics}
    for row in neurons.logits.to_dict("records"):
        pair = [row["token"], _number(row["logit"])]
        logits[row["neuron"]].setdefault(row["side"], []).append(pair)
    waiting: list[dict[str, Any]] = []
    for table in neurons.groups():
        for neuron, rows in groupby(table.to_dict("records"), itemgetter("neuron")):
            of_side = {side: rules[neuron, side] for side in SIDES}
            waiting.append(_detail(statistics[neuron], of_side, logits[neuron], list(rows)))
            if len(waiting) == GROUP:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


def _detail(
    statistics: dict[Any, Any],
    rules: dict[Stage, dict[Any, Any]],
    logits: dict[str, list[Any]],
    examples: list[dict[Any, Any]],
) -> dict[str, Any]:
    names = [f"{name}_{side}" for name in ("f1", "precision", "recall") for side in SIDES]
    own = [f"{name}_{side}" for name in ("k_eff", "engagement") for side in SIDES]
    scale = {
        stage: max(float(np.abs(row[stage]).max()) for row in examples) or 1.0 for stage in STAGES
    }
    return {
        "rules": {
            side: {"rule": of_side["rule"]}
            | {name: _number(of_side[name]) for name in names}
            | {f"consistent_{at}": _numbers(of_side[f"consistent_{at}"]) for at in SIDES}
            for side, of_side in rules.items()
        },
        **{name: _number(statistics[name]) for name in ("gamma", *own)},
        "histogram": {side: statistics[f"histogram_{side}"].tolist() for side in SIDES},
        "byRange": _by_range(examples),
        "scale": scale,
        "logits": logits,
        "examples": [_example(row, scale) for row in examples],
    }


def _by_range(examples: list[dict[Any, Any]]) -> dict[str, list[float | None]]:
    """Return the mean effect and D of the examples in each range after the norm."""
    after = [row for row in examples if row["stage"] == SIDES[1]]
    found: dict[str, list[float | None]] = {}
    for name in ("effect", "D"):
        values = [
            [row[name] for row in after if row["range"] == number and math.isfinite(row[name])]
            for number in range(N_RANGES)
        ]
        found[name] = [_number(sum(each) / len(each)) if each else None for each in values]
    return found


def _example(row: dict[Any, Any], scale: dict[Any, float]) -> dict[str, Any]:
    values = row[row["stage"]]
    codes = np.round(127 * values / scale[row["stage"]]).astype(int)
    return {
        "stage": row["stage"], "range": row["range"], "document": row["document"], "peak": row["peak"],
        "tokens": row["tokens"].tolist(), "codes": codes.tolist(),
        "value": _number(values[row["peak"]]), **{name: _number(row[name]) for name in ("effect", "D", "k_eff")},
    }  # fmt: skip


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: Any) -> float | None:
    """Return a number with `DIGITS` significant digits; JSON has no nan, so that becomes None."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def _data(folder: Path, name: str, content: Any) -> None:
    write_text(folder / f"{name}.js", f'soluscopeNeurons("{name}", "{_packed(content)}");\n')


def _packed(content: Any) -> str:
    """Return a JSON value compressed, in letters that neither HTML nor a script interprets."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


@cache
def _environment() -> Environment:
    """Return the templates of the site and of the report, whose style sheet the site shares."""
    packages = {"neurons": "soluscope.neurons", "report": "soluscope.report"}
    return environment(
        PrefixLoader({name: PackageLoader(package) for name, package in packages.items()})
    )
