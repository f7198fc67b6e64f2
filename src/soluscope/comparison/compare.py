"""From the losses of all runs of a study to what differs between its variants.

The training seed is the unit: variants are paired by seed (same initial values, same batches) and
measured on the same documents. Each difference comes twice: with the interval for new seeds and
new documents (`cluster="seed"`), which a claim about a variant needs, and with the interval for
these trained models on new documents (`cluster="document"`).

Models of one size are compared with each other and with no others, and an arm that was trained at
several learning rates with its best one.

Source: science.md sections 4, 5 and 10.2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from soluscope.comparison import stats
from soluscope.comparison.stats import Floats, Interval
from soluscope.errors import UserError
from soluscope.files import digest
from soluscope.results import MARGIN, Row

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
SIZE = ("d_model", "d_mlp", "n_layers", "n_heads", "ctx", "tokens")
"""Settings that make models comparable: differences are never taken between two sizes."""
SETTINGS = (*SIZE, "lr", "kappa", "gain")
"""What is told of each arm; `kappa` and `gain` of those whose mid norm has one."""
SETTING = "setting"
"""Quantity of a row that tells one of them, its name in `group`."""
BY_RATE, BY_GAIN = "select loss by lr", "select loss by gain"
"""Quantities of the points of the curves on which a rate and a gain were chosen."""
NO_CHOICE = "no choice"
"""Quantity of a row whose `group` names arms of which none was chosen, and whose `note` says why."""
GRID_FROM = 3
"""Points from which a curve has an inside: of two, one end is always the best."""
GAIN_OF_KAPPA = "gain_of_kappa"
"""The kappa to whose gain a static arm was set at the start; nan where its gain was given outright."""


@dataclass(frozen=True, eq=False)
class _Arm:
    name: str
    variant: str
    config: str
    family: str
    """The same for arms that differ in nothing but their learning rate."""
    settings: dict[str, float]
    """Those of `SETTINGS` that it has; a gain that differs by seed is the seeds' median."""
    select: dict[int, float]
    """Loss on the select split by seed, nats a token: for choosing."""
    report: dict[int, Floats]
    """Loss sums on the report split by seed, [document]: for reporting."""


@dataclass(frozen=True)
class _Arms:
    """What was measured of one size, and the choices made among it."""

    study: str
    commit: str
    size: str
    """What tells this size from the study's others, in words; empty if there is one."""
    counts: Floats
    """Target tokens of the report split, [document]."""
    arms: tuple[_Arm, ...]

    @cached_property
    def families(self) -> list[list[_Arm]]:
        """Arms that differ in nothing but their rate, from the lowest rate up.

        Those of one rate under two names, such as on two machines, were named apart to be compared.
        Those of which no rate can be chosen are families of one.

        Raises:
            UserError: if two have one rate and others another, so that the curve would have two points there.
        """
        families = []
        for alike in self._alike:
            rates = [arm.settings["lr"] for arm in alike]
            for a, b in pairwise(alike):
                if a.settings["lr"] == b.settings["lr"] and len(set(rates)) > 1:
                    raise UserError(
                        f"arms {a.name!r} and {b.name!r} of {self.study!r} differ in nothing, nor in their rate"
                        f" ({a.settings['lr']:g}), and a curve of several rates has one arm a rate: move one of"
                        " them to another study"
                    )
            one_line = len(set(rates)) == len(alike) and _eligible(alike)
            families += [alike] if one_line else [[arm] for arm in alike]
        return families

    @cached_property
    def _alike(self) -> list[list[_Arm]]:
        """Arms that differ in nothing but their rate, from the lowest rate up."""
        found: dict[str, list[_Arm]] = {}
        for arm in self.arms:
            found.setdefault(arm.family, []).append(arm)
        return [sorted(alike, key=lambda arm: arm.settings["lr"]) for alike in found.values()]

    @cached_property
    def not_chosen(self) -> list[list[_Arm]]:
        """Arms of which the best would be wanted, and that share no seed."""
        wanted = [alike for alike in self._alike if len({arm.settings["lr"] for arm in alike}) > 1]
        found = [alike for alike in wanted if not _eligible(alike)]
        for variants in (("gelu",), ("solu",), STATIC, ("solu_ln_det",)):
            arms = [arm for arm in self.tuned if arm.variant in variants]
            if arms and not _shared(*arms) and not any(set(arms) == set(one) for one in found):
                found.append(arms)
        return found

    @cached_property
    def tuned(self) -> list[_Arm]:
        """The best rate's arm of each family: what is compared."""
        chosen = {_choose(_eligible(family))[0].name for family in self.families}
        return [arm for arm in self.arms if arm.name in chosen]

    def family(self, of: _Arm) -> list[_Arm]:
        return next(family for family in self.families if of in family)

    def best(self, variants: Sequence[str], lr: float | None = None) -> tuple[_Arm, str] | None:
        """The best of the variants' arms and how it was chosen; None without one, or a seed that all have.

        Each arm at its own best rate, or at the rate `lr` where that is given.
        """
        arms = self.tuned if lr is None else [a for a in self.arms if a.settings["lr"] == lr]
        candidates = [arm for arm in arms if arm.variant in variants]
        if not candidates or not _shared(*candidates):
            return None
        chosen, losses = _choose(candidates)
        rates = _eligible(self.family(chosen)) if lr is None else [chosen]
        if len(candidates) == 1 and len(rates) > 1:
            over = _seeds(len(_shared(*rates)))
            return (
                chosen,
                f"{chosen.name}, the best of {len(rates)} rates on the select split over {over}",
            )
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
            note=_also(note, self.size),
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


