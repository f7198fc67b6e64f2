"""The report's sections, built once from the records, for the page and for the dashboard's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from soluscope.report import (
    contrasts,
    controls,
    dynamics,
    evidence,
    figures,
    ladders,
    meaning,
    methods,
    neurons,
    paragraph,
    pretrained,
    proxies,
    rating,
    removal,
    robustness,
    scaling,
    tokens,
    tuning,
    where,
)
from soluscope.report.blocks import (
    Badge,
    Badges,
    Block,
    Bullets,
    Cell,
    Fold,
    Paragraph,
    Section,
    Table,
    fold,
    plot,
)
from soluscope.report.figures import QUARTILE, Style, term_name
from soluscope.report.findings import (
    at_best_rate,
    by_stream,
    comparisons,
    estimate,
    for_these_models,
    held_out_gaps,
    listed,
    number,
    number_key,
    of_size,
    per_token,
    remarks,
    run_name,
    sizes,
    streams,
    tuned,
    twins,
)
from soluscope.report.sheet import N_COLUMNS
from soluscope.results import (
    HELD_OUT,
    NOT_PROBES,
    Comparison,
    Figure,
    Ladder,
    LeftOut,
    Measurement,
    OfRun,
    ProbeWords,
    Provenance,
    Quantity,
    Record,
    Registered,
    Term,
    Untrained,
    of_kind,
)
from soluscope.text import plural

N_MEANINGS = 1
"""Number of sentences on a probe's result in view; the others are folded."""
CLICK = "Click an arm in the legend to hide it; double-click shows it alone."
NOT_COUNTED = (
    "False positives were not counted; to count them: soluscope probe --false-positives DIR"
)


def build(records: list[Record], identifiers: Mapping[str, str] | None = None) -> list[Section]:
    """Return the sections that have content, in their order on the page.

    Args:
        records: the study's records.
        identifiers: the identifiers of the arms by the names that they have in the records; by default, the names
            in the records are the identifiers.
    """
    arms = _Arms(records, identifiers or {})
    sections = [
        Section("pretrained", "Pretrained", pretrained.blocks(arms.records)),
        Section("evidence", "Hypotheses and evidence", evidence.blocks(arms.records)),
        Section("terms", "Phi_dyn and its terms", arms.terms()),
        Section("where", "Where the arms differ", where.blocks(arms.records, arms.look)),
        Section("differences", "Paired differences", arms.differences()),
        Section("loss", "Loss", arms.loss()),
        Section("training", "Training", arms.training(), "training"),
        Section("dynamics", "Dynamics", dynamics.blocks(arms.records, arms.look), "training"),
        Section("tuning", "Tuning", tuning.blocks(records, arms.look), "tuning"),
        Section(
            "robustness", "Robustness to the learning rate", robustness.blocks(records), "tuning"
        ),
        Section(
            "designs", "At a fixed scale of the MLP's output", robustness.designs(records), "tuning"
        ),
        Section("dose", "Dose: kappa", tuning.dose(arms.records, arms.look), "dose"),
        Section("gain", "Dose: a constant gain", ladders.blocks(arms.records, Ladder.GAIN), "dose"),
        Section(
            "entropy",
            "Dose: an entropy penalty",
            ladders.blocks(arms.records, Ladder.ENTROPY),
            "dose",
        ),
        Section("width", "Width", ladders.blocks(arms.records, Ladder.WIDTH), "dose"),
        Section("size", "Size", scaling.blocks(arms.records), "dose"),
        Section(
            "removal",
            "Removal of the per-token gain, or of all norms",
            removal.blocks(arms.records),
            "probes",
        ),
        Section("contrasts", "Differences between arms", contrasts.blocks(arms.records), "probes"),
        Section("confirmed", "Probes before and after training", arms.confirmed(), "probes"),
    ]
    probes = {
        record.probe for record in arms.records if isinstance(record, Measurement | LeftOut)
    } - NOT_PROBES
    sections += [arms.probe(name) for name in controls.in_order(records, probes)]
    sections += [
        Section("tokens", "Token view", tokens.blocks(arms.records), "tokens"),
        Section("neurons", "Neurons", neurons.blocks(arms.records), "neurons"),
        Section("rating", "Blind rating", rating.blocks(records), "neurons"),
        Section(
            "proxies", "Automatic proxies, not ratings", proxies.blocks(arms.records), "neurons"
        ),
        Section("methods", "Terms and intervals", methods.terms(), "methods"),
        Section("controls", "Probes on control models", methods.controls_table(records), "methods"),
        Section("registration", "Preregistration", _registration(records), "data"),
        Section("provenance", "Runs and code", _provenance(records, arms.identifiers), "data"),
        Section("paragraph", "Methods paragraph and BibTeX", paragraph.blocks(records), "data"),
    ]
    return [section for section in sections if section.blocks]


