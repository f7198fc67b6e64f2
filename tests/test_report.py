"""The page and its sentences, from made-up records; no model is involved."""

from __future__ import annotations

import base64
import hashlib
import html as markup
import io
import json
import re
from dataclasses import fields, is_dataclass, replace
from enum import StrEnum
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from _page import as_shown, figures_in, packed_in
from _records import LN, RUN, gate, number, passed, token_values
from _records import words as words_of
from conftest import run_python
from markupsafe import escape
from plotly.offline import get_plotlyjs_version
from rich.console import Console
from test_compare import LARGE, LINEAGES, OPTIMA, SIX, compare, make_losses, tuned

from soluscope import plugins, report, results
from soluscope.comparison.compare import Lineage
from soluscope.comparison.stats import Interval, equivalence
from soluscope.errors import UserError
from soluscope.report import (
    answer,
    evidence,
    figures,
    findings,
    meaning,
    names,
    packing,
    page,
    tokens,
    words,
)
from soluscope.report.blocks import Table
from soluscope.report.packing import unpacked
from soluscope.results import (
    HELD_OUT,
    OUTPUT_SIZE,
    SCALED_SIZE,
    ChoicePoint,
    Comparison,
    FalsePositives,
    Figure,
    Grid,
    LeftOut,
    Measurement,
    NoChoice,
    Record,
    Setting,
    Term,
    TokenValue,
    Untrained,
    Verdict,
    of_kind,
)

LEVELS = {"r": 0.9, "gain": 300.0, "kappa": 42.0, "max_p": 0.05, "log_z": 6.0, "k_eff": 120.0}
POSITIONS = ("all", "BOS", "not BOS", "1", "2-15", ">=16")


def make_rows(
    arms: dict[str, float] = SIX,
    n_seeds: int = 2,
    seed_noise: float = 0.004,
    r: float = 0.9,
    freeze: float = 0.0001,
    worse: dict[str, float] | None = None,
) -> list[Record]:
    """Return all records of a study of these arms, with the given r and the given cost of a freeze."""
    losses = make_losses(arms, n_seeds, seed_noise=seed_noise, document_noise=0.002, worse=worse)
    rows = compare("synthetic", losses, "abc1234")
    rows += map(words_of, ("engagement", "gain_variation", "scale_freeze"))
    random = np.random.default_rng(1)
    for (run, arm, seed), table in losses[losses.split == "report"].groupby(["run", "arm", "seed"]):
        base = Measurement(
            study="synthetic", probe="", quantity="", value=None, unit="", run=run, arm=arm,
            variant=arm.split("-")[0], seed=int(seed), commit="abc1234", config=f"hash of {arm}",
            n=4000, n_clusters=40, cluster="document",
        )  # fmt: skip

        def measured(
            value: float, half: float, base: Measurement = base, **more: object
        ) -> Measurement:
            if more["probe"] != "loss":
                value += 0.3 * half * random.normal()
            return replace(base, **more, value=value, low=value - half, high=value + half)

        n_tokens = int(table.n_tokens.sum())
        loss = float(table.loss_sum.sum() / n_tokens)
        rows.append(
            measured(loss, 0.05, probe="loss", quantity="loss", unit="nats / token", n=n_tokens)
        )
        rows += [
            replace(
                base, probe="training", quantity="loss", value=loss + 4e5 / n_seen, unit="nats / token",
                stream="train", positions="all", x=float(n_seen), n=0, n_clusters=0, cluster="",
            )
            for n_seen in np.geomspace(1e5, 5e6, 25)
        ]  # fmt: skip
        normed = "ln" in arm
        level = LEVELS | {"r": r if normed else 0.0, "gain": 300.0 if normed else 1.0}
        for stream in ("natural", "prose", "code", "repeated", "random"):
            for name, quantity in words_of("engagement").quantities.items():
                for positions in POSITIONS:
                    shift = 0.4 if positions == "BOS" else 1.0
                    rows += [
                        measured(
                            level.get(name, 0.1) * shift, 0.02 * level.get(name, 0.1),
                            probe="engagement", quantity=name, unit=quantity.unit,
                            statistic=statistic, stream=stream, positions=positions,
                        )
                        for statistic in quantity.statistics
                    ]  # fmt: skip
        for stream in ("prefixes", "repeated", "random"):
            for name, quantity in words_of("gain_variation").quantities.items():
                for n in (1, 2, 4, 8, 16, 32, 64, 127):
                    diluted = level["gain"] * (1 - 0.6 / n if "with BOS" in name else 1)
                    rows.append(
                        measured(
                            diluted, 0.02 * level["gain"], probe="gain_variation", quantity=name,
                            unit=quantity.unit, stream=stream, x=float(n),
                        )
                    )  # fmt: skip
        if normed:
            rows += [
                measured(
                    freeze, 0.0002, probe="scale_freeze", quantity=name, unit=quantity.unit,
                    stream="natural", group=group,
                )
                for name, quantity in words_of("scale_freeze").quantities.items()
                for group in ("", "gain Q1", "gain Q2", "gain Q3", "gain Q4")
            ]  # fmt: skip
    return rows


CITED = passed("engagement", "scale_freeze")
"""Gates of the probes that the headline cites beside the comparisons."""


def page_of(records: list[Record], tmp_path: Path) -> str:
    """Return the page of a study whose results.jsonl holds these records."""
    results.write(tmp_path / "results.jsonl", records)
    return report.build(tmp_path).read_text(encoding="utf8")


def rendered(records: list[Record]) -> str:
    """Return the page without the library that draws its figures, which would be most of the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "library", str)
        return page.render(records)


def section(records: list[Record], probe: str) -> str:
    """Return a probe's section of the page, without its figures' data; add the probe's words to the records."""
    shown = text(rendered([words_of(probe), *records]))
    heading = re.escape(f"{words_of(probe).section} {words_of(probe).name}")
    (body,) = re.findall(rf"<h2>{heading}.*?</section>", shown, flags=re.S)
    return body


@pytest.fixture(scope="module")
def rows() -> list[Record]:
    return make_rows()


@pytest.fixture(scope="module")
def some(rows: list[Record]) -> list[Record]:
    """Return the comparisons, and one arm's measurements on natural text: the page is drawn quickly."""
    return [
        row
        for row in rows
        if not isinstance(row, Measurement)
        or (row.arm == "solu_ln" and row.stream in ("", "natural", "train"))
    ]


@pytest.fixture(scope="module")
def html(rows: list[Record], tmp_path_factory: pytest.TempPathFactory) -> str:
    return page_of(rows, tmp_path_factory.mktemp("study"))


def text(html: str) -> str:
    """Return the page without its scripts and styles, and with its compressed tables."""
    html = re.sub(
        r'<script type="text/plain" class="packed">([^<]*)</script>',
        lambda found: unpacked(found[1]),
        html,
    )
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.S)


GELU = replace(LN, arm="gelu", variant="gelu", role="baseline", twin="")
"""The settings of an arm without a norm."""


# ---------------------------------------------------------------- sentences


def test_what_static_arms_do_not_reach_is_not_called_a_need():
    sentences = words.headline(make_rows(n_seeds=8, seed_noise=0.0005))
    assert sentences[0].startswith(
        "The norm of solu_ln lowers the loss (8 seeds), and the static arms trained here do not reach all of this "
        "(corrected p = 0.0078). That does not yet show that a scale for each token is needed"
    )
    joined = " ".join(sentences)
    assert "solu_ln had a loss 0.080" in joined
    assert "the sign is settled at the 95% level" in joined
    assert "Phi_dyn (solu_ln) is 0.2" in joined


def test_a_need_too_small_to_matter_is_called_so():
    arms = SIX | {"solu_gain": 3.021}
    sentences = words.headline(make_rows(arms, n_seeds=8, seed_noise=0.0005))
    assert "misses some of it, but too little to matter" in sentences[0]


def test_a_gain_that_a_static_arm_reaches_is_not_called_a_need():
    arms = SIX | {"solu_gain": 3.0196}
    sentences = words.headline(make_rows(arms, n_seeds=8, seed_noise=0.0005))
    assert "It is not shown that the static arms miss any part of this" in sentences[0]
    assert "equivalent: closer than 0.005 nats" in " ".join(sentences)


def test_the_twin_with_one_gain_is_named_and_called_close_only_within_the_margin():
    near, far = (
        " ".join(words.headline(make_rows(SIX | {"solu_frozen_ln": loss}, 8, seed_noise=0.0005)))
        for loss in (SIX["solu_ln"] + 0.001, SIX["solu_ln"] + 0.02)
    )
    begins = "The static twin of solu_ln is solu_frozen_ln, trained with one gain for all tokens. Its loss minus"
    assert begins in near
    assert begins in far
    close = "8 seeds); this is within 0.005 nats of 0"
    assert close in near.split(begins)[1]
    assert close not in far


def test_the_documents_counted_are_those_of_the_loss(rows):
    last = of_kind(rows, Measurement)[-1]
    more = [replace(last, probe="engagement", cluster="document", n_clusters=999)]
    assert "999" not in " ".join(words.headline([*rows, *more]))


def test_a_relative_curve_ends_at_one_whatever_its_size(rows):
    spec = Figure("", ("mean without BOS",), kind="curve", relative=True, log_x=True)
    curves = [row for row in of_kind(rows, Measurement) if row.x is not None]
    mine = [replace(row, quantity="mean without BOS") for row in curves]
    mine = [replace(row, probe="gain_variation", stream="random", group="") for row in mine]
    figure = figures.draw([row for row in mine if row.value], spec)
    ends = [trace.y[-1] for trace in figure.data if trace.mode == "lines" and trace.name]
    assert ends
    assert all(end == pytest.approx(1) for end in ends)
    assert figure.layout.xaxis.type == "log"


def test_plain_solu_being_better_means_nothing_to_explain():
    sentences = words.headline(make_rows(SIX | {"solu": 2.95}, n_seeds=8, seed_noise=0.0005))
    assert sentences[0].startswith(
        "The norm of solu_ln raises the loss (8 seeds): plain SoLU has the lower loss, so smearing has nothing to "
        "explain at this size."
    )
    joined = " ".join(sentences)
    assert "plain SoLU had a loss 0.07" in joined
    assert "undefined, because no benefit of LN is established" in joined


def test_two_seeds_that_differ_leave_the_sign_open_and_are_called_two_seeds():
    sentences = words.headline(make_rows(n_seeds=2, worse={"solu-s1": 0.03}))
    assert sentences[0].startswith(
        "2 seeds do not settle whether LayerNorm lowers the loss (solu_ln)"
    )
    joined = " ".join(sentences)
    assert (
        "With 2 seeds no test over seeds can reach p < 0.05: the least possible p is 0.5." in joined
    )
    assert "so the sign is not settled" in joined


def test_one_seed_settles_nothing():
    sentences = words.headline(make_rows(n_seeds=1))
    assert sentences[0].startswith(
        "1 seed does not settle whether LayerNorm lowers the loss (solu_ln)"
    )
    joined = " ".join(sentences)
    assert "With one seed, results describe these trained models, not their variants." in joined
    assert "nothing is known about other seeds" in joined
    assert "with one seed, which gives no interval" in joined


def test_without_solu_ln_there_is_no_verdict():
    sentences = words.headline(make_rows({"gelu": 3.0, "solu": 3.1}))
    assert sentences[0].startswith("No verdict on LayerNorm")
    assert "4 runs of 2 arms (gelu, solu), 2 seeds per arm" in sentences[1]


def test_the_first_lines_count_runs_seeds_documents_and_tokens(rows):
    losses = make_losses(SIX, 2)
    first_run = losses[(losses.run == "gelu-s0") & (losses.split == "report")]
    expected = f"40 documents ({first_run.n_tokens.sum():,} tokens)"
    basis = next(s for s in words.headline(rows) if s.startswith("Compared here"))
    assert basis.startswith("Compared here: 12 runs of 6 arms (gelu, gelu_ln, solu,")
    assert expected in basis


@pytest.mark.parametrize(
    ("spread", "top", "verdict"),
    [
        (0.9, 0.02, "the gain varies between tokens (sd of log gain 0.9 over 1 seed"),
        (0.005, 0.9, "the gain is one constant in effect, pinned by the norm's epsilon"),
        (0.02, 0.02, "the gain is one constant in effect, pinned by the norm's epsilon"),
        (0.1, 0.9, "it is not settled whether the gain varies between tokens"),  # .1 lies inside
    ],
)
def test_a_norm_is_judged_by_the_spread_of_its_gain(spread, top, verdict):
    median = number("engagement", "r", 0.01, 0.001, statistic="median")
    found = [*gain_of(spread, top, 0.0), replace(median, positions="2-15")]
    sentence = next(s for s in words.headline([LN, *found, *CITED]) if "median r" in s)
    assert verdict in sentence
    assert "positions 2-15" in sentence


