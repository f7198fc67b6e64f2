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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from soluscope.comparison import stats
from soluscope.comparison.stats import Floats, Interval
from soluscope.errors import UserError
from soluscope.files import digest
from soluscope.results import (
    MARGIN,
    ChoicePoint,
    Comparison,
    Grid,
    Measurement,
    NoChoice,
    Record,
    Setting,
    Step,
    Term,
    Verdict,
    of_kind,
)

if TYPE_CHECKING:
    import pandas as pd

PRIMARY = (Term.STATIC, Term.SHARE)
"""Terms whose test is of the primary family: the second is 0 where the first is."""
SIZE = ("d_model", "d_mlp", "n_layers", "n_heads", "ctx", "tokens")
"""Settings that make models comparable: differences are never taken between two sizes."""
SETTINGS = (*SIZE, "lr", "kappa", "gain")
"""What is stored of each arm; `kappa` and `gain` of those whose mid norm has one."""
GRID_FROM = 3
"""Points from which a curve has an inside: of two, one end is always the best."""
GAIN_OF_KAPPA = "gain_of_kappa"
"""The kappa to whose gain a static arm was set at the start; nan where its gain was given outright."""


@dataclass(frozen=True)
class Lineage:
    """A variant's part in the comparison, as its file declares it."""

    role: str
    """`baseline`, `plain`, `static` (one gain for all tokens) or `per_token`."""
    twin: str
    """The variant that is the same with one gain for all tokens; empty if there is none."""
    chain: tuple[Step, ...]
    """From the root of the variant's chain to the variant itself."""


@dataclass(frozen=True, eq=False)
class _Arm:
    name: str
    variant: str
    lineage: Lineage
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
        by_family: dict[str, list[_Arm]] = {}
        for arm in self.arms:
            by_family.setdefault(arm.family, []).append(arm)
        return [sorted(alike, key=lambda arm: arm.settings["lr"]) for alike in by_family.values()]

    @cached_property
    def not_chosen(self) -> list[list[_Arm]]:
        """Arms of which the best would be wanted, and that share no seed."""
        rates = [alike for alike in self._alike if len({arm.settings["lr"] for arm in alike}) > 1]
        missing = [alike for alike in rates if not _eligible(alike)]
        stages = dict.fromkeys(arm.variant for arm in self.tuned if arm.lineage.role == "plain")
        for arm in _per_token(self.tuned):
            stages |= dict.fromkeys(step.variant for step in arm.lineage.chain[:-1])
        by_stage = [_of_variant(self.tuned, variant) for variant in stages]
        for arms in (_references(self.tuned), _static(self.tuned), *by_stage):
            if arms and not _shared(*arms) and not any(set(arms) <= set(each) for each in missing):
                missing.append(arms)
        return missing

    @cached_property
    def tuned(self) -> list[_Arm]:
        """The best rate's arm of each family: what is compared."""
        chosen = {_choose(_eligible(family))[0].name for family in self.families}
        return [arm for arm in self.arms if arm.name in chosen]

    def at(self, lr: float | None) -> list[_Arm]:
        """The arms at the rate `lr`, or each at its own best rate where none is given."""
        return self.tuned if lr is None else [a for a in self.arms if a.settings["lr"] == lr]

    def family(self, of: _Arm) -> list[_Arm]:
        return next(family for family in self.families if of in family)

    def best(self, candidates: Sequence[_Arm], lr: float | None = None) -> tuple[_Arm, str] | None:
        """Return the best of some of the arms `at(lr)`, and in words how it was chosen.

        None where there are no candidates, or no seed that all of them have.
        """
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

    def fields(self, arm: _Arm, interval: Interval, cluster: str, n_seeds: int) -> dict[str, Any]:
        """Return what a comparison and a point of a curve have in common."""
        return {
            "study": self.study, "commit": self.commit, "size": self.size,
            "arm": arm.name, "variant": arm.variant, "config": arm.config,
            "value": None if math.isnan(interval.value) else interval.value,
            "low": interval.low, "high": interval.high, "n": n_seeds,
            "n_clusters": n_seeds if cluster == "seed" else interval.n_clusters, "cluster": cluster,
        }  # fmt: skip

    def comparison(
        self,
        term: Term,
        arm: _Arm,
        interval: Interval,
        cluster: str,
        n_seeds: int,
        unit: str = "nats / token",
        **more: Any,
    ) -> Comparison:
        common = self.fields(arm, interval, cluster, n_seeds)
        return Comparison(term=term, unit=unit, **common, **more)

    def contrast(self, term: Term, a: _Arm, b: _Arm, arm: _Arm, **more: Any) -> list[Comparison]:
        """Compare `a` minus `b` over the seeds both have, both ways; nothing if they share none.

        Args:
            term: what the comparison is of.
            a: an arm.
            b: another.
            arm: which of them the comparison is about; the other is the one it is compared with.
            more: further fields of the records.
        """
        seeds = _shared(a, b)
        if not seeds:
            return []
        difference = self.difference(a, b, seeds)
        new_seeds = stats.seeds_and_documents(difference, self.counts)
        new_documents = stats.document_bootstrap(difference.mean(axis=0), self.counts)
        n_seeds = len(seeds)
        p = new_seeds.p if n_seeds > 1 else None  # one seed flips to itself: no test
        more["against"] = (b if arm is a else a).name
        documents = self.comparison(term, arm, new_documents, "document", n_seeds, **more)
        more["note"] = _also(more.get("note", ""), "" if p is None else f"sign-flip p = {p:.3g}")
        return [self.comparison(term, arm, new_seeds, "seed", n_seeds, p=p, **more), documents]