def _choose(candidates: Sequence[_Arm]) -> tuple[_Arm, dict[str, float]]:
    """The arm with the lowest mean loss on select, and the losses of all by name.

    The candidates share a seed. Chosen once and for all seeds, on documents that are not reported:
    the best of several on the report split itself would be too good.
    """
    losses = {name: float(np.mean(by_seed)) for name, by_seed in _select(candidates).items()}
    return min(candidates, key=lambda arm: (losses[arm.name], arm.name)), losses


def _select(candidates: Sequence[_Arm]) -> dict[str, list[float]]:
    """Losses on the select split by arm, one a seed.

    Seeds that not all have are left out, so that an arm does not win by its seeds.
    """
    shared = set.intersection(*(set(arm.select) for arm in candidates))
    return {arm.name: [arm.select[seed] for seed in shared] for arm in candidates}


def _eligible(family: Sequence[_Arm]) -> list[_Arm]:
    """The rates of which the best is chosen: those with all of the family's seeds.

    A rate with fewer would take its place with fewer seeds. Where none has them all: every rate, over the
    seeds that they share; none where they share none.
    """
    seeds = {seed for arm in family for seed in arm.select}
    full = [arm for arm in family if seeds <= arm.select.keys()]
    return full or (list(family) if _shared(*family) else [])