@pytest.mark.parametrize(
    ("freeze", "verdict"),
    [
        (0.0001, "within 0.001 nats of 0, so negligible at inference"),
        (0.01, "a cost"),
        (-0.01, "an improvement"),
        (0.001, "a cost"),
    ],
)
def test_the_cost_of_freezing_is_judged_by_the_ends_of_its_interval(freeze, verdict):
    said = words.headline([*make_rows(freeze=freeze), *CITED])
    sentence = next(s for s in said if s.startswith("The trained "))
    assert verdict in sentence


def test_each_solu_ln_arm_has_its_own_verdict():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.04}
    sentences = words.headline(make_rows(arms, n_seeds=8, seed_noise=0.0005))
    assert "norm of solu_ln-k0 lowers the loss (8 seeds)" in sentences[0]
    assert "norm of solu_ln-k42 lowers the loss (8 seeds)" in sentences[1]


# ---------------------------------------------------------------- the page


def test_the_page_has_all_sections_and_starts_with_the_verdict(html, rows):
    body = text(html)
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    assert headings[:5] == [
        "Findings",
        "Hypotheses and evidence",
        "Phi_dyn and its terms",
        "Paired differences",
        "Loss",
    ]
    assert "P1 LayerNorm engagement" in headings
    assert "P4 Scale freeze" in headings
    assert body.index(words.headline(rows)[0][:40]) < body.index("<h2>")
    for run in findings.runs_of(rows):
        assert run in body


def test_the_page_asks_for_nothing_from_elsewhere(html):
    tags = "".join(re.findall(r"<[^>]*>", text(html)))
    assert not re.search(r"\b(src|action|data|poster)\s*=", tags)
    assert set(re.findall(r'href="(.)', tags)) == {"#"}
    assert "<link" not in tags
    assert not re.search(r"<script[^>]+src", html)
    styles = "".join(re.findall(r"<style\b.*?</style>", html, flags=re.S))
    assert "@import" not in styles
    assert "url(" not in styles
    assert "default-src 'none'" in html


class Inline(HTMLParser):
    """The scripts and styles of a page, and the attributes that contain one."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.policy = ""
        self.into: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "style" or (tag == "script" and "type" not in given):
            self.into = self.styles if tag == "style" else self.scripts
            self.into.append("")
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        self.attributes += [
            (tag, name) for name in given if name == "style" or name.startswith("on")
        ]

    def handle_data(self, data: str) -> None:
        if self.into is not None:
            self.into[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.into = None


def test_the_browser_runs_and_applies_only_what_the_page_came_with(some, swept):
    page = Inline(rendered([*some, *swept, *token_values(["<|BOS|>", "a", "b"])]))
    policy = dict(part.split(None, 1) for part in page.policy.split(";"))
    assert "unsafe" not in page.policy

    def hashed(*contents: str) -> set[str]:
        sums = (hashlib.sha256(each.encode()).digest() for each in contents)
        return {f"'sha256-{base64.b64encode(each).decode()}'" for each in sums}

    assert len(page.scripts) == 1
    # The script unpacks the library, which `rendered` leaves empty.
    assert set(policy["script-src"].split()) == hashed(*page.scripts, "")
    assert len([each for each in page.styles if each]) == 1
    # The library adds its rules to an empty element.
    assert set(policy["style-src"].split()) == hashed(*page.styles, "")
    assert not page.attributes
    assert policy["base-uri"] == policy["form-action"] == policy["default-src"] == "'none'"


def test_plotly_is_inlined_once_and_figures_have_fixed_names(html):
    (version,) = re.findall(r"<!-- plotly\.js \(basic - minified\) v(\S+) .* MIT license -->", html)
    assert packed_in(html, "library") == page.library()
    # The figures are made by plotly's Python package, for the plotly.js that it contains.
    assert version == get_plotlyjs_version()
    names = re.findall(r'id="(figure-\d+)"', html)
    assert names == [f"figure-{i}" for i in range(1, len(names) + 1)]
    assert len(names) > 8


def test_the_same_records_give_the_same_bytes(some):
    assert rendered(some) == rendered(some)


BAD = "<script>alert(1)</script><b>"
KEYWORDS = {"kind", "role", "cluster", "sign", "setting", "more_smeared_when", "family"}
"""Fields of records whose text the report compares with constants."""
PLACES = {"probe", "quantity", "statistic", "stream", "positions", "group", "quantities", "tested"}
"""Fields by which the report selects the rows that it cites and draws."""


def spoiled(value: Any, kept: set[str]) -> Any:
    """Return a record with markup after each of its texts, except in the fields of these names."""
    if isinstance(value, str):
        return value if isinstance(value, StrEnum) else value + BAD
    if isinstance(value, tuple):
        return tuple(spoiled(each, kept) for each in value)
    if isinstance(value, dict):
        return {key: spoiled(each, kept) for key, each in value.items()}
    if is_dataclass(value):
        of = {each.name: getattr(value, each.name) for each in fields(value)}
        more = {k: spoiled(v, kept) for k, v in of.items() if k not in kept or isinstance(v, dict)}
        return replace(value, **more)
    return value


@pytest.mark.parametrize("kept", [KEYWORDS, KEYWORDS | PLACES])
def test_what_comes_from_data_is_escaped(some, swept, kept):
    confirmed = Comparison(
        study="s", term=Term.PROBE, against="x", probe="p", quantity="q", value=1.0, unit="u",
        arm="solu_ln", note="n", choice="c", size="z", adds="a", cluster="seed",
    )  # fmt: skip
    rate = FalsePositives(
        study="s", probe="engagement", tested="r", source="s", passed=True, value=0.1, unit="u"
    )
    gone = LeftOut(study="s", run="solu_ln-s0", arm="solu_ln", probe="engagement", note="n")
    apart = NoChoice(study="s", arms=("a", "b"), note="n")
    fact = replace(RUN, probe="pretrained", quantity="eps", value=1.0, pretrained=True)
    failed = gate("scale_freeze", "pinned", "within 1 of 0", passed=False)
    more = [*token_values(["x"]), *CITED, failed, confirmed, rate, gone, apart, fact]
    # The arms of the two synthetic studies have the same families.
    others = [replace(r, family=f"{r.family} 2") if isinstance(r, Setting) else r for r in swept]
    html = rendered([spoiled(row, kept) for row in [*some, *more, *others]])
    assert "<script>alert" not in html
    assert "</script><b>" not in html
    assert text(html).count("&lt;script&gt;alert(1)") > 1000


def test_labels_in_figures_are_escaped_against_plotlys_own_markup(rows):
    bad = "<b>bold</b>"
    for name in ("engagement", "gain_variation"):
        some = [replace(r, arm=bad) for r in of_kind(rows, Measurement) if r.probe == name]
        for spec in words_of(name).figures:
            drawn = figures.draw(some, spec)
            assert "<b>" not in str(drawn.to_plotly_json())


def test_a_row_without_interval_is_marked(rows):
    engaged = [row for row in of_kind(rows, Measurement) if row.probe == "engagement"]
    bare = [replace(row, low=None, high=None) for row in engaged]
    assert text(rendered(bare[:200])).count("(no interval)<") == 200
    spec = Figure("r", ("r",), statistic="median")
    drawn = figures.draw(bare, spec)
    assert all(s.endswith("-open") for trace in drawn.data for s in trace.marker.symbol)


def test_an_undefined_value_says_so():
    body = text(rendered(sweep(SIX | {"solu": 2.9}, {})))
    assert "undefined, because no benefit of LN is established" in body
    assert not re.search(r"\bnan\b", body)


def test_a_probe_is_shown_with_the_words_it_was_measured_with():
    """The words come from the results, even if the probe's file has changed or no longer exists."""
    old = replace(
        words_of("scale_freeze"),
        probe="long_gone",
        name="An old name",
        section="P99",
        **{key: f"old {key}" for key in ("question", "reading", "pitfalls", "formula", "source")},
        quantities={"smear": results.Quantity("nats", "old meaning", more_smeared_when="higher")},
        figures=(Figure("old figure", ("smear",)),),
        gates=(results.Gate("pinned", "smear", above=0.05),),
        tested="smear",
    )
    row = number("long_gone", "smear", 0.1)
    found = [row, before_training(row, 0.0), *passed("long_gone")]
    html = rendered([LN, old, *found])
    body = html.split("<h2>P99 An old name</h2>")[1].split("</section>")[0]
    for wanted in ("question", "reading", "pitfalls", "formula", "source", "meaning", "figure"):
        assert f"old {wanted}" in body, wanted
    assert "above 0, the side that smearing predicts" in body
    assert "more smeared when higher" in body
    assert body.count('class="plot"') == 1


def test_a_probe_without_stored_words_gets_a_plain_section():
    body = text(rendered([number("wordless", "smear", 0.1)]))
    assert "The results contain no description of &#39;wordless&#39;" in body
    assert "mean of smear" in body


def test_a_broken_last_line_is_skipped_with_a_warning(tmp_path, rows, capsys):
    path = tmp_path / "results.jsonl"
    results.write(path, rows)
    path.write_text(path.read_text() + '{"kind": "measurement", "study": "synthetic", "pro')
    report.build(tmp_path)
    assert f"line {len(rows) + 1} is not a record and is skipped" in capsys.readouterr().err


def test_no_results_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no results at"):
        report.build(tmp_path)


