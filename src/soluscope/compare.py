"""From the losses of all runs of a study to what differs between its variants.

The training seed is the unit: variants are paired by seed (same initial values, same batches) and
measured on the same documents. Each difference comes twice: with the interval for new seeds and
new documents (`cluster="seed"`), which a claim about a variant needs, and with the interval for
these trained models on new documents (`cluster="document"`).

Source: science.md sections 4 and 5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from soluscope import stats
from soluscope.errors import UserError
from soluscope.files import digest
from soluscope.results import MARGIN, Row
from soluscope.stats import Floats, Interval

if TYPE_CHECKING:
    import pandas as pd

UNDEFINED = "undefined: no gain of LN at this size"
STATIC = ("solu_gain", "solu_frozen_ln")
"""The class C: variants whose output scale is the same for every token."""
CHAIN = ("solu", "solu_gain", "solu_frozen_ln", "solu_ln_det", "solu_ln")
"""Each adds one thing: a gain; centring, affine; a scale of each token's own; its gradient."""
TWIN = "solu_frozen_ln"
"""What differs from solu_ln in nothing but having one gain for all tokens."""
PRIMARY = ("static - LN", "Phi_dyn")
"""Quantities whose test is of the primary family: the second is 0 where the first is."""


@dataclass(frozen=True)
class _Arm:
    name: str
    variant: str
    config: str
    select: dict[int, float]
    """Loss on the select split by seed, nats a token: for choosing."""
    report: dict[int, Floats]
    """Loss sums on the report split by seed, [document]: for reporting."""


@dataclass(frozen=True)
class _Arms:
    """What was measured, and the choices made among it."""

    study: str
    commit: str
    counts: Floats
    """Target tokens of the report split, [document]."""
    arms: tuple[_Arm, ...]

    def of(self, variants: Iterable[str]) -> list[_Arm]:
        wanted = set(variants)
        return [arm for arm in self.arms if arm.variant in wanted]

    def best(self, variants: Sequence[str]) -> tuple[_Arm, str] | None:
        """The arm with the lowest mean loss on select, and how it was chosen; None without one.

        Chosen once and for all seeds, on documents that are not reported: the best of several on
        the report split itself would be too good. Seeds that not all have are left out, so that an
        arm does not win by its seeds.
        """
        candidates = self.of(variants)
        if not candidates:
            return None
        shared = set.intersection(*(set(arm.select) for arm in candidates))
        losses = {
            arm.name: float(np.mean([arm.select[seed] for seed in shared or arm.select]))
            for arm in candidates
        }
        chosen = min(candidates, key=lambda arm: (losses[arm.name], arm.name))
        if len(candidates) == 1:
            return chosen, f"{chosen.name}, the only arm"
        return chosen, (
            f"{chosen.name}, chosen on the select split: "
            + ", ".join(f"{name} {loss:.4f}" for name, loss in sorted(losses.items()))
        )

    def difference(self, a: _Arm, b: _Arm, seeds: Sequence[int]) -> Floats:
        """Loss sums of `a` minus `b`, [seed document], nats."""
        return np.stack([a.report[seed] - b.report[seed] for seed in seeds])

    def row(
        self,
        quantity: str,
        arm: _Arm,
        interval: Interval,
        cluster: str,
        n_seeds: int,
        group: str = "",
        unit: str = "nats / token",
        note: str = "",
        p: float | None = None,
    ) -> Row:
        return Row(
            study=self.study,
            probe="comparison",
            quantity=quantity,
            value=None if math.isnan(interval.value) else interval.value,
            unit=unit,
            arm=arm.name,
            variant=arm.variant,
            stream="report",
            group=group,
            low=interval.low,
            high=interval.high,
            p=p,
            n=n_seeds,
            n_clusters=n_seeds if cluster == "seed" else interval.n_clusters,
            cluster=cluster,
            note=note,
            commit=self.commit,
            config=arm.config,
        )

    def contrast(
        self, quantity: str, arm: _Arm, a: _Arm, b: _Arm, group: str = "", note: str = ""
    ) -> list[Row]:
        """`a` minus `b` over the seeds both have, both ways; nothing if they share none."""
        seeds = _shared(a, b)
        if not seeds:
            return []
        difference = self.difference(a, b, seeds)
        new_seeds = stats.seeds_and_documents(difference, self.counts)
        new_documents = stats.document_bootstrap(difference.mean(axis=0), self.counts)
        n_seeds = len(seeds)
        p = new_seeds.p if n_seeds > 1 else None  # one seed flips to itself: no test
        notes = _also(note, "" if p is None else f"sign-flip p = {p:.3g}")
        return [
            self.row(quantity, arm, new_seeds, "seed", n_seeds, group=group, note=notes, p=p),
            self.row(quantity, arm, new_documents, "document", n_seeds, group=group, note=note),
        ]