def compare(study: str, losses: pd.DataFrame, commit: str) -> list[Row]:
    """All comparisons that the arms of a study allow; what needs a missing arm is not there.

    Sizes are compared each by itself. Of arms that differ in nothing but their learning rate, the
    one with the lowest loss on the select split is compared. Where a variant other than `solu_ln` then
    has several arms (gains), the one with the lowest loss on select stands for it; each `solu_ln`
    arm (kappas) is compared by itself.

    Args:
        study: name of the study.
        losses: one row a (run, split, document), with columns run, arm, variant, seed, split
            (`select` or `report`), document, loss_sum (nats, over targets that are not BOS),
            n_tokens (those targets), config, family (the same for runs that differ in nothing but
            seed and learning rate), `SETTINGS` (nan for what a run has not), and, if it is known,
            `GAIN_OF_KAPPA`.
        commit: of the code that measured.

    Returns:
        Rows of probe `comparison`, by quantity:
        `loss` of each arm, Student's t over seeds on these documents;
        `difference` of each arm to each reference, the reference in `group`;
        `gain of LN`, L(solu) - L(solu_ln), for each solu_ln arm;
        `static - LN`, L(best static) - L(solu_ln), its equivalence verdict in `note`;
        `Phi_dyn`, `static - LN` as a share of `gain of LN`, or None and a note that starts with
        `UNDEFINED`; `telescoping: a - b`, which sum to the gain of LN;
        `BY_RATE` and `BY_GAIN`, the points of the curves on which a rate or a gain was chosen,
        stream `select`, the setting in `x`, the chosen arm in `group`, and in the chosen arm's
        `note` over how many seeds, and whether it lies inside the grid; the same of rates that lack
        seeds, over their own, which were not chosen from;
        `NO_CHOICE`, where arms share no seed;
        the first three terms with ` at a common rate`, the rate in `x` and the tuned arm in
        `group`, where a solu_ln arm was trained at several; `SETTING` of each arm.
        Where there are several sizes, `note` ends with the row's. Differences over two seeds or
        more have the exact sign-flip `p`. `static - LN` and `Phi_dyn` of all solu_ln arms are the
        primary family, with `p_adj` after Holm's correction.

    Raises:
        UserError: if a run was not measured on the documents of the others of its size, two runs
            have the same arm and seed, an arm's runs differ in their settings, or two arms are one
            point of a curve.

    Source: science.md sections 4, 5 and 10.2.
    """
    if losses.empty:
        raise UserError("no losses to compare: measure them with 'python eval/run.py'")
    _check_settings(losses)
    sizes = [_read(study, table, commit, size) for size, table in _by_size(losses)]
    rows = [row for arms in sizes for row in _compared(arms)]
    rows += [
        row for arms in sizes for row in (*_tuning(arms), *_no_choices(arms), *_settings(arms))
    ]
    return _adjust_primary(rows)


def _compared(arms: _Arms) -> list[Row]:
    """The comparisons within one size, each arm at its own best rate."""
    rows = []
    for arm in arms.arms:
        per_seed = [arm.report[seed].sum() / arms.counts.sum() for seed in sorted(arm.report)]
        interval = stats.paired_seeds(per_seed)
        note = "new seeds, these documents"
        rows.append(arms.row("loss", arm, interval, "seed", len(per_seed), note=note))

    gelu = arms.best(["gelu"])
    normed = [arm for arm in arms.tuned if arm.variant == "solu_ln"]
    for reference in ([gelu[0]] if gelu else []) + normed:
        for arm in arms.tuned:
            if arm is not reference:
                rows += arms.contrast("difference", arm, arm, reference, f"minus {reference.name}")
    for ln in normed:
        rows += _share(arms, ln)
        rows += _telescoping(arms, ln)
    return rows


def _share(arms: _Arms, ln: _Arm, lr: float | None = None) -> list[Row]:
    """The gain of LN, what of it the best static arm does not reach, and the share of the one in the other."""
    rows = []
    plain, static = arms.best(["solu"], lr), arms.best(STATIC, lr)
    if plain is not None:
        rows += arms.contrast("gain of LN", ln, plain[0], ln, note=_stand_in("solu", *plain))
    if static is not None:
        rows += _static_minus_ln(arms, *static, ln)
    if plain is not None and static is not None:
        rows += _phi_dyn(arms, plain[0], *static, ln)
    return rows


def _tuning(arms: _Arms) -> list[Row]:
    """The curves on which rates and gains were chosen, and what a rate common to all arms would give."""
    rows = []
    for family in arms.families:
        if len(family) > 1:
            rows += _curve(arms, BY_RATE, "lr", family)
    for variant in sorted({arm.variant for arm in arms.tuned}):
        static = [arm for arm in arms.tuned if arm.variant == variant and "gain" in arm.settings]
        if len({arm.settings["gain"] for arm in static}) > 1 and _shared(*static):
            rows += _curve(arms, BY_GAIN, "gain", static)
    for ln in arms.tuned:
        family = arms.family(ln) if ln.variant == "solu_ln" else []
        for one in family if len(family) > 1 else []:
            lr = one.settings["lr"]
            rows += [
                replace(row, quantity=f"{row.quantity} at a common rate", x=lr, group=ln.name)
                for row in _share(arms, one, lr)
            ]
    return rows