def _references(arms: Iterable[_Arm]) -> list[_Arm]:
    """Return the arms of which the best is what all others are compared with."""
    return [a for a in arms if a.lineage.role == "baseline" and len(a.lineage.chain) == 1]


def _per_token(arms: Iterable[_Arm]) -> list[_Arm]:
    return [arm for arm in arms if arm.lineage.role == "per_token"]


def _static(arms: Iterable[_Arm]) -> list[_Arm]:
    """Return the arms of class C: those whose output scale is the same for every token."""
    return [arm for arm in arms if arm.lineage.role == "static"]


def _plain(arms: Iterable[_Arm], of: _Arm) -> list[_Arm]:
    """Return the arms without a norm from which the chain of an arm starts."""
    root = of.lineage.chain[0].variant
    return [arm for arm in _of_variant(arms, root) if arm.lineage.role == "plain"]


def _of_variant(arms: Iterable[_Arm], variant: str) -> list[_Arm]:
    return [arm for arm in arms if arm.variant == variant]


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


def compare(
    study: str, losses: pd.DataFrame, commit: str, lineages: Mapping[str, Lineage]
) -> list[Record]:
    """Make all comparisons that the arms of a study allow; what needs a missing arm is left out.

    Sizes are compared each by itself. Of arms that differ in nothing but their learning rate, the
    one with the lowest loss on the select split is compared. Where several arms could stand for the
    baseline, the plain, the static or a chain's variant (gains), the one with the lowest loss on
    select does; each arm with a per-token norm (kappas) is compared by itself.

    Args:
        study: name of the study.
        losses: one row a (run, split, document), with columns run, arm, variant, seed, split
            (`select` or `report`), document, loss_sum (nats, over targets that are not BOS),
            n_tokens (those targets), config, family (the same for runs that differ in nothing but
            seed and learning rate), `SETTINGS` (nan for what a run has not), and, if it is known,
            `GAIN_OF_KAPPA`.
        commit: of the code that measured.
        lineages: the part of each variant in the comparison, by the variant's name.

    Returns:
        Comparisons, by term:
        `LOSS` of each arm, Student's t over seeds on these documents;
        `DIFFERENCE` of each arm to each reference: the best baseline that has none before it in
        its chain, and every arm with a per-token norm;
        `GAIN`, `STATIC`, `SHARE` and `STEP` of each arm with a per-token norm, the steps along its
        own chain, by the members that the study has, so that they sum to the gain;
        the first three of these once more at each rate common to all, where such an arm was trained
        at several.
        Choice points of the curves on which a rate or a gain was chosen; those of rates that lack
        seeds, over their own, were not chosen from. `NoChoice` where arms share no seed. The
        `Setting` of each arm.
        Differences over two seeds or more have the exact sign-flip `p`. `STATIC` and `SHARE` of
        all arms with a per-token norm are the primary family, with `p_adj` after Holm's correction.

    Raises:
        UserError: if a run was not measured on the documents of the others of its size, two runs
            have the same arm and seed, an arm's runs differ in their settings, or two arms are one
            point of a curve.

    Source: science.md sections 4, 5 and 10.2.
    """
    if losses.empty:
        raise UserError("no losses to compare: measure them with 'python eval/run.py'")
    _check_settings(losses)
    sizes = [_read(study, table, commit, size, lineages) for size, table in _by_size(losses)]
    compared = [each for arms in sizes for each in _compared(arms)]
    records: list[Record] = [*_adjust_primary(compared)]
    for arms in sizes:
        records += [*_tuning(arms), *_no_choices(arms), *_settings(arms)]
    return records