def test_the_results_are_all_that_the_report_reads(tmp_path, some):
    """A process that cannot import probes, controls and torch makes the same page."""
    here = page_of(some, tmp_path)
    code = """
import sys
from pathlib import Path
for name in ("torch", "pandas", "soluscope.probes", "soluscope.controls"):
    sys.modules[name] = None  # importing it fails
from soluscope import report
report.build(Path(sys.argv[1]))
"""
    done = run_python("-c", code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.html").read_text(encoding="utf8") == here


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_page_of_few_rows_is_still_a_page(tmp_path, rows, n_rows):
    for picked in (rows[:n_rows], rows[-n_rows:]):
        assert page_of(picked, tmp_path).endswith("</html>\n")


LABELS = {"gelu": "GELU", "solu": "SoLU", "solu_gain": "SoLU", "solu_ln": "SoLU + LN"}


@pytest.fixture(scope="module")
def labelled() -> list[Record]:
    """Return the comparisons of arms with labels: two constant gains and two kappas."""
    arms = {
        "gelu": 3.0,
        "solu": 3.1,
        "solu_gain-a": 3.06,
        "solu_gain-b": 3.07,
        "solu_ln": 3.02,
        "solu_ln-k0": 3.04,
    }
    told = {
        "solu_gain-a": {"gain": 8.0}, "solu_gain-b": {"gain": 32.0}, "solu_ln": {"kappa": 41.94},
        "solu_ln-k0": {"kappa": 4e-5},
    }  # fmt: skip
    return [
        replace(row, label=LABELS[row.variant]) if isinstance(row, Setting) else row
        for row in sweep(arms, told)
    ]


def test_arms_have_names_for_people_in_the_order_of_the_chain(labelled):
    assert names.arms(labelled) == {
        "solu": "SoLU", "solu_gain-a": "SoLU, static gain 8", "solu_gain-b": "SoLU, static gain 32",
        "solu_ln-k0": "SoLU + LN, kappa 4e-5", "solu_ln": "SoLU + LN, kappa 41.9", "gelu": "GELU",
    }  # fmt: skip
    one_kappa = [row for row in labelled if row.arm != "solu_ln-k0"]
    assert names.arms(one_kappa)["solu_ln"] == "SoLU + LN, kappa 41.9"  # a pinned gain is not live
    assert [*figures.styles(names.named(labelled))] == [*names.arms(labelled).values()]
    body = text(rendered(labelled))
    assert "SoLU + LN, kappa 4e-5" in body
    assert re.search("<td[^>]*>solu_ln-k0</td>", body)  # the identifier, beside the name


def test_two_arms_never_share_a_name(labelled, swept):
    alike = [replace(row, values={}) if isinstance(row, Setting) else row for row in labelled]
    for rows in (alike, labelled, swept):
        assert len(set(names.arms(rows).values())) == len(names.arms(rows))
    assert names.arms(alike)["solu_ln-k0"] == "SoLU + LN (solu_ln-k0)"


def test_texts_on_the_page_have_the_names_of_arms_and_not_their_identifiers(labelled):
    arms = "|".join(re.escape(arm) for arm in names.arms(labelled) if "-" in arm)
    body = re.sub(rf"<td[^>]*>(?:{arms})</td>", "", text(rendered(labelled)))  # beside the name
    assert re.findall(rf"(?<![\w.-])(?:{arms})(?![\w-])", body) == []
    static = next(row for row in names.named(labelled) if getattr(row, "term", "") == Term.STATIC)
    assert static.choice.startswith("SoLU, static gain 8, chosen on the select split: ")
    assert re.search(r"SoLU, static gain 32 \(3\.\d{4}\)", static.choice)


def test_a_setting_in_a_text_on_the_page_has_its_plain_name():
    told = replace(
        LN, label="SoLU + LN", note="", rate="was tuned with mid.kappa=41.94, here 4e-05"
    )
    (named,) = names.named([told])
    assert named.rate == "was tuned with kappa 41.94, here 4e-05"


def test_an_arm_has_one_entry_in_the_legend_of_the_doses_for_all_its_seeds(labelled):
    kappas = ("solu_ln", "solu_ln-k0")
    seeds = [
        number("engagement", "r", 0.1 + seed, arm=arm, run=f"{arm}-s{seed}", seed=seed, statistic="median")
        for arm in kappas for seed in (0, 1)
    ]  # fmt: skip
    (dose,) = drawn([*labelled, *seeds], "Dose: kappa")
    (entry,) = (trace.name for trace in dose.data if trace.name and trace.showlegend is not False)
    assert entry == "SoLU + LN"
    of_seeds = [trace for trace in dose.data if "seed" in str(trace.text)]
    assert {trace.legendgroup for trace in of_seeds} == {entry}
    for seed in (0, 1):
        assert any(f"SoLU + LN, kappa 41.9, seed {seed}" in str(trace.text) for trace in of_seeds)


def test_the_table_of_controls_has_a_short_sign_with_words_for_each_result():
    asked = [
        words_of("engagement"),
        gate("engagement", "smear_shared", "above 0.5"),
        gate("engagement", "pinned", "within 0.01 of 0", passed=False),
        gate("unknown", "pinned", "above 0.5"),
        gate("unknown", "pinned", "within 0.01 of 0"),
    ]
    body = text(rendered([LN, *asked])).split("<h2>Probes on control models</h2>")[1]
    head, first, second = re.findall("<tr>.*?</tr>", body.split("</table>")[0], flags=re.S)
    assert 'aria-label="P1 LayerNorm engagement"' in head
    assert ">P1</div>" in head
    assert ">unknown</div>" in head
    for line, words_ in ((first, ["C+ pass"]), (second, ["C- FAIL", "C+/C- pass"])):
        assert re.findall('aria-label="(.*?)"', line) == words_
    assert "\u2717 \u2212</div>" in second
    assert "\u2713 \u00b1</div>" in second


def test_the_first_screen_has_an_answer_a_figure_three_facts_and_their_certainty(labelled):
    page_text = rendered([*labelled, *CITED])
    first = page_text.split("</section>")[0]
    answer = re.search('<h2 class="first">(.*?)</h2>', text(first), flags=re.S)[1]
    assert answer == words.answer(names.named(labelled))
    assert first.count('class="plot"') == 1
    assert first.count("<dt>") == 3
    assert "3 seeds per arm" in first
    assert "controls: 2 probes, all passed" in first
    (figure,) = figures_in(page_text, first)
    shown = {
        f"{row.value:.4g}"
        for row in findings.comparisons(
            labelled, Term.DIFFERENCE, against="solu", cluster="document"
        )
    }
    assert shown <= {f"{x:.4g}" for trace in figure.data for x in trace.x}


def test_arms_with_one_verdict_share_a_sentence(labelled):
    assert words.answer(labelled).startswith(
        "The norm of solu_ln-k0 and solu_ln lowers the loss (3 seeds)"
    )


def test_a_probe_that_is_not_validated_is_not_summarised_on_the_first_screen(labelled):
    first = rendered(labelled).split("</section>")[0]
    assert "the probe engagement has not been validated on controls" in first
    failed = gate("engagement", "pinned", "within 0.01 of 0", passed=False)
    assert (
        "the probe engagement failed a control"
        in rendered([*labelled, failed]).split("</section>")[0]
    )


def test_each_tab_links_to_a_part_of_the_page(html):
    body = text(html)
    ids = re.findall(r' id="([^"]+)"', body)
    assert len(ids) == len(set(ids))
    links = re.findall(r'href="#([^"]+)"', body)
    assert links[:3] == ["answer", "training", "probes"]
    assert set(links) <= set(ids)


def test_figures_have_a_text_and_tables_have_headers(some):
    body = text(rendered(some))
    texts = re.findall(r'class="plot"[^>]*>([^<]*)</div>', body)
    assert texts
    assert all(each.startswith("Figure ") and "axes: " in each for each in texts)
    assert "<th>" not in body
    assert body.count('<th scope="col">') > body.count("<table>")


def test_what_differs_between_arms_comes_first_and_failed_probes_do_not_come():
    twin = replace(LN, arm="solu_frozen_ln", variant="solu_frozen_ln", role="static", twin="")
    rows = []
    for probe, quantity, gap in (
        ("scale_freeze", "frozen at best constant", 0.1),
        ("engagement", "r", 0.5),
    ):
        here = number(
            probe,
            quantity,
            0.1 + gap,
            0.01,
            statistic="median" if probe == "engagement" else "mean",
        )
        there = replace(
            here, value=0.1, arm=twin.arm, variant=twin.variant, run="solu_frozen_ln-s0"
        )
        there = replace(there, low=0.09, high=0.11)
        rows += [here, there, words_of(probe), before_training(here, 0.2)]
    rows += [LN, twin]
    body = text(rendered(rows))
    table = body.split("<h2>Differences between arms</h2>")[1].split("</section>")[0]
    assert table.index("engagement: median of r") < table.index("scale_freeze: mean of frozen")
    assert "untrained 0.2" in table
    assert "35.4" in table  # .5 / sqrt(.01^2 + .01^2)
    failed = gate("engagement", "pinned", "within 0.01 of 0", passed=False)
    body = text(rendered([*rows, failed]))
    assert (
        "engagement: "
        not in body.split("<h2>Differences between arms</h2>")[1].split("</section>")[0]
    )


def test_gap_on_held_out_documents_is_to_the_plain_run_of_the_same_seed_and_step(rows):
    made = [*rows]
    base = next(row for row in made if isinstance(row, Measurement) and row.probe == "training")
    known = {setting.arm: setting for setting in made if isinstance(setting, Setting)}
    (plain,) = (arm for arm, setting in known.items() if setting.role == "plain")
    ln = next(arm for arm, setting in known.items() if setting.role == "per_token")
    values = {(plain, 0, 1e5): 6.0, (plain, 0, 2e5): 5.0, (plain, 1, 1e5): 7.0, (ln, 0, 1e5): 6.5,
              (ln, 0, 2e5): 4.75, (ln, 1, 1e5): 7.25, (ln, 2, 1e5): 9.0}  # fmt: skip
    made += [
        replace(base, quantity=HELD_OUT, arm=arm, run=f"{arm}-s{seed}", seed=seed, x=x, value=value)
        for (arm, seed, x), value in values.items()
    ]  # fmt: skip
    gaps = findings.held_out_gaps(made)
    assert {row.quantity for row in gaps} == {f"{HELD_OUT} minus that of {plain}"}
    assert {(row.arm, row.seed, row.x): row.value for row in gaps} == {
        (ln, 0, 1e5): 0.5, (ln, 0, 2e5): -0.25, (ln, 1, 1e5): 0.25,
    }  # fmt: skip
    page = rendered(made)
    assert page.index(f"{HELD_OUT} minus that of") > page.index(HELD_OUT)


def test_numbers_before_training_are_rings_beside_the_dots():
    row = number("engagement", "r", 0.9, statistic="median")
    spec = Figure("", ("r",), statistic="median")
    drawn = figures.draw([row], spec, before=[before_training(row, 0.2)])
    ring, _ = drawn.data
    assert (ring.x, ring.marker.symbol) == ((0.2,), "circle-open")


# ---------------------------------------------------------------- controls


def test_each_control_has_a_badge_with_its_number_and_what_was_asked():
    asked = [
        gate("engagement", "smear_shared", "above 0.5"),
        gate("engagement", "pinned", "within 0.01 of 0", passed=False, value=0.2, low=0.1),
    ]
    shown = section([number("engagement", "r", 0.9, statistic="median"), *asked], "engagement")
    badges = dict(re.findall(r'<span class="badge (\w+)" title="([^"]*)">', shown))
    assert badges["pass"] == "r (median): 0.9 [0.8, 0.99] share; pass: above 0.5"
    assert badges["fail"] == "r (median): 0.2 [0.1, 0.99] share; FAIL: within 0.01 of 0"
    assert "C+ smear_shared pass</span>" in shown
    assert "C- pinned FAIL</span>" in shown


def test_a_probe_without_controls_says_that_none_was_run():
    shown = section([number("engagement", "r", 0.9, statistic="median")], "engagement")
    assert "no control run" in shown
    assert "do not cite" not in shown


def test_a_failed_gate_is_said_before_the_figures_and_in_the_navigation(some):
    asked = [
        gate("scale_freeze", "smear_shared", "above 0.1"),
        gate("scale_freeze", "uniform", "within 0.001 of 0", passed=False),
    ]
    shown = text(rendered([*some, *asked]))
    warning = "This probe failed its control uniform: do not cite its numbers."
    freeze = shown[shown.index("<h2>P4 Scale freeze (control failed)") :]
    assert freeze.index(warning) < freeze.index('class="plot"')
    assert re.search(r'<a href="#s\d+" class="fail">P4 Scale freeze \(control failed\)</a>', shown)
    assert "Meaning of this result" not in freeze.split("</section>")[0]
    assert shown.count(warning) == 1


def test_the_headline_cites_no_probe_that_failed(rows):
    failed = gate("scale_freeze", "uniform", "within 0.001 of 0", passed=False)
    sentences = words.headline([*rows, *CITED, failed])
    assert not any(sentence.startswith("The trained ") for sentence in sentences)
    assert sentences[-1] == ("scale_freeze failed its control uniform: do not cite its numbers.")
    assert any("median r" in sentence for sentence in sentences)


def test_without_a_control_run_nothing_is_said_of_a_probes_numbers(rows):
    sentences = words.headline([*rows, *passed("engagement")])
    assert any("median r" in sentence for sentence in sentences)
    assert not any(sentence.startswith("The trained ") for sentence in sentences)
    assert sentences[-1] == (
        "scale_freeze has not been validated on the control models, so its results are not summarised."
    )
    found = [LN, number("engagement", "r", 0.9, statistic="median")]
    assert "Meaning of this result" not in section(found, "engagement")
    assert "Meaning of this result" in section([*found, *passed("engagement")], "engagement")


def test_what_was_not_counted_is_said_in_one_line():
    shown = section([number("engagement", "r", 0.9)], "engagement")
    assert (
        '<p class="soft">False positives were not counted; to count them: '
        "soluscope probe --false-positives DIR</p>" in shown
    )


def test_rates_of_false_positives_are_shown_with_their_draws():
    found = FalsePositives(
        study="", probe="engagement", tested="r", source="untrained models", passed=True,
        value=0.045, low=0.02, high=0.08, n=200, unit="share", note="nominal 0.05",
    )  # fmt: skip
    undefined = replace(
        found, source="shuffled labels", value=None, passed=None, note="r is not defined there"
    )
    shown = section([number("engagement", "r", 0.9), found, undefined], "engagement")
    assert "untrained models: 0.045 [0.02, 0.08] over 200 draws; pass: nominal 0.05" in shown
    assert "shuffled labels: r is not defined there" in shown
    assert "not counted" not in shown


def test_what_was_left_out_is_named_with_its_reason():
    about = {key: getattr(RUN, key) for key in ("study", "run", "arm", "variant", "seed")}
    gone = LeftOut(**about, probe="scale_freeze", note="exact for one layer only")
    rows = [number("scale_freeze", "frozen at best constant", 0.0)]
    shown = section([*rows, gone], "scale_freeze")
    assert "Left out: solu_ln (exact for one layer only)." in shown
    rows.append(replace(rows[0], run="solu_ln-s1", seed=1))
    shown = section([*rows, replace(gone, stream="code")], "scale_freeze")
    assert "Left out on code text: solu_ln, seed 0 (exact for one layer only)." in shown


def test_the_terminal_matrix_has_each_probe_against_each_control():
    asked = [
        gate("engagement", "smear_shared", "above 0.5"),
        gate("engagement", "pinned", "within 0.01 of 0"),
        gate("scale_freeze", "pinned", "within 0.001 of 0", passed=False, value=0.25, low=0.1),
    ]
    known = [words_of(name) for name in ("scale_freeze", "engagement")]
    rate = FalsePositives(
        study="", probe="engagement", tested="r", source="untrained models", passed=True, n=200,
        value=0.05, unit="share",
    )  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.matrix([*known, *asked, rate]))
    shown = console.export_text()
    lines = [line.split() for line in shown.splitlines()]
    assert lines[0] == ["probe", "C1", "C3"]
    assert ["P1", "engagement", "pass", "pass"] in lines
    assert ["P4", "scale_freeze", "FAIL"] in lines
    assert "C1 smear_shared, C3 pinned" in shown
    assert "- scale_freeze on pinned: r (median): 0.25 [0.1, 0.99] share; FAIL: within" in shown
    assert "controls: 2 probes, 1 failed: scale_freeze (pinned)" in shown
    assert "untrained models" in shown