class _Arms:
    """Sections about arms at their chosen learning rates; an arm has the same style in all of them."""

    def __init__(self, records: list[Record], identifiers: Mapping[str, str]) -> None:
        self.all = records
        self.identifiers = identifiers
        self.records = tuned(records)
        self.sizes = sizes(self.records)
        self.look: Mapping[str, Style] = figures.styles(at_best_rate(records))
        self.doses = figures.doses(self.records)
        self.matrix = evidence.matrix(self.records)

    def loss(self) -> list[Block]:
        means = comparisons(self.records, Term.LOSS)
        runs = [row for row in of_kind(self.records, Measurement) if row.probe == "loss"]
        if not means and not runs:
            return []
        lead = (
            "Loss in nats per token on the report split (the documents kept for reporting), without targets "
            "that are BOS. One dot per training seed; its bar is the 95% interval for other documents. A "
            "change of documents moves all arms together. To compare arms, read the paired differences, "
            "where the documents' common effect cancels."
        )
        lines = [
            [
                row.arm,
                self.identifiers.get(row.arm, row.arm),
                str(row.n),
                estimate(row, decimals=4),
                [f"s{r.seed}: {estimate(r, decimals=4)}" for r in runs if r.arm == row.arm],
            ]
            for row in means
        ]
        heads = [
            "arm",
            "identifier",
            "seeds",
            "mean [95%, new seeds on these documents]",
            "seed: loss [95%, other documents]",
        ]
        drawn = figures.losses(self.records, self.look)
        return [Paragraph(lead), *plot(drawn), Table(heads, lines)]

    def differences(self) -> list[Block]:
        rows = comparisons(self.records, Term.DIFFERENCE)
        if not rows:
            return []
        lead = (
            "Loss of an arm minus loss of a reference arm, in nats per token; below 0 the arm is better. "
            "Each pair of runs has the same seed, so the same initial values and batches, and is measured "
            "on the same documents. Thick bar: 95% interval for these trained models on other documents. "
            "Thin bar: 95% interval for new seeds and new documents, which a claim about a variant needs. "
            "If a thin bar leaves the frame, the table gives its bounds. An open mark has no interval."
        )
        result: list[Block] = [Paragraph(lead)]
        for size, of_one in self.sizes.items():
            result += plot(figures.differences(of_one, self.look), size)
        labels = [f"{row.arm} minus {row.against}" for row in rows]
        return [*result, self._contrasts(rows, labels)]

    def terms(self) -> list[Block]:
        shown = (Term.BENEFIT, Term.STATIC, Term.SHARE, Term.STEP)
        rows = [
            row
            for row in of_kind(self.records, Comparison)
            if row.term in shown and row.cluster == "seed" and row.lr is None and not row.design
        ]
        if not rows:
            return []
        lead = (
            "Benefit of LN: loss of plain SoLU minus loss of SoLU with LayerNorm. static - LN: loss of the "
            "best static arm (one gain for all tokens, retrained) minus loss of SoLU with LayerNorm. Phi_dyn: "
            "static - LN as a share of the benefit of LN. 0: the static arms reach all of it; 1: they reach "
            "none; below 0: the static arm is better. The steps from plain SoLU to LayerNorm "
            "add one part each, and sum to the benefit of LN. Bars as above."
        )
        labels = [
            f"{row.arm}: {term_name(row)}" + (f" ({row.adds})" if row.adds else "") for row in rows
        ]
        return [
            Paragraph(lead),
            *plot(figures.terms(self.records, self.look)),
            self._contrasts(rows, labels),
            *fold(
                "With all arms at one learning rate (exploratory)",
                tuning.common_rate(self.all, self.look),
            ),
        ]

    def confirmed(self) -> list[Block]:
        """Show the confirmatory tests: a probe's number minus that of the run's own initialisation."""
        rows = comparisons(self.records, Term.PROBE)
        if not rows:
            return []
        lead = (
            "A probe's number in a trained run minus its number in the same run before training, on the same "
            "text. If training did not change it, the difference is as often above 0 as below. The p-values are "
            "corrected for the number of these tests. All other tests on this page, except those of the numerator "
            "of Phi_dyn and of the two contrasts between tokens, are exploratory."
        )
        lines = [
            [
                f"{row.arm}, trained minus untrained: {row.probe}: {row.quantity}, {row.unit}",
                estimate(row),
                str(row.n),
                remarks(row),
            ]
            for row in rows
        ]
        heads = ["", "difference [95%, new seeds]", "seeds", "note"]
        return [Paragraph(lead), Table(heads, lines)]

    def _contrasts(self, rows: Sequence[Comparison], labels: Sequence[str]) -> Table:
        """Return a table of comparisons, each with both intervals."""
        lines = []
        for row, label in zip(rows, labels, strict=True):
            fixed = for_these_models(self.records, row)
            decimals = 2 if row.unit == "share" else 4
            lines.append(
                [
                    label,
                    estimate(row, decimals),
                    estimate(fixed, decimals) if fixed else "",
                    str(row.n),
                    remarks(row),
                ]
            )
        heads = [
            "",
            "estimate [95%, new seeds and documents]",
            "[95%, these models, other documents]",
            "seeds",
            "note",
        ]
        return Table(heads, lines)

    def training(self) -> list[Block]:
        """Draw each number that was logged during training; the loss on held-out documents comes first."""
        rows = [row for row in of_kind(self.records, Measurement) if row.probe == "training"]
        gaps = held_out_gaps(self.records)
        result: list[Block] = []
        names = {row.quantity for row in rows}
        first = [name for name in (HELD_OUT, "loss") if name in names]
        for name in [*first, *sorted(names - {*first})]:
            result += self._training_curve(rows, name, log_y=name != "r")
            for gap in dict.fromkeys(row.quantity for row in gaps if name == HELD_OUT):
                result += self._training_curve(gaps, gap)
        lead = "One thin line per run, against the number of training tokens."
        return [Paragraph(lead), *result] if result else []

    def _training_curve(
        self, rows: Sequence[Measurement], name: str, log_y: bool = False
    ) -> list[Block]:
        spec = Figure(name, (name,), kind="curve", x_title="tokens seen", log_y=log_y)
        return plot(figures.draw(rows, spec, self.look), caption=name)

    def probe(self, name: str) -> Section:
        """Return a probe's section: its numbers, figures and stored description, or the numbers alone."""
        rows = [row for row in of_kind(self.records, Measurement) if row.probe == name]
        before = [row for row in of_kind(self.records, Untrained) if row.probe == name]
        wrong = controls.failures(self.all, name)
        failed = " (control failed)" if wrong else ""
        words = controls.words_of(self.all, name)
        if words is None:
            note = f"The results contain no description of {name!r}; its numbers are shown without one."
            blocks: list[Block] = [
                *self._standing(name, wrong),
                Paragraph(note),
                *self._left_out(name),
                *_probe_tables(rows, {}, before),
                *self._on_controls(name),
            ]
            return Section(name, name + failed, blocks, "probes", bool(wrong))
        shown, headline = self._headline(words, rows, before)
        if not headline and words.figures:
            text = "The numbers of this probe's figure are undefined for these models; the table has the reasons."
            headline = [Paragraph(text, style="soft")]
        sentences = self._meaning(words, rows, before)
        blocks = [
            Paragraph("", lead=words.question),
            *self._standing(name, wrong),
            *(Paragraph(text, "Meaning of this result.") for text in sentences[:N_MEANINGS]),
            *headline,
            *self._left_out(name),
        ]
        others = sentences[N_MEANINGS:]
        blocks += fold(f"Meaning: {len(others)} more", [Bullets(others)] if others else [])
        more = []
        for spec in words.figures:
            whole = shown is not None and spec.quantities == shown.quantities
            whole = whole and (spec.kind == "curve" or len(_streams(rows, spec)) < 2)
            more += (self._against_dose if whole else self._drawn)(rows, spec)
        blocks += [
            *fold("More figures", more),
            *_probe_tables(rows, words.quantities, before),
            *self._on_controls(name),
        ]
        method: list[Block] = [
            Paragraph(words.reading, "How to read it."),
            Paragraph(words.formula, "Formula.", code=True),
            Paragraph(words.pitfalls, "Pitfalls."),
        ]
        if rates := controls.false_positives(self.all, name):
            text = "; ".join(map(controls.rate, rates))
            text = f"Rate of findings where there is nothing to find: {text}."
            method.append(Paragraph(text, "False positives."))
        else:
            method.append(Paragraph(NOT_COUNTED, style="soft"))
        if words.source:
            method.append(Paragraph(f"Source: {words.source}", style="soft"))
        blocks += fold("How to read it", method)
        heading = f"{words.section} {words.name}".strip() + failed
        return Section(name, heading, blocks, "probes", bool(wrong))

    def _meaning(
        self, words: ProbeWords, rows: Sequence[Measurement], before: Sequence[Untrained]
    ) -> list[str]:
        """Return sentences on a validated probe's result: about these trained models, without BOS."""
        if controls.standing(self.all, words.probe) != "passed":
            return []
        arms = [*per_token(self.records), *twins(self.records), *pretrained.arms(self.records)]
        return meaning.sentences(words, rows, arms, before)

    def _headline(
        self, words: ProbeWords, rows: Sequence[Measurement], before: Sequence[Untrained]
    ) -> tuple[Figure | None, list[Block]]:
        """Draw the numbers that the sentences are about, beside the numbers before training.

        Returns:
            The specification of the figure and its blocks. The figure shows natural text or else the first stream,
            and one row of panels. Without numbers that sentences are about, it is the probe's first figure.
        """
        main = meaning.main(words, rows)
        spec = _about(words, main[0]) if main else next(iter(words.figures), None)
        if spec is None:
            return None, []
        remark = ""
        if spec.kind == "dots":
            drawn = [row for row in rows if figures.is_drawn(row, spec)]
            first = [row.quantity for row in main[:1]]
            known = [name for name in spec.quantities if name in {row.quantity for row in drawn}]
            panels = list(dict.fromkeys([*first, *known]))[:N_COLUMNS]
            spec = replace(
                spec,
                quantities=tuple(name for name in spec.quantities if name in panels),
                streams=tuple(_streams(main or drawn, spec)[:1]),
            )
            rings = any(each.quantity in panels for each in before)
            remark = "Grey rings: the same models before training. " if rings else ""
            bare = any(row.low is None for row in drawn if row.quantity in panels)
            remark += "Open marks have no interval. " if bare else ""
            remark += self.doses.caption()
        return spec, plot(figures.draw(rows, spec, self.look, before), spec.title, remark)

    def _standing(self, name: str, wrong: Sequence[str]) -> list[Block]:
        """Return badges on the controls and on each arm's verdict on H-smear, and a warning if a control failed."""
        gates = controls.gates(self.all, name)
        if gates:
            standing = controls.standing(self.all, name)
            mark = "pass" if standing == "passed" else "fail"
            hover = "results on models whose answer is known"
            badges = [Badge(mark, f"controls {standing}", hover)]
        else:
            hover = "this probe has not been validated on controls"
            badges = [Badge("none", "no control run", hover)]
        for row, seen in self.matrix:
            if row.probe == name:
                badges += [
                    Badge(
                        evidence.MARKS[each.verdicts[-1]],
                        f"{each.arm}: H-smear {each.verdicts[-1]}",
                        row.name,
                    )
                    for each in seen
                    if each.verdicts
                ]
        badges += [
            Badge(
                "fail" if control in wrong else "pass",
                f"{controls.sign(of_one)} {control} {'FAIL' if control in wrong else 'pass'}",
                " | ".join(map(controls.line, of_one)),
            )
            for control, of_one in gates.items()
        ]
        result: list[Block] = [Badges(badges)]
        if wrong:
            noun = plural(len(wrong), "control")
            text = f"This probe failed its {noun} {', '.join(wrong)}: do not cite its numbers."
            result.append(Paragraph(text, style="warn"))
        return result

    def _on_controls(self, name: str) -> list[Block]:
        """Return the numbers behind the badges of the controls, folded."""
        gates = controls.gates(self.all, name)
        lines = [
            [control, gate.measured, f"{estimate(gate)} {gate.unit}", controls.asked(gate)]
            for control, of_one in gates.items()
            for gate in of_one
        ]
        if not lines:
            return []
        text = (
            "Controls are planted models whose answer is known. C+: the probe must find its effect; C-: it must "
            "find none."
        )
        numbers = Table(["control", "number", "result", "note"], lines, n_text=2)
        return fold("Results on the controls", [Paragraph(text, style="soft"), numbers])

    def _left_out(self, name: str) -> list[Block]:
        """Return sentences on the arms and runs that a probe leaves out, with the reasons."""
        runs: dict[str, set[str]] = {}
        for record in self.records:
            if isinstance(record, OfRun):
                runs.setdefault(record.arm, set()).add(record.run)
        left: dict[tuple[str, str], dict[str, list[LeftOut]]] = {}
        for each in of_kind(self.records, LeftOut):
            if each.probe == name:
                of_reason = left.setdefault((each.stream, each.note), {})
                of_reason.setdefault(each.arm, []).append(each)
        result: list[Block] = []
        for (stream, note), by_arm in left.items():
            names: list[str] = []
            for arm, gone in by_arm.items():
                whole = {each.run for each in gone} == runs[arm]
                names += [arm] if whole else sorted(map(run_name, gone))
            on = f" on {stream} text" if stream else ""
            result.append(Paragraph(f"Left out{on}: {listed(names)} ({note}).", style="soft"))
        return result

    def _drawn(self, rows: Sequence[Measurement], spec: Figure) -> list[Block]:
        """Return a figure of a probe, and the same numbers against the dose if a variant has several doses."""
        below = CLICK if spec.kind == "curve" else ""
        of_spec = _streams(rows, spec)
        if spec.kind == "curve" or len(spec.quantities) < 2 or len(of_spec) < 2:
            result = plot(figures.draw(rows, spec, self.look), spec.title, below)
            return [*result, *self._against_dose(rows, spec)]
        of_stream = [
            plot(
                figures.draw(rows, replace(spec, streams=(stream,)), self.look),
                f"{spec.title}: {stream}",
                below,
            )
            for stream in of_spec
        ]
        first, *others = [each for each in of_stream if each] or [[]]
        folded = fold(
            f"{spec.title}: {len(others)} other {plural(len(others), 'stream')}",
            [block for each in others for block in each],
        )
        return [*first, *folded, *self._against_dose(rows, spec)]

    def _against_dose(self, rows: Sequence[Measurement], spec: Figure) -> list[Block]:
        """Return the numbers of a figure of dots against the dose, if a variant has several doses."""
        result: list[Block] = []
        for size, of_one in self.sizes.items() if spec.kind == "dots" else ():
            arms = {record.arm for record in of_one}
            of_size_only = [row for row in rows if row.arm in arms]
            doses = figures.doses(of_one)
            against = figures.against_dose(of_size_only, spec, self.look, doses)
            result += plot(against, of_size(f"{spec.title}, against the dose", size))
        return result