def _compared(arms: _Arms) -> list[Comparison]:
    """The comparisons within one size, each arm at its own best rate."""
    records = []
    for arm in arms.arms:
        per_seed = [arm.report[seed].sum() / arms.counts.sum() for seed in sorted(arm.report)]
        interval = stats.paired_seeds(per_seed)
        note = "new seeds, these documents"
        records.append(arms.comparison(Term.LOSS, arm, interval, "seed", len(per_seed), note=note))

    baseline = arms.best(_references(arms.tuned))
    normed = _per_token(arms.tuned)
    for reference in ([baseline[0]] if baseline else []) + normed:
        for arm in arms.tuned:
            if arm is not reference:
                records += arms.contrast(Term.DIFFERENCE, arm, reference, arm)
    for ln in normed:
        records += _share(arms, ln)
        records += _telescoping(arms, ln)
    return records


def _share(arms: _Arms, ln: _Arm, lr: float | None = None) -> list[Comparison]:
    """The gain of LN, what of it the best static arm does not reach, and the share of the one in the other."""
    records = []
    arms_at = arms.at(lr)
    plain, static = arms.best(_plain(arms_at, ln), lr), arms.best(_static(arms_at), lr)
    if plain is not None:
        records += arms.contrast(Term.GAIN, plain[0], ln, ln, choice=plain[1])
    if static is not None:
        records += _static_minus_ln(arms, *static, ln)
    if plain is not None and static is not None:
        records += _phi_dyn(arms, plain[0], *static, ln)
    return records


def _tuning(arms: _Arms) -> list[ChoicePoint | Comparison]:
    """The curves on which rates and gains were chosen, and what a rate common to all arms would give."""
    records: list[ChoicePoint | Comparison] = []
    for family in arms.families:
        if len(family) > 1:
            records += _curve(arms, "lr", family)
    for variant in sorted({arm.variant for arm in arms.tuned}):
        static = [arm for arm in _of_variant(arms.tuned, variant) if "gain" in arm.settings]
        if len({arm.settings["gain"] for arm in static}) > 1 and _shared(*static):
            records += _curve(arms, "gain", static)
    for ln in _per_token(arms.tuned):
        family = arms.family(ln)
        for arm in family if len(family) > 1 else []:
            lr = arm.settings["lr"]
            at_one_rate = _share(arms, arm, lr)
            records += [replace(each, lr=lr, tuned_arm=ln.name) for each in at_one_rate]
    return records


def _curve(
    arms: _Arms, setting: Literal["lr", "gain"], candidates: Sequence[_Arm]
) -> list[ChoicePoint]:
    """Loss on the select split against a setting, and where on the grid the least of it lies.

    Source: science.md section 10.2 (c): the tuned optimum must lie inside the grid, not at its edge.
    """
    eligible = _eligible(candidates) if setting == "lr" else candidates
    chosen, _ = _choose(eligible)
    settings = {arm.settings[setting] for arm in eligible}
    at = chosen.settings[setting]
    grid = (
        Grid.TOO_FEW if len(settings) < GRID_FROM
        else Grid.LOWER_EDGE if at == min(settings)
        else Grid.UPPER_EDGE if at == max(settings)
        else Grid.INSIDE
    )  # fmt: skip
    where = f"{grid}: {len(settings)}" if grid is Grid.TOO_FEW else grid
    losses = _select(eligible)
    n_seeds = len(losses[chosen.name])
    points = []
    for arm in sorted(candidates, key=lambda arm: arm.settings[setting]):
        by_seed = losses.get(arm.name) or [arm.select[seed] for seed in sorted(arm.select)]
        note = f"chosen over {_seeds(n_seeds)}, {where}" if arm is chosen else ""
        if arm not in eligible:
            note = f"not chosen from: {len(by_seed)} of {_seeds(n_seeds)}"
        common = arms.fields(arm, stats.paired_seeds(by_seed), "seed", len(by_seed))
        points.append(
            ChoicePoint(
                **common, unit="nats / token", setting=setting, x=arm.settings[setting],
                chosen_arm=chosen.name, eligible=arm in eligible,
                grid=grid if arm is chosen else None, note=note,
            )
        )  # fmt: skip
    return points


