"""A study's comparison as one wandb run, and the project's dashboard of the study, written as code.

Losses, r and gain of the training runs are read from those runs; intervals and Phi_dyn are not theirs
to know, so the comparison is logged as a run of its own, and the dashboard shows its table and figures.
The study's name fixes the ids of both: the same command again writes over them. Numbers of arms that are no
longer in the study stay in the run's summary.

Keys that the training runs are read by: config `variant`, `arm_name`, `seed`, `study`, `size`, `kappa`, `lr`;
curves `tokens`, `loss`, `r`, `gain`, `grad_norm`, `tokens_per_s`; numbers `report_loss`, `r`, `gain`.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from soluscope import results, wandb_client
from soluscope.errors import UserError
from soluscope.files import digest
from soluscope.report import figures, page, pretrained, sections, words
from soluscope.report.figures import Point, Style
from soluscope.report.findings import (
    by_kappa,
    comparisons,
    estimate,
    number,
    remarks,
    runs_of,
    settings,
    tuned,
)
from soluscope.results import ChoicePoint, Comparison, Record, Term, of_kind

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import Section, Workspace

TABLE = "comparison"
BARS, PHI_DYN = "figures/final_loss", "figures/phi_dyn_by_kappa"
SECTIONS = {
    "tuning": "Tuning",
    "loss": "Loss of each run",
    "differences": "Paired differences",
    "terms": "Gain of LN and its terms",
    "dose": "Dose",
    "training": "Training",
}
"""Sections of the report's page that have figures, and what they are called here."""
NO_PHI_DYN = (
    "No Phi_dyn: it takes runs of plain SoLU, of an arm with a per-token norm and of a static arm that "
    "share a seed."
)
COLUMNS = (
    "term", "arm", "variant", "kappa", "against", "x", "value", "low", "high", "unit", "n",
    "cluster", "n_clusters", "p", "p_adj", "verdict", "note",
)  # fmt: skip
"""Of the table of comparisons, and of the curves on which a setting `x` was chosen. Each difference is
there twice, by `cluster`."""
PINNED = (
    "config:variant.value", "config:seed.value", "config:study.value", "config:size.value",
    "config:kappa.value", "config:lr.value", "summary:report_loss", "summary:r", "summary:gain",
)  # fmt: skip
"""Columns of the runs table, after the run's name. The app files a config key under `.value`."""
START_SECONDS, FINISH_SECONDS = 30, 600
"""How long a server may take that does not answer, before the report gives up."""
TITLE_HEIGHT = 40
"""Pixels that a title takes: the report's page has headings instead."""


@dataclass(frozen=True)
class Place:
    """Where in wandb."""

    entity: str
    project: str


def place(text: str) -> Place:
    """Where `entity/project` is.

    Raises:
        UserError: if `text` is not of that form.
    """
    if not re.fullmatch(r"[^\s/\\#?%:]+/[^/\\#?%:]+", text.strip()):
        raise UserError(f"--wandb {text!r} is not entity/project, as in: --wandb my-team/soluscope")
    return Place(*text.strip().split("/"))


def sign_in() -> None:
    """Make sure that wandb takes this user's key, before anything is sent.

    Raises:
        UserError: if wandb is not installed, there is no key, or the server refuses it or is not there.
    """
    _installed()
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise UserError(f"WANDB_MODE={mode} with --wandb, which sends: unset it, or add --dry-run")
    wandb_client.sign_in("--wandb", "add --dry-run, which needs none")


def preview(study_dir: Path, where: Place) -> str:
    """The dashboard as JSON, as it would be saved. Nothing is sent.

    Raises:
        UserError: if there are no results, or wandb is not installed.
    """
    _installed()
    records = results.read(study_dir / "results.jsonl")
    made = _workspace(records, drawings(records), where)
    return json.dumps(made._to_model().model_dump(by_alias=True, exclude_none=True), indent=1)


def publish(study_dir: Path, where: Place) -> str:
    """Log the study's comparison, save its dashboard, and return the dashboard's address.

    Raises:
        UserError: if there are no results, or the server refuses one of the two.
    """
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError
    from wandb_workspaces.workspaces.errors import SpecVersionError

    records = results.read(study_dir / "results.jsonl")
    drawn = drawings(records)
    try:
        _log(records, drawn, where)
        return _save(_workspace(records, drawn, where), _study(records))
    except (wandb.Error, WandbApiFailedError, SpecVersionError, TimeoutError) as error:
        raise UserError(
            f"wandb did not take the study into --wandb {where.entity}/{where.project}: "
            f"{wandb_client.one_line(error)}"
        ) from error


