"""The page and its sentences, from made-up rows; no model is involved."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from rich.console import Console
from test_compare import SIX, make_losses

from soluscope import plugins, report, results
from soluscope.compare import UNDEFINED, compare
from soluscope.errors import UserError
from soluscope.probes import Figure
from soluscope.report import figures, words
from soluscope.results import Row

LEVELS = {"r": 0.9, "gain": 300.0, "kappa": 42.0, "max_p": 0.05, "log_z": 6.0, "k_eff": 120.0}
POSITIONS = ("all", "BOS", "not BOS", "1", "2-15", ">=16")


def make_rows(
    arms: dict[str, float] = SIX,
    n_seeds: int = 2,
    seed_noise: float = 0.004,
    r: float = 0.9,
    freeze: float = 0.0001,
    worse: dict[str, float] | None = None,
) -> list[Row]:
    """All rows that a study of these arms gives, with r and the cost of a freeze as told."""
    losses = make_losses(arms, n_seeds, seed_noise=seed_noise, document_noise=0.002, worse=worse)
    rows = compare("synthetic", losses, "abc1234")
    random = np.random.default_rng(1)
    for (run, arm, seed), table in losses[losses.split == "report"].groupby(["run", "arm", "seed"]):
        base = Row(
            study="synthetic",
            probe="",
            quantity="",
            value=None,
            unit="",
            run=run,
            arm=arm,
            variant=arm.split("-")[0],
            seed=int(seed),
            commit="abc1234",
            config=f"hash of {arm}",
        )

        def measured(value: float, half: float, base: Row = base, **fields: object) -> Row:
            if fields["probe"] != "loss":
                value += 0.3 * half * random.normal()
            return replace(
                base,
                **({"n": 4000, "n_clusters": 40, "cluster": "document"} | fields),
                value=value,
                low=value - half,
                high=value + half,
            )

        n_tokens = int(table.n_tokens.sum())
        loss = float(table.loss_sum.sum() / n_tokens)
        rows.append(
            measured(loss, 0.05, probe="loss", quantity="loss", unit="nats / token", n=n_tokens)
        )
        for tokens in np.geomspace(1e5, 5e6, 25):
            rows.append(
                replace(
                    base,
                    probe="training",
                    quantity="loss",
                    value=loss + 4e5 / tokens,
                    unit="nats / token",
                    stream="train",
                    positions="all",
                    x=float(tokens),
                )
            )
        normed = "ln" in arm
        level = LEVELS | {"r": r if normed else 0.0, "gain": 300.0 if normed else 1.0}
        for stream in ("natural", "prose", "code", "repeated", "random"):
            for name, quantity in plugins.pick("soluscope.probes", "engagement").quantities.items():
                for positions in POSITIONS:
                    shift = 0.4 if positions == "BOS" else 1.0
                    rows += [
                        measured(
                            level[name] * shift,
                            0.02 * level[name],
                            probe="engagement",
                            quantity=name,
                            unit=quantity.unit,
                            statistic=statistic,
                            stream=stream,
                            positions=positions,
                        )
                        for statistic in quantity.statistics
                    ]
        for stream in ("prefixes", "repeated", "random"):
            for name, quantity in plugins.pick(
                "soluscope.probes", "gain_variation"
            ).quantities.items():
                for n in (1, 2, 4, 8, 16, 32, 64, 127):
                    diluted = level["gain"] * (1 - 0.6 / n if "with BOS" in name else 1)
                    rows.append(
                        measured(
                            diluted,
                            0.02 * level["gain"],
                            probe="gain_variation",
                            quantity=name,
                            unit=quantity.unit,
                            stream=stream,
                            x=float(n),
                        )
                    )
        if normed:
            for name, quantity in plugins.pick(
                "soluscope.probes", "scale_freeze"
            ).quantities.items():
                for group in ("", "gain Q1", "gain Q2", "gain Q3", "gain Q4"):
                    rows.append(
                        measured(
                            freeze,
                            0.0002,
                            probe="scale_freeze",
                            quantity=name,
                            unit=quantity.unit,
                            stream="natural",
                            group=group,
                        )
                    )
    return rows


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make_rows()


@pytest.fixture(scope="module")
def html(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> str:
    study = tmp_path_factory.mktemp("study")
    results.write(study / "results.jsonl", rows)
    return report.build(study).read_text(encoding="utf8")


def text(html: str) -> str:
    """The page without its scripts and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.S)