def test_eighty_columns_hold_the_name_of_every_probe_and_control():
    probes, planted = (plugins.names(f"soluscope.{kind}") for kind in ("probes", "controls"))
    asked = [gate(probe, control, "above 0") for probe in probes for control in planted]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.matrix(asked))
    shown = console.export_text()
    assert "\u2026" not in shown
    assert set(probes) <= set(shown.split())
    assert shown.split().count("pass") == len(asked)


def test_the_terminal_table_has_a_line_on_the_controls(rows):
    asked = passed("engagement", "rotation")
    failed = gate("centring", "pinned", "above 1", passed=False)
    for found, line in (
        ([], "controls: none run"),
        (asked, "controls: 2 probes, all passed"),
        ([*asked, failed], "3 probes, 1 failed: centring (pinned)"),
    ):
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(report.table([*rows, *found]))
        assert line in console.export_text()


# ---------------------------------------------------------------- the meaning of a result


@pytest.mark.parametrize(
    ("value", "half", "said"),
    [
        (0.02, 0.005, "above 0"),
        (-0.02, 0.005, "below 0"),
        (0.0002, 0.0005, "within 0.001 of 0, as on a control without an effect"),
        (0.001, 0.005, "the sign is not settled"),
        (0.0012, 0.0005, "above 0, but possibly by less than 0.001, which would not matter"),
        (-0.0012, 0.0005, "below 0, but possibly by less than 0.001, which would not matter"),
    ],
)
def test_a_difference_of_an_earlier_version_means_no_more_than_its_interval(value, half, said):
    """A study that was probed by an earlier version has no answers."""
    one = replace(words_of("scale_freeze"), answers=())
    found = number("scale_freeze", "frozen at best constant", value, half)
    (sentence,) = meaning.sentences(one, [found], [found.arm])
    assert sentence.startswith(f"solu_ln, natural: mean of frozen at best constant is {value:.3g}")
    assert sentence.endswith(f"): {said}.")


@pytest.mark.parametrize(
    ("value", "half", "said"),
    [
        (0.02, 0.005, "The loss rises when every token gets the same gain; "),
        (-0.02, 0.005, "The loss falls when every token gets the same gain. "),
        (0.0002, 0.0005, "The loss stays the same when every token gets the same gain; "),
        (0.001, 0.005, "Not settled: the interval leaves every answer open. "),
        (
            0.0012,
            0.0005,
            "Not settled: the number may be between -0.001 and 0.001 or above 0.001. ",
        ),
    ],
)
def test_the_meaning_begins_with_an_answer_that_holds_for_the_whole_interval(value, half, said):
    one = words_of("scale_freeze")
    found = number("scale_freeze", "frozen at best constant", value, half)
    (sentence,) = meaning.sentences(one, [found], [found.arm])
    assert sentence.startswith(f"solu_ln: {said}")
    evidence = (
        f'The mean of "frozen at best constant" on natural text is {value:.3g} nats (95% interval '
    )
    assert sentence.endswith(f"{evidence}{value - half:.3g} to {value + half:.3g}).")


def test_an_answer_is_about_the_tested_quantity_alone():
    one = words_of("scale_freeze")
    other = number("scale_freeze", "diffuse codes at the others' gain", 0.02, 0.005)
    (sentence,) = meaning.sentences(one, [other], [other.arm])
    assert sentence.startswith(
        "solu_ln, natural: mean of diffuse codes at the others' gain is 0.02"
    )


def before_training(row: Measurement, value: float, half: float = 0.001) -> Untrained:
    """Return the record of the same number before training."""
    change = (row.value or 0.0) - value
    keys = (
        "study",
        "run",
        "arm",
        "variant",
        "seed",
        "probe",
        "quantity",
        "statistic",
        "unit",
        "stream",
    )
    return Untrained(
        **{key: getattr(row, key) for key in keys},
        value=value, difference=change, low=change - half, high=change + half,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("untrained", "said"),
    [
        (
            0.0,
            "untrained 0, a change of 0.66 (0.659 to 0.661): above 0, the side that smearing predicts.",
        ),
        (
            0.72,
            "a change of -0.06 (-0.061 to -0.059): below 0, the side that smearing does not predict.",
        ),
        (0.66, "a change of 0 (-0.001 to 0.001): closer to 0 than 0.01, which counts as 0."),
    ],
)
def test_a_direction_is_that_of_the_change_by_training(untrained, said):
    one = words_of("scale_causes")
    row = number("scale_causes", one.tested, 0.66, 0.001, unit="correlation", statistic="")
    (alone,) = meaning.sentences(one, [row], [row.arm])
    assert "smearing" not in alone
    (sentence,) = meaning.sentences(one, [row], [row.arm], [before_training(row, untrained)])
    assert sentence.endswith(said)


def test_the_seeds_are_judged_together_and_the_twin_by_itself():
    one = words_of("scale_freeze")
    up, down = (number("scale_freeze", "frozen at best constant", v, 0.001) for v in (0.01, -0.01))
    seeds = [up, replace(down, seed=1, run="solu_ln-s1")]
    twin = replace(up, arm="solu_frozen_ln", variant="solu_frozen_ln")
    first, second = meaning.sentences(one, [*seeds, twin], [up.arm, twin.arm])
    assert (
        "is -0.01 to 0.01 nats (the 95% intervals of 2 seeds reach from -0.011 to 0.011)" in first
    )
    assert first.startswith("solu_ln: Not settled: ")
    assert second.startswith("solu_frozen_ln: The loss rises")


def test_a_share_that_cannot_be_below_0_is_not_called_above_0():
    one = replace(words_of("engagement"), answers=())
    share = {"unit": "share", "statistic": "median"}
    low, high = (number("engagement", "r", value, 0.001, **share) for value in (0.03, 0.9))
    assert meaning.sentences(one, [low], [RUN.arm])[0].endswith("(95% interval 0.029 to 0.031).")
    assert meaning.sentences(one, [high], [RUN.arm])[0].endswith(
        "above 0.5, as on the control smear_shared."
    )


def test_each_stream_is_told_of_where_none_is_natural():
    one = words_of("scale_patching")
    found = [
        number("scale_patching", one.tested, value, stream=stream, statistic="")
        for stream, value in (("pairs: names", 0.4), ("pairs: subjects", 0.0))
    ]
    first, second = meaning.sentences(one, found, [RUN.arm])
    assert '"denoise: gain" on the text "pairs: names" is 0.4 ' in first
    assert '"denoise: gain" on the text "pairs: subjects" is 0 ' in second
    natural = [replace(row, stream="natural") for row in found[:1]]
    assert len(meaning.sentences(one, [*found, *natural], [RUN.arm])) == 1


@pytest.mark.parametrize(
    ("ends", "side"),
    [
        ((-0.0009, 0.0009), "zero"),
        ((0.0001, 0.0009), "zero"),  # excludes 0, and is too small to matter
        ((0.0001, 0.0020), "open"),
        ((-0.0020, -0.0001), "open"),
        ((-0.0009, 0.0010), "open"),
        ((0.0011, 0.0020), "above"),
        ((-0.0020, -0.0011), "below"),
        ((-1.0, 1.0), "open"),
        (None, "open"),
    ],
)
def test_a_side_is_settled_only_beyond_the_margin(ends, side):
    assert findings.side(ends, 0.001) == side
    if ends is not None:  # stats.equivalence agrees
        verdict = {"zero": "equivalent", "open": "inconclusive"}.get(side, "different")
        assert equivalence(Interval(0.0, *ends, 100, 30), 0.001) == verdict


def test_only_what_is_the_same_at_every_token_needs_no_interval():
    bare = number("engagement", "r", 0.9, low=None, high=None, n=1)
    assert findings.envelope([bare]) is None
    assert findings.envelope([replace(bare, constant=True)]) == (0.9, 0.9)
    assert findings.envelope([replace(bare, constant=True), bare]) is None


def test_without_an_interval_nothing_is_judged():
    one = words_of("scale_freeze")
    bare = number("scale_freeze", "frozen at best constant", 0.1, low=None, high=None)
    (sentence,) = meaning.sentences(one, [bare], [RUN.arm])
    assert sentence.startswith("solu_ln: Not settled: there is no interval. ")
    assert sentence.endswith("nats over 1 seed, without an interval.")
    shared = {each.name for each in fields(Untrained)} & {each.name for each in fields(Measurement)}
    twin = Untrained(**{name: getattr(bare, name) for name in shared}, difference=0.08)
    (sentence,) = meaning.sentences(one, [bare], [RUN.arm], [replace(twin, value=0.02)])
    assert sentence.endswith("without an interval; untrained 0.02.")


def test_an_untuned_rate_is_warned_of_unless_the_study_chose_among_several():
    told = [
        replace(LN, rate="was set by hand"),
        replace(GELU, rate="was tuned with train.steps=900, here 60"),
    ]
    (warning,) = words.untuned(told)
    assert "solu_ln (the rate was set by hand)" in warning
    assert "gelu (the rate was tuned with train.steps=900, here 60)" in warning
    assert words.untuned([LN, GELU]) == []
    point = ChoicePoint(study="synthetic", arm="solu_ln", setting="lr", x=1e-3, chosen_arm="solu_ln", value=3.0,
                        unit="nats / token", grid=Grid.INSIDE)  # fmt: skip
    (warning,) = words.untuned([*told, point])
    assert "solu_ln" not in warning


def test_a_choice_of_rates_at_the_reported_seeds_is_named():
    points = [
        ChoicePoint(study="synthetic", arm=arm, setting="lr", x=x, chosen_arm="solu_ln", value=3.0,
                    unit="nats / token", grid=Grid.TOO_FEW)
        for arm, x in (("solu_ln", 1e-3), ("solu_ln-lr2e-3", 2e-3))
    ]  # fmt: skip
    known = [LN, replace(LN, arm="solu_ln-lr2e-3")]
    said = "learning rates were chosen at the reported seeds"
    assert said in "; ".join(words.certainty([*known, *points]))
    apart = [LN, replace(LN, arm="solu_ln-lr2e-3", only_tried=True)]
    assert said not in "; ".join(words.certainty([*apart, *points]))
    assert said not in "; ".join(words.certainty([*known, points[0]]))


# ---------------------------------------------------------------- hypotheses and evidence


def verdicts(records: list[Record], line: str) -> tuple[str, ...]:
    """Return the verdicts on each of the hypotheses; empty if the report may not give any.

    ln_final rescales no token of an arm whose |o| / |r0| is not among the records.
    """
    known = {each.arm for each in of_kind(records, Measurement) if each.quantity == SCALED_SIZE}
    records = [*records, *(rescaling(arm, 0.5) for arm in {LN.arm, TWIN.arm} - known)]
    asked = {each.probe for each in records if isinstance(each, results.GateResult)}
    believed = passed(*({each.probe for each in of_kind(records, Measurement)} - asked))
    static = [] if any(isinstance(each, Setting) for each in records) else [TWIN]
    found = evidence.matrix([LN, *static, *believed, *records])
    (seen,) = (each for one, of_arms in found if one.section == line for each in of_arms)
    return seen.verdicts


TWIN = replace(LN, arm="static", variant="solu_frozen_ln", role="static", twin="")
"""The settings of a static arm with all other parts of LayerNorm."""


def rescaling(arm: str, size: float) -> Measurement:
    """Return |o| / |r0| of an arm: above 5 ln_final rescales each token."""
    return number(OUTPUT_SIZE, SCALED_SIZE, size, 0.0001, statistic="median", arm=arm)


YES, NO, OPEN = "consistent", "inconsistent", "not settled"
NO_GAIN_NEEDED = (YES, YES, YES, NO, NO)


def gain_of(spread: float, top: float, share: float, half: float = 0.001) -> list[Measurement]:
    """Return the numbers of P1: sd of log gain, r at 99% of the tokens, share of the loss at r above .05."""
    return [
        number("engagement", "log gain", spread, half, statistic="sd"),
        number("engagement", "r", top, half, statistic="q99"),
        number("engagement", findings.SHARE_OF_LOSS, share, half, statistic=""),
        number("engagement", "r", 0.01, half, statistic="median"),
    ]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((1.4, 0.99, 0.24), YES),  # the typical token's r is low, and the gain varies
        ((0.005, 0.9, 0.5), NO),  # no token's gain differs
        ((0.03, 0.03, 0.005), NO),  # at its ceiling at 99% of the tokens and of the loss
        ((0.03, 0.03, 0.05), OPEN),  # the other tokens have 5% of the loss
        ((0.03, 0.3, 0.005), OPEN),
        ((0.1, 0.3, 0.3), OPEN),
    ],
)
def test_a_gain_is_judged_by_its_spread_and_not_by_the_typical_token(numbers, said):
    assert verdicts(gain_of(*numbers), "P1") == (YES, YES, YES, said, said)


