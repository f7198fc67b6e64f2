"""The wandb dashboard of a study: its JSON, and the requests that wandb's own client sends to a server.

After a change of the dashboard, run: python tests/test_dashboard.py > tests/dashboard.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from _launching import LAUNCH, sweep_file, words_for
from _records import gate
from _records import words as words_of
from conftest import HANGS_AFTER_S, run_python, tiny_config

from soluscope import results
from soluscope.errors import UserError
from soluscope.launching.launch import launch
from soluscope.report import dashboard, page, words
from soluscope.report.findings import comparisons, runs_of
from soluscope.results import (
    Comparison,
    Measurement,
    Record,
    Setting,
    Term,
    Untrained,
    of_kind,
)
from soluscope.training import wandb_run
from soluscope.wandb_client import place

ROOT = Path(__file__).parents[1]
STORED = ROOT / "tests" / "dashboard.json"
COMMAND = ROOT / "eval" / "report.py"
PLACE = "team/solu"
LOW, HIGH = "solu_ln-low", "solu_ln-high"
KAPPAS = {LOW: 0.42, HIGH: 419.4}
LOSSES = {"solu": 4.0, "solu_gain": 3.97, LOW: 3.9, HIGH: 3.99}
UNDEFINED = "undefined, because no benefit of LN is established"


ROLES = {"solu": "plain", "solu_gain": "static", "solu_ln": "per_token"}


def comparison(
    term: Term, arm: str, value: float | None, half: float, **more: Any
) -> list[Comparison]:
    """Return a comparison with an interval for new seeds. For a difference, add a narrower one for these models."""
    base = Comparison(
        study="first", term=term, value=value, unit="nats / token", arm=arm, variant=arm.split("-")[0],
        n=4, n_clusters=4, cluster="seed", commit="abc",
    )  # fmt: skip
    base = replace(base, **more)
    if value is None:
        return [base]
    wide = replace(base, low=value - half, high=value + half)
    narrow = replace(base, low=value - half / 2, high=value + half / 2, cluster="document")
    return [wide] if term in (Term.LOSS, Term.SHARE) else [wide, narrow]


def make_rows() -> list[Record]:
    """Return a study of plain SoLU, a static arm and two kappas; at one kappa Phi_dyn is undefined."""
    rows: list[Record] = [
        row for arm, loss in LOSSES.items() for row in comparison(Term.LOSS, arm, loss, 0.01)
    ]
    for arm in (LOW, HIGH):
        benefit = LOSSES["solu"] - LOSSES[arm]
        rows += comparison(Term.BENEFIT, arm, benefit, 0.02)
        rows += comparison(Term.STATIC, arm, LOSSES["solu_gain"] - LOSSES[arm], 0.02)
        rows += comparison(Term.DIFFERENCE, "solu", benefit, 0.02, against=arm)
    rows += comparison(Term.SHARE, LOW, 0.7, 0.2, unit="share", note="Fieller's interval")
    rows += comparison(Term.SHARE, HIGH, None, 0.0, unit="share", note=UNDEFINED)
    for arm, loss in LOSSES.items():
        variant = arm.split("-")[0]
        for seed in (0, 1):
            run = Measurement(
                study="first", probe="loss", quantity="loss", value=loss, unit="nats / token",
                run=f"{arm}-s{seed}", arm=arm, variant=variant, seed=seed, stream="natural",
                low=loss - 0.05, high=loss + 0.05, n=4000, n_clusters=40, cluster="document", commit="abc",
            )  # fmt: skip
            rows.append(run)
            rows += [
                replace(run, probe="training", stream="train", value=loss + 1 / x, x=float(x), low=None, high=None)
                for x in (1, 2, 4)
            ]  # fmt: skip
            measured = replace(run, probe="engagement", statistic="median", low=None, high=None)
            rows.append(replace(measured, quantity="r", unit="share", value=0.5))
        values = {"kappa": KAPPAS[arm]} if arm in KAPPAS else {}
        rows.append(
            Setting(
                study="first", arm=arm, variant=variant, values=values, role=ROLES[variant], n=2
            )
        )
    return [*rows, replace(words_of("engagement"), study="first", commit="abc")]


ROWS = make_rows()
ONE_KAPPA = [row for row in ROWS if row.arm != HIGH]
"""A study whose variants have one arm each."""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Return a study's folder that holds its rows and nothing else."""
    results.write(tmp_path / "first" / "results.jsonl", ROWS)
    return tmp_path / "first"


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove every wandb login, and set an address without a server, so that nothing can be sent."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def workspace(rows: list[Record] = ROWS) -> dict[str, Any]:
    """Return the dashboard's JSON."""
    made = dashboard._workspace(rows, dashboard.drawings(rows), place("--wandb ", PLACE))
    model: dict[str, Any] = made._to_model().model_dump(by_alias=True, exclude_none=True)
    return model