def _curve(arms: _Arms, quantity: str, setting: str, candidates: Sequence[_Arm]) -> list[Row]:
    """Loss on the select split against a setting, and where on the grid the least of it lies.

    Source: science.md section 10.2 (c): the tuned optimum must lie inside the grid, not at its edge.
    """
    eligible = _eligible(candidates) if quantity == BY_RATE else candidates
    chosen, _ = _choose(eligible)
    grid = {arm.settings[setting] for arm in eligible}
    at = chosen.settings[setting]
    place = (
        f"too few for a grid: {len(grid)}" if len(grid) < GRID_FROM
        else "at the lower edge of the grid" if at == min(grid)
        else "at the upper edge of the grid" if at == max(grid)
        else "inside the grid"
    )  # fmt: skip
    losses = _select(eligible)
    n_seeds = len(losses[chosen.name])
    rows = []
    for arm in sorted(candidates, key=lambda arm: arm.settings[setting]):
        by_seed = losses.get(arm.name) or [arm.select[seed] for seed in sorted(arm.select)]
        note = f"chosen over {_seeds(n_seeds)}, {place}" if arm is chosen else ""
        if arm not in eligible:
            note = f"not chosen from: {len(by_seed)} of {_seeds(n_seeds)}"
        row = arms.row(
            quantity, arm, stats.paired_seeds(by_seed), "seed", len(by_seed), chosen.name, note=note
        )
        rows.append(replace(row, stream="select", x=arm.settings[setting]))
    return rows


def _no_choices(arms: _Arms) -> list[Row]:
    """What was not compared, or not at its best, since an arm would have won by its seeds."""
    return [
        Row(
            study=arms.study, probe="comparison", quantity=NO_CHOICE, value=None, unit="",
            group=", ".join(arm.name for arm in alike), note=_also("they share no seed", arms.size),
            commit=arms.commit,
        )
        for alike in arms.not_chosen
    ]  # fmt: skip


def _settings(arms: _Arms) -> list[Row]:
    """Each arm's settings, so that readers need not take its name apart."""
    kappa = "eps d_mlp^2"
    units = {"gain": "1 / activation", "kappa": kappa, GAIN_OF_KAPPA: kappa, "tokens": "tokens"}
    return [
        Row(
            study=arms.study, probe="comparison", quantity=SETTING, group=name, value=value,
            unit=units.get(name, ""), arm=arm.name, variant=arm.variant, positions="all",
            n=len(arm.report), note=arms.size, commit=arms.commit, config=arm.config,
        )
        for arm in arms.arms
        for name, value in arm.settings.items()
    ]  # fmt: skip


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
    probe tests between it and its twin (with several kappas, the twin of its own), with the exact
    sign-flip p, corrected after Holm over all of them.

    Args:
        rows: of the study's runs, and `compare`'s: arms of another size, and those whose rate was
            not chosen, are left out.
        tested: quantity by probe.

    Returns:
        Rows of probe `comparison`, quantity `probe: tested`, group `minus` and the twin's arm; none
        where the twin has no number (what is undefined under one gain cannot be compared).

    Source: science.md section 5, "Families".
    """
    found = []
    passed_over = {row.arm for row in rows if row.quantity == BY_RATE and row.arm != row.group}
    twins = sorted({row.arm for row in rows if row.variant == TWIN} - passed_over)
    normed = {row.arm for row in rows if row.variant == "solu_ln" and row.run}
    for arm in sorted(normed - passed_over):
        for twin in _twins_of(rows, arm, normed - passed_over, twins):
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


def _twins_of(rows: Sequence[Row], arm: str, normed: set[str], twins: Sequence[str]) -> list[str]:
    """The static arms of `arm`'s size; with several kappas, those whose gain was set to its kappa's.

    All of them where it is not known to which kappa's gain any was set.
    """
    sizes = {row.arm: row.note for row in rows if row.quantity == SETTING}
    told = {(row.arm, row.group): row.value for row in rows if row.quantity == SETTING}
    mine = [twin for twin in twins if sizes.get(twin) == sizes.get(arm)]
    kappas = {told.get((one, "kappa")) for one in normed if sizes.get(one) == sizes.get(arm)}
    set_to = {twin: told.get((twin, GAIN_OF_KAPPA)) for twin in mine}
    if len(kappas) < 2 or not any(set_to.values()):
        return mine
    kappa = told.get((arm, "kappa")) or 0.0
    return [twin for twin, of in set_to.items() if of and math.isclose(of, kappa, rel_tol=1e-6)]


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
                float(
                    np.mean([stats.difference(here[name], there[name]) for name in sorted(shared)])
                )
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


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _stand_in(variant: str, arm: _Arm, choice: str) -> str:
    """Which arm a variant's name stands for, where the name alone does not say."""
    return "" if arm.name == variant else f"{variant} is {choice}"