# ---------------------------------------------------------------- the comparison, as a run


def _log(records: Sequence[Record], drawn: dict[str, go.Figure], where: Place) -> None:
    import wandb

    study = _study(records)
    commits = ", ".join(sorted({record.commit for record in records} - {""}))
    with (
        TemporaryDirectory() as scratch,
        wandb.init(
            entity=where.entity,
            project=where.project,
            id=_run_id(study),
            resume="allow",
            name=study,
            group=study,
            job_type="report",
            config={"study": study, "commit": commits},
            dir=scratch,
            mode="online",
            settings=wandb.Settings(
                console="off",
                init_timeout=START_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        ) as run,
    ):
        table = wandb.Table(columns=list(COLUMNS), data=_table(records), allow_mixed_types=True)
        run.log({TABLE: table, **{key: wandb.Plotly(figure) for key, figure in drawn.items()}})
        run.summary.update(_final(records))


def _table(records: Sequence[Record]) -> list[list[Any]]:
    """All comparisons and points of curves, one line each, in the order of `COLUMNS`."""
    kappas = _kappas(records)
    lines: list[list[Any]] = []
    for row in records:
        if isinstance(row, Comparison):
            named = {"term": _term(row), "against": row.against, "x": row.lr, "p": row.p}
            named |= {"p_adj": row.p_adj, "verdict": row.verdict, "note": remarks(row)}
        elif isinstance(row, ChoicePoint):
            named = {"term": f"select loss by {row.setting}", "against": row.chosen_arm, "x": row.x}
        else:
            continue
        named["kappa"] = kappas.get(row.arm)
        lines.append([named[k] if k in named else getattr(row, k, None) for k in COLUMNS])
    return lines


def _final(records: Sequence[Record]) -> dict[str, float | str | None]:
    """The comparisons with the interval for new seeds: `Phi_dyn/solu_ln`, its `/low` and `/high`.

    What is undefined has its note in the number's place. Bounds that do not exist are None and not
    left out, so that a second report of the study does not keep the first one's.
    """
    result: dict[str, float | str | None] = {}
    for row in of_kind(records, Comparison):
        if row.cluster != "seed":
            continue
        key = "/".join(part for part in (_term(row), row.arm, _reference(row)) if part)
        result[key] = row.note if row.value is None else row.value
        result |= {f"{key}/low": row.low, f"{key}/high": row.high}
    return result


def _term(row: Comparison) -> str:
    """What a comparison is of, unlike that of every other comparison of the same arms."""
    if row.term is Term.PROBE:
        return f"{row.probe}: {row.quantity}"
    name = figures.term_name(row)
    if row.term is Term.STEP:
        return f"telescoping: {name}"
    return name if row.lr is None else f"{name} at a common rate"


def _reference(row: Comparison) -> str:
    """The other arm that a comparison's key names: what is subtracted, or the arm whose curve it is on."""
    return f"minus {row.against}" if row.term in (Term.DIFFERENCE, Term.PROBE) else row.tuned_arm


def drawings(records: Sequence[Record]) -> dict[str, go.Figure]:
    """Return the figures of the report and two more, by the key under which they are logged."""
    compared = tuned(records)
    look = figures.styles(compared)
    result = {
        BARS: _titled(_bars(compared, look), "Final loss and its 95% interval for new seeds"),
        PHI_DYN: _titled(_phi_dyn(compared, look), "Phi_dyn and its 95% interval for new seeds"),
    }
    result = {key: figure for key, figure in result.items() if figure.data}
    for section in sections.build(list(records)):
        of_probe = section.name not in SECTIONS
        key = f"{'probes' if of_probe else 'figures'}/{section.name}"
        heading = section.heading if of_probe else SECTIONS[section.name]
        for i, plot in enumerate(section.plots, start=1):
            title = f"{heading}: {plot.caption}" if plot.caption else heading
            result[f"{key}/{i}"] = _titled(plot.figure, title)
    return result


def _bars(records: Sequence[Record], look: Mapping[str, Style]) -> go.Figure:
    """Mean loss by arm, nats a token. Bars begin at 0, so the numbers stand in them."""
    means = comparisons(records, Term.LOSS)
    ends = [(row.value or 0.0, row.low, row.high) for row in means]
    bars = go.Bar(
        x=[value for value, _, _ in ends],
        y=[html.escape(row.arm) for row in means],
        orientation="h",
        marker={"color": [look[row.arm].colour for row in means]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [0.0 if high is None else high - value for value, _, high in ends],
            "arrayminus": [0.0 if low is None else value - low for value, low, _ in ends],
        },
        text=[f"{estimate(row, decimals=4)}, n = {row.n}" for row in means],
        textposition="inside",
        insidetextanchor="start",
    )
    layout = {"template": "none", "height": 120 + 34 * len(means), "margin": {"l": 130, "t": 20}}
    figure = go.Figure([bars] if means else [], layout)
    figure.update_xaxes(title_text="nats / token")
    return figure.update_yaxes(autorange="reversed")


def _phi_dyn(records: Sequence[Record], look: Mapping[str, Style]) -> go.Figure:
    """Phi_dyn against kappa, or by arm where no variant has several kappas; no traces where it is undefined."""
    rows = [row for row in comparisons(records, Term.SHARE) if row.value is not None]
    points: list[Point] = []
    lines: dict[str, Style] = {}
    for variant, kappas in by_kappa(records).items():
        points += [Point(kappas[row.arm], row, variant) for row in rows if row.arm in kappas]
        lines[variant] = look[min(kappas)]
    if not points:
        return figures.by_arm(rows, look)
    figure = figures.along({"": points}, "kappa", lines, {line: line for line in lines})
    return figure.update_traces(mode="markers")  # a line would cross the kappas without a Phi_dyn


def _titled(figure: go.Figure, title: str) -> go.Figure:
    """The figure with room above its panels for a title."""
    if figure.layout.height is None:
        return figure.update_layout(title=html.escape(title))
    return figure.update_layout(
        title={"text": html.escape(title), "font": {"size": 14}},
        height=figure.layout.height + TITLE_HEIGHT,
        margin_t=figure.layout.margin.t + TITLE_HEIGHT,
    )


# ---------------------------------------------------------------- the dashboard


def _workspace(records: Sequence[Record], drawn: dict[str, go.Figure], where: Place) -> Workspace:
    """The study's dashboard: the runs of the study, grouped by variant or arm, and its comparison."""
    import wandb_workspaces.workspaces as ws

    study = _study(records)
    n_runs = _n_runs(records)
    made = ws.Workspace(
        entity=where.entity,
        project=where.project,
        name=study.replace("+", "-"),  # the library takes + for an emoji
        sections=_sections(records, drawn),
        settings=ws.WorkspaceSettings(max_runs=n_runs),
        runset_settings=ws.RunsetSettings(
            filters=f"Config('study') == {study!r}",
            groupby=[ws.Config(_grouped_by(records))],
            pinned_columns=list(PINNED),
            pinned_runs=[_run_id(study)],  # fetched whatever else is, so that its figures show
        ),
    )
    for section in made.sections:
        for i, panel in enumerate(section.panels):
            panel._id = digest([study, section.name, i])  # else random: links to panels would break
    made._internal_name = f"nw-{_view_id(study)}-v"
    return made


def _save(made: Workspace, study: str) -> str:
    """Save the dashboard in the place of the study's last one; its address."""
    from wandb_workspaces.workspaces.internal import get_view_dict

    # Without an id there is no last one yet, which the library says by a ValueError.
    with suppress(ValueError):
        made._internal_id = get_view_dict(made.entity, made.project, _view_id(study))["id"]
    return str(made.save().url)


def _sections(records: Sequence[Record], drawn: dict[str, go.Figure]) -> list[Section]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sentences = words.in_view(words.headline(list(records)), page.N_SENTENCES)
    headline = "\n".join(f"- {sentence}" for sentence in sentences)
    key, n_runs = _grouped_by(records), _n_runs(records)
    by_section: dict[str, list[str]] = {}
    for logged_as in drawn:
        by_section.setdefault(logged_as.rpartition("/")[0], []).append(logged_as)

    def curves(name: str, log_y: bool) -> PanelTypes:
        return wr.LinePlot(
            title=f"{name} by {key}",
            x="tokens",
            y=[name],
            log_y=log_y,
            groupby=wr.Config(key),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=n_runs,
        )

    def bars(name: str) -> PanelTypes:
        return wr.BarPlot(
            title=f"{name} by {key}: mean of the runs, lowest to highest",
            metrics=[wr.SummaryMetric(name)],
            groupby=wr.Config(key),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=n_runs,
        )

    def media(title: str, logged: Sequence[str]) -> list[PanelTypes]:
        return [wr.MediaBrowser(title=title, media_keys=logged, num_columns=1)] if logged else []

    def shown(*names: str) -> list[PanelTypes]:
        return [
            panel
            for name in names
            for panel in media(SECTIONS[name], by_section.get(f"figures/{name}", []))
        ]

    return [
        ws.Section(
            name="What was found",
            panels=[
                wr.MarkdownPanel(markdown=headline),
                wr.WeavePanelSummaryTable(table_name=TABLE),
            ],
            is_open=True,
            pinned=True,
        ),
        ws.Section(
            name="Loss",
            panels=[
                curves("loss", log_y=True),
                bars("report_loss"),
                *media("Final loss with intervals", [BARS] if BARS in drawn else []),
                *shown("loss", "differences", "terms"),
            ],
            is_open=True,
        ),
        ws.Section(
            name="Phi_dyn by kappa",
            panels=[
                wr.MarkdownPanel(markdown=_phi_dyn_in_words(records)),
                *media("Phi_dyn by kappa", [PHI_DYN] if PHI_DYN in drawn else []),
                *shown("dose"),
            ],
            is_open=True,
        ),
        ws.Section(
            name="r and gain",
            panels=[
                curves("r", log_y=False),
                curves("gain", log_y=True),
                bars("r"),
                bars("gain"),
            ],
            is_open=True,
        ),
        ws.Section(
            name="Training",
            panels=[
                curves("grad_norm", log_y=True),
                curves("tokens_per_s", log_y=False),
                *shown("tuning", "training"),
            ],
        ),
        ws.Section(
            name="Probes",
            panels=[
                panel
                for name, logged in by_section.items()
                if name.startswith("probes/")
                for panel in media(name.removeprefix("probes/"), logged)
            ],
        ),
    ]


def _grouped_by(records: Sequence[Record]) -> str:
    """The config key that panels group runs by: a variant's mean over several rates or kappas means nothing."""
    pairs = {(each.variant, each.arm) for each in pretrained.trained(records) if each.arm}
    return "arm_name" if len(pairs) > len({variant for variant, _ in pairs}) else "variant"


def _n_runs(records: Sequence[Record]) -> int:
    """Runs behind a panel, the report's own among them; the app takes the first 10 by default."""
    return 1 + len(runs_of(records))


def _phi_dyn_in_words(records: Sequence[Record]) -> str:
    """One line an arm: kappa, Phi_dyn and how it was made, or why there is none."""
    kappas = _kappas(records)
    lines = [
        f"- {row.arm}, kappa {number(kappas[row.arm]) if row.arm in kappas else 'not measured'}: "
        + (row.note if row.value is None else f"{estimate(row, decimals=2)}; {remarks(row)}")
        for row in comparisons(records, Term.SHARE)
    ]
    return "\n".join(lines) or NO_PHI_DYN


def _kappas(records: Sequence[Record]) -> dict[str, float]:
    """Return kappa by arm, of those whose norm has an epsilon."""
    known = settings(records).items()
    return {arm: each.values["kappa"] for arm, each in known if "kappa" in each.values}


def _study(records: Sequence[Record]) -> str:
    return records[0].study


def _run_id(study: str) -> str:
    return f"report-{digest(study)}"


def _view_id(study: str) -> str:
    return digest(study)[:11]  # as long as the app's own


def _installed() -> None:
    missing = [name for name in ("wandb", "wandb_workspaces") if find_spec(name) is None]
    if missing:
        package = missing[0].replace("_", "-")
        raise UserError(f"--wandb wants {package}: pip install wandb wandb-workspaces")
