"""A study's comparison as one wandb run, and the study's wandb dashboard, defined in code.

The dashboard shows losses, r and gain from the training runs. Training runs contain no intervals and no
Phi_dyn, so the comparison is logged as a separate run, and the dashboard shows its table and figures. The
ids of the run and of the dashboard follow from the study's name, so the same command overwrites both.
Numbers of arms that are no longer in the study stay in the run's summary.

Keys read from the training runs: config `variant`, `arm_name`, `seed`, `study`, `size`, `kappa`, `lr`;
curves `tokens`, `loss`, `r`, `gain`, `grad_norm`, `tokens_per_s`; numbers `report_loss`, `r`, `gain`.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from soluscope import results, wandb_client
from soluscope.errors import UserError
from soluscope.files import digest
from soluscope.report import answer, contrasts, figures, page, pretrained, sections, words
from soluscope.report.blocks import Plot
from soluscope.report.figures import Point, Style
from soluscope.report.findings import (
    by_kappa,
    comparisons,
    estimate,
    number,
    number_key,
    remarks,
    runs_of,
    settings,
    tuned,
)
from soluscope.results import ChoicePoint, Comparison, Record, Term, Untrained, of_kind

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import PanelTypes
    from wandb_workspaces.workspaces import Section, Workspace

TABLE, PROBES = "comparison", "main numbers of the probes"
ANSWER, BARS, PHI_DYN = "figures/answer", "figures/final_loss", "figures/phi_dyn_by_kappa"
SECTIONS = {
    "tuning": "Tuning",
    "loss": "Loss of each run",
    "differences": "Paired differences",
    "terms": "Benefit of LN and its terms",
    "where": "Where the arms differ",
    "dose": "Dose",
    "gain": "Dose: a constant gain",
    "entropy": "Dose: an entropy penalty",
    "width": "Width",
    "size": "Size",
    "training": "Training",
    "dynamics": "Dynamics",
}
"""Titles on the dashboard for the sections of the report's page that have figures."""
NO_PHI_DYN = (
    "There is no Phi_dyn: it needs runs of plain SoLU, of an arm with a per-token norm and of a static arm "
    "that share a seed."
)
COLUMNS = (
    "term", "arm", "variant", "kappa", "against", "x", "value", "low", "high", "unit", "n",
    "cluster", "n_clusters", "p", "p_adj", "verdict", "note",
)  # fmt: skip
"""Columns of the table of comparisons and of the curves from which a setting `x` was chosen. Each
difference has two rows, with different `cluster`."""
OF_PROBES = (
    "probe", "quantity", "statistic", "unit", "arm", "variant", "seed", "trained", "low", "high", "untrained",
    "difference", "difference_low", "difference_high",
)  # fmt: skip
"""Columns of the table with one number of each probe and run: trained, untrained and their difference."""
PINNED = (
    "config:variant.value", "config:seed.value", "config:study.value", "config:size.value",
    "config:kappa.value", "config:lr.value", "summary:report_loss", "summary:r", "summary:gain",
)  # fmt: skip
"""Columns of the runs table after the run's name. The app stores a config key under `.value`."""
START_SECONDS, FINISH_SECONDS = 30, 600
"""Time limits for the server to start and to finish the run; after them, publishing fails."""


def sign_in(knob: str = "--wandb", instead: str = "add --dry-run, which needs none") -> None:
    """Check that wandb accepts this user's key before anything is sent.

    Args:
        knob: the word that needs the key, for messages.
        instead: words for doing without a key.

    Raises:
        UserError: if wandb is not installed, there is no key, or the server refuses the key or cannot be
            reached.
    """
    _installed(knob)
    wandb_client.sign_in(knob, instead)


def preview(study_dir: Path, where: wandb_client.Place) -> str:
    """Return the dashboard as the JSON that would be saved; nothing is sent.

    Raises:
        UserError: if there are no results, or wandb is not installed.
    """
    _installed()
    records = results.read(study_dir / "results.jsonl")
    made = _workspace(records, drawings(records), where)
    return json.dumps(made._to_model().model_dump(by_alias=True, exclude_none=True), indent=1)