def _shared(*arms: _Arm) -> list[int]:
    return sorted(set.intersection(*(set(arm.report) for arm in arms)))


def _check_settings(losses: pd.DataFrame) -> None:
    """One arm is one setting, whatever the seed; a gain measured at the start has the seed's value."""
    for arm, table in losses.groupby("arm"):
        for name in _told(losses):
            values = sorted(table[name].dropna().unique())
            if len(values) > 1 and name != "gain":
                raise UserError(
                    f"runs of arm {arm!r} differ in {name} ({values[0]:g} and {values[-1]:g}), and an arm is"
                    " one setting at several seeds: move one of them to another study"
                )


def _told(losses: pd.DataFrame) -> list[str]:
    """The columns that are settings."""
    return [name for name in (*SETTINGS, GAIN_OF_KAPPA) if name in losses]


def _by_size(losses: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The losses of each size, the smallest first, and what tells it from the others."""
    sizes = list(losses.groupby(list(SIZE), sort=True))
    differing = [i for i in range(len(SIZE)) if len({shape[i] for shape, _ in sizes}) > 1]
    for shape, table in sizes:
        yield ", ".join(f"{SIZE[i]} {shape[i]:.0f}" for i in differing), table


def _read(study: str, losses: pd.DataFrame, commit: str, size: str) -> _Arms:
    """Losses of one size as arrays over one order of documents, or the run that does not fit the others."""
    ordered = losses.sort_values(["run", "split", "document"], kind="stable")
    runs = {str(name): table for name, table in ordered.groupby("run", sort=True)}
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
        arm = arms.setdefault(str(first["arm"]), _arm(losses[losses["arm"] == first["arm"]]))
        if seed in arm.report:
            raise UserError(f"run {name!r} is a second run of arm {arm.name!r} with seed {seed}")
        arm.select[seed] = float(select["loss_sum"].sum() / select["n_tokens"].sum())
        arm.report[seed] = report["loss_sum"].to_numpy(dtype=np.float64)
    counts = report["n_tokens"].to_numpy(dtype=np.float64)
    return _Arms(study, commit, size, counts, tuple(arms[name] for name in sorted(arms)))


def _arm(table: pd.DataFrame) -> _Arm:
    """An arm before its losses, from the rows of all of its runs."""
    first = table.iloc[0]
    settings = table.groupby("run")[_told(table)].first().median()
    return _Arm(
        str(first["arm"]), str(first["variant"]), str(first["config"]), str(first["family"]),
        {str(name): float(value) for name, value in settings.items() if not math.isnan(value)}, {}, {},
    )  # fmt: skip