def compare(study: str, losses: pd.DataFrame, commit: str) -> list[Row]:
    """All comparisons that the arms of a study allow; what needs a missing arm is not there.

    Where a variant other than `solu_ln` has several arms (gains, learning rates), the one with the
    lowest loss on the select split stands for it; each `solu_ln` arm is compared by itself.

    Args:
        study: name of the study.
        losses: one row a (run, split, document), with columns run, arm, variant, seed, split
            (`select` or `report`), document, loss_sum (nats, over targets that are not BOS),
            n_tokens (those targets), config.
        commit: of the code that measured.

    Returns:
        Rows of probe `comparison`, by quantity:
        `loss` of each arm, Student's t over seeds on these documents;
        `difference` of each arm to each reference, the reference in `group`;
        `gain of LN`, L(solu) - L(solu_ln), for each solu_ln arm;
        `static - LN`, L(best static) - L(solu_ln), its equivalence verdict in `note`;
        `Phi_dyn`, `static - LN` as a share of `gain of LN`, or None and a note that starts with
        `UNDEFINED`; `telescoping: a - b`, which sum to the gain of LN.
        Differences over two seeds or more have the exact sign-flip `p`. `static - LN` and `Phi_dyn`
        of all solu_ln arms are the primary family, with `p_adj` after Holm's correction.

    Raises:
        UserError: if a run was not measured on the documents of the others, or two runs have the
            same arm and seed.

    Source: science.md sections 4 and 5.
    """
    arms = _read(study, losses, commit)
    rows = []
    for arm in arms.arms:
        per_seed = [arm.report[seed].sum() / arms.counts.sum() for seed in sorted(arm.report)]
        interval = stats.paired_seeds(per_seed)
        note = "new seeds, these documents"
        rows.append(arms.row("loss", arm, interval, "seed", len(per_seed), note=note))

    gelu = arms.best(["gelu"])
    normed = arms.of(["solu_ln"])
    for reference in ([gelu[0]] if gelu else []) + normed:
        for arm in arms.arms:
            if arm is not reference:
                rows += arms.contrast("difference", arm, arm, reference, f"minus {reference.name}")

    plain, static = arms.best(["solu"]), arms.best(STATIC)
    for ln in normed:
        if plain is not None:
            rows += arms.contrast("gain of LN", ln, plain[0], ln, note=_stand_in("solu", *plain))
        if static is not None:
            rows += _static_minus_ln(arms, *static, ln)
        if plain is not None and static is not None:
            rows += _phi_dyn(arms, plain[0], *static, ln)
        if plain is not None:
            rows += _telescoping(arms, ln)
    return _adjust_primary(rows)


def _adjust_primary(rows: list[Row]) -> list[Row]:
    """The same rows, where those that answer "is Phi_dyn 0?" have p corrected for asking each arm.

    Phi_dyn is 0 where its numerator is, so the numerator's p is its own. The family holds all
    solu_ln arms, also those whose Phi_dyn is undefined: the tests must not depend on the outcome.
    """
    family = {row.arm: row.p for row in rows if row.quantity == "static - LN" and row.p is not None}
    adjusted = stats.holm(family)

    def with_p(row: Row) -> Row:
        asked = row.quantity in PRIMARY and row.cluster == "seed" and row.value is not None
        if not asked or row.arm not in family:
            return row
        note = f"Holm-adjusted p = {adjusted[row.arm]:.3g} over {', '.join(family)}"
        if row.quantity == "Phi_dyn":
            note = f"sign-flip p of its numerator = {family[row.arm]:.3g}; {note}"
        return replace(row, p=family[row.arm], p_adj=adjusted[row.arm], note=_also(row.note, note))

    return [with_p(row) for row in rows]