def _no_choices(arms: _Arms) -> list[NoChoice]:
    """What was not compared, or not at its best, since an arm would have won by its seeds."""
    return [
        NoChoice(
            study=arms.study, arms=tuple(arm.name for arm in alike), note="they share no seed",
            size=arms.size, commit=arms.commit,
        )
        for alike in arms.not_chosen
    ]  # fmt: skip


def _settings(arms: _Arms) -> list[Setting]:
    return [
        Setting(
            study=arms.study, arm=arm.name, variant=arm.variant, values=arm.settings,
            role=arm.lineage.role, chain=arm.lineage.chain, twin=arm.lineage.twin, size=arms.size,
            n=len(arm.report), commit=arms.commit, config=arm.config,
        )
        for arm in arms.arms
    ]  # fmt: skip


def _adjust_primary(compared: list[Comparison]) -> list[Comparison]:
    """The same records, where those that answer "is Phi_dyn 0?" have p corrected for asking each arm.

    Phi_dyn is 0 where its numerator is, so the numerator's p is its own. The family holds all
    arms with a per-token norm, also those whose Phi_dyn is undefined: the tests must not depend on
    the outcome.
    """
    family = {
        each.arm: each.p for each in compared if each.term is Term.STATIC and each.p is not None
    }
    adjusted = stats.holm(family)

    def with_p(record: Comparison) -> Comparison:
        asked = record.term in PRIMARY and record.cluster == "seed" and record.value is not None
        if not asked or record.arm not in family:
            return record
        p, p_adj = family[record.arm], adjusted[record.arm]
        note = f"Holm-adjusted p = {p_adj:.3g} over {', '.join(family)}"
        if record.term is Term.SHARE:
            note = f"sign-flip p of its numerator = {p:.3g}; {note}"
        return replace(record, p=p, p_adj=p_adj, note=_also(record.note, note))

    return [with_p(record) for record in compared]


def confirm(records: Sequence[Record], tested: Mapping[str, str]) -> list[Comparison]:
    """Do probes find more in a per-token norm than in its static twin, seed by seed?

    The confirmatory family: for each arm with a per-token norm and each probe, the paired
    difference of what the probe tests between the arm and its twin (with several kappas, the twin
    of its own), with the exact sign-flip p, corrected after Holm over all of them.

    Args:
        records: of the study's runs, and `compare`'s: arms of another size, and those whose rate
            was not chosen, are left out.
        tested: quantity by probe.

    Returns:
        Comparisons with the term `PROBE`; none where the twin has no number (what is undefined
        under one gain cannot be compared).

    Source: science.md section 5, "Families".
    """
    points = [each for each in of_kind(records, ChoicePoint) if each.setting == "lr"]
    passed_over = {each.arm for each in points if each.arm != each.chosen_arm}
    settings = [each for each in of_kind(records, Setting) if each.arm not in passed_over]
    measured = of_kind(records, Measurement)
    probed = {each.arm for each in measured}
    normed = [each for each in settings if each.role == "per_token" and each.arm in probed]
    tests = [
        test
        for arm in sorted(normed, key=lambda each: each.arm)
        for twin in _twins_of(arm, settings, normed)
        for probe, quantity in tested.items()
        for test in _paired_probe(measured, probe, quantity, arm, twin)
    ]
    family = {str(i): test.p for i, test in enumerate(tests) if test.p is not None}
    adjusted = stats.holm(family)
    return [
        replace(
            test, p_adj=adjusted[str(i)],
            note=_also(test.note, f"Holm-adjusted p = {adjusted[str(i)]:.3g} over {len(adjusted)} tests"),
        ) if str(i) in adjusted else test
        for i, test in enumerate(tests)
    ]  # fmt: skip