def publish(study_dir: Path, where: wandb_client.Place, knob: str = "--wandb ") -> str:
    """Log the study's comparison, save its dashboard, and return the dashboard's address.

    Args:
        study_dir: folder with results.jsonl.
        where: entity and project in wandb.
        knob: beginning of the word that chose them, for messages.

    Raises:
        UserError: if there are no results, or the server refuses the comparison or the dashboard.
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
            f"wandb did not accept the study in {knob}{where.entity}/{where.project}: "
            f"{wandb_client.one_line(error)}"
        ) from error


# ---------------------------------------------------------------- the comparison, as a run


def _log(records: Sequence[Record], drawn: dict[str, go.Figure], where: wandb_client.Place) -> None:
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
                **wandb_client.ANONYMOUS,
            ),
        ) as run,
    ):
        table = wandb.Table(columns=list(COLUMNS), data=_table(records), allow_mixed_types=True)
        of_probes = wandb.Table(
            columns=list(OF_PROBES), data=_main_numbers(records), allow_mixed_types=True
        )
        plots = {key: wandb.Plotly(figure) for key, figure in drawn.items()}
        run.log({TABLE: table, PROBES: of_probes, **plots})
        run.summary.update(_final(records))


def _table(records: Sequence[Record]) -> list[list[Any]]:
    """Return one row for each comparison and each point of a curve, with the columns `COLUMNS`."""
    kappas = _kappas(records)
    lines: list[list[Any]] = []
    for row in records:
        if isinstance(row, Comparison):
            named = {"term": _term(row), "against": row.against, "x": row.lr or row.x, "p": row.p}
            named |= {"p_adj": row.p_adj, "verdict": row.verdict, "note": remarks(row)}
        elif isinstance(row, ChoicePoint):
            named = {"term": f"select loss by {row.setting}", "against": row.chosen_arm, "x": row.x}
        else:
            continue
        named["kappa"] = kappas.get(row.arm)
        lines.append([named[k] if k in named else getattr(row, k, None) for k in COLUMNS])
    return lines


def _main_numbers(records: Sequence[Record]) -> list[list[Any]]:
    """Return one row for each probe and run, with the columns `OF_PROBES`."""
    untrained = {number_key(row): row for row in of_kind(records, Untrained)}
    lines: list[list[Any]] = []
    for rows in contrasts.main_numbers(records).values():
        for row in rows:
            before = untrained.get(number_key(row))
            compared = (
                (before.value, before.difference, before.low, before.high) if before else [None] * 4
            )
            about = [getattr(row, name) for name in OF_PROBES[:7]]
            lines.append([*about, row.value, row.low, row.high, *compared])
    return lines


def _final(records: Sequence[Record]) -> dict[str, float | str | None]:
    """Return the answer, and the comparisons for new seeds: `Phi_dyn/solu_ln`, its `/low` and `/high`.

    An undefined comparison has its note in place of the number. Missing bounds are None rather than left
    out, so that a second report of the study does not keep the bounds of the first report.
    """
    result: dict[str, float | str | None] = {
        "answer": " ".join([*words.warnings(list(records)), words.answer(list(records))]),
        "how sure": "; ".join(words.certainty(list(records))),
    }
    for row in of_kind(records, Comparison):
        if row.cluster != "seed" or row.term in (Term.WHERE, Term.GAP):
            continue
        key = "/".join(part for part in (_term(row), row.arm, _reference(row)) if part)
        result[key] = row.note if row.value is None else row.value
        result |= {f"{key}/low": row.low, f"{key}/high": row.high}
    return result


def _term(row: Comparison) -> str:
    """Return a name for a comparison that is unique among the comparisons of the same arms."""
    if row.term is Term.PROBE:
        return f"{row.probe}: {row.quantity}"
    name = figures.term_name(row)
    if row.term is Term.STEP:
        return f"telescoping: {name}"
    return name if row.lr is None else f"{name} at a common rate"


def _reference(row: Comparison) -> str:
    """Return the second arm in a comparison's key: the subtracted arm, or the arm that names its curve."""
    return f"minus {row.against}" if row.term in (Term.DIFFERENCE, Term.PROBE) else row.tuned_arm


def drawings(records: Sequence[Record]) -> dict[str, go.Figure]:
    """Return the figures of the report, its first screen's included, and two more, by the key of their log."""
    compared = tuned(records)
    look = figures.styles(compared)
    result = {
        BARS: figures.titled(
            _bars(compared, look), "Final loss and its 95% interval for new seeds"
        ),
        PHI_DYN: figures.titled(
            _phi_dyn(compared, look), "Phi_dyn and its 95% interval for new seeds"
        ),
    }
    for block in answer.blocks(list(records), compared, look):
        if isinstance(block, Plot):
            result[ANSWER] = figures.titled(block.figure, block.caption)
    result = {key: figure for key, figure in result.items() if figure.data}
    for section in sections.build(list(records)):
        of_probe = section.name not in SECTIONS
        key = f"{'probes' if of_probe else 'figures'}/{section.name}"
        heading = section.heading if of_probe else SECTIONS[section.name]
        for i, plot in enumerate(section.plots, start=1):
            title = f"{heading}: {plot.caption}" if plot.caption else heading
            result[f"{key}/{i}"] = figures.titled(plot.figure, title)
    return result