def freezes(
    geometric: float, best: float, neuron: float | None = None, diffuse: float | None = None
):
    """Return the numbers of P4: two constants, one gain for each neuron, diffuse codes at the others' gain."""
    costs = {
        "frozen at geometric mean": geometric, "frozen at best constant": best,
        evidence.PER_NEURON: neuron, evidence.DIFFUSE_CODES: diffuse,
    }  # fmt: skip
    return [number("scale_freeze", k, value) for k, value in costs.items() if value is not None]


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ((0.0002, 0.0002), NO_GAIN_NEEDED),
        ((0.00001, 0.005), NO_GAIN_NEEDED),  # other documents' best constant is not best here
        ((0.050, 0.00001), NO_GAIN_NEEDED),  # the geometric mean is not the constant of least loss
        ((0.050, 0.001, 0.050), (OPEN, OPEN, OPEN, OPEN, OPEN)),  # the interval crosses the margin
        ((0.050, 0.005, 0.050, 0.020), (OPEN, OPEN, OPEN, YES, YES)),
        ((0.050, 0.005, 0.050, 0.0001), (OPEN, OPEN, OPEN, YES, NO)),  # as on `magnitude`
        (
            (0.050, 0.005, 0.0001, 0.020),
            (OPEN, YES, YES, NO, NO),
        ),  # gamma suffices, as on `disjoint`
        ((0.050, 0.005, 0.050), (OPEN, OPEN, OPEN, YES, OPEN)),  # all codes are alike
        ((-0.02, -0.05, 0.1, 0.1), (OPEN, OPEN, OPEN, NO, NO)),
    ],
)
def test_the_freeze_is_judged_at_the_static_gains_that_cost_least(costs, said):
    assert verdicts(freezes(*costs), "P4") == said


@pytest.mark.parametrize(("size", "said"), [(1.0, NO_GAIN_NEEDED), (20.0, (OPEN,) * 5)])
def test_a_zero_says_nothing_where_ln_final_swallows_the_gain(size, said):
    share = number(OUTPUT_SIZE, SCALED_SIZE, size, statistic="median")
    rows = [*freezes(0.0, 0.0, 0.0, 0.0), share]
    assert verdicts(rows, "P4") == said
    cells = [number("lateral_inhibition", k, 0.0) for k in ("g const", "Z and g const")]
    assert verdicts([*cells, share], "P20") == said
    costly = [*freezes(0.1, 0.1, 0.1, 0.1), share]
    assert verdicts(costly, "P4") == (OPEN, OPEN, OPEN, YES, YES)


@pytest.mark.parametrize(
    ("swap", "diffuse", "spread", "said"),
    [
        (0.05, 0.03, 0.5, (OPEN, OPEN, OPEN, YES, YES)),
        (0.05, 0.0, 0.5, (OPEN, OPEN, OPEN, YES, OPEN)),
        (
            0.0,
            0.0,
            0.5,
            (YES, YES, YES, OPEN, OPEN),
        ),  # tokens of other classes may need other gains
        (-0.05, -0.05, 0.5, (OPEN,) * 5),
        (0.0, 0.0, 0.05, (OPEN,) * 5),  # similar tokens have similar gains
    ],
)
def test_a_swap_that_costs_nothing_counts_only_between_different_gains(swap, diffuse, spread, said):
    rows = [
        number("scale_swap", "swap, signed", swap),
        number("scale_swap", "swap, signed, diffuse codes", diffuse),
        number("scale_swap", "log(g_u / g_t)", spread, statistic="sd"),
    ]
    assert verdicts(rows, "P5") == said


@pytest.mark.parametrize(
    ("low", "high", "verdict", "phi", "p_adj", "said"),
    [
        (0.010, 0.020, Verdict.DIFFERENT, (0.1, 0.4), 0.01, YES),
        (0.010, 0.020, Verdict.DIFFERENT, (0.1, 0.4), 0.6, OPEN),
        (0.010, 0.020, Verdict.DIFFERENT, (0.1, 0.4), None, OPEN),
        (0.010, 0.020, Verdict.DIFFERENT, (-0.1, 0.4), 0.01, OPEN),
        (-0.002, 0.002, Verdict.EQUIVALENT, None, 0.5, NO),
        (0.001, 0.003, Verdict.EQUIVALENT, (-0.1, 0.2), 0.01, NO),
        (0.001, 0.003, Verdict.EQUIVALENT, (0.1, 0.2), 0.01, OPEN),
        (-0.020, -0.010, Verdict.DIFFERENT, None, 0.01, NO),
        (-0.010, 0.010, Verdict.INCONCLUSIVE, None, 0.9, OPEN),
    ],
)
def test_phi_dyn_separates_static_hypotheses_from_a_gain_per_token(
    low, high, verdict, phi, p_adj, said
):
    static = Comparison(
        study="synthetic", term=Term.STATIC, arm="solu_ln", variant="solu_ln", cluster="seed", n=8,
        value=(low + high) / 2, low=low, high=high, unit="nats / token", verdict=verdict, p_adj=p_adj,
        against=TWIN.arm,
    )  # fmt: skip
    rows = [static]
    if phi:
        ends = {"value": sum(phi) / 2, "low": phi[0], "high": phi[1]}
        rows.append(replace(static, term=Term.SHARE, unit="share", verdict=None, **ends))
    against = {YES: NO, NO: YES, OPEN: OPEN}[said]
    assert verdicts(rows, "P8") == (against,) * 3 + (said,) * 2


MISSED = Comparison(
    study="synthetic", term=Term.STATIC, arm="solu_ln", variant="solu_ln", cluster="seed", n=8, value=0.02,
    low=0.01, high=0.03, unit="nats / token", verdict=Verdict.DIFFERENT, p_adj=0.01, against=TWIN.arm,
)  # fmt: skip
"""The best static arm loses .02 nats more than LayerNorm."""
MISSED_SHARE = replace(MISSED, term=Term.SHARE, value=0.5, low=0.3, high=0.7, verdict=None)
AT_EDGE = ChoicePoint(
    study="synthetic", arm="static", setting="lr", x=1e-3, chosen_arm="static", value=3.0,
    unit="nats / token", grid=Grid.UPPER_EDGE,
)  # fmt: skip


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([TWIN], NO),
        ([replace(TWIN, variant="solu_gain")], OPEN),  # it lacks centring, gamma and beta
        ([replace(TWIN, rate="was set by hand")], OPEN),
        ([TWIN, AT_EDGE], OPEN),
        ([TWIN, replace(AT_EDGE, grid=Grid.INSIDE)], NO),
    ],
)
def test_a_static_account_is_contradicted_only_by_a_static_arm_that_could_have_done_as_well(
    more, said
):
    assert verdicts([MISSED, MISSED_SHARE, *more], "P8") == (said,) * 3 + (YES, YES)


def test_a_zero_counts_only_where_ln_finals_part_was_measured():
    """Without |o| / |r0|, ln_final may give each token a scale, and then nothing follows from a zero."""
    zeros = [
        number("scale_swap", "swap, signed", 0.0),
        number("scale_swap", "log(g_u / g_t)", 0.5, statistic="sd"),
        *(number("lateral_inhibition", name, 0.0) for name in ("g const", "Z and g const")),
        replace(MISSED, value=0.0, low=-0.001, high=0.001, verdict=Verdict.EQUIVALENT),
    ]
    believed = passed("scale_swap", "lateral_inhibition")
    sizes = [rescaling(arm, 0.5) for arm in (LN.arm, TWIN.arm)]
    for more, said in ((sizes, YES), ([], OPEN)):
        found = evidence.matrix([LN, TWIN, *believed, *zeros, *more])
        lines = {one.section: seen[0] for one, seen in found if seen}
        assert {lines[name].verdicts[0] for name in ("P5", "P8", "P20")} == {said}
        shown = "\n".join(text for line in lines.values() for text in line.observed)
        assert ("was not measured" in shown) == (said == OPEN)


def test_a_verdict_is_not_read_from_the_note():
    static = Comparison(
        study="synthetic", term=Term.STATIC, arm="solu_ln", cluster="seed", n=8, value=0.002, low=0.001,
        high=0.003, unit="nats / token", verdict=Verdict.DIFFERENT, note="equivalent; best static",
        p_adj=0.01, against=TWIN.arm,
    )  # fmt: skip
    share = replace(static, term=Term.SHARE, value=0.2, low=0.1, high=0.3)
    assert verdicts([static, share], "P8") == (NO, NO, NO, YES, YES)


@pytest.mark.parametrize(
    ("lowest", "residual", "at_high_gain", "said"),
    [
        (0.0, 0.0, 0.0, (YES, YES, OPEN, OPEN, OPEN)),  # a code may lie outside the set
        (0.0, 0.05, 0.1, (OPEN,) * 5),
        (0.200, 0.0, 0.0, (OPEN, OPEN, YES, OPEN, OPEN)),
        (0.200, 0.05, 0.1, (OPEN, OPEN, OPEN, YES, YES)),
        (0.001, 0.0, 0.0, (OPEN,) * 5),  # the interval crosses the margin
        (-0.200, 0.0, 0.1, (OPEN,) * 5),
    ],
)
@pytest.mark.parametrize("same_mass", [0.0, 1.0])
def test_the_low_set_rules_no_smearing_out(lowest, residual, at_high_gain, said, same_mass):
    name, removed = "low_activation_impact", "lowest 90% removed"
    rows = [
        number(name, removed, lowest),
        number(name, f"{removed}, D", residual),
        number(name, f"{removed}, D where the gain is high", at_high_gain),
        number(name, "set: same |n|", same_mass, x=0.9, statistic=""),
    ]
    without_norm = replace(number(name, removed, 0.1), arm="gelu", variant="gelu")
    assert verdicts([GELU, without_norm, *rows], "P9") == said


@pytest.mark.parametrize(("of_gelu", "said"), [(None, OPEN), (0.1, YES), (0.2, OPEN), (0.3, OPEN)])
def test_static_smuggling_must_exceed_what_small_activations_carry_without_a_norm(of_gelu, said):
    name, removed = "low_activation_impact", "lowest 90% removed"
    rows = [number(name, removed, 0.2), number(name, f"{removed}, D", 0.0)]
    if of_gelu is not None:
        rows.append(replace(number(name, removed, of_gelu), arm="gelu", variant="gelu"))
    assert verdicts([GELU, *rows], "P9")[2] == said


@pytest.mark.parametrize(
    ("A", "said"),
    [
        (0.05, (OPEN, OPEN, OPEN, YES, YES)),  # the gain may change an order that nothing reads
        (0.0, (YES, YES, YES, OPEN, OPEN)),  # the gain may matter without changing any order
        (0.01, (OPEN,) * 5),
        (-0.05, (OPEN,) * 5),
    ],
)
def test_specificity_lost_by_the_gain_alone_speaks_against_nothing(A, said):
    assert verdicts([number("specificity", "A (gain only)", A, statistic="")], "P11") == said


@pytest.mark.parametrize(
    ("gain", "both", "said"),
    [
        (0.0, 0.0, NO_GAIN_NEEDED),
        (0.1, 0.1, (OPEN, OPEN, OPEN, YES, OPEN)),
        (0.0, 0.29, (OPEN, OPEN, OPEN, NO, NO)),  # each of Z and g takes the other's place
    ],
)
def test_only_the_cell_with_both_constant_shows_that_both_are_idle(gain, both, said):
    cells = {"g const": gain, "Z and g const": both, "Z const": 0.0}
    rows = [number("lateral_inhibition", name, value) for name, value in cells.items()]
    assert verdicts(rows, "P20") == said


def test_the_names_that_the_matrix_reads_are_those_of_the_probes():
    """Otherwise the report would show a renamed quantity as `not measured` for ever."""
    for name, quantities in {
        "engagement": ["r", "log gain", findings.SHARE_OF_LOSS],
        "scale_freeze": [
            "frozen at geometric mean",
            "frozen at best constant",
            "frozen at best constant, final norm frozen",
            evidence.PER_NEURON,
            evidence.DIFFUSE_CODES,
            "|mlp_out| / |resid_mid|",
        ],
        "scale_swap": ["swap, signed", "swap, signed, diffuse codes", "log(g_u / g_t)"],
        "low_activation_impact": [
            "lowest 90% removed",
            "lowest 90% removed, D",
            "lowest 90% removed, D where the gain is high",
            "set: same |n|",
        ],
        "specificity": ["A (gain only)"],
        "lateral_inhibition": ["g const", "Z and g const"],
    }.items():
        assert set(quantities) <= words_of(name).quantities.keys()


def test_evidence_needs_a_passed_gate():
    found = gain_of(0.9, 0.9, 0.9)
    failed = gate("engagement", "pinned", "within 0.01 of 0", passed=False)
    assert verdicts([*found, failed], "P1") == ()
    shown = evidence_of([*found, failed])
    assert "not citable (control failed)" in shown
    assert "0.9" not in shown
    unasked = {one.section: seen for one, seen in evidence.matrix([LN, *found])}["P1"]
    assert unasked[0].verdicts == (OPEN,) * 5
    assert "no control run" in unasked[0].observed