def section(model: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = model["spec"]["section"]
    return found


def panels(model: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """Return the configurations of the panels of a kind."""
    return [
        panel["config"]
        for part in section(model)["panelBankConfig"]["sections"]
        for panel in part["panels"]
        if panel["viewType"] == kind
    ]


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_ids(one) for key, one in value.items() if key != "__id__"}
    return [without_ids(one) for one in value] if isinstance(value, list) else value


def report(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(COMMAND), *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Return the only line that a refused command prints."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert not done.stdout
    return line


# ---------------------------------------------------------------- the code and its JSON


def test_the_dashboard_is_the_stored_one() -> None:
    assert without_ids(workspace()) == without_ids(json.loads(STORED.read_text()))


def test_the_same_rows_give_the_same_json_with_ids_of_which_none_is_twice() -> None:
    assert workspace() == workspace()
    ids = [
        panel["__id__"]
        for part in section(workspace())["panelBankConfig"]["sections"]
        for panel in part["panels"]
    ]
    assert len(ids) == len(set(ids)) > 10


def test_dry_run_prints_the_json_and_neither_connects_nor_starts_a_process(
    study: Path, no_key: None
) -> None:
    """An audit hook sees every connection and child process; wandb's client would be a child process."""
    watched = (
        "import json, runpy, sys\n"
        "seen = []\n"
        "asked = ('socket.connect', 'socket.getaddrinfo', 'subprocess.Popen', 'os.posix_spawn', 'os.fork')\n"
        "sys.addaudithook(lambda event, args: seen.append(event) if event in asked else None)\n"
        "try:\n"
        f"    runpy.run_path({str(COMMAND)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(json.dumps(seen), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watched, str(study), "--wandb", PLACE, "--dry-run"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == workspace()
    assert json.loads(done.stderr.splitlines()[-1]) == []
    assert [path.name for path in study.iterdir()] == ["results.jsonl"]


def test_panels_read_what_training_runs_log(tiny_study: Path, tmp_path: Path) -> None:
    run_dir = tiny_study / "solu_ln-s0"
    curves = set(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0]))
    # A wandb run's summary also holds the last value of each curve.
    numbers = curves | set(json.loads((run_dir / "done.json").read_text()))
    config = wandb_run._config(tiny_config(tmp_path, "variant=solu_ln")).keys()
    model = workspace()
    lines, bars = panels(model, "Run History Line Plot"), panels(model, "Bar Chart")
    assert {name for plot in lines for name in plot["metrics"]} == {
        "loss", "r", "gain", "grad_norm", "tokens_per_s"
    } <= curves  # fmt: skip
    assert {plot["xAxis"] for plot in lines} == {"tokens"} <= curves
    read = {name for plot in bars for name in plot["metrics"]}
    assert read == {f"summary_metrics.{name}" for name in ("report_loss", "r", "gain")}
    assert read <= {f"summary_metrics.{name}" for name in numbers}
    grouped = {plot["groupBy"] for plot in lines + bars}
    grouped |= {plot["groupBy"] for plot in panels(workspace(ONE_KAPPA), "Bar Chart")}
    assert grouped == {"variant.value", "arm_name.value"} <= {f"{key}.value" for key in config}
    columns = section(model)["runSets"][0]["runFeed"]["columnOrder"]
    known = {"run:displayName", *(f"summary:{name}" for name in numbers)}
    assert set(columns) <= known | {f"config:{key}.value" for key in config}


def test_the_runs_table_holds_the_runs_of_the_study_by_what_tells_them_apart() -> None:
    (runs,) = section(workspace())["runSets"]
    (wanted,) = leaves(runs["filters"])
    assert (wanted["key"], wanted["op"], wanted["value"]) == (
        {"section": "config", "name": "study"}, "=", "first"
    )  # fmt: skip
    (alone,) = section(workspace(ONE_KAPPA))["runSets"]
    assert runs["grouping"] == [{"section": "config", "name": "arm_name.value"}]
    assert alone["grouping"] == [{"section": "config", "name": "variant.value"}]
    pinned = list(runs["runFeed"]["columnPinned"])
    assert pinned[:3] == ["run:displayName", "config:variant.value", "config:seed.value"]
    assert {"config:study.value", "config:size.value", "config:kappa.value"} < set(pinned)
    assert {"summary:report_loss", "summary:r"} < set(pinned)


def leaves(filters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the conditions of a tree of filters."""
    if "key" in filters:
        yield filters
    for one in filters.get("filters", ()):
        yield from leaves(one)


def test_every_figure_that_is_logged_is_shown_once() -> None:
    shown = [key for panel in panels(workspace(), "Media Browser") for key in panel["mediaKeys"]]
    assert sorted(shown) == sorted(dashboard.drawings(ROWS))
    of_report = {
        f"figures/{name}/1" for name in ("loss", "differences", "terms", "dose", "training")
    }
    assert of_report | {dashboard.BARS, dashboard.PHI_DYN, "probes/engagement/1"} <= set(shown)


def test_where_a_variant_has_several_arms_no_panel_averages_over_them() -> None:
    def grouped(rows: list[Record]) -> set[str]:
        model = workspace(rows)
        kinds = ("Run History Line Plot", "Bar Chart")
        return {plot["groupBy"] for kind in kinds for plot in panels(model, kind)}

    assert grouped(ROWS) == {"arm_name.value"}
    assert grouped(ONE_KAPPA) == {"variant.value"}


def test_no_run_of_a_large_study_is_left_out_of_a_panel() -> None:
    run = of_kind(ROWS, Measurement)[0]
    many = [replace(run, run=f"{run.arm}-s{seed}", seed=seed) for seed in range(300)]
    n_runs = len(runs_of([*ROWS, *many]))
    model = workspace([*ROWS, *many])
    lines, bars = panels(model, "Run History Line Plot"), panels(model, "Bar Chart")
    assert {plot["limit"] for plot in lines + bars} == {n_runs + 1}


def test_many_sentences_are_cut_and_the_rest_counted() -> None:
    said = words.headline(ROWS)
    more = [replace(row, arm=f"{row.arm}-2") for row in ROWS if row.arm in KAPPAS]
    shown = panels(workspace([*ROWS, *more]), "Markdown Panel")[0]["value"].splitlines()
    assert len(said) <= page.N_SENTENCES + 1
    n_left = len(words.headline([*ROWS, *more])) - page.N_SENTENCES
    assert len(shown) == page.N_SENTENCES + 1
    assert shown[-1] == f"- {n_left} more in the report"
    assert panels(workspace(), "Markdown Panel")[0]["value"].splitlines() == [
        f"- {s}" for s in said
    ]


def test_loss_bars_have_the_length_and_the_interval_of_their_rows() -> None:
    (bars,) = dashboard.drawings(ROWS)[dashboard.BARS].data
    assert dict(zip(bars.y, bars.x, strict=True)) == LOSSES
    assert bars.error_x.array == pytest.approx([0.01] * 4)
    assert bars.error_x.arrayminus == pytest.approx([0.01] * 4)


def test_phi_dyn_is_drawn_at_its_kappa_and_said_to_be_undefined_where_it_is() -> None:
    (points,) = dashboard.drawings(ROWS)[dashboard.PHI_DYN].data
    assert (points.x, points.y, points.mode) == ((0.42,), (0.7,), "markers")
    assert (points.error_y.array, points.error_y.arrayminus) == ((pytest.approx(0.2),),) * 2
    texts = [panel["value"] for panel in panels(workspace(), "Markdown Panel")]
    assert f"- {HIGH}, kappa 419: {UNDEFINED}" in texts[1].splitlines()
    assert f"- {LOW}, kappa 0.42: 0.70 [0.50, 0.90]; Fieller's interval" in texts[1].splitlines()
    assert dashboard._final(ROWS)[f"Phi_dyn/{HIGH}"] == UNDEFINED


def test_without_any_phi_dyn_the_dashboard_says_so_and_shows_no_empty_figure() -> None:
    shares = comparisons(ROWS, Term.SHARE)
    undefined = [row for row in ROWS if row not in shares or row.arm != LOW]
    no_rows = [row for row in ROWS if row not in shares]
    for rows, said in ((undefined, UNDEFINED), (no_rows, dashboard.NO_PHI_DYN)):
        model = workspace(rows)
        assert said in panels(model, "Markdown Panel")[1]["value"]
        shown = [key for panel in panels(model, "Media Browser") for key in panel["mediaKeys"]]
        assert dashboard.PHI_DYN not in shown
        assert dashboard.BARS in shown


def test_with_one_kappa_phi_dyn_is_drawn_by_arm() -> None:
    (points,) = dashboard.drawings(ONE_KAPPA)[dashboard.PHI_DYN].data
    assert points.x == (0.7,)


def test_figures_of_a_probe_that_failed_a_control_say_so() -> None:
    failed = gate("engagement", "pinned", "within 0.01 of 0", passed=False)
    drawn = dashboard.drawings([*ROWS, failed])
    titles = [f.layout.title.text for key, f in drawn.items() if key.startswith("probes/")]
    assert titles
    assert all("(control failed)" in title for title in titles)
    assert "control failed" not in dashboard.drawings(ROWS)["probes/engagement/1"].layout.title.text


def test_the_table_has_all_comparisons_with_their_kappa() -> None:
    table = [dict(zip(dashboard.COLUMNS, line, strict=True)) for line in dashboard._table(ROWS)]
    assert len(table) == len(of_kind(ROWS, Comparison))
    assert {(line["arm"], line["kappa"]) for line in table} == {
        ("solu", None), ("solu_gain", None), (LOW, 0.42), (HIGH, 419.4)
    }  # fmt: skip


def test_a_study_with_a_plus_in_its_name_has_a_dashboard() -> None:
    model = workspace([replace(row, study="a+b") for row in ROWS])
    (wanted,) = leaves(section(model)["runSets"][0]["filters"])
    assert (model["displayName"], wanted["value"]) == ("a-b", "a+b")


def test_the_table_of_probes_has_one_number_per_run_and_probe_trained_untrained_and_between() -> (
    None
):
    trained = next(row for row in of_kind(ROWS, Measurement) if row.probe == "engagement")
    same = {f.name: getattr(trained, f.name) for f in fields(Untrained) if hasattr(trained, f.name)}
    before = Untrained(**same | {"value": 0.25, "difference": 0.125, "low": 0.0625, "high": 0.5})
    lines = [dict(zip(dashboard.OF_PROBES, line, strict=True))
             for line in dashboard._main_numbers([*ROWS, before])]  # fmt: skip
    assert [(line["probe"], line["arm"], line["seed"]) for line in lines].count(
        ("engagement", trained.arm, trained.seed)
    ) == 1
    (line,) = [line for line in lines if (line["arm"], line["seed"]) == (trained.arm, trained.seed)]
    assert (line["quantity"], line["trained"], line["low"]) == (
        trained.quantity,
        trained.value,
        trained.low,
    )
    assert (line["untrained"], line["difference"]) == (0.25, 0.125)
    assert (line["difference_low"], line["difference_high"]) == (0.0625, 0.5)
    assert all(line["untrained"] is None for line in lines if line["seed"] != trained.seed)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("text", ["", "team", "team/", "/solu", "a/b/c", "https://x/y", "a b/c?d"])
def test_a_place_that_is_not_entity_and_project_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"is not entity/project, as in: --wandb my-team/soluscope"):
        place("--wandb ", text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--wandb"], "argument --wandb: expected one argument"),
        (["--wandb", "solu"], "'solu' is not entity/project"),
        (["--dry-run"], "--dry-run needs --wandb entity/project"),
        (["--wandb", PLACE], "there is no key"),
        ([f"--wandb={PLACE}"], "there is no key"),
        (["--wand", PLACE], "unrecognized arguments: --wand"),
    ],
)
def test_a_command_that_cannot_log_is_one_line_and_leaves_nothing(
    study: Path, no_key: None, words: list[str], said: str
) -> None:
    assert said in refused(report(study, *words))
    assert [path.name for path in study.iterdir()] == ["results.jsonl"]


def test_a_study_without_results_is_one_line(tmp_path: Path, no_key: None) -> None:
    line = refused(report(tmp_path, "--wandb", PLACE, "--dry-run"))
    assert line.startswith("error: no results at")


def test_an_address_that_is_none_is_one_line(
    study: Path, no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "nonsense")
    assert "valid URL" in refused(report(study, "--wandb", PLACE))


def test_what_is_not_installed_is_named(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match="needs wandb-workspaces: pip install wandb"):
        dashboard.preview(study, place("--wandb ", PLACE))


def test_offline_mode_and_a_report_to_wandb_exclude_each_other(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(UserError, match=r"WANDB_MODE, .* limits wandb to offline"):
        dashboard.sign_in()


# ---------------------------------------------------------------- wandb's own client, on loopback


def with_views() -> Any:
    """Return a server that also accepts dashboards and tables."""
    from _wandb_server import WandbServer

    class Server(WandbServer):
        def __init__(self) -> None:
            super().__init__()
            self.views: dict[str, dict[str, Any]] = {}

        def answer(self, operation: str, query: str, given: dict[str, Any]) -> dict[str, Any]:
            answers = {
                "View": self.view,
                "UpsertView2": self.upsert_view,
                "ArtifactType": lambda given: {"project": {"artifact": None}},
                "CreateArtifact": self.committed,
            }
            if operation not in answers:
                return super().answer(operation, query, given)
            self.asked.append((operation, given))
            return answers[operation](given)

        def view(self, given: dict[str, Any]) -> dict[str, Any]:
            found = [one for one in self.views.values() if one["name"] == given["viewName"]]
            return {"project": {"allViews": {"edges": [{"node": one} for one in found]}}}

        def upsert_view(self, given: dict[str, Any]) -> dict[str, Any]:
            id = given.get("id") or f"view{len(self.views)}"
            kept = {key: given[key] for key in ("name", "displayName", "spec")}
            self.views[id] = {"id": id, **kept}
            return {"upsertView": {"view": {"id": id, "name": given["name"]}, "inserted": True}}

        def committed(self, given: dict[str, Any]) -> dict[str, Any]:
            """Answer as if the server had the content already. The table is also among the run's own files."""
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s"}}
            return {"createArtifact": {"artifact": artifact}}

    return Server()


def signed_in(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def test_a_refused_key_is_one_line_before_anything_is_logged(
    study: Path, no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_views() as server:
        signed_in(server, monkeypatch)
        server.refusing = True
        line = refused(report(study, "--wandb", PLACE))
    assert "run 'wandb login'" in line
    assert (server.runs, server.views, server.asked) == ({}, {}, [])
    assert [path.name for path in study.iterdir()] == ["results.jsonl"]


def test_a_server_that_refuses_the_dashboard_is_one_line(
    study: Path, no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_views() as server:
        signed_in(server, monkeypatch)

        def withdrawn(given: dict[str, Any]) -> dict[str, Any]:
            server.refusing = True
            return {"project": None}

        server.view = withdrawn
        done = report(study, "--wandb", PLACE)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: wandb did not accept the study in --wandb {PLACE}: ")
    assert server.views == {}


def test_what_arrives_is_what_the_dry_run_shows_and_a_second_report_replaces_it(
    study: Path, no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with with_views() as server:
        signed_in(server, monkeypatch)
        first, second = (report(study, "--wandb", PLACE) for _ in range(2))
    for done in (first, second):
        assert done.returncode == 0, done.stderr
        assert "report:" in done.stdout
        address = f"dashboard: {server.url}/{PLACE}?nw="
        assert address in done.stdout
    assert server.unknown == []

    (view,) = server.views.values()
    shown = workspace()
    assert json.loads(view["spec"]) == shown["spec"]
    assert (view["name"], view["displayName"]) == (shown["name"], "first")

    (run,) = server.runs.values()
    assert (run.entity, run.project, run.group, run.display_name) == (
        "team",
        "solu",
        "first",
        "first",
    )
    assert run.config["study"] == "first"
    assert run.exit_code == 0
    for row in comparisons(ROWS, Term.LOSS):
        assert run.summary[f"loss/{row.arm}"] == row.value
        assert run.summary[f"loss/{row.arm}/high"] == row.high
    assert run.summary[f"Phi_dyn/{HIGH}"] == UNDEFINED
    tables = [name for name in run.files if name.startswith("media/table/comparison")]
    assert json.loads(run.files[tables[0]])["data"] == dashboard._table(ROWS)
    drawn = dashboard.drawings(ROWS)
    for key, figure in drawn.items():
        files = [name for name in run.files if name.startswith(f"media/plotly/{key}_0_")]
        assert json.loads(run.files[files[0]])["data"] == json.loads(figure.to_json())["data"], key
    assert run.summary["answer"] == words.answer(ROWS)
    tables = [name for name in run.files if name.startswith("media/table/main numbers")]
    assert json.loads(run.files[tables[0]])["data"] == dashboard._main_numbers(ROWS)
    begun = next(given for operation, given in server.asked if operation == "UpsertBucket")
    assert begun["jobType"] == "report"


@pytest.mark.long
def test_a_sweep_saves_the_dashboard_after_its_report(
    tmp_path: Path, no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sweep_file(tmp_path, variant=["solu", "solu_ln"])
    words = words_for(tmp_path / "runs", "study=first", "train.steps=12", "inline.jobs=1")
    words += [
        "eval.probes=[gain_variation]",
        "eval.n_tokens=200",
        "eval.n_loss_tokens=500",
        "eval.n_draws=100",
    ]
    refused = run_python(LAUNCH, path, *words, f"wandb.dashboard={PLACE}")
    assert "there is no key" in refused.stderr
    assert refused.returncode == 2
    assert not (tmp_path / "runs").exists()
    with with_views() as server:
        signed_in(server, monkeypatch)
        done = run_python(LAUNCH, path, *words, f"wandb.dashboard={PLACE}")
    assert done.returncode == 0, done.stderr
    assert f"dashboard: {server.url}/{PLACE}?nw=" in done.stdout.splitlines()[-1]
    assert [view["displayName"] for view in server.views.values()] == ["first"]
    (run,) = server.runs.values()  # wandb=off: the runs themselves are not sent
    assert run.summary["answer"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("wandb.dashboard=solu",), "wandb.dashboard='solu' is not entity/project, as in: wandb.dashboard="),
        ((f"wandb.dashboard={PLACE}", "report=false"), "report=false: remove one of the two"),
    ],
)  # fmt: skip
def test_a_dashboard_that_a_sweep_cannot_save_is_one_line_before_any_job(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    path = sweep_file(tmp_path, variant=["solu"])
    with pytest.raises(UserError, match=said):
        launch(path, [*words_for(tmp_path / "runs"), *words])
    assert not (tmp_path / "runs").exists()


if __name__ == "__main__":
    print(json.dumps(workspace(), indent=1))