def confirm(rows: Sequence[Row], tested: Mapping[str, str]) -> list[Row]:
    """Do probes find more in LayerNorm than in its static twin, seed by seed?

    The confirmatory family: for each solu_ln arm and each probe, the paired difference of what the
    probe tests, with the exact sign-flip p, corrected after Holm over all of them.

    Args:
        rows: of the study's runs.
        tested: quantity by probe.

    Returns:
        Rows of probe `comparison`, quantity `probe: tested`, group `minus` and the twin's arm; none
        where the twin has no number (what is undefined under one gain cannot be compared).

    Source: science.md section 5, "Families".
    """
    found = []
    twins = sorted({row.arm for row in rows if row.variant == TWIN})
    for arm in sorted({row.arm for row in rows if row.variant == "solu_ln" and row.run}):
        for twin in twins:
            for probe, quantity in tested.items():
                found += _paired_probe(rows, probe, quantity, arm, twin)
    names = [f"{row.arm} {row.quantity} {row.group}" for row in found]
    adjusted = stats.holm(
        {name: row.p for name, row in zip(names, found, strict=True) if row.p is not None}
    )
    return [
        replace(
            row, p_adj=adjusted[name],
            note=_also(row.note, f"Holm-adjusted p = {adjusted[name]:.3g} over {len(adjusted)} tests"),
        ) if name in adjusted else row
        for name, row in zip(names, found, strict=True)
    ]  # fmt: skip


def _paired_probe(rows: Sequence[Row], probe: str, quantity: str, arm: str, twin: str) -> list[Row]:
    """One confirmatory test; a run's number is the mean over the streams that both arms have."""
    numbers: dict[str, dict[int, dict[str, float]]] = {arm: {}, twin: {}}
    unit = ""
    for row in rows:
        asked = (row.probe, row.quantity, row.group, row.x) == (probe, quantity, "", None)
        headline = row.positions == "not BOS" and row.statistic in ("", "mean")
        if not (asked and headline and row.arm in numbers):
            continue
        if row.value is not None and row.seed is not None:
            numbers[row.arm].setdefault(row.seed, {})[row.stream] = row.value
            unit = row.unit
    seeds = sorted(numbers[arm].keys() & numbers[twin].keys())
    differences = []
    for seed in seeds:
        here, there = numbers[arm][seed], numbers[twin][seed]
        shared = here.keys() & there.keys()
        if shared:
            differences.append(
                float(np.mean([here[name] - there[name] for name in sorted(shared)]))
            )
    if not differences:
        return []
    interval = stats.paired_seeds(differences)
    base = next(row for row in rows if row.arm == arm and row.run)
    return [
        Row(
            study=base.study, probe="comparison", quantity=f"{probe}: {quantity}", arm=arm,
            variant=base.variant, group=f"minus {twin}", value=interval.value, unit=unit,
            low=interval.low, high=interval.high, p=interval.p if len(differences) > 1 else None,
            n=interval.n, n_clusters=interval.n_clusters, cluster="seed", commit=base.commit,
            note=f"sign-flip p = {interval.p:.3g}" if len(differences) > 1 else "",
        )
    ]  # fmt: skip


def _static_minus_ln(arms: _Arms, static: _Arm, choice: str, ln: _Arm) -> list[Row]:
    seeds = _shared(static, ln)
    if not seeds:
        return []
    difference = arms.difference(static, ln, seeds)
    verdict = stats.equivalence(
        stats.seeds_and_documents(difference, arms.counts, level=0.90), MARGIN
    )
    meaning = {
        "equivalent": f"equivalent: closer than {MARGIN} nats",
        "different": f"different: farther than {MARGIN} nats",
        "inconclusive": f"inconclusive against a margin of {MARGIN} nats",
    }[verdict]
    note = f"{meaning}; best static is {choice}"
    return arms.contrast("static - LN", ln, static, ln, note=note)


def _phi_dyn(arms: _Arms, plain: _Arm, static: _Arm, choice: str, ln: _Arm) -> list[Row]:
    """The share of LN's gain that the best static arm does not reach."""
    seeds = _shared(plain, static, ln)
    if not seeds:
        return []
    num = arms.difference(static, ln, seeds)
    den = arms.difference(plain, ln, seeds)
    gain = stats.seeds_and_documents(den, arms.counts)
    best = f"best static is {choice}"
    if gain.low is None or gain.low <= MARGIN:
        note = f"{UNDEFINED} ({_why_undefined(gain)}); {best}"
        undefined = Interval(float("nan"), None, None, gain.n, gain.n_clusters)
        return [arms.row("Phi_dyn", ln, undefined, "seed", len(seeds), unit="share", note=note)]
    check = stats.fieller(num, den, arms.counts)
    ends = "no interval" if check.low is None else f"{check.low:.2f} to {check.high:.2f}"
    interval = stats.two_level_bootstrap_ratio(num, den, arms.counts)
    method = f"BCa interval from seeds and documents resampled; Fieller's is {ends}"
    if interval.low is None:
        interval = check
        few = len(seeds) < stats.MIN_SEEDS_TO_RESAMPLE
        why = f"{len(seeds)} seeds are too few to resample" if few else "resampling gives none"
        method = f"Fieller's interval: {why}"
    note = f"{method}; {best}"
    return [arms.row("Phi_dyn", ln, interval, "seed", len(seeds), unit="share", note=note)]


