"""A study for a paper: images, tables, the methods paragraph and its references, from made-up records."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from _records import gate, number
from conftest import ROOT
from test_report import BAD, CITED, KEYWORDS, PLACES, make_rows, rendered, spoiled, sweep, text

from soluscope import report, results
from soluscope.commands import _print_completion
from soluscope.commands import report as command
from soluscope.config import Config, TrainConfig
from soluscope.data.cache import SPLITS
from soluscope.errors import UserError
from soluscope.evaluation import provenance
from soluscope.report import (
    citations,
    findings,
    images,
    latex,
    names,
    paper,
    paragraph,
    tables,
)
from soluscope.results import (
    MARGIN,
    Comparison,
    GateResult,
    Measurement,
    OfRun,
    Provenance,
    Record,
    Setting,
    Term,
    Untrained,
    of_kind,
)
from soluscope.runs.weights import Facts, commit

SOURCE = Provenance(
    study="synthetic", source="stdlib", documents={"train": 7210, "select": 811, "report": 902},
    tokens={"train": 564215, "select": 152347, "report": 171236}, d_vocab=4096, n_copies=13,
    n_overlapping={"train": 29, "select": 3}, commits=("c0ffee0",),
    versions={"soluscope": "0.1.7", "torch": "2.13.5", "transformer-lens": "3.9.8", "numpy": "2.4.6"},
    training={"batch_size": 32, "beta1": 0.9, "beta2": 0.99, "clip": 1.5, "lr_rest": 0.003, "warmup_steps": 70,
              "schedule": "cosine", "final_lr_share": 0.15},
)  # fmt: skip
SHAPE = {
    "d_model": 64.0,
    "d_mlp": 256.0,
    "n_layers": 1.0,
    "n_heads": 4.0,
    "ctx": 128.0,
    "tokens": 1800000.0,
}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    """Return a study with sizes, rates set manually, twins before training, controls and a known source."""
    rows = [
        replace(row, values=SHAPE | {"lr": 0.0021}, rate="was set by hand")
        if isinstance(row, Setting)
        else row
        for row in make_rows(n_seeds=2)
        if not isinstance(row, Measurement)
        or row.stream not in ("prose", "code", "repeated", "random")
    ]
    twins = [
        Untrained(
            **{name: getattr(row, name) for name in (
                "study", "arm", "variant", "run", "seed", "probe", "quantity", "statistic", "stream", "positions",
                "group", "unit",
            )},
            value=0.25, difference=(row.value or 0.0) - 0.25, low=-0.5, high=0.5,
        )
        for row in of_kind(rows, Measurement)
        if row.probe == "engagement" and row.quantity == "r"
    ]  # fmt: skip
    # The probes' descriptions name the commit of this clone.
    return [replace(row, commit="abc1234") for row in [*rows, *twins, *CITED]] + [SOURCE]


@pytest.fixture(scope="module")
def tuned() -> list[Record]:
    """Return a study in which learning rates and constant gains were chosen."""
    arms: dict[str, float] = {}
    told: dict[str, dict[str, float | str]] = {}
    losses = {"solu": 3.1, "solu_gain": 3.06, "solu_frozen_ln": 3.05, "solu_ln": 3.02}
    for variant, loss in losses.items():
        for i, (rate, worse) in enumerate({0.0005: 0.03, 0.0011: 0.0, 0.0023: 0.02}.items()):
            arm = f"{variant}-r{i}"
            arms[arm] = loss + worse
            told[arm] = {"lr": rate, "family": variant}
    return sweep(arms, told)


def parsed(table: tables.Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


def built(records: list[Record]) -> dict[str, tables.Table]:
    return {table.name: table for table in tables.build(records, {})}


def said(records: list[Record]) -> str:
    """Return the methods paragraph without its citations."""
    return paragraph.plain(replace(each, keys=()) for each in paragraph.sentences(records))


# ---------------------------------------------------------------- the paragraph


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts inside a record, and its numbers in each form that a sentence uses."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from texts_in(key)
            yield from texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (f"{value:.3g}", f"{value:.0f}", str(value))
    elif value is not None:
        yield str(value)


NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:\.\d+)*"


@pytest.mark.parametrize("study", ["records", "tuned"])
def test_every_number_of_the_methods_paragraph_is_that_of_a_record(study, request):
    rows = request.getfixturevalue(study)
    arms = {each.arm for each in of_kind(rows, Setting)}
    runs = {each.run for each in rows if isinstance(each, OfRun)}
    probes = {each.probe for each in of_kind(rows, Measurement)} - {"loss", "training"}
    checked = {each.probe for each in of_kind(rows, GateResult)}
    allowed = {"95", str(MARGIN), *(str(len(each)) for each in (arms, runs, probes, checked))}
    compared = {each.arm for each in of_kind(findings.tuned(rows), Setting)}
    allowed |= {
        str(len(compared)),
        str(len([run for run in runs if run.rsplit("-s", 1)[0] in compared])),
    }
    for row in rows:
        for each in texts_in(asdict(row)):
            allowed |= {found.replace(",", "") for found in re.findall(r"\d[\d.,]*\d|\d", each)}
    found = re.findall(NUMBER, said(rows))
    assert len(found) > 8
    assert [each for each in found if each.replace(",", "").rstrip(".") not in allowed] == []


def test_the_paragraph_has_the_facts_of_the_records(records, tuned):
    made = said(records)
    for part in (
        "compares 6 configurations in 12 runs",
        "1 layer, d_model 64, 256 neurons in the MLP, 4 attention heads, and a context of 128 tokens",
        "trained on 1,800,000 tokens",
        "source stdlib: 7,210 documents (564,215 tokens) for training; 811 documents",
        "copies of another document: 13 documents",
        "29 from the train split, 3 from the select split",
        "The learning rate is 0.0021, which was set by hand",
        "trained at seeds 0, 1",
        "soluscope 0.1.7 (commit c0ffee0), PyTorch 2.13.5, TransformerLens 3.9.8",
        "measured with the code of commit abc1234",
    ):
        assert part in made
    rates = said(tuned)
    assert "0.0011 for solu-r1 (tried: 0.0005, 0.0011, 0.0023; inside the grid; 3 seeds)" in rates
    assert "learning rate is" not in rates


def test_a_fact_that_no_record_has_is_left_out(records):
    without = said([row for row in records if not isinstance(row, Provenance)])
    for part in ("source", "tokenizer", "duplicates", "copies", "PyTorch", "c0ffee0", "0.1.7"):
        assert part in said(records)
        assert part not in without
    bare = [replace(row, values={}) if isinstance(row, Setting) else row for row in records]
    assert not re.search(r"d_model|learning rate|trained on", said(bare))
    unnamed = [replace(row, commit="") for row in records]
    assert "code of commit" not in said(unnamed)
    assert paragraph.sentences([number("engagement", "r", 0.9)])
    assert "Holm" not in paragraph.plain(paragraph.sentences([number("engagement", "r", 0.9)]))
    assert paragraph.sentences([]) == []


def test_each_citation_has_an_entry_and_each_entry_balanced_braces(records):
    entries = paragraph.bibtex(records)
    keys = set(re.findall(r"^@\w+\{([^,]+),$", entries, re.MULTILINE))
    cited = re.findall(r"\\cite\{([^}]+)\}", paragraph.tex(paragraph.sentences(records)))
    assert {key for each in cited for key in each.split(",")} == keys
    assert {"soluscope", "elhage2022solu", "ba2016layernorm", "nanda2022transformerlens"} <= keys
    assert entries.count("{") == entries.count("}")
    assert "version 0.1.7; commit abc1234" in entries


def test_the_entry_of_soluscope_is_that_of_the_citation_file():
    known = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert known["title"] == citations.TITLE
    assert " and ".join(each["name"] for each in known["authors"]) == citations.AUTHORS
    (solu,) = known["references"]
    entry = citations.entries()["elhage2022solu"]
    assert f"title = {{{solu['title']}}}" in entry
    assert f"year = {{{solu['year']}}}" in entry
    assert citations.SHORT.keys() == {citations.OWN, *citations.entries()}


@pytest.mark.parametrize("hostile", ["a}{b", "x\\input{y}", "1 % 2"])
def test_a_version_that_bibtex_would_interpret_is_left_out(hostile):
    entry = citations.bibtex([], version=hostile, commits=[hostile])
    assert hostile not in entry
    assert entry.count("{") == entry.count("}")


def test_the_page_shows_the_paragraph_and_the_entries_of_the_files(records):
    body = text(rendered(records))
    shown = re.findall(r'<pre class="source">(.*?)</pre>', body, re.DOTALL)
    assert [each.replace("&#39;", "'") for each in shown] == [
        paragraph.plain(paragraph.sentences(names.named(records))),
        paragraph.bibtex(names.named(records)),
    ]


def test_the_paragraph_names_the_optimizers_settings_that_all_runs_share(records):
    said = paragraph.plain(paragraph.sentences(records))
    assert (
        "The optimizer is AdamW with beta1 0.9 and beta2 0.99 (Loshchilov and Hutter 2019). "
        in said
    )
    assert "A step has 32 rows. Gradients with a norm above 1.5 are scaled down to it." in said
    assert "Weight decay" not in said  # it differs between the runs, so it is not in the record
    assert (
        "Learning rates rise for 70 steps; after that the schedule is cosine. The last rate is 0.15"
        in said
    )
    constant = replace(
        SOURCE, training={"schedule": "constant", "warmup_steps": 7, "final_lr_share": 0.1}
    )
    said = paragraph.plain(
        paragraph.sentences([constant if row is SOURCE else row for row in records])
    )
    assert "the schedule is constant. " in said
    assert "The last rate" not in said


# ---------------------------------------------------------------- facts beside the results


FACTS = Facts(
    run="solu_ln-s0", arm="solu_ln", variant="solu_ln", study="synthetic", seed=0, d_model=8, n_heads=1, d_mlp=8,
    n_layers=1, ctx=8, d_vocab=512, hooked_act_fn="solu", ln_eps=1e-5, mid_norm=None, eps=None, gain=None, bos=0,
    eos=1, pad=2, tokenizer_hash="t0", lr=0.1, steps=1, tokens=60, precision="fp32", device="cpu", config="cafe",
    commit="c0ffee", versions={"torch": "2.0"}, role="per_token", twin="", chain=(),
)  # fmt: skip


def test_the_text_and_the_software_are_those_of_the_runs(tmp_path):
    counts = {"n_documents": 5, "n_tokens": 60, "n_bytes": 70}
    data = {
        "source": "stdlib", "tokenizer_hash": "t0", "d_vocab": 512,
        "splits": dict.fromkeys(SPLITS, counts), "dropped_duplicates": 1,
        "dropped_overlapping": {"train": 2, "select": 0},
    }  # fmt: skip
    study = tmp_path / "synthetic"
    study.mkdir()
    (study / "data.json").write_text(json.dumps(data))
    both = [Config(variant=name, train=TrainConfig(lr=0.1, batch_size=8, clip=clip)) for name, clip in
            (("solu", 2.0), ("solu_ln", 3.0))]  # fmt: skip
    two = [FACTS, replace(FACTS, versions={"torch": "2.1"})]
    (found,) = provenance.of_study(study, two, both)
    assert found.training == {
        "batch_size": 8, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.05, "lr_rest": 1e-3, "warmup_steps": 50,
        "schedule": "cosine", "final_lr_share": 0.1,
    }  # fmt: skip
    found = replace(found, training={})
    assert found == Provenance(
        study="synthetic", commit=commit(), source="stdlib", documents=dict.fromkeys(SPLITS, 5),
        tokens=dict.fromkeys(SPLITS, 60), d_vocab=512, n_copies=1,
        n_overlapping={"train": 2, "select": 0}, versions={"torch": "2.0, 2.1"}, commits=("c0ffee",),
        apart=("variant",), unclaimed=("train.clip",),
    )  # fmt: skip
    results.write(study / "results.jsonl", [found, number("engagement", "r", 0.9, config="cafe")])
    assert "PyTorch 2.0" in report.build(study).read_text()
    assert provenance.of_study(study, [replace(FACTS, tokenizer_hash="t1")]) == []
    (study / "data.json").write_text('{"source": 5}')
    assert provenance.of_study(study, [FACTS]) == []


# ---------------------------------------------------------------- tables


def test_the_csv_has_the_exact_numbers_of_the_losses(records):
    rows = [row for row in of_kind(records, Measurement) if row.probe == "loss"]
    head = "loss, nats / token [95%]"
    found = {
        (line["arm"], line["seed"]): tuple(
            float(line[f"{head}: {part}"]) for part in ("value", "low", "high")
        )
        for line in parsed(built(records)["losses"])
        if not line["seed"].startswith("mean")
    }
    assert found == {(row.arm, str(row.seed)): (row.value, row.low, row.high) for row in rows}
    means = [line for line in parsed(built(records)["losses"]) if line["seed"] == "mean of 2"]
    stored = [row for row in of_kind(records, Comparison) if row.term is Term.LOSS]
    assert {line["arm"]: float(line[f"{head}: value"]) for line in means} == {
        row.arm: row.value for row in stored
    }


def test_the_csv_has_the_exact_comparisons_with_both_intervals(records):
    lines = parsed(built(records)["comparisons"])
    stored = [
        row for row in of_kind(records, Comparison) if row.term in tables.TERMS and row.lr is None
    ]
    heads = {
        "seed": "estimate [95%, new seeds and documents]", "document": "[95%, these models, other documents]",
    }  # fmt: skip
    for cluster, head in heads.items():
        there = sorted(
            (row.arm, row.against, row.low) for row in stored
            if row.cluster == cluster and row.low is not None
        )  # fmt: skip
        here = sorted(
            (line["arm"], line["against"], float(line[f"{head}: low"]))
            for line in lines
            if line[f"{head}: low"]
        )
        assert here == there
    first = next(row for row in stored if row.cluster == "seed" and row.p is not None)
    wanted = {"arm": first.arm, "against": first.against, "term": first.term}
    (line,) = (each for each in lines if wanted.items() <= each.items())
    assert float(line["p"]) == first.p


def test_the_csv_has_each_number_before_and_after_training(records):
    lines = parsed(built(records)["probe-P1-engagement"])
    rows = [row for row in of_kind(records, Measurement) if row.probe == "engagement"]
    assert len(lines) == len(rows)
    key = ("quantity", "statistic", "positions", "arm", "seed")
    trained = {tuple(line[name] for name in key): line for line in lines}
    for row in rows:
        line = trained[tuple(str(getattr(row, name)) for name in key)]
        assert float(line[f"{tables.TRAINED[0]}: value"]) == row.value
        if row.quantity == "r":
            assert float(line["untrained"]) == 0.25
            assert float(line[f"{tables.TRAINED[2]}: value"]) == (row.value or 0.0) - 0.25
        else:
            assert line["untrained"] == ""


def test_the_csv_has_the_settings_the_tried_rates_and_the_controls(records, tuned):
    settings = parsed(built(records)["settings"])
    assert {float(line["d_mlp"]) for line in settings} == {256}
    assert {line["learning rate"] for line in settings} == {"was set by hand"}
    tried = parsed(built(tuned)["tuning"])
    assert sorted({float(line["tried"]) for line in tried}) == [0.0005, 0.0011, 0.0023]
    assert {line["arm"] for line in tried if line["choice"] == "chosen"} == {
        "solu-r1", "solu_gain-r1", "solu_frozen_ln-r1", "solu_ln-r1",
    }  # fmt: skip
    failed = gate("engagement", "uniform", "within 0.1 of 0", passed=False)
    controls = parsed(built([*records, failed])["controls"])
    assert {(line["control"], line["outcome"]) for line in controls} >= {
        ("pinned", "pass"),
        ("uniform", "FAIL"),
    }
    assert "controls failed" in built([*records, failed])["probe-P1-engagement"].tex()


def test_numbers_in_latex_have_the_form_of_the_report(records):
    row = next(
        row
        for row in of_kind(records, Comparison)
        if row.term is Term.DIFFERENCE and (row.low or 0) < 0
    )
    assert row.value is not None
    assert row.low is not None
    assert row.high is not None
    shown = f"{row.value:.4f} {{[}}{row.low:.4f}, {row.high:.4f}{{]}}".replace("-", "$-$")
    made = built(records)["comparisons"].tex()
    assert shown in made
    assert made.count(r"\toprule") == made.count(r"\midrule") == made.count(r"\bottomrule") == 1


def cells(made: str) -> list[list[str]]:
    """Return the cells of the lines of a LaTeX table, without escapes."""
    body = made.split(r"\midrule")[1].split(r"\bottomrule")[0].replace("\\endhead\n", "")
    return [
        [plain(cell) for cell in re.split(r"(?<!\\)&", line)]
        for line in body.strip().removesuffix(r"\\").split("\\\\\n")
    ]


def plain(escaped: str) -> str:
    """Return the text that LaTeX prints for escaped text."""
    back = {escape: character for character, escape in latex.SPECIAL.items()}
    pattern = "|".join(map(re.escape, sorted(back, key=len, reverse=True)))
    result = re.sub(
        pattern, lambda match: back[match[0]], escaped.replace("$-$", "-").replace("-{}", "-")
    )
    return result.strip()


HOSTILE = '\\input{/etc/passwd}%_$x$&#~^<b>|"[*] --- \u202e\x1b[31m'


@pytest.mark.parametrize("bad", ["solu_gain-gain_8", HOSTILE, "{", "}", "\\", "a%b", "[1] * -- x"])
def test_latex_prints_any_name_as_it_is_and_runs_none_of_it(bad):
    line = latex.escape(bad)
    assert plain(line) == " ".join(
        bad.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b").split()
    )
    without = line
    for escape in latex.SPECIAL.values():
        without = without.replace(escape, "")
    assert not set(without.replace("-{}", "")) & set('\\{}$&#_%~^<>|"')
    made = latex.table("t", bad, [bad], [[bad], [bad]], [False])
    assert cells(made) == [[plain(line)]] * 2
    assert not re.search(r"\\input|\\\\\s*[\[*]", made)


@pytest.mark.parametrize("kept", [KEYWORDS, KEYWORDS | PLACES])
def test_files_of_a_hostile_study_escape_its_names(records, tuned, kept, tmp_path, monkeypatch):
    monkeypatch.setattr("test_report.BAD", BAD + HOSTILE)
    rows = [spoiled(row, kept) for row in [*records[:: 1 + len(records) // 800], *tuned, SOURCE]]
    paper.write(rows, None, tmp_path / "t")
    for path in (tmp_path / "t").iterdir():
        assert re.fullmatch(r"[\w.-]{1,90}", path.name)
        content = path.read_text(encoding="utf8")
        assert not {"\x1b", "\u202e"} & set(content)
        if path.suffix in (".tex", ".bib"):
            assert "\\input" not in content
            assert not re.search(r"(?<!\\)\{/etc", content)
            assert content.replace("\\{", "").replace("\\}", "").count("{") == content.replace(
                "\\{", ""
            ).replace("\\}", "").count("}")


@pytest.mark.parametrize("start", ["=1+1", "@x", "+a", "-a"])
def test_a_spreadsheet_runs_no_name(start):
    table = tables.Table("t", "t", ("arm",), frozenset(), [[start], ["-0.5 [-1, 0]"]])
    assert [line["arm"] for line in parsed(table)] == [f"'{start}", "-0.5 [-1, 0]"]


def test_names_of_files_are_different_on_every_system():
    taken: list[str] = []
    for words in ("probe a/b", "probe A b", "../..", "", "x" * 200, "x" * 300):
        taken.append(names.file_name(words, taken))
    assert len({each.lower() for each in taken}) == len(taken)
    assert taken[:4] == ["probe-a-b", "probe-A-b-2", "unnamed", "unnamed-2"]


# ---------------------------------------------------------------- folders


@pytest.fixture
def study(tmp_path: Path, records: list[Record]) -> Path:
    folder = tmp_path / "study"
    few = [row for row in records if not isinstance(row, Measurement) or row.arm == "solu_ln"]
    results.write(folder / "results.jsonl", few)
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the browser by one that writes each image's name."""

    def write(folder: Path, chosen: list[images.Image]) -> None:
        for image in chosen:
            (folder / f"{image.name}.svg").write_text(image.plot.caption)

    monkeypatch.setattr(images, "check", lambda: None)
    monkeypatch.setattr(images, "write", write)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_command_writes_figures_and_tables_by_flags_or_by_settings(study, undrawn, capsys):
    by_flags, by_settings = study.parent / "flags", study.parent / "settings"
    command.run([str(study), "--figures", str(by_flags / "f"), "--tables", str(by_flags / "t")])
    command.run([str(study), f"figures={by_settings / 'f'}", f"tables={by_settings / 't'}"])
    for each in ("f", "t"):
        assert listing(by_flags / each) == listing(by_settings / each)
    assert {"answer-Loss-minus-the-loss-of-solu.svg", "Paired-differences.svg"} <= set(
        listing(by_flags / "f")
    )
    assert {"losses.csv", "losses.tex", "methods.tex", "references.bib"} <= set(
        listing(by_flags / "t")
    )
    assert f"figures: {by_flags / 'f'}" in capsys.readouterr().out
    assert (study / "report.html").is_file()