def _twins_of(arm: Setting, settings: Sequence[Setting], normed: Sequence[Setting]) -> list[str]:
    """Return the static twins of `arm`; with several kappas, those whose gain was set to its kappa's.

    All of them where it is not known to which kappa's gain any was set.
    """
    twins = [each for each in settings if (each.variant, each.size) == (arm.twin, arm.size)]
    alike = [each for each in normed if (each.twin, each.size) == (arm.twin, arm.size)]
    kappas = {each.values.get("kappa") for each in alike}
    set_to = {each.arm: each.values.get(GAIN_OF_KAPPA) for each in twins}
    if len(kappas) < 2 or not any(set_to.values()):
        return sorted(set_to)
    kappa = arm.values.get("kappa", 0.0)
    same = (twin for twin, of in set_to.items() if of and math.isclose(of, kappa, rel_tol=1e-6))
    return sorted(same)


def _paired_probe(
    measured: Sequence[Measurement], probe: str, quantity: str, arm: Setting, twin: str
) -> list[Comparison]:
    """Make one confirmatory test; a run's number is the mean over the streams that both arms have."""
    numbers: dict[str, dict[int, dict[str, float]]] = {arm.arm: {}, twin: {}}
    unit = commit = ""
    for each in measured:
        asked = (each.probe, each.quantity, each.group, each.x) == (probe, quantity, "", None)
        headline = each.positions == "not BOS" and each.statistic in ("", "mean")
        if not (asked and headline and each.arm in numbers):
            continue
        if each.value is not None and each.seed is not None:
            numbers[each.arm].setdefault(each.seed, {})[each.stream] = each.value
            unit, commit = each.unit, each.commit
    seeds = sorted(numbers[arm.arm].keys() & numbers[twin].keys())
    differences = []
    for seed in seeds:
        here, there = numbers[arm.arm][seed], numbers[twin][seed]
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
    return [
        Comparison(
            study=arm.study, term=Term.PROBE, probe=probe, quantity=quantity, arm=arm.arm,
            variant=arm.variant, against=twin, value=interval.value, unit=unit, low=interval.low,
            high=interval.high, p=interval.p if len(differences) > 1 else None, n=interval.n,
            n_clusters=interval.n_clusters, cluster="seed", commit=commit, config=arm.config,
            size=arm.size, note=f"sign-flip p = {interval.p:.3g}" if len(differences) > 1 else "",
        )
    ]  # fmt: skip


def _static_minus_ln(arms: _Arms, static: _Arm, choice: str, ln: _Arm) -> list[Comparison]:
    seeds = _shared(static, ln)
    if not seeds:
        return []
    difference = arms.difference(static, ln, seeds)
    verdict = Verdict(
        stats.equivalence(stats.seeds_and_documents(difference, arms.counts, level=0.90), MARGIN)
    )
    note = {
        Verdict.EQUIVALENT: f"equivalent: closer than {MARGIN} nats",
        Verdict.DIFFERENT: f"different: farther than {MARGIN} nats",
        Verdict.INCONCLUSIVE: f"inconclusive against a margin of {MARGIN} nats",
    }[verdict]
    return arms.contrast(Term.STATIC, static, ln, ln, verdict=verdict, choice=choice, note=note)


def _phi_dyn(arms: _Arms, plain: _Arm, static: _Arm, choice: str, ln: _Arm) -> list[Comparison]:
    """The share of LN's gain that the best static arm does not reach."""
    seeds = _shared(plain, static, ln)
    if not seeds:
        return []
    num = arms.difference(static, ln, seeds)
    den = arms.difference(plain, ln, seeds)
    gain = stats.seeds_and_documents(den, arms.counts)
    more: dict[str, Any] = {"unit": "share", "against": static.name, "choice": choice}
    if gain.low is None or gain.low <= MARGIN:
        more |= {
            "verdict": Verdict.UNDEFINED,
            "note": f"undefined: no gain of LN at this size ({_why_undefined(gain)})",
        }
        undefined = Interval(float("nan"), None, None, gain.n, gain.n_clusters)
        return [arms.comparison(Term.SHARE, ln, undefined, "seed", len(seeds), **more)]
    check = stats.fieller(num, den, arms.counts)
    bounds = "no interval" if check.low is None else f"{check.low:.2f} to {check.high:.2f}"
    interval = stats.two_level_bootstrap_ratio(num, den, arms.counts)
    note = f"BCa interval from seeds and documents resampled; Fieller's is {bounds}"
    if interval.low is None:
        interval = check
        few = len(seeds) < stats.MIN_SEEDS_TO_RESAMPLE
        why = f"{len(seeds)} seeds are too few to resample" if few else "resampling gives none"
        note = f"Fieller's interval: {why}"
    return [arms.comparison(Term.SHARE, ln, interval, "seed", len(seeds), note=note, **more)]