def evidence_of(records: list[Record]) -> str:
    """Return the matrix as the page shows it."""
    return text(rendered([LN, *records])).split("<h2>Hypotheses")[1].split("</section>")[0]


def test_what_is_missing_is_not_measured():
    shown = evidence_of(gain_of(0.9, 0.9, 0.9))
    n_lines = shown.count("<tr>") - 1
    assert shown.count("not measured</td>") == n_lines - 1
    assert "P23 gap at convergence" in shown


# ---------------------------------------------------------------- token view


def token_view(records: list[TokenValue]) -> str:
    """Return the token view as the page shows it."""
    return text(rendered(records)).split("<h2>Token view</h2>")[1].split("</section>")[0]


def test_a_tokens_text_is_escaped_and_its_spaces_and_ends_of_lines_are_seen():
    texts = [
        "<|BOS|>",
        "<script>alert(1)</script>",
        " a  b",
        "x\n\ny",
        '" onfocus="evil',
        "\u202e",
        "\ud800",
    ]
    shown = token_view(token_values(texts))
    shown.encode()  # raises if half a surrogate pair is left, which cannot be written
    spans = [markup.unescape(s) for s in re.findall(r"<span [^>]*>([^<]*)</span>", shown)]
    assert spans == [*texts[:3], "x\u21b5\n\u21b5\ny", texts[4], r"\u202e", r"\ud800"]
    assert "<script" not in shown
    assert not re.search(r'"\s+onfocus', shown)
    assert re.search(r"\.words \{ white-space: pre-wrap", rendered([RUN]))


def test_a_token_tells_all_three_numbers_to_pointer_and_keyboard():
    shown = token_view(token_values(["<|BOS|>", "the", " end"]))
    titles = [markup.unescape(t) for t in re.findall(r'tabindex="0"[^>]*title="([^"]*)"', shown)]
    assert titles[1] == (
        "1 \u201cthe\u201d: gain 350 1 / activation, r 0.1 share, ablation effect -1 nats"
    )
    assert titles[2].endswith("ablation effect none")


def test_colours_are_scaled_after_bos_and_around_0_for_the_effect():
    shown = token_view(token_values(["<|BOS|>", "a", "b", "c", "d", "e"]))
    styles = re.findall(r'<span tabindex="0" class="([^"]*)"', shown)
    sky, orange = "56b4e9", "e69f00"
    assert f"gain-{sky}" in styles[-1]
    assert "gain-ffffff" in styles[1]
    assert "gain-ffffff" in styles[0]  # BOS is below all other tokens
    assert "effect-ffffff" in styles[2]  # 0
    assert f"effect-{sky}" in styles[4]
    assert "effect" not in styles[5]
    assert f"effect-{orange}" in styles[0]  # -2, the lowest effect
    page = rendered(token_values(["<|BOS|>", "a", "b", "c", "d", "e"]))
    for each in {each for one in styles for each in one.split()}:
        name, colour = each.split("-")
        rule = f"#by-{name}:checked ~ details .words .{name}-{colour} {{ background: #{colour}; }}"
        assert rule in page
    assert "gain, 1 / activation: 350" in shown
    assert "ablation effect, nats: -2" in shown


def test_text_is_readable_on_every_colour():
    def luminance(colour: tuple[int, int, int]) -> float:
        linear = [c / 255 / 12.92 if c < 11 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink = luminance((0x22, 0x22, 0x22))
    for colour in (tokens.LOW, tokens.HIGH, tokens.WHITE):
        assert (luminance(colour) + 0.05) / (ink + 0.05) > 4.5  # WCAG AA


def test_a_quantity_that_is_the_same_everywhere_has_no_colour():
    flat = [
        replace(row, value=316.0 * (1 + 1e-9 * row.place)) if row.quantity == "gain" else row
        for row in token_values(["<|BOS|>", "a", "b"])
    ]
    shown = token_view(flat)
    assert "gain-" not in shown
    assert "gain: 316 1 / activation at every token after BOS" in shown


def test_the_token_view_has_a_block_an_arm_and_shows_the_first_quantity_without_a_script():
    more = [replace(row, seed=1, run="solu_ln-s1", text="other") for row in token_values(["x"])]
    texts = [*token_values(["a", "b"]), *token_values(["a", "b"], "gelu"), *more]
    shown = token_view([*texts, LN])
    assert re.findall(r"<details open><summary>(.*?)</summary>", shown) == ["solu_ln, seed 0"]
    assert re.findall(r"<summary>(.*?)</summary>", shown) == ["solu_ln, seed 0", "gelu, seed 0"]
    assert re.findall(r'id="(by-\w+)" checked', shown) == ["by-gain"]
    assert "other" not in shown
    assert "<script" not in shown


# ---------------------------------------------------------------- doses


def dosed(kappas: dict[str, float], n_seeds: int = 2) -> list[Measurement]:
    """Return r and kappa of solu_ln arms, whose kappas are given by name; r is 1 / (1 + kappa)."""
    rows = []
    for arm, kappa in kappas.items():
        for seed in range(n_seeds):
            run = {"run": f"{arm}-s{seed}", "arm": arm, "seed": seed, "statistic": "median"}
            rows.append(number("engagement", "kappa", kappa, **run))
            rows.append(number("engagement", "r", 1 / (1 + kappa), **run))
    return rows


def test_arms_at_several_doses_are_drawn_against_them_one_line_a_seed():
    rows = dosed({"solu_ln-k42": 42.0, "solu_ln-k4": 4.2, "solu_ln-k0": 4.2e-5})
    static = replace(rows[0], arm="gelu", run="gelu-s0", variant="gelu", quantity="gain", value=1.0)
    spec = Figure("", ("r",), statistic="median")
    look = figures.styles([*rows, static])
    drawn = figures.against_dose(rows, spec, look, figures.doses([*rows, static]))
    assert [list(line.x) for line in drawn.data] == [[4.2e-5, 4.2, 42.0]] * 2
    for line in drawn.data:
        assert line.mode == "lines+markers"
        assert list(line.y) == pytest.approx([1 / (1 + x) for x in line.x])
        assert list(line.error_y.array) == pytest.approx([0.0001] * 3)
    assert drawn.layout.xaxis.type == "log"


def test_an_arm_with_an_entropy_penalty_is_on_no_line_of_doses():
    rows = dosed({"solu_ln-k42": 42.0, "solu_ln-k4": 4.2, "solu_ln-k1": 1.0, "solu_ln-k0": 4.2e-5})
    penalised = replace(LN, arm="solu_ln-k4", values={"kappa": 4.2, "entropy_penalty": 0.1})
    spec = Figure("", ("r",), statistic="median")
    drawn = figures.against_dose(
        rows, spec, figures.styles(rows), figures.doses([*rows, penalised])
    )
    assert [list(line.x) for line in drawn.data] == [[4.2e-5, 1.0, 42.0]] * 2


def test_with_one_dose_a_variant_only_the_dots_are_drawn_and_the_caption_has_the_doses():
    rows = dosed({"solu_ln": 41.94})
    gain = {"quantity": "gain", "unit": "1 / activation"}
    twin = replace(rows[0], arm="solu_gain", run="solu_gain-s0", variant="solu_gain", value=316.0)
    doses = figures.doses([*rows, replace(twin, **gain), replace(rows[0], value=300.0, **gain)])
    assert (
        doses.caption()
        == "Dose (kappa, or the gain of arms without an epsilon): solu_gain: gain 316; solu_ln: kappa 41.9."
    )
    spec = Figure("", ("r",), statistic="median")
    assert not figures.against_dose(rows, spec, figures.styles(rows), doses).data
    shown = section([*rows, replace(twin, **gain)], "engagement")
    assert (
        "Dose (kappa, or the gain of arms without an epsilon): solu_gain: gain 316; solu_ln: kappa 41.9."
        in shown
    )
    assert "against the dose" not in shown


# ---------------------------------------------------------------- figures and terminal


def test_figures_are_drawn_from_their_own_data_and_those_after_the_first_are_folded(html):
    drawn = figures_in(html)
    assert len(drawn) == html.count('class="plot"')
    assert all(figure.data for figure in drawn)
    engagement = html[html.index("<h2>P1 ") :].split("</section>")[0]
    assert engagement.index('class="plot"') < engagement.index("<summary>More figures")
    assert engagement.count('class="plot"') == 5


def test_estimates_are_drawn_though_they_have_no_statistic():
    rows = [number("rotation", "D", 0.1, statistic="", x=x) for x in (1.0, 2.0)]
    point = number("specificity", "A (gain only)", 0.1, statistic="")
    assert figures.draw(rows, Figure("", ("D",), kind="curve")).data
    assert figures.draw([point], Figure("", ("A (gain only)",))).data
    shown = section([point], "specificity")
    assert '<th scope="row" class="text">A (gain only), nats<br>' in shown


def test_kinds_of_one_curve_share_their_axis():
    rows = [
        number("specificity", "specificity", 0.1 * x, x=x, statistic="", group=group)
        for group in ("before", "both")
        for x in (1.0, 2.0)
    ]
    drawn = figures.draw(rows, Figure("", ("specificity",), kind="curve"))
    assert drawn.layout.yaxis2.matches == "y"


def test_dots_show_every_seed_with_its_interval(rows):
    mine = [row for row in of_kind(rows, Measurement) if row.probe == "engagement"]
    drawn = figures.draw(mine, Figure("r", ("r",), statistic="median", streams=("natural",)))
    assert isinstance(drawn, go.Figure)
    assert len(drawn.data) == 6
    shown = sorted(x for trace in drawn.data for x in trace.x)
    wanted = [r for r in mine if (r.quantity, r.statistic) == ("r", "median")]
    wanted = [r for r in wanted if (r.stream, r.positions) == ("natural", "not BOS")]
    assert shown == sorted(r.value for r in wanted)
    gaps = [gap for trace in drawn.data for gap in trace.error_x.array]
    assert sorted(gaps) == pytest.approx(sorted(r.high - r.value for r in wanted))


def test_quartiles_are_panels(rows):
    mine = [row for row in of_kind(rows, Measurement) if row.probe == "scale_freeze"]
    drawn = figures.draw(mine, Figure("", ("frozen at geometric mean",), group="gain"))
    titles = [annotation.text for annotation in drawn.layout.annotations]
    assert titles == ["gain Q1", "gain Q2", "gain Q3", "gain Q4"]


def test_curves_have_one_line_a_run_in_each_stream(rows):
    mine = [row for row in of_kind(rows, Measurement) if row.probe == "gain_variation"]
    drawn = figures.draw(mine, Figure("", ("last token",), kind="curve"))
    lines = [trace for trace in drawn.data if trace.hovertemplate]
    assert len(lines) == 12 * 3
    assert sum(trace.showlegend for trace in lines) == 6


def test_an_arm_keeps_its_colour_through_the_page(rows):
    look = figures.styles(rows)
    assert len({style.colour for style in look.values()}) == 6
    mine = [row for row in of_kind(rows, Measurement) if row.probe == "engagement"]
    mine = [row for row in mine if row.arm == "solu_ln"]
    drawn = figures.draw(mine, Figure("", ("r",), statistic="median"), look)
    assert {trace.marker.color for trace in drawn.data} == {look["solu_ln"].colour}


def test_more_arms_than_colours_are_told_apart_by_shape():
    arms = [replace(RUN, arm=f"{i:02d}") for i in range(20)]
    styles = figures.styles(arms).values()
    assert len({(style.colour, style.symbol) for style in styles}) == 20
    assert len({(style.colour, style.dash) for style in styles}) == 20  # of lines without symbols


def test_a_zero_is_not_drawn_on_a_logarithmic_axis_and_ticks_are_round():
    spec = Figure("", ("r",), kind="curve", log_y=True)
    rows = [number("engagement", "r", value, 0.0, x=x) for x, value in ((1, 0.0), (2, 1e-4))]
    drawn = figures.draw(rows, spec)
    assert drawn.data[-1].y == (None, 1e-4)
    assert drawn.layout.yaxis.title.text.endswith("(log; 0 not drawn)")
    negative = [replace(rows[0], value=-1.0), rows[1]]
    assert figures.draw(negative, spec).layout.yaxis.type is None
    dots = replace(spec, kind="dots")
    assert figures.draw([replace(row, x=None) for row in rows], dots).layout.xaxis.type is None
    for values in ((1e-7, 1e-1), (210.0, 316.0), (39.0, 39.4)):
        rows = [number("engagement", "r", value, 0.0, x=x) for x, value in enumerate(values)]
        axis = figures.draw(rows, spec).layout.yaxis
        assert axis.type == "log"
        assert len(axis.tickvals) >= 2
        assert not {"4", "3"} & set(axis.ticktext)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("SoLU, one", "SoLU, one"),
        ("SoLU + LN, kappa 41.9", "SoLU + LN,<br>kappa 41.9"),
        ("a name that is long and has no comma", "a name that is long and has no comma"),
        ("SoLU + LN, scale without gradient, kappa 4e-5, alpha 0.5",
         "SoLU + LN, scale without gradient,<br>kappa 4e-5, alpha 0.5"),
        ("<b>bold</b>, of another", "&lt;b&gt;bold&lt;/b&gt;,<br>of another"),
    ],
)  # fmt: skip
def test_a_long_name_of_an_arm_has_two_lines_that_are_about_equal(name, label):
    rows = [number("engagement", "r", 0.5, arm=name, statistic="median")]
    assert figures.draw(rows, Figure("", ("r",), statistic="median")).layout.yaxis.ticktext == (
        label,
    )