def test_help_and_completion_have_the_flags_and_the_settings(capsys):
    shown = command.build_parser().format_help()
    assert all(
        word in shown for word in ("--figures DIR", "--tables DIR", "\n  figures ", "\n  tables ")
    )
    _print_completion(["bash"])
    assert "--figures" in capsys.readouterr().out


def test_main_figures_are_those_of_the_comparison_and_one_of_each_probe(records, tuned):
    found = [image.name for image in images.choose(records, {})]
    assert found == [
        "answer-Loss-minus-the-loss-of-solu", "Phi_dyn-and-its-terms", "Paired-differences",
        "probe-P1-LayerNorm-engagement", "probe-P2-Gain-variation-along-a-prompt", "probe-P4-Scale-freeze",
    ]  # fmt: skip
    swept = [image.name for image in images.choose(tuned, {})]
    assert "Tuning-Loss-against-the-learning-rate" in swept
    failed = gate("scale_freeze", "pinned", "within 1 of 0", passed=False)
    marked = images.choose([*records, failed], {})
    assert "probe-P4-Scale-freeze-control-failed" in [image.name for image in marked]
    assert "do not cite its numbers" in images.captions(marked)
    assert "Thick bar: 95% interval" in images.captions(marked)


@pytest.mark.parametrize("full", ["figures", "tables"])
def test_a_folder_with_content_is_refused_and_an_empty_one_is_filled(
    study, undrawn, full, tmp_path
):
    folders = {"figures": tmp_path / "f", "tables": tmp_path / "t"}
    for folder in folders.values():
        folder.mkdir()
    (folders[full] / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists already: name a new folder"):
        report.publish(study, **folders)
    assert listing(study) == ["results.jsonl"]
    assert sorted(len(listing(folder)) for folder in folders.values()) == [0, 1]
    (folders[full] / "mine").unlink()
    report.publish(study, **folders)
    assert all(len(listing(folder)) > 4 for folder in folders.values())


@pytest.mark.parametrize("tables", ["f", "f/tables", "."])
def test_folders_that_overlap_are_refused(study, undrawn, tmp_path, tables):
    inner = tmp_path / "new"
    with pytest.raises(UserError, match="overlap: name two separate folders"):
        report.publish(study, figures=inner / "f", tables=inner / tables)
    assert not inner.exists()


def test_nothing_is_left_of_figures_that_the_browser_does_not_draw(
    study, undrawn, tmp_path, monkeypatch
):
    def fail(folder: Path, chosen: list[images.Image]) -> None:
        (folder / f"{chosen[0].name}.svg").write_text("half")
        raise UserError("the browser has not drawn the figures")

    monkeypatch.setattr(images, "write", fail)
    with pytest.raises(UserError, match="has not drawn"):
        report.publish(study, figures=tmp_path / "f", tables=tmp_path / "t")
    assert listing(tmp_path) == ["study"]
    assert listing(study) == ["results.jsonl"]


def test_without_kaleido_or_a_browser_one_line_says_what_is_needed_and_nothing_is_written(
    study, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(
        UserError, match=r"^figures= needs kaleido: pip install 'soluscope\[figures\]'$"
    ):
        report.publish(study, figures=tmp_path / "f", tables=tmp_path / "t")
    for found in (None, "/no/such/browser"):
        fake = ModuleType("choreographer.browsers.chromium")
        fake.Chromium = type(
            "Chromium", (), {"find_browser": staticmethod(lambda found=found, **_: found)}
        )
        monkeypatch.setitem(sys.modules, "kaleido", ModuleType("kaleido"))
        for name in ("choreographer", "choreographer.browsers"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "choreographer.browsers.chromium", fake)
        with pytest.raises(
            UserError, match=r"^figures= needs Chrome or Chromium, and .*BROWSER_PATH"
        ) as caught:
            report.publish(study, figures=tmp_path / "f", tables=tmp_path / "t")
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == ["study"]
    assert listing(study) == ["results.jsonl"]


def browser_lacks() -> str:
    """Return what is missing to draw figures here; empty if nothing is."""
    try:
        images.check()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.skipif(bool(browser_lacks()), reason=browser_lacks() or "a browser is here")
def test_the_browser_draws_each_figure_as_svg_and_png(records, tmp_path):
    bad = "<b>bold</b> & <script>alert(1)</script>"
    rows = [replace(row, arm=bad) if row.arm == "solu_ln" else row for row in records]
    (first, *_) = images.choose(rows, {})
    images.write(tmp_path, [first])
    assert listing(tmp_path) == [f"{first.name}.png", f"{first.name}.svg", "captions.md"]
    content = (tmp_path / f"{first.name}.svg").read_text(encoding="utf8")
    drawn = xml.etree.ElementTree.fromstring(content)
    assert drawn.attrib["width"] == str(first.width)
    assert not [each for each in drawn.iter() if each.tag.endswith("script")]
    shown = "".join(drawn.itertext())
    assert "nats / token" in shown
    assert "<script>alert(1)</script>" in shown.replace("\u00a0", " ")
    png = (tmp_path / f"{first.name}.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(png[16:20]) == images.SCALE * first.width