# ---------------------------------------------------------------- sentences


def test_a_gain_that_takes_a_scale_of_each_token_is_said_to_be_found():
    sentences = words.headline(make_rows(n_seeds=8, seed_noise=0.0005))
    assert sentences[0].startswith("LayerNorm lowers the loss (solu_ln, 8 seeds), and part of this")
    joined = " ".join(sentences)
    assert "solu_ln had a loss 0.080" in joined
    assert "the sign is settled at the 95% level" in joined
    assert "Phi_dyn (solu_ln) is 0.2" in joined


def test_a_need_too_small_to_matter_is_called_so():
    arms = SIX | {"solu_gain": 3.021}
    sentences = words.headline(make_rows(arms, n_seeds=8, seed_noise=0.0005))
    assert "but so little that it does not matter" in sentences[0]


def test_a_gain_that_a_static_arm_reaches_is_not_called_a_need():
    arms = SIX | {"solu_gain": 3.0196}
    sentences = words.headline(make_rows(arms, n_seeds=8, seed_noise=0.0005))
    assert "that any of this takes a scale of each token's own is not shown" in sentences[0]
    assert "equivalent: closer than 0.005 nats" in " ".join(sentences)


def test_the_twin_with_one_gain_is_named_and_called_close_only_within_the_margin():
    near, far = (
        " ".join(words.headline(make_rows(SIX | {"solu_frozen_ln": loss}, 8, seed_noise=0.0005)))
        for loss in (SIX["solu_ln"] + 0.001, SIX["solu_ln"] + 0.02)
    )
    assert "Trained with one gain for all tokens instead (solu_frozen_ln)" in near
    assert re.search(r"instead \(solu_frozen_ln\).*8 seeds\), closer than 0.005 nats", near)
    assert not re.search(r"instead \(solu_frozen_ln\).*8 seeds\), closer", far)


def test_the_documents_counted_are_those_of_the_loss(rows):
    more = [replace(rows[-1], probe="engagement", cluster="document", n_clusters=999)]
    assert "999" not in " ".join(words.headline([*rows, *more]))


def test_a_relative_curve_ends_at_one_whatever_its_size(rows):
    spec = Figure("", ("mean without BOS",), kind="curve", relative=True, log_x=True)
    mine = [replace(row, quantity="mean without BOS") for row in rows if row.x is not None]
    mine = [replace(row, probe="gain_variation", stream="random", group="") for row in mine]
    figure = figures.draw([row for row in mine if row.value], spec)
    ends = [trace.y[-1] for trace in figure.data if trace.mode == "lines" and trace.name]
    assert ends
    assert all(end == pytest.approx(1) for end in ends)
    assert figure.layout.xaxis.type == "log"


def test_plain_solu_being_better_means_nothing_to_explain():
    sentences = words.headline(make_rows(SIX | {"solu": 2.95}, n_seeds=8, seed_noise=0.0005))
    assert sentences[0].startswith("Nothing for smearing to explain at this size")
    joined = " ".join(sentences)
    assert "plain SoLU had a loss 0.07" in joined
    assert UNDEFINED in joined


def test_two_seeds_that_differ_leave_the_sign_open_and_are_called_two_seeds():
    sentences = words.headline(make_rows(n_seeds=2, worse={"solu-s1": 0.03}))
    assert sentences[0].startswith(
        "Not settled whether LayerNorm lowers the loss (solu_ln, 2 seeds)"
    )
    joined = " ".join(sentences)
    assert "Two seeds say little about a third." in joined
    assert "so the sign is not settled" in joined


def test_one_seed_settles_nothing():
    sentences = words.headline(make_rows(n_seeds=1))
    assert sentences[0].startswith(
        "Not settled whether LayerNorm lowers the loss (solu_ln): 1 seed"
    )
    joined = " ".join(sentences)
    assert "One seed shows these trained models, not their variants." in joined
    assert "nothing is known of other seeds" in joined
    assert "with one seed, which gives no interval" in joined


def test_without_solu_ln_there_is_no_verdict():
    sentences = words.headline(make_rows({"gelu": 3.0, "solu": 3.1}))
    assert sentences[0].startswith("No verdict on LayerNorm")
    assert "4 runs of 2 arms (gelu, solu), 2 seeds an arm" in sentences[1]