def _about(words: ProbeWords, row: Measurement) -> Figure:
    """Return the probe's figure of dots with this number, or a figure of this number alone."""
    for spec in words.figures:
        if spec.kind == "dots" and not spec.group and figures.is_drawn(row, spec):
            return spec
    title = f"{row.quantity}, {row.statistic}" if row.statistic else row.quantity
    return Figure(title, (row.quantity,), statistic=row.statistic)


def _streams(rows: Sequence[Measurement], spec: Figure) -> list[str]:
    """Return the streams of a figure, in the order in which they are shown."""
    return streams(row for row in rows if figures.is_drawn(row, spec))


# --- tables ---------------------------------------------------------------------------------------


def _probe_tables(
    rows: Sequence[Measurement], quantities: Mapping[str, Quantity], before: Sequence[Untrained]
) -> list[Block]:
    """Return a probe's numbers in folded tables: the main stream without BOS; then other streams and splits."""
    arms = list(dict.fromkeys(row.arm for row in rows))
    points = [row for row in rows if row.x is None]
    order = {name: i for i, name in enumerate(quantities)}
    last = len(order)
    points.sort(
        key=lambda r: (order.get(r.quantity, last), r.quantity, r.statistic, r.group, r.positions)
    )
    first = min(map(by_stream, points), default=None)
    main: list[Measurement] = []
    rest: list[Measurement] = []
    for row in points:
        split = QUARTILE.fullmatch(row.group) or row.positions != "not BOS"
        (rest if split or by_stream(row) != first else main).append(row)
    result: list[Block] = []
    if main:
        stream = main[0].stream
        caption = f"{stream} text, without BOS" if stream else "without BOS"
        lead = Paragraph("One line per seed, with the 95% interval for these models.", style="soft")
        result += fold(f"Table: {caption}", [lead, _by_arm(main, arms, quantities, before)])
    if rest:
        table = _by_arm(rest, arms, {}, before)
        result.append(Fold("Table: other streams and splits", [table], packed=True))
    return result