def test_an_axis_shared_by_curves_does_not_match_itself():
    """Plotly logs a warning for an axis that matches itself."""
    rows = [number("engagement", "r", 0.5, x=x, stream=stream) for x in (0, 1) for stream in "ab"]
    layout = figures.draw(rows, Figure("", ("r",), kind="curve", relative=True)).layout
    assert (layout.yaxis.matches, layout.yaxis2.matches) == (None, "y")


def test_an_interval_that_the_frame_cuts_has_an_arrow():
    row = Comparison(
        study="s", term=Term.DIFFERENCE, arm="a", against="b", value=0.0, low=-9.0, high=9.0, unit="nats",
        cluster="seed",
    )  # fmt: skip
    near = replace(row, low=-0.01, high=0.01, cluster="document")
    look = figures.styles([row])
    arrows = figures.differences([row, near], look).data[-1]
    assert arrows.marker.symbol == ("triangle-left", "triangle-right")
    low, high = figures.differences([row, near], look).layout.xaxis.range
    assert arrows.x == pytest.approx((low, high), abs=0.003 * (high - low))


@pytest.mark.parametrize("value", [0.0, 5.2068134, -1 / 3, 1234.5678])
def test_each_arrow_lies_inside_its_frame_on_the_page_too(value):
    """Plotly draws no mark outside the frame, and the page rounds the marks and not the frame."""
    row = Comparison(
        study="s", term=Term.DIFFERENCE, arm="a", against="b", value=value, low=value - 1e5, high=value + 1e5,
        unit="nats", cluster="seed",
    )  # fmt: skip
    for scale in (1e-5, 1 / 7):
        near = replace(row, low=value - scale, high=value + scale, cluster="document")
        drawn = figures.differences([row, near], figures.styles([row]))
        content = json.loads(packing.as_text(drawn))
        low, high = content["layout"]["xaxis"]["range"]
        left, right = content["data"][-1]["x"]
        assert low < left < right < high


def test_a_gain_that_hardly_varies_has_no_colours():
    flat = [
        replace(row, value=39.0 + 0.1 * row.place) if row.quantity == "gain" else row
        for row in token_values(["<|BOS|>", "a", "b", "c"])
    ]
    shown = token_view(flat)
    assert "gain-" not in shown
    assert "39.1 to 39.3 after BOS, too little to matter: no colours" in shown


def test_figures_without_rows_are_empty(rows):
    assert not figures.draw(rows, Figure("nothing", ("no such quantity",))).data
    assert not figures.differences([], {}).data


def test_the_terminal_table_has_each_arm_and_the_headline(rows):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table(rows))
    shown = console.export_text()
    for arm in SIX:
        assert arm in shown
    flat = " ".join(shown.split())
    for sentence in words.headline(rows):
        assert " ".join(sentence.split()) in flat


def test_a_sweep_ends_with_the_answer_how_sure_it_is_and_two_commands(
    some: list[Record], tmp_path: Path
) -> None:
    results.write(tmp_path / "results.jsonl", some)
    assert report.brief(tmp_path, Path("runs/demo")) == [
        f"answer: {words.answer(some)}",
        f"how sure: {'; '.join(words.certainty(some))}. {words.not_shown(some)}",
        f"report: {tmp_path / 'report.html'}",
        f"table: soluscope report {tmp_path}",
        "states of the runs: soluscope sweep --status runs/demo",
    ]
    assert "solu_ln" in words.answer(some)
    assert (tmp_path / "report.html").is_file()


def test_the_answer_in_the_terminal_begins_with_the_warnings_that_limit_it(
    some: list[Record], tmp_path: Path
) -> None:
    untuned = [
        replace(each, rate="was set by hand") if isinstance(each, Setting) else each
        for each in some
    ]
    results.write(tmp_path / "results.jsonl", untuned)
    answer = report.brief(tmp_path, tmp_path)[0]
    assert answer.startswith("answer: A learning rate that is not tuned can reverse the answer")
    assert answer.endswith(words.answer(untuned))


def test_the_terminal_does_not_read_markup_in_names(rows):
    marked = [replace(row, arm="[red]gelu[/]") if row.arm == "gelu" else row for row in rows]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table(marked))
    assert "[red]gelu[/]" in console.export_text()


def test_confirmatory_tests_have_their_own_table():
    made = sweep(SIX, {})
    confirmed = Comparison(
        study="synthetic", term=Term.PROBE, probe="specificity", quantity="A (gain only)",
        arm="solu_ln", variant="solu_ln", value=0.02, low=-0.1, high=0.14,
        n=2, unit="share", cluster="seed", note="sign-flip p = 0.5; Holm-adjusted p = 1 over 3 tests",
    )  # fmt: skip
    assert "Probes before and after training" not in text(rendered(made))
    body = text(rendered([*made, confirmed]))
    assert "solu_ln, trained minus untrained: specificity: A (gain only)" in body
    assert "0.02 [-0.1, 0.14]" in body
    assert "Holm-adjusted p = 1 over 3 tests" in body


# ---------------------------------------------------------------- sweeps


def sweep(
    arms: dict[str, float],
    settings: dict[str, dict[str, float | str]],
    n_seeds: int = 3,
    **more: Lineage,
) -> list[Record]:
    """Return the comparisons of a study of these arms, and the median r of each run."""
    losses = make_losses(arms, n_seeds, seed_noise=0.0005, settings=settings)
    made = compare("synthetic", losses, "abc1234", **more)
    r = {"statistic": "median", "unit": "share"}
    runs = losses[["run", "arm", "variant", "seed"]].drop_duplicates().itertuples(index=False)
    for i, (run, arm, variant, seed) in enumerate(runs):
        named = {"run": run, "arm": arm, "variant": variant, "seed": int(seed)}
        made.append(number("engagement", "r", 0.9 - 0.001 * i, 0.01, **r, **named))
    return made


def headings(rows: list[Record]) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", text(rendered(rows)))


def drawn(rows: list[Record], heading: str) -> list[go.Figure]:
    """Return the figures of a section of the page, as a browser would draw them."""
    html = rendered(rows)
    return figures_in(html, html.split(f"<h2>{heading}</h2>")[1].split("</section>")[0])


def points(figure: go.Figure) -> set[tuple[float, float]]:
    """Return the points that are joined by lines."""
    joined = (trace for trace in figure.data if trace.mode == "lines+markers")
    return {(x, y) for trace in joined for x, y in zip(trace.x, trace.y, strict=True)}


def rings(figure: go.Figure) -> set[tuple[float, float]]:
    ringed = (trace for trace in figure.data if trace.marker.symbol == "circle-open")
    return {(x, y) for trace in ringed for x, y in zip(trace.x, trace.y, strict=True)}


def printed(rows: list[Record]) -> list[str]:
    """Return the lines of the report in the terminal."""
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table(rows))
    return console.export_text().splitlines()


def cells(rows: list[Record]) -> list[list[str]]:
    """Return the cells of each line of the report in the terminal; lines outside tables have none."""
    return [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in printed(rows)]


@pytest.fixture(scope="module")
def swept() -> list[Record]:
    """Return a sweep of four rates, with all optima but solu's inside the grid, and LayerNorm at two kappas."""
    arms, told = tuned(**OPTIMA)
    for arm in list(arms):
        if arm.startswith("solu_ln"):
            told[arm] |= {"kappa": 0.42}
            other = arm.replace("solu_ln", "solu_ln-kappa42")
            arms[other] = arms[arm] + 0.01
            told[other] = told[arm] | {"kappa": 42.0, "family": "solu_ln-kappa42"}
        if arm.startswith("solu_frozen_ln"):
            told[arm] |= {"gain": 30.0, "matched_kappa": 0.42}
            for gain, more in ((4.0, 0.01), (200.0, 0.02)):
                other = arm.replace("solu_frozen_ln", f"solu_frozen_ln-gain{gain}")
                arms[other] = arms[arm] + more
                told[other] = told[arm] | {"gain": gain, "family": f"gain {gain}"}
    return sweep(arms, told)


def test_a_study_of_one_rate_and_kappa_has_no_sections_on_sweeps(some):
    assert not {"Tuning", "Dose: kappa"} & set(headings(some))
    assert "common rate" not in text(rendered(some))


def test_the_curves_of_rate_and_gain_are_those_of_the_rows(swept):
    by_rate, by_gain = drawn(swept, "Tuning")
    for figure, setting in ((by_rate, "lr"), (by_gain, "gain")):
        curve = [row for row in of_kind(swept, ChoicePoint) if row.setting == setting]
        assert as_shown(points(figure)) == as_shown({(row.x, row.value) for row in curve})
        chosen = {(row.x, row.value) for row in curve if row.arm == row.chosen_arm}
        assert as_shown(rings(figure)) == as_shown(chosen)
    assert {axis.type for axis in by_rate.select_xaxes() if axis.title.text} == {"log"}
    lines = [trace for trace in by_rate.data if trace.mode == "lines+markers"]
    assert {trace.name for trace in lines} == {
        "gelu", "solu", "solu_frozen_ln, gain 4", "solu_frozen_ln, gain 30", "solu_frozen_ln, gain 200",
        "solu_ln, kappa 0.42", "solu_ln, kappa 42",
    }  # fmt: skip
    assert all(len(trace.x) == 4 for trace in lines)
    assert all(any(trace.error_y.array) for trace in lines)


def test_arms_are_known_by_their_roles_and_not_by_their_names(swept, tmp_path):
    """Other names for the static twin and for the per-token arm change nothing but these names on the page."""
    names = {"solu_frozen_ln": "solu_f", "solu_ln": "solu_x"}

    def renamed(text: str) -> str:
        for old, new in names.items():
            text = text.replace(old, new)
        return text

    path = tmp_path / "results.jsonl"
    results.write(path, [*swept, *CITED])
    path.write_text(renamed(path.read_text()))
    shown = rendered(results.read(path))
    assert text(shown) == renamed(text(rendered([*swept, *CITED])))
    assert re.search(
        r"The static twin of solu_x\S* is solu_f\S*, trained with one gain", text(shown)
    )


def test_one_kappa_of_each_of_two_variants_is_no_dose():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln": 3.02, "solu_rms": 3.05}
    told = {"solu_ln": {"kappa": 0.42}, "solu_rms": {"kappa": 42.0}}
    made = sweep(arms, told, solu_rms=replace(LINEAGES["solu_ln"], twin=""))
    assert findings.by_kappa(made) == {}
    assert findings.per_token(made) == ["solu_ln", "solu_rms"]
    for sentence, arm in zip(words.headline(made)[:2], ("solu_ln", "solu_rms"), strict=True):
        assert sentence.startswith(f"The norm of {arm} lowers the loss (3 seeds)")


def test_an_optimum_at_the_edge_comes_before_all_verdicts(swept):
    first = words.headline(swept)[0]
    assert first.startswith("Do not rely on any comparison here yet")
    assert (
        "for solu-lr0.008 (lr 0.008 is the highest of 0.001, 0.002, 0.004, 0.008). Widen" in first
    )
    body = text(rendered(swept))
    assert (
        body.count(escape(first)) == 3
    )  # on the first screen, under Findings, and in the tab Tuning
    assert '<p class="warn">Do not rely' in body


def test_optima_inside_their_grids_leave_the_verdict_first():
    arms, told = tuned(**OPTIMA | {"solu": 0.004})
    made = sweep(arms, told)
    assert "Do not rely" not in text(rendered(made))
    assert words.headline(made)[0].startswith(
        "The norm of solu_ln-lr0.002 lowers the loss (3 seeds)"
    )


BY_HAND = "was set by hand"


def gains(
    *tried: float, rate: str = ""
) -> tuple[dict[str, float], dict[str, dict[str, float | str]]]:
    """Return arms at one rate. The static arms have these gains, and each is better than the one before."""
    arms = {"solu": 3.1, "solu_ln": 3.02}
    told: dict[str, dict[str, float | str]] = {arm: {"rate": rate} for arm in arms}
    for i, gain in enumerate(tried):
        arms[f"solu_gain-{gain:g}"] = 3.06 - 0.01 * i
        told[f"solu_gain-{gain:g}"] = {"gain": gain, "rate": rate}
    return arms, told