def test_the_first_lines_count_runs_seeds_documents_and_tokens(rows):
    losses = make_losses(SIX, 2)
    first_run = losses[(losses.run == "gelu-s0") & (losses.split == "report")]
    expected = f"40 documents ({first_run.n_tokens.sum():,} tokens)"
    basis = next(s for s in words.headline(rows) if s.startswith("Compared here"))
    assert basis.startswith("Compared here: 12 runs of 6 arms (gelu, gelu_ln, solu,")
    assert expected in basis


@pytest.mark.parametrize(
    ("r", "verdict"),
    [
        (0.9, "LayerNorm is engaged at the typical token"),
        (0.01, "close to one static gain at the typical token, pinned by its epsilon"),
        (0.2, "LayerNorm is partly engaged"),
        (0.505, "LayerNorm is partly engaged"),  # the interval reaches below .5
    ],
)
def test_engagement_is_judged_by_the_ends_of_its_interval(r, verdict):
    sentence = next(s for s in words.headline(make_rows(r=r)) if "median r" in s)
    assert verdict in sentence
    assert "positions 2-15" in sentence


@pytest.mark.parametrize(
    ("freeze", "verdict"),
    [
        (0.0001, "within 0.001 nats, so nothing at inference"),
        (0.01, "a cost"),
        (-0.01, "an improvement"),
        (0.001, "a cost"),
    ],
)
def test_the_cost_of_freezing_is_judged_by_the_ends_of_its_interval(freeze, verdict):
    sentence = next(s for s in words.headline(make_rows(freeze=freeze)) if s.startswith("Giving"))
    assert verdict in sentence


def test_each_solu_ln_arm_has_its_own_verdict():
    arms = {"solu": 3.1, "solu_gain": 3.06, "solu_ln-k42": 3.02, "solu_ln-k0": 3.04}
    sentences = words.headline(make_rows(arms, n_seeds=8, seed_noise=0.0005))
    assert "(solu_ln-k0, 8 seeds)" in sentences[0]
    assert "(solu_ln-k42, 8 seeds)" in sentences[1]


# ---------------------------------------------------------------- the page


def test_the_page_has_all_sections_and_starts_with_the_verdict(html, rows):
    body = text(html)
    headings = re.findall(r"<h2>(.*?)</h2>", body)
    assert headings[:4] == ["Loss", "Paired differences", "Phi_dyn and its terms", "Training"]
    assert "P1 LayerNorm engagement" in headings
    assert "P4 Scale freeze" in headings
    assert body.index(words.headline(rows)[0][:40]) < body.index("<h2>")
    for run in {row.run for row in rows if row.run}:
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


def test_plotly_is_inlined_once_and_figures_have_fixed_names(html):
    assert html.count("plotly.js v") == 1
    names = re.findall(r'id="(figure-\d+)"', html)
    assert names == [f"figure-{i}" for i in range(1, len(names) + 1)]
    assert len(names) > 8