def _why_undefined(gain: Interval) -> str:
    estimate = f"gain of LN {gain.value:+.4f} nats"
    if gain.n < 2:
        return f"{estimate} with one seed, which gives no interval for new seeds"
    if gain.low is None or gain.high is None:
        return f"{estimate}; {gain.n_clusters} documents are too few for an interval"
    ends = f"{estimate}, 95% interval for new seeds {gain.low:+.4f} to {gain.high:+.4f}"
    if gain.high < 0:
        return f"{ends}: plain solu is better"
    if gain.low <= 0:
        return f"{ends}: it reaches 0"
    return f"{ends}: its lower end is not above {MARGIN} nats"


def _telescoping(arms: _Arms, ln: _Arm) -> list[Row]:
    """The gain of LN in steps of one change each, over the seeds that all steps have."""
    steps: list[tuple[str, _Arm, str]] = []
    for variant in CHAIN[:-1]:
        best = arms.best([variant])
        if best is not None:
            steps.append((variant, *best))
    steps.append((ln.variant, ln, ln.name))
    seeds = _shared(*(arm for _, arm, _ in steps))
    if not seeds:
        return []
    rows = []
    for (from_name, a, _), (to_name, b, choice) in pairwise(steps):
        interval = stats.seeds_and_documents(arms.difference(a, b, seeds), arms.counts)
        quantity = f"telescoping: {from_name} - {to_name}"
        note = _stand_in(to_name, b, choice)
        rows.append(arms.row(quantity, ln, interval, "seed", len(seeds), note=note))
    return rows


def _also(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _stand_in(variant: str, arm: _Arm, choice: str) -> str:
    """Which arm a variant's name stands for, where the name alone does not say."""
    return "" if arm.name == variant else f"{variant} is {choice}"


def _shared(*arms: _Arm) -> list[int]:
    return sorted(set.intersection(*(set(arm.report) for arm in arms)))


def _read(study: str, losses: pd.DataFrame, commit: str) -> _Arms:
    """Losses as arrays over one order of documents, or the run that does not fit the others."""
    ordered = losses.sort_values(["run", "split", "document"], kind="stable")
    runs = {str(name): table for name, table in ordered.groupby("run", sort=True)}
    if not runs:
        raise UserError("no losses to compare: measure them with 'python eval/run.py'")
    measured = {
        name: digest(table[["split", "document", "n_tokens"]].to_numpy().tolist())
        for name, table in runs.items()
    }
    usual, n_usual = Counter(measured.values()).most_common(1)[0]
    for name, mark in measured.items():
        if mark != usual:
            raise UserError(
                f"run {name!r} was not measured on the same documents as {n_usual} of the"
                f" {len(runs)} runs of {study!r}: probe it again, or give it a study of its own"
            )
    arms: dict[str, _Arm] = {}
    for name, table in runs.items():
        first = table.iloc[0]
        seed = int(first["seed"])
        select, report = (table[table["split"] == split] for split in ("select", "report"))
        if select.empty or report.empty:
            raise UserError(f"run {name!r} of {study!r} lacks the select or the report split")
        fresh = _Arm(str(first["arm"]), str(first["variant"]), str(first["config"]), {}, {})
        arm = arms.setdefault(fresh.name, fresh)
        if seed in arm.report:
            raise UserError(f"run {name!r} is a second run of arm {arm.name!r} with seed {seed}")
        arm.select[seed] = float(select["loss_sum"].sum() / select["n_tokens"].sum())
        arm.report[seed] = report["loss_sum"].to_numpy(dtype=np.float64)
    counts = report["n_tokens"].to_numpy(dtype=np.float64)
    return _Arms(study, commit, counts, tuple(arms[name] for name in sorted(arms)))