def test_a_gain_at_the_edge_unsettles_what_needs_the_static_arm_and_nothing_else():
    sentences = words.headline(sweep(*gains(8.0, 32.0, 128.0)))
    assert sentences[0].startswith(
        "A better static arm may exist, so static - LN and Phi_dyn are not settled"
    )
    assert "for solu_gain-128 (gain 128 is the highest of 8, 32, 128). Widen" in sentences[0]
    assert sentences[1].startswith("The norm of solu_ln lowers the loss (3 seeds)")
    assert "Do not rely" not in " ".join(sentences)


def test_two_gains_are_no_grid_with_an_edge():
    made = sweep(*gains(8.0, 32.0))
    assert words.headline(made)[0].startswith("The norm of solu_ln lowers the loss (3 seeds)")
    assert "edge of its grid" not in text(rendered(made))
    assert ["solu_gain-32", "gain 32", "8, 32", "3", "no grid"] in cells(made)


def test_two_rates_are_called_no_grid():
    arms, told = tuned(**OPTIMA)
    arms = {arm: loss for arm, loss in arms.items() if arm.endswith(("lr0.002", "lr0.004"))}
    first = words.headline(sweep(arms, told))[0]
    assert first.startswith("Fewer than three learning rates were tried")
    assert all(arm in first for arm in ("gelu-lr0.002", "solu-lr0.004", "solu_ln-lr0.002"))
    assert first.count("(0.002, 0.004)") == 1


def test_arms_at_one_edge_of_one_grid_are_named_together():
    arms, told = tuned(gelu=0.001, solu=0.008, solu_ln=0.002, solu_frozen_ln=0.008)
    first = words.headline(sweep(arms, told))[0]
    assert (
        "for gelu-lr0.001 (lr 0.001 is the lowest of 0.001, 0.002, 0.004, 0.008); solu-lr0.008,"
        " solu_frozen_ln-lr0.008 (lr 0.008 is the highest of 0.001, 0.002, 0.004, 0.008). Widen"
    ) in first


def test_gains_at_one_rate_are_not_presented_as_tuned():
    made = sweep(*gains(8.0, 32.0, 128.0, rate=BY_HAND))
    once = (
        "Trained at one untuned rate only: solu, solu_gain-128, solu_gain-32, solu_gain-8, solu_ln."
    )
    assert once in words.headline(made)
    body = text(rendered(made))
    assert "each at its best rate" not in body
    assert "all at the rate 0.002, untuned" in drawn(made, "Tuning")[0].to_json()
    assert once in body.split("<h2>Tuning</h2>")[1].split("<h2>")[0]


def test_gains_at_their_best_rates_are_presented_as_such(swept):
    assert "each at its best rate" in drawn(swept, "Tuning")[1].to_json()
    assert "one rate only" not in text(rendered(swept))


def test_arms_at_one_rate_that_was_tuned_before_are_not_listed():
    made = sweep(*gains(8.0, 32.0, 128.0))
    assert "one untuned rate" not in " ".join(words.headline(made))


def test_a_static_arm_matched_to_another_kappa_is_no_twin():
    arms = {
        "solu": 3.1,
        "solu_ln-a": 3.02,
        "solu_ln-b": 3.03,
        "solu_frozen_ln-a": 3.04,
        "solu_frozen_ln-b": 3.05,
    }
    told = {
        f"{name}-{arm}": {key: kappa}
        for arm, kappa in (("a", 0.42), ("b", 42.0))
        for name, key in (("solu_ln", "kappa"), ("solu_frozen_ln", "matched_kappa"))
    }
    made = sweep(arms, told)
    assert findings.twins(made, "solu_ln-a") == ["solu_frozen_ln-a"]
    assert findings.twins(made, "solu_ln-b") == ["solu_frozen_ln-b"]
    said = [each for each in words.headline(made) if "static twin" in each]
    assert [re.findall(r"solu_\w+-(\w)", each)[:2] for each in said] == [["a", "a"], ["b", "b"]]
    told["solu_frozen_ln-b"] = {"gain": 8.0}
    assert findings.twins(sweep(arms, told), "solu_ln-b") == []


def glance(records: list[Record]) -> list[list[str]]:
    """Return the lines of the table at a glance; [] without one."""
    shown = answer.glance(records, findings.tuned(records))
    found = [each for each in shown if isinstance(each, Table)]
    return [[str(cell) for cell in line] for each in found for line in each.lines]


def test_a_table_shows_each_layer_norm_at_a_glance_beside_its_untrained_twin():
    made = sweep({"solu": 3.1, "solu_frozen_ln": 3.04, "solu_ln": 3.02}, {})
    frozen = number("scale_freeze", "frozen at geometric mean", 0.00116, statistic="mean")
    shared = {each.name for each in fields(Untrained)} & {each.name for each in fields(Measurement)}
    before = Untrained(**{name: getattr(frozen, name) for name in shared}, difference=0.00117)
    size = number("scale_freeze", "|mlp_out| / |resid_mid|", 24.7, statistic="median")
    measured = [frozen, replace(before, value=-0.00001), size]
    lines = glance([*made, *measured, *passed("scale_freeze")])
    assert ["freezing the gain costs, nats", "0.0012 (0.0000)"] in lines
    assert ["|mlp_out| / |resid_mid|", "24.7"] in lines
    assert lines[-1][0].startswith("training with one gain instead costs")
    assert lines[-1][1].startswith("0.02")
    assert not glance([*made, *measured])  # without controls nothing is cited


def test_the_first_screen_says_which_questions_stay_open():
    made = sweep({"solu": 3.1, "solu_frozen_ln": 3.04, "solu_ln": 3.02}, {})
    left = words.not_shown(made)
    assert "d_model 64, d_mlp 256, tokens 1,843,200 here" in left
    assert "solu_gain (what solu_gain adds), which this study lacks" in left
    assert left in text(rendered(made))
    assert words.not_shown(sweep({"gelu": 3.0, "solu": 3.1}, {})) == ""


def test_kappas_at_one_rate_are_said_to_be():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln-a": 3.02, "solu_ln-b": 3.05}
    told = {arm: {"rate": BY_HAND} for arm in arms}
    told["solu_ln-a"] |= {"kappa": 0.42}
    told["solu_ln-b"] |= {"kappa": 42.0}
    made = sweep(arms, told)
    said = words.headline(made)
    once = "Trained at one untuned rate only: solu, solu_gain, solu_ln-a, solu_ln-b."
    assert once in said
    assert not said[0].startswith("Trained")
    assert once in text(rendered(made)).split("<h2>Dose: kappa</h2>")[1].split("<h2>")[0]


def _around(body: str, heading: str) -> tuple[str, str, str]:
    """Return the page before a section, the section, and the page after it, without the figures' texts."""
    body = re.sub(r'(class="plot"[^>]*>)[^<]*', r"\1", body)
    before, after = body.split(f"<h2>{heading}</h2>")
    section, rest = after.split("</section>", 1)
    return before, section, rest


def test_a_rate_that_lacks_seeds_is_in_the_table_and_not_on_the_curve():
    arms, told = tuned(**OPTIMA)
    losses = make_losses(arms, 3, settings=told)
    lacking = "solu_ln-lr0.008"
    made = compare("synthetic", losses[(losses.arm != lacking) | (losses.seed == 0)], "abc1234")
    (by_rate,) = drawn(made, "Tuning")
    left_out = next(row for row in of_kind(made, ChoicePoint) if row.arm == lacking)
    assert not as_shown({(left_out.x, left_out.value)}) & as_shown(points(by_rate))
    body = text(rendered(made))
    before, tuning, rest = _around(body, "Tuning")
    assert "not eligible: 1 of 3 seeds" in tuning
    assert lacking not in before + rest.split("<h2>Runs and code</h2>")[0]


def test_arms_that_share_no_seed_are_named_in_the_headline():
    losses = make_losses(
        {"solu": 3.1, "solu_gain": 3.06, "solu_frozen_ln": 3.04, "solu_ln": 3.02}, 4
    )
    apart = (losses.arm == "solu_gain") & (losses.seed < 2)
    apart |= (losses.arm == "solu_frozen_ln") & (losses.seed >= 2)
    made = compare("s", losses[~apart], "abc1234")
    assert words.headline(made)[0].startswith(
        "No choice was made between solu_frozen_ln, solu_gain: they share no seed"
    )


def test_the_page_compares_arms_at_the_rates_that_were_chosen(swept):
    passed_over = {f"gelu-lr{lr}" for lr in (0.001, 0.004, 0.008)}
    before, tuning, rest = _around(text(rendered(swept)), "Tuning")
    others = before + rest.split("<h2>Runs and code</h2>")[0]
    for arm in passed_over:
        assert arm in tuning
        assert arm not in others
    assert "gelu-lr0.002" in others


def test_phi_dyn_is_drawn_against_kappa_and_against_a_common_rate(swept):
    (dose,) = drawn(swept, "Dose: kappa")
    kappa = {row.arm: row.values.get("kappa") for row in of_kind(swept, Setting)}
    chosen = {"solu_ln-lr0.002", "solu_ln-kappa42-lr0.002"}
    wanted = {
        (kappa[row.arm], row.value)
        for row in of_kind(swept, Comparison)
        if row.arm in chosen and row.cluster == "seed" and row.lr is None
        if row.term in (Term.LOSS, Term.STATIC, Term.SHARE)
    }
    r = {
        (kappa[row.arm], row.value)
        for arm in chosen
        for row in findings.engagement(swept, arm, "not BOS")
    }
    assert len(wanted) == 6
    assert len(r) == 6
    assert as_shown(points(dose)) == as_shown(wanted | r)
    *_, common = drawn(swept, "Phi_dyn and its terms")
    at_rates = {
        (row.lr, row.value)
        for row in of_kind(swept, Comparison)
        if row.lr is not None and row.cluster == "seed" and row.value is not None
    }
    assert as_shown(points(common)) == as_shown(at_rates)
    assert len({x for x, _ in at_rates}) == 4


def test_an_undefined_phi_dyn_has_no_point_and_is_named():
    arms = {"solu": 3.03, "solu_gain": 3.06, "solu_ln-a": 2.98, "solu_ln-b": 3.04}
    told = {"solu_ln-a": {"kappa": 0.42}, "solu_ln-b": {"kappa": 42.0}}
    made = sweep(arms, told, n_seeds=8)
    assert "Phi_dyn is undefined at kappa 42; the reasons are in the tab Answer." in text(
        rendered(made)
    )
    (figure,) = drawn(made, "Dose: kappa")
    (phi,) = (row for row in findings.comparisons(made, Term.SHARE) if row.value is not None)
    assert as_shown({(0.42, phi.value)}) <= as_shown(points(figure))


def test_one_size_has_its_own_figures_and_terminal_table():
    small = {f"{arm}-d64": loss for arm, loss in SIX.items()}
    large = {f"{arm}-d128": loss - 0.5 for arm, loss in SIX.items()}
    made = sweep(small | large, dict.fromkeys(large, LARGE))
    of_small, of_large = drawn(made, "Paired differences")
    for figure, mine, other in ((of_small, "-d64", "-d128"), (of_large, "-d128", "-d64")):
        shown = figure.to_json()
        assert mine in shown
        assert other not in shown
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table(made))
    shown = console.export_text()
    assert shown.index("d_model 64, d_mlp 256, n_heads 4") < shown.index("solu_ln-d64")
    assert shown.index("solu_ln-d64") < shown.index("d_model 128, d_mlp 512, n_heads 8")
    assert len(re.findall(r"minus solu_ln-d64 *\u2503", shown)) == 1


def test_the_terminal_says_what_was_chosen_and_whether_it_is_at_the_edge(swept):
    lines = cells(swept)
    grid = "0.001, 0.002, 0.004, 0.008"
    assert ["solu-lr0.008", "lr 0.008", grid, "3", "AT THE UPPER EDGE"] in lines
    assert ["solu_ln-lr0.002", "lr 0.002", grid, "3", "inside"] in lines
    assert ["solu_frozen_ln-lr0.004", "gain 30", "4, 30, 200", "3", "inside"] in lines
    doses = [line for line in lines if line and line[0] in ("0.42", "42")]
    assert [len(line) for line in doses] == [4, 4]
    assert any("more in the report" in line for line in printed(swept))


def test_names_in_sweeps_are_escaped(swept):
    bad = "<b>x</b>"
    names = ("arm", "variant", "against", "chosen_arm")

    def marked_up(record: Record) -> Record:
        its = {name: getattr(record, name) for name in names if hasattr(record, name)}
        return replace(record, **{name: text.replace("gelu", bad) for name, text in its.items()})

    marked = [marked_up(record) for record in swept]
    assert bad not in text(rendered(marked))
    for figure in drawn(marked, "Tuning"):
        assert bad not in str(figure.to_plotly_json())