def _bars(records: Sequence[Record], look: Mapping[str, Style]) -> go.Figure:
    """Draw the mean loss by arm, in nats per token. Bars start at 0, so there is room for the numbers inside."""
    means = comparisons(records, Term.LOSS)
    bounds = [(row.value or 0.0, row.low, row.high) for row in means]
    bars = go.Bar(
        x=[value for value, _, _ in bounds],
        y=[html.escape(row.arm) for row in means],
        orientation="h",
        marker={"color": [look[row.arm].colour for row in means]},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [0.0 if high is None else high - value for value, _, high in bounds],
            "arrayminus": [0.0 if low is None else value - low for value, low, _ in bounds],
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
    """Draw Phi_dyn against kappa, or by arm if no variant has several kappas; undefined values are left out."""
    rows = [row for row in comparisons(records, Term.SHARE) if row.value is not None]
    points: list[Point] = []
    lines: dict[str, Style] = {}
    for variant, kappas in by_kappa(records).items():
        points += [Point(kappas[row.arm], row, variant) for row in rows if row.arm in kappas]
        lines[variant] = look[min(kappas)]
    if not points:
        return figures.by_arm(rows, look)
    figure = figures.along({"": points}, "kappa", lines, {line: line for line in lines})
    return figure.update_traces(mode="markers")  # a line would pass over kappas without a Phi_dyn


# ---------------------------------------------------------------- the dashboard


def _workspace(
    records: Sequence[Record], drawn: dict[str, go.Figure], where: wandb_client.Place
) -> Workspace:
    """Build the study's dashboard: its runs, grouped by variant or arm, and its comparison."""
    import wandb_workspaces.workspaces as ws

    study = _study(records)
    n_runs = _n_runs(records)
    made = ws.Workspace(
        entity=where.entity,
        project=where.project,
        name=study.replace("+", "-"),  # the library interprets + as an emoji
        sections=_sections(records, drawn),
        settings=ws.WorkspaceSettings(max_runs=n_runs),
        runset_settings=ws.RunsetSettings(
            filters=f"Config('study') == {study!r}",
            groupby=[ws.Config(_grouped_by(records))],
            pinned_columns=list(PINNED),
            pinned_runs=[_run_id(study)],  # always fetched, so that its figures are shown
        ),
    )
    for section in made.sections:
        for i, panel in enumerate(section.panels):
            # The default id is random, which would break links to panels.
            panel._id = digest([study, section.name, i])
    made._internal_name = f"nw-{_view_id(study)}-v"
    return made


def _save(made: Workspace, study: str) -> str:
    """Save the dashboard, replacing the study's previous dashboard, and return its address."""
    from wandb_workspaces.workspaces.internal import get_view_dict

    # The library raises ValueError if there is no previous dashboard.
    with suppress(ValueError):
        made._internal_id = get_view_dict(made.entity, made.project, _view_id(study))["id"]
    return str(made.save().url)


def _sections(records: Sequence[Record], drawn: dict[str, go.Figure]) -> list[Section]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sentences = words.in_view(words.headline(list(records)), page.N_SENTENCES)
    headline = "\n".join(f"- {sentence}" for sentence in sentences)
    panels = _Panels(records, drawn)
    return [
        ws.Section(
            name="Findings",
            panels=[
                wr.MarkdownPanel(markdown=headline),
                *panels.figure("Loss of each arm beside plain SoLU", ANSWER),
                wr.WeavePanelSummaryTable(table_name=TABLE),
                wr.WeavePanelSummaryTable(table_name=PROBES),
            ],
            is_open=True,
            pinned=True,
        ),
        ws.Section(
            name="Loss",
            panels=[
                panels.curves("loss", log_y=True),
                panels.bars("report_loss"),
                *panels.figure("Final loss with intervals", BARS),
                *panels.sections("loss", "differences", "terms", "where"),
            ],
            is_open=True,
        ),
        ws.Section(
            name="Phi_dyn by kappa",
            panels=[
                wr.MarkdownPanel(markdown=_phi_dyn_in_words(records)),
                *panels.figure("Phi_dyn by kappa", PHI_DYN),
                *panels.sections("dose"),
            ],
            is_open=True,
        ),
        ws.Section(
            name="r and gain",
            panels=[
                panels.curves("r", log_y=False),
                panels.curves("gain", log_y=True),
                panels.bars("r"),
                panels.bars("gain"),
            ],
            is_open=True,
        ),
        ws.Section(
            name="Training",
            panels=[
                panels.curves("grad_norm", log_y=True),
                panels.curves("tokens_per_s", log_y=False),
                *panels.sections("tuning", "training", "dynamics"),
            ],
        ),
        ws.Section(name="Probes", panels=panels.probes()),
    ]


class _Panels:
    """Builder of the panels of a dashboard, from a study's runs and its logged figures."""

    def __init__(self, records: Sequence[Record], drawn: dict[str, go.Figure]) -> None:
        self._drawn = drawn
        self._key, self._n_runs = _grouped_by(records), _n_runs(records)
        self._by_section: dict[str, list[str]] = {}
        for logged_as in drawn:
            self._by_section.setdefault(logged_as.rpartition("/")[0], []).append(logged_as)

    def curves(self, name: str, log_y: bool) -> PanelTypes:
        """Return the curves of a number over training, as means of the groups of runs."""
        import wandb_workspaces.reports.v2 as wr

        return wr.LinePlot(
            title=f"{name} by {self._key}",
            x="tokens",
            y=[name],
            log_y=log_y,
            groupby=wr.Config(self._key),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=self._n_runs,
        )

    def bars(self, name: str) -> PanelTypes:
        """Return the final values of a number, as means of the groups of runs."""
        import wandb_workspaces.reports.v2 as wr

        return wr.BarPlot(
            title=f"{name} by {self._key}: mean of the runs, lowest to highest",
            metrics=[wr.SummaryMetric(name)],
            groupby=wr.Config(self._key),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=self._n_runs,
        )

    def figure(self, title: str, logged_as: str) -> list[PanelTypes]:
        """Return a figure; empty if it was not drawn."""
        return [_media(title, [logged_as])] if logged_as in self._drawn else []

    def sections(self, *names: str) -> list[PanelTypes]:
        """Return a panel with the figures of each named section of the report that has figures."""
        return [
            _media(SECTIONS[name], self._by_section[key])
            for name in names
            if (key := f"figures/{name}") in self._by_section
        ]

    def probes(self) -> list[PanelTypes]:
        """Return a panel with the figures of each probe."""
        return [
            _media(key.removeprefix("probes/"), logged)
            for key, logged in self._by_section.items()
            if key.startswith("probes/")
        ]


def _media(title: str, logged: Sequence[str]) -> PanelTypes:
    import wandb_workspaces.reports.v2 as wr

    return wr.MediaBrowser(title=title, media_keys=logged, num_columns=1)


def _grouped_by(records: Sequence[Record]) -> str:
    """Return the config key that panels group runs by.

    It is the arm if a variant has several arms: a mean over several learning rates or kappas is meaningless.
    """
    pairs = {(each.variant, each.arm) for each in pretrained.trained(records) if each.arm}
    return "arm_name" if len(pairs) > len({variant for variant, _ in pairs}) else "variant"


def _n_runs(records: Sequence[Record]) -> int:
    """Return the number of runs that a panel reads, including the report's run; the app's default is 10."""
    return 1 + len(runs_of(records))


def _phi_dyn_in_words(records: Sequence[Record]) -> str:
    """Return one line per arm with kappa, and Phi_dyn with its method or the reason why it is undefined."""
    kappas = _kappas(records)
    lines = [
        f"- {row.arm}, kappa {number(kappas[row.arm]) if row.arm in kappas else 'not measured'}: "
        + (row.note if row.value is None else f"{estimate(row, decimals=2)}; {remarks(row)}")
        for row in comparisons(records, Term.SHARE)
    ]
    return "\n".join(lines) or NO_PHI_DYN


def _kappas(records: Sequence[Record]) -> dict[str, float]:
    """Return kappa by arm, for the arms whose norm has an epsilon."""
    known = settings(records).items()
    return {arm: each.values["kappa"] for arm, each in known if "kappa" in each.values}


def _study(records: Sequence[Record]) -> str:
    return records[0].study


def _run_id(study: str) -> str:
    return f"report-{digest(study)}"


def _view_id(study: str) -> str:
    return digest(study)[:11]  # the length of the app's own ids


def _installed(knob: str = "--wandb") -> None:
    missing = [name for name in ("wandb", "wandb_workspaces") if find_spec(name) is None]
    if missing:
        package = missing[0].replace("_", "-")
        raise UserError(f"{knob} needs {package}: pip install wandb wandb-workspaces")