def _why_undefined(gain: Interval) -> str:
    estimate = f"gain of LN {gain.value:+.4f} nats"
    if gain.n < 2:
        return f"{estimate} with one seed, which gives no interval for new seeds"
    if gain.low is None or gain.high is None:
        return f"{estimate}; {gain.n_clusters} documents are too few for an interval"
    bounds = f"{estimate}, 95% interval for new seeds {gain.low:+.4f} to {gain.high:+.4f}"
    if gain.high < 0:
        return f"{bounds}: the plain arm is better"
    if gain.low <= 0:
        return f"{bounds}: it reaches 0"
    return f"{bounds}: its lower end is not above {MARGIN} nats"


def _telescoping(arms: _Arms, ln: _Arm) -> list[Comparison]:
    """The gain of LN in steps along the arm's own chain, over the seeds that all steps have.

    A member of the chain that the study lacks is passed over: the step across it adds both things.
    """
    chain = ln.lineage.chain
    stages: list[tuple[int, _Arm, str]] = []
    for i, member in enumerate(chain[:-1]):
        best = arms.best(_of_variant(arms.tuned, member.variant))
        if best is not None:
            stages.append((i, *best))
    stages.append((len(chain) - 1, ln, ""))
    seeds = _shared(*(arm for _, arm, _ in stages))
    if not seeds:
        return []
    steps = []
    for (i, a, _), (j, b, choice) in pairwise(stages):
        interval = stats.seeds_and_documents(arms.difference(a, b, seeds), arms.counts)
        adds = "; ".join(step.adds for step in chain[i + 1 : j + 1])
        ends = (chain[i].variant, chain[j].variant)
        steps.append(
            arms.comparison(
                Term.STEP, ln, interval, "seed", len(seeds), against=a.name, step=ends, adds=adds,
                choice=choice,
            )
        )  # fmt: skip
    return steps


def _also(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _shared(*arms: _Arm) -> list[int]:
    return sorted(set.intersection(*(set(arm.report) for arm in arms)))


def _check_settings(losses: pd.DataFrame) -> None:
    """One arm is one setting, whatever the seed; a gain measured at the start has the seed's value."""
    for arm, table in losses.groupby("arm"):
        for name in _settings_in(losses):
            values = sorted(table[name].dropna().unique())
            if len(values) > 1 and name != "gain":
                raise UserError(
                    f"runs of arm {arm!r} differ in {name} ({values[0]:g} and {values[-1]:g}), and an arm is"
                    " one setting at several seeds: move one of them to another study"
                )


def _settings_in(losses: pd.DataFrame) -> list[str]:
    """The columns that are settings."""
    return [name for name in (*SETTINGS, GAIN_OF_KAPPA) if name in losses]


def _by_size(losses: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The losses of each size, the smallest first, and what tells it from the others."""
    sizes = list(losses.groupby(list(SIZE), sort=True))
    differing = [i for i in range(len(SIZE)) if len({shape[i] for shape, _ in sizes}) > 1]
    for shape, table in sizes:
        yield ", ".join(f"{SIZE[i]} {shape[i]:.0f}" for i in differing), table


def _read(
    study: str, losses: pd.DataFrame, commit: str, size: str, lineages: Mapping[str, Lineage]
) -> _Arms:
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
        arm = arms.setdefault(
            str(first["arm"]), _arm(losses[losses["arm"] == first["arm"]], lineages)
        )
        if seed in arm.report:
            raise UserError(f"run {name!r} is a second run of arm {arm.name!r} with seed {seed}")
        arm.select[seed] = float(select["loss_sum"].sum() / select["n_tokens"].sum())
        arm.report[seed] = report["loss_sum"].to_numpy(dtype=np.float64)
    counts = report["n_tokens"].to_numpy(dtype=np.float64)
    return _Arms(study, commit, size, counts, tuple(arms[name] for name in sorted(arms)))


def _arm(table: pd.DataFrame, lineages: Mapping[str, Lineage]) -> _Arm:
    """An arm before its losses, from the rows of all of its runs."""
    first = table.iloc[0]
    variant = str(first["variant"])
    settings = table.groupby("run")[_settings_in(table)].first().median()
    return _Arm(
        str(first["arm"]), variant, lineages[variant], str(first["config"]), str(first["family"]),
        {str(name): float(value) for name, value in settings.items() if not math.isnan(value)}, {}, {},
    )  # fmt: skip