def test_the_same_rows_give_the_same_bytes(tmp_path, rows):
    pages = []
    for name in ("a", "b"):
        results.write(tmp_path / name / "results.jsonl", rows)
        pages.append(report.build(tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_what_comes_from_data_is_escaped(tmp_path, rows):
    bad = "<script>alert(1)</script><b>"
    fields = {"arm": bad, "stream": bad, "note": bad, "run": bad, "group": bad, "unit": bad}
    changed = [
        replace(row, **{key: value for key, value in fields.items() if getattr(row, key)})
        if row.arm == "gelu_ln"
        else row
        for row in rows
    ]
    unknown = replace(rows[-1], probe=bad, quantity=bad, study=bad, group="")
    results.write(tmp_path / "results.jsonl", [*changed, unknown])
    html = report.build(tmp_path).read_text(encoding="utf8")
    assert "<script>alert" not in html
    assert "</script><b>" not in html
    assert "&lt;script&gt;alert(1)" in text(html)


def test_labels_in_figures_are_escaped_against_plotlys_own_markup(rows):
    bad = "<b>bold</b>"
    some = [replace(row, arm=bad) for row in rows if row.probe in ("engagement", "gain_variation")]
    for name in ("engagement", "gain_variation"):
        for spec in plugins.pick("soluscope.probes", name).figures:
            drawn = figures.draw([row for row in some if row.probe == name], spec)
            assert "<b>" not in str(drawn.to_plotly_json())


def test_a_row_without_interval_is_marked(tmp_path, rows):
    bare = [replace(row, low=None, high=None) if row.probe == "engagement" else row for row in rows]
    results.write(tmp_path / "results.jsonl", bare)
    assert text(report.build(tmp_path).read_text(encoding="utf8")).count("(no interval)") > 100
    spec = Figure("r", ("r",), statistic="median")
    drawn = figures.draw([row for row in bare if row.probe == "engagement"], spec)
    assert all(s.endswith("-open") for trace in drawn.data for s in trace.marker.symbol)


def test_an_undefined_value_says_so(tmp_path):
    results.write(tmp_path / "results.jsonl", make_rows(SIX | {"solu": 2.9}))
    body = text(report.build(tmp_path).read_text(encoding="utf8"))
    assert UNDEFINED in body
    assert "nan" not in body


def test_a_probe_that_the_folder_no_longer_has_gets_a_plain_section(tmp_path, rows):
    gone = replace(rows[-1], probe="long_gone", quantity="smear", group="")
    results.write(tmp_path / "results.jsonl", [*rows, gone])
    body = text(report.build(tmp_path).read_text(encoding="utf8"))
    assert "There is no file for &#x27;long_gone&#x27; in probes/ any more" in body
    assert "mean of smear" in body


def test_a_broken_last_line_is_skipped_with_a_warning(tmp_path, rows, capsys):
    path = tmp_path / "results.jsonl"
    results.write(path, rows)
    path.write_text(path.read_text() + '{"study": "synthetic", "pro')
    report.build(tmp_path)
    assert f"line {len(rows) + 1} is not a row and is skipped" in capsys.readouterr().err


def test_no_results_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no results at"):
        report.build(tmp_path)


def test_the_report_is_built_without_torch_and_pandas(tmp_path, rows):
    results.write(tmp_path / "results.jsonl", rows)
    code = (
        "import sys; from pathlib import Path; from soluscope import report;"
        "report.build(Path(sys.argv[1])); print({'torch', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("n_rows", [1, 3])
def test_a_page_of_few_rows_is_still_a_page(tmp_path, rows, n_rows):
    for picked in (rows[:n_rows], rows[-n_rows:]):
        results.write(tmp_path / "results.jsonl", picked)
        assert report.build(tmp_path).read_text(encoding="utf8").endswith("</html>\n")


# ---------------------------------------------------------------- figures and terminal


def test_dots_show_every_seed_with_its_interval(rows):
    mine = [row for row in rows if row.probe == "engagement"]
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
    mine = [row for row in rows if row.probe == "scale_freeze"]
    drawn = figures.draw(mine, Figure("", ("frozen at geometric mean",), group="gain"))
    titles = [annotation.text for annotation in drawn.layout.annotations]
    assert titles == ["gain Q1", "gain Q2", "gain Q3", "gain Q4"]


def test_curves_have_one_line_a_run_in_each_stream(rows):
    mine = [row for row in rows if row.probe == "gain_variation"]
    drawn = figures.draw(mine, Figure("", ("last token",), kind="curve"))
    lines = [trace for trace in drawn.data if trace.hovertemplate]
    assert len(lines) == 12 * 3
    assert sum(trace.showlegend for trace in lines) == 6


def test_an_arm_keeps_its_colour_through_the_page(rows):
    look = figures.styles(rows)
    assert len({style.colour for style in look.values()}) == 6
    mine = [row for row in rows if row.probe == "engagement" and row.arm == "solu_ln"]
    drawn = figures.draw(mine, Figure("", ("r",), statistic="median"), look)
    assert {trace.marker.color for trace in drawn.data} == {look["solu_ln"].colour}


def test_more_arms_than_colours_are_told_apart_by_shape():
    arms = [
        Row(study="", probe="", quantity="", value=0, unit="", arm=f"{i:02d}") for i in range(20)
    ]
    assert len(set(figures.styles(arms).values())) == 20


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


def test_the_terminal_does_not_read_markup_in_names(rows):
    marked = [replace(row, arm="[red]gelu[/]") if row.arm == "gelu" else row for row in rows]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.table(marked))
    assert "[red]gelu[/]" in console.export_text()


if __name__ == "__main__":  # a page to look at: python tests/test_report.py FOLDER
    results.write(Path(sys.argv[1]) / "results.jsonl", make_rows())
    print(report.build(Path(sys.argv[1])))