def _by_arm(
    rows: Sequence[Measurement],
    arms: Sequence[str],
    meanings: Mapping[str, Quantity],
    before: Sequence[Untrained],
) -> Table:
    """Return a table with one row per number and one column per arm.

    A cell has a line for each seed, and one for the same number before training.
    """
    untrained = {number_key(each): each for each in before}
    arms = [arm for arm in arms if arm in {row.arm for row in rows}]
    keys = ("stream", "positions", "group")
    shown = [key for key in keys if len({getattr(row, key) for row in rows}) > 1]
    by_number: dict[tuple[str, ...], dict[str, list[Measurement]]] = {}
    for row in rows:
        key = (row.quantity, row.statistic, *(getattr(row, name) for name in shown), row.unit)
        by_number.setdefault(key, {}).setdefault(row.arm, []).append(row)
    lines: list[list[Cell]] = []
    for (quantity, statistic, *rest), by_arm in by_number.items():
        *places, unit = rest
        name = f"{statistic} of {quantity}" if statistic else quantity
        label = [", ".join(part for part in (name, unit) if part)]
        if quantity in meanings:
            label.append(meanings[quantity].meaning)
            if meanings[quantity].more_smeared_when != "neither":
                label.append(f"more smeared when {meanings[quantity].more_smeared_when}")
        label += sorted({row.note for of_arm in by_arm.values() for row in of_arm} - {""})
        numbers: list[Cell] = []
        for arm in arms:
            of_arm = sorted(by_arm.get(arm, []), key=lambda r: r.seed or 0)
            numbers.append(
                [
                    line
                    for row in of_arm
                    for line in (estimate(row), *_before(untrained.get(number_key(row))))
                ]
            )
        lines.append([label, *places, *numbers])
    return Table(["quantity", *shown, *arms], lines, n_text=1 + len(shown))


def _before(untrained: Untrained | None) -> list[str]:
    if untrained is None or untrained.value is None:
        return []
    change = replace(untrained, value=untrained.difference)
    return [f"untrained {number(untrained.value)}; change {estimate(change)}"]


def _registration(records: list[Record]) -> list[Block]:
    """State whether the analysis followed the registered plan, and list each departure."""
    result: list[Block] = []
    for each in of_kind(records, Registered):
        followed = (
            "It lists these departures:" if each.departures else "No departure from it is known."
        )
        result += [
            Paragraph(
                f"The plan of this study was registered at {each.at}, before any run at a reported seed. Its "
                f"sha256 is {each.sha256}. {followed}"
            ),
            *([Bullets(each.departures)] if each.departures else []),
        ]
    return result


def _provenance(records: list[Record], identifiers: Mapping[str, str]) -> list[Block]:
    """List the runs, configurations and code that the numbers come from."""
    runs = {each.run: each for each in records if isinstance(each, OfRun)}
    commits = ", ".join(sorted({each.commit for each in records} - {""})) or "unknown"
    studies = ", ".join(sorted({each.study for each in records}))
    n_records = sum(not isinstance(each, Provenance) for each in records)
    text = (
        f"Study {studies}: {len(runs)} runs, {n_records:,} records of results.jsonl, measured with the code "
        f"of commit {commits}."
    )
    lines = []
    for name in sorted(runs):
        run = runs[name]
        seed = "" if run.seed is None else str(run.seed)
        identifier = identifiers.get(run.arm, run.arm)
        lines.append([name, run.arm, identifier, seed, run.config])
    return [Paragraph(text), Table(["run", "arm", "identifier", "seed", "config"], lines)]
