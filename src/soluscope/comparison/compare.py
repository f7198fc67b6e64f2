"""Comparisons of a study's variants, computed from the losses of all its runs.

The training seed is the unit: variants are paired by seed (same initial values, same batches) and
measured on the same documents. Each difference is stored twice: with the interval for new seeds and
new documents (`cluster="seed"`), which a claim about a variant needs, and with the interval for
these trained models on new documents (`cluster="document"`).

Only models of the same size are compared. If a configuration was trained at several learning rates,
only its best rate is compared. Rates, gains and the static arm are chosen on the select split: at the study's
select seeds, which are not reported, or without such seeds at the reported ones.

Source: protocol.md sections 4, 5 and 10.2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from soluscope.comparison import stats
from soluscope.comparison.scaling import OfSize, scaling
from soluscope.comparison.stats import Floats, Interval
from soluscope.config import n_block_weights
from soluscope.errors import UserError
from soluscope.files import digest
from soluscope.results import (
    MARGIN,
    ChoicePoint,
    Comparison,
    Grid,
    Measurement,
    NoChoice,
    Part,
    Record,
    Setting,
    Step,
    Term,
    Untrained,
    Verdict,
    of_kind,
)
from soluscope.text import plural

if TYPE_CHECKING:
    import pandas as pd

PRIMARY = (Term.STATIC, Term.SHARE)
"""Terms whose tests form the primary family. `SHARE` is 0 where `STATIC` is 0."""
SIZE = ("d_model", "d_mlp", "n_layers", "n_heads", "ctx", "tokens")
"""Settings that must be equal for two models to be compared. Sizes are never compared with each other."""
SETTINGS = (
    *SIZE, "lr", "kappa", "gain", "matched_kappa", "mlp_out_scale", "entropy_penalty", "further_tokens",
)  # fmt: skip
"""Settings stored for each arm; `kappa` and `gain` only where its mid norm has them, `entropy_penalty` only where
it is not 0. `matched_kappa`: the kappa of the per-token norm that a static gain was matched to before training.
`further_tokens`: the tokens of an arm that began with another arm's trained weights, whose tokens `tokens` is."""
EQUALLY_LONG = "both began with the same trained weights and were trained equally long"
GRID_FROM = 3
"""Least number of points for a curve with an inside. With two points the best one is at an edge."""


@dataclass(frozen=True)
class Lineage:
    """A variant's role in the comparison, as its file declares it."""

    role: str
    """`baseline`, `plain`, `static` (one gain for all tokens), `per_token`, or `other` (never a reference)."""
    twin: str
    """The variant that differs only in having one gain for all tokens; empty if there is none."""
    chain: tuple[Step, ...]
    """From the root of the variant's chain to the variant itself."""
    label: str = ""
    """The variant's name for people."""
    after: str = ""
    """The arm with whose trained weights this one began; it has seen more tokens, so its role is `other`."""
    beside: str = ""
    """The arm that began with the same weights and was trained equally long, as it was."""


@dataclass(frozen=True, eq=False)
class _Arm:
    name: str
    variant: str
    lineage: Lineage
    config: str
    family: str
    """Identifier shared by arms that differ only in their learning rate and in the scale of the MLP's output."""
    settings: dict[str, float]
    """The arm's values of `SETTINGS`. If the gain differs by seed, the median over seeds."""
    select: dict[int, float]
    """Loss on the select split by seed, nats per token, at the seeds at which arms are chosen."""
    report: dict[int, Floats]
    """Loss sums on the report split by seed, [document], at the reported seeds."""
    rate: str = ""
    """Why the learning rate cannot be taken for tuned; empty if it can."""
    matched: bool = False
    """True if the scale of the MLP's output was measured, so that the MLP's share starts as in the baseline."""
    uniform: float = math.inf
    """Loss of a uniform guess, ln d_vocab, which an untrained model has to .01 nats."""

    @property
    def place(self) -> tuple[float, float]:
        """Return the arm's point on its family's surface: learning rate, scale of the MLP's output."""
        return self.settings["lr"], self.out_scale

    @property
    def out_scale(self) -> float:
        return self.settings.get("mlp_out_scale", 1.0)

    @property
    def is_penalised(self) -> bool:
        """Return whether the arm's training loss has an entropy penalty; no arm is then compared with it."""
        return bool(self.settings.get("entropy_penalty", 0.0))


@dataclass(frozen=True)
class _Arms:
    """The arms of one size, and the choices made among them."""

    study: str
    commit: str
    size: str
    """Text that distinguishes this size from the study's other sizes; empty if there is one size."""
    counts: Floats
    """Number of target tokens of the report split, [document]."""
    arms: tuple[_Arm, ...]
    select_seeds: Collection[int]
    """Seeds at which arms are chosen and that are not reported. Empty: choices are made at the reported seeds."""
    design: str = ""
    """Rule for the scale of the MLP's output that all these arms follow; empty: each arm has its best scale."""

    @cached_property
    def families(self) -> list[list[_Arm]]:
        """Group the arms that are points of one surface: of learning rates and scales of the MLP's output.

        Arms with equal settings and one common point, such as runs of two machines, were given two names so
        that they are compared: each is a separate family. So is each arm for which no point can be chosen.

        Returns:
            Families, each sorted by learning rate.

        Raises:
            UserError: if two arms share a point while another has a different one, so that the surface would
                have two losses at one point.
        """
        families = []
        for alike in self._alike:
            places = [arm.place for arm in alike]
            for a, b in pairwise(alike):
                if a.place == b.place and a.matched == b.matched and len(set(places)) > 1:
                    raise UserError(
                        f"arms {a.name!r} and {b.name!r} of {self.study!r} have the same settings and the same"
                        f" learning rate ({a.settings['lr']:g}), but a curve over rates needs one arm per rate:"
                        " move one of them to another study"
                    )
            is_surface = (len(alike) == 1 or len(set(places)) > 1) and _eligible(alike)
            families += [alike] if is_surface else [[arm] for arm in alike]
        return families

    @cached_property
    def _alike(self) -> list[list[_Arm]]:
        """Group the arms by everything but their point on the surface, lowest rate first."""
        by_family: dict[str, list[_Arm]] = {}
        for arm in self.arms:
            by_family.setdefault(arm.family, []).append(arm)
        return [sorted(alike, key=lambda arm: arm.place) for alike in by_family.values()]

    @cached_property
    def main(self) -> _Arms:
        """Return the arms that are compared at their best points; a matched alpha belongs to its design."""
        kept = tuple(arm for arm in self.arms if not arm.matched)
        return replace(self, arms=kept) if self.designs else self

    @cached_property
    def designs(self) -> list[_Arms]:
        """Return the arms of each fixed design: with alpha 1, and with alpha matched; empty with one alpha."""
        if len({arm.out_scale for arm in self.arms}) < 2:
            return []
        fixed = {
            "alpha 1": [arm for arm in self.arms if arm.out_scale == 1 and not arm.matched],
            "alpha matched": [arm for arm in self.arms if arm.matched],
        }
        return [
            replace(self, arms=tuple(arms), design=name) for name, arms in fixed.items() if arms
        ]

    @cached_property
    def not_chosen(self) -> list[list[_Arm]]:
        """List the groups of arms among which a choice is needed but impossible, because they share no seed."""
        rates = [alike for alike in self._alike if len({arm.place for arm in alike}) > 1]
        missing = [alike for alike in rates if not _eligible(alike)]
        stages = dict.fromkeys(arm.variant for arm in self.tuned if arm.lineage.role == "plain")
        for arm in _per_token(self.tuned):
            stages |= dict.fromkeys(step.variant for step in arm.lineage.chain[:-1])
        by_stage = [_of_variant(self.tuned, variant) for variant in stages]
        for arms in (_references(self.tuned), _static(self.tuned), *by_stage):
            if not _can_choose(arms) and not any(set(arms) <= set(each) for each in missing):
                missing.append(arms)
        return missing

    @cached_property
    def tuned(self) -> list[_Arm]:
        """Select the best rate's arm of each family; only these arms are compared."""
        chosen = {_choose(_eligible(family))[0].name for family in self.families}
        return [arm for arm in self.arms if arm.name in chosen]

    @property
    def to_report(self) -> list[_Arm]:
        """Return the chosen arms: each configuration at its best rate, and each static variant at its best gain."""
        static = {arm.variant for arm in _static(self.tuned)}
        best = (self.best(_of_variant(self.tuned, variant)) for variant in sorted(static))
        return [arm for arm in self.tuned if arm.variant not in static or arm.is_penalised] + [
            found[0] for found in best if found is not None
        ]

    def at(self, lr: float | None) -> list[_Arm]:
        """Return the arms at the rate `lr`; without `lr`, each family's arm at its own best rate."""
        return self.tuned if lr is None else [a for a in self.arms if a.settings["lr"] == lr]

    def family(self, of: _Arm) -> list[_Arm]:
        return next(family for family in self.families if of in family)

    def best(self, candidates: Sequence[_Arm], lr: float | None = None) -> tuple[_Arm, str] | None:
        """Return the best of the candidates, which are among `at(lr)`, and a text on how it was chosen.

        Without candidates, or without a seed at which all candidates can be compared, the result is None.
        """
        if not candidates or not _can_choose(candidates):
            return None
        chosen, losses = _choose(candidates)
        rates = _eligible(self.family(chosen)) if lr is None else [chosen]
        if len(candidates) == 1 and len(rates) > 1:
            over = _seeds(len(_choosing(*rates)))
            return (
                chosen,
                f"{chosen.name}, the best of {len(rates)} rates on the select split over {over}",
            )
        if len(candidates) == 1:
            return chosen, f"{chosen.name}, the only candidate"
        return chosen, (
            f"{chosen.name}, chosen on the select split: "
            + ", ".join(f"{name} ({loss:.4f})" for name, loss in sorted(losses.items()))
        )

    def optimism(self, candidates: Sequence[_Arm]) -> float | None:
        """Return by how much the choice alone would favour the chosen one of equally good candidates, in nats.

        This is the expected distance of the luckiest of k arms from their mean: the standard error of an arm's mean
        over seeds, times the expected maximum of k standard normal numbers. It is 0 at select seeds, since the
        luck of seeds that are not reported is not in the results.

        Returns:
            None with one seed, which does not show how much seeds differ.

        Source: protocol.md section 5, "Choices".
        """
        if self.select_seeds or len(candidates) < 2:
            return 0.0
        losses = np.array([*_select(candidates).values()])  # [arm seed]
        n_arms, n_seeds = losses.shape
        if n_seeds < 2:
            return None
        luck = losses - losses.mean(axis=0) - losses.mean(axis=1, keepdims=True) + losses.mean()
        variance = float((luck**2).sum()) / ((n_arms - 1) * (n_seeds - 1))
        return math.sqrt(variance / n_seeds) * stats.expected_maximum(n_arms)

    def difference(self, a: _Arm, b: _Arm, seeds: Sequence[int]) -> Floats:
        """Return the loss sums of `a` minus those of `b`, [seed document], nats."""
        return np.stack([a.report[seed] - b.report[seed] for seed in seeds])

    def against_margin(self, a: _Arm, b: _Arm) -> Verdict | None:
        """Return whether the losses of two arms are equivalent; None without common seeds."""
        seeds = _shared(a, b)
        if not seeds:
            return None
        tested = stats.seeds_and_documents(self.difference(a, b, seeds), self.counts, level=0.90)
        return Verdict(stats.equivalence(tested, MARGIN))

    def fields(self, arm: _Arm, interval: Interval, cluster: str, n_seeds: int) -> dict[str, Any]:
        """Return the fields that comparisons and points of curves share."""
        return {
            "study": self.study, "commit": self.commit, "size": self.size, "design": self.design,
            "arm": arm.name, "variant": arm.variant, "config": arm.config,
            "value": None if math.isnan(interval.value) else interval.value,
            "low": interval.low, "high": interval.high, "n": n_seeds,
            "n_clusters": n_seeds if cluster == "seed" else interval.n_clusters, "cluster": cluster,
            "n_effective": interval.n_effective,
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
        """Compute `a` minus `b` over their common seeds, with both intervals; empty without common seeds.

        Args:
            term: the quantity that the comparison estimates.
            a: the arm from whose loss is subtracted.
            b: the arm whose loss is subtracted.
            arm: the arm, `a` or `b`, that the comparison is about; the other one is its `against`.
            more: further fields of the records.
        """
        seeds = _shared(a, b)
        if not seeds:
            return []
        difference = self.difference(a, b, seeds)
        new_seeds = stats.seeds_and_documents(difference, self.counts)
        new_documents = stats.bootstrap_mean(difference.mean(axis=0), self.counts)
        n_seeds = len(seeds)
        p = new_seeds.p if n_seeds > 1 else None  # with one seed there is nothing to test
        more["against"] = (b if arm is a else a).name
        documents = self.comparison(term, arm, new_documents, "document", n_seeds, **more)
        more["note"] = _also(more.get("note", ""), "" if p is None else f"sign-flip p = {p:.3g}")
        return [self.comparison(term, arm, new_seeds, "seed", n_seeds, p=p, **more), documents]


def _reported(arm: _Arm) -> bool:
    """Return whether an arm has reported seeds; one that was only tried out on select seeds has none."""
    return bool(arm.report)


def _references(arms: Iterable[_Arm]) -> list[_Arm]:
    """Return the baseline arms at the start of a chain. All other arms are compared with the best of them."""
    return [a for a in arms if a.lineage.role == "baseline" and len(a.lineage.chain) == 1]


def _per_token(arms: Iterable[_Arm]) -> list[_Arm]:
    return [arm for arm in arms if arm.lineage.role == "per_token"]


def _static(arms: Iterable[_Arm]) -> list[_Arm]:
    """Return the candidates for the best static arm, which have one gain for all tokens (protocol.md section 4)."""
    return [arm for arm in arms if arm.lineage.role == "static"]


def _plain(arms: Iterable[_Arm], of: _Arm) -> list[_Arm]:
    """Return the arms without a norm from which the chain of an arm starts."""
    root = of.lineage.chain[0].variant
    return [arm for arm in _of_variant(arms, root) if arm.lineage.role == "plain"]


def _of_variant(arms: Iterable[_Arm], variant: str) -> list[_Arm]:
    """Return the arms of a variant, without arms that minimise another loss."""
    return [arm for arm in arms if arm.variant == variant and not arm.is_penalised]


def _choose(candidates: Sequence[_Arm]) -> tuple[_Arm, dict[str, float]]:
    """Return the arm with the lowest mean loss on the select split, and all candidates' losses by name.

    Several candidates must share a seed. The choice is made once for all seeds, on documents that are not
    reported: choosing on the report split would bias the winner's loss downwards.
    """
    if len(candidates) == 1:
        return candidates[0], {}
    losses = {name: float(np.mean(by_seed)) for name, by_seed in _select(candidates).items()}
    return min(candidates, key=lambda arm: (losses[arm.name], arm.name)), losses


def _select(candidates: Sequence[_Arm]) -> dict[str, list[float]]:
    """Return the losses on the select split by arm, one per seed.

    Seeds that some candidate lacks are left out, so that no arm wins because its seeds are easier.
    """
    return {arm.name: [arm.select[seed] for seed in _choosing(*candidates)] for arm in candidates}


def _eligible(family: Sequence[_Arm]) -> list[_Arm]:
    """Return the arms among which the best rate is chosen: the rates that have all seeds of the family.

    If a rate with fewer seeds won, the family would be compared over fewer seeds. If no rate has all seeds,
    every rate is eligible, over the seeds common to all rates. If there are no common seeds, no rate is.
    """
    if len(family) < 2:
        return list(family)
    seeds = {seed for arm in family for seed in arm.select}
    full = [arm for arm in family if seeds and seeds <= arm.select.keys()]
    return full or (list(family) if _can_choose(family) else [])


def compare(
    study: str,
    losses: pd.DataFrame,
    commit: str,
    lineages: Mapping[str, Lineage],
    select_seeds: Collection[int] = (),
) -> list[Record]:
    """Make all comparisons that the arms of a study allow; skip comparisons that need a missing arm.

    Each size is compared separately. Among arms that differ only in their learning rate, the arm with
    the lowest loss on the select split is compared. If several arms could be the baseline, the plain
    arm, the static arm or a chain's member (several gains), the one with the lowest loss on the select
    split is used. Each arm with a per-token norm (several kappas) is compared separately.

    Args:
        study: name of the study.
        losses: one row per run, split and document, with columns run, arm, variant, seed, split
            (`select` or `report`), document, loss_sum (nats, over targets that are not BOS),
            n_tokens (number of those targets), config, family (equal for runs that differ only in
            seed and learning rate), `SETTINGS` (nan for a setting that a run lacks), and optionally rate (why
            the learning rate cannot be taken for tuned; empty if it can) and constant (true for a run that has lost
            its per-token scales).
        commit: commit of the code that measured.
        lineages: role of each variant in the comparison, by the variant's name.
        select_seeds: seeds at which rates, gains and the static arm are chosen; their losses are not reported. If
            there are none, the choices are made at the reported seeds, on the select split.

    Returns:
        Comparisons, by term:
        `LOSS` of each arm, with Student's t over seeds on these documents;
        `DIFFERENCE` of each arm to each reference: the best baseline at the start of a chain, the best
        plain arm, and every arm with a per-token norm; and of each arm that was trained further with less
        normalisation, to the arm that was trained further as it was;
        `BENEFIT`, `STATIC`, `SHARE` and `STEP` of each arm with a per-token norm. The steps follow the
        arm's chain through the members that the study has, and sum to the benefit of LN;
        `BENEFIT`, `STATIC` and `SHARE` again at each learning rate common to all arms, if the arm with a
        per-token norm was trained at several.
        Choice points of the curves on which a rate or a gain was chosen. Points of rates that lack
        seeds are over the seeds they have, and are not eligible. `NoChoice` for arms that share no
        seed. The `Setting` of each arm.
        The baseline's curve over the sizes of one shape, and each arm's multiplier (see `scaling`).
        Differences over two seeds or more have the exact sign-flip `p`. `STATIC` and `SHARE` of
        all arms with a per-token norm are the primary family, with `p_adj` after Holm's correction.

    Raises:
        UserError: if a run was not measured on the same documents as the other runs of its size, two
            runs have the same arm and seed, an arm's runs differ in their settings, or two arms are
            the same point of a curve.

    Source: protocol.md sections 4, 5 and 10.2.
    """
    if losses.empty:
        raise UserError("no losses to compare: measure them with 'soluscope probe'")
    _check_settings(losses)
    sizes = [
        _read(study, table, commit, size, lineages, select_seeds)
        for size, table in _by_size(losses)
    ]
    compared = [each for arms in sizes for each in _compared(arms.main)]
    records: list[Record] = [*_adjust_primary(compared)]
    for arms in sizes:
        for design in arms.designs:
            in_design = [each for each in _compared(design) if each.term is not Term.LOSS]
            records += _adjust_primary(in_design)
        records += [
            *sensitivities(arms),
            *_tuning(arms.main),
            *_no_choices(arms.main),
            *_settings(arms),
        ]
    return [*records, *_scaling(sizes)]


def _scaling(sizes: Sequence[_Arms]) -> list[Record]:
    """Return the baseline's curves and the multipliers, for sizes of one shape that saw the same tokens."""
    shapes: dict[tuple[object, ...], list[OfSize]] = {}
    for arms in (each.main for each in sizes):
        best = arms.best([arm for arm in _references(arms.tuned) if _reported(arm)])
        if best is None:
            continue
        shape = best[0].settings
        key = (
            shape["d_mlp"] / shape["d_model"],
            shape["ctx"],
            shape["tokens"],
            arms.counts.tobytes(),
        )
        known = list(filter(_reported, arms.tuned))
        n_weights = n_block_weights(*(int(shape[name]) for name in SIZE[:3]))
        of_size = OfSize(
            arms.size, n_weights, arms.counts, best[0].name, {arm.name: arm.variant for arm in known},
            {arm.name: arm.report for arm in known},
        )  # fmt: skip
        shapes.setdefault(key, []).append(of_size)
    about = {"study": sizes[0].study, "commit": sizes[0].commit}
    return [found for of_shape in shapes.values() for found in scaling(of_shape, about)]


@dataclass(frozen=True)
class Choices:
    """The choices that a study with select seeds makes before its report seeds are trained."""

    arms: frozenset[str]
    """Arms to train at the report seeds: each configuration at its best rate and output scale, and each static
    variant at its best gain, in every design."""
    best: frozenset[str]
    """The arms to train that are at the best points of their surfaces."""
    losses: Mapping[str, float]
    """Loss of each arm that has all select seeds, on the select split, nats per token."""


def choices(
    losses: pd.DataFrame, lineages: Mapping[str, Lineage], select_seeds: Collection[int]
) -> Choices:
    """Choose the arms that a study with select seeds trains at its report seeds.

    The arguments are those of `compare`.

    Raises:
        UserError: if arms to choose from share no select seed, and for the reasons that `compare` gives.
    """
    _check_settings(losses)
    chosen, best, known = set[str](), set[str](), dict[str, float]()
    for size, table in _by_size(losses):
        arms = _read("", table, "", size, lineages, select_seeds)
        for alike in [
            *arms.main.not_chosen,
            *(each for d in arms.designs for each in d.not_chosen),
        ]:
            raise UserError(
                f"no choice is possible between {', '.join(arm.name for arm in alike)}: they share no select seed; "
                "give all arms the same select_seeds"
            )
        best |= {arm.name for arm in arms.main.to_report}
        for design in [arms.main, *arms.designs]:
            chosen |= {arm.name for arm in design.to_report}
        known |= {
            arm.name: float(np.mean([*arm.select.values()]))
            for arm in arms.arms
            if arm.select.keys() >= set(select_seeds)
        }
    return Choices(frozenset(chosen), frozenset(best), known)


def _compared(arms: _Arms) -> list[Comparison]:
    """Make the comparisons within one size, each arm at its own best rate."""
    records = []
    for arm in filter(_reported, arms.arms):
        per_seed = [arm.report[seed].sum() / arms.counts.sum() for seed in sorted(arm.report)]
        interval = stats.paired_seeds(per_seed)
        note = "new seeds, these documents"
        records.append(arms.comparison(Term.LOSS, arm, interval, "seed", len(per_seed), note=note))

    baseline = arms.best(_references(arms.tuned))
    plain = arms.best([arm for arm in arms.tuned if arm.lineage.role == "plain"])
    normed = list(filter(_reported, _per_token(arms.tuned)))
    for reference in [best[0] for best in (baseline, plain) if best is not None] + normed:
        for arm in arms.tuned:
            if arm is not reference:
                records += arms.contrast(Term.DIFFERENCE, arm, reference, arm)
    for arm in arms.tuned:
        for unchanged in _of_variant(arms.tuned, arm.lineage.beside):
            records += arms.contrast(Term.DIFFERENCE, arm, unchanged, arm, note=EQUALLY_LONG)
    for ln in normed:
        records += _share(arms, ln)
        records += _telescoping(arms, ln)
    return records


def _share(arms: _Arms, ln: _Arm, lr: float | None = None) -> list[Comparison]:
    """Compute the benefit of LN, the part that the best static arm does not reach, and their ratio (Phi_dyn)."""
    records = []
    arms_at = arms.at(lr)
    plain, static = arms.best(_plain(arms_at, ln), lr), arms.best(_static(arms_at), lr)
    if plain is not None:
        more = {"choice": plain[1], "verdict": arms.against_margin(plain[0], ln)}
        records += arms.contrast(Term.BENEFIT, plain[0], ln, ln, **more)
    if static is not None:
        records += _static_minus_ln(arms, *static, ln, _static(arms_at))
    if plain is not None and static is not None:
        records += _phi_dyn(arms, plain[0], *static, ln)
    return records


def _tuning(arms: _Arms) -> list[ChoicePoint | Comparison]:
    """Return the curves on which rates and gains were chosen, and the comparisons at common rates."""
    records: list[ChoicePoint | Comparison] = []
    for family in arms.families:
        if len(family) > 1:
            records += _surface(arms, family)
    for variant in sorted({arm.variant for arm in arms.tuned}):
        static = [
            arm for arm in _static(_of_variant(arms.tuned, variant)) if "gain" in arm.settings
        ]
        if len({arm.settings["gain"] for arm in static}) > 1 and _choosing(*static):
            records += _curve(arms, "gain", static)
    for ln in _per_token(arms.tuned):
        family = arms.family(ln)
        is_curve = len(family) > 1 and len({arm.out_scale for arm in family}) == 1
        for arm in family if is_curve else []:
            lr = arm.settings["lr"]
            at_one_rate = _share(arms, arm, lr)
            records += [replace(each, lr=lr, tuned_arm=ln.name) for each in at_one_rate]
    return records


def _surface(arms: _Arms, family: Sequence[_Arm]) -> list[ChoicePoint]:
    """Return a family's losses on the select split against the rate, and through the best point against alpha."""
    points = _curve(arms, "lr", family)
    chosen, _ = _choose(_eligible(family))
    across = [arm for arm in family if arm.settings["lr"] == chosen.settings["lr"]]
    if len({arm.out_scale for arm in across}) > 1 and chosen in _eligible(across):
        points += _curve(arms, "mlp_out_scale", across)
    return points


def _curve(
    arms: _Arms, setting: Literal["lr", "gain", "mlp_out_scale"], candidates: Sequence[_Arm]
) -> list[ChoicePoint]:
    """Return the loss on the select split against a setting; mark the least loss's position on the grid.

    The grid of the learning rate is that of the points with the chosen point's alpha.

    Source: protocol.md section 10.2 (c): the tuned optimum must lie inside the grid, not at its edge.
    """
    eligible = candidates if setting == "gain" else _eligible(candidates)
    chosen, _ = _choose(eligible)
    on_axis = [a for a in eligible if setting != "lr" or a.out_scale == chosen.out_scale]
    settings = {arm.settings[setting] for arm in on_axis}
    at = chosen.settings[setting]
    grid = (
        Grid.TOO_FEW if len(settings) < GRID_FROM
        else Grid.LOWER_EDGE if at == min(settings)
        else Grid.UPPER_EDGE if at == max(settings)
        else Grid.INSIDE
    )  # fmt: skip
    where = f"{len(settings)} points are {grid}" if grid is Grid.TOO_FEW else grid
    losses = _select(eligible)
    n_seeds = len(losses[chosen.name])
    points = []
    for arm in sorted(candidates, key=lambda arm: arm.settings[setting]):
        by_seed = losses.get(arm.name) or [arm.select[seed] for seed in sorted(arm.select)]
        if not by_seed:
            continue
        note = f"chosen over {_seeds(n_seeds)}, {where}" if arm is chosen else ""
        if arm not in eligible:
            note = f"not eligible: {len(by_seed)} of {_seeds(n_seeds)}"
        common = arms.fields(arm, stats.paired_seeds(by_seed), "seed", len(by_seed))
        points.append(
            ChoicePoint(
                **common, unit="nats / token", setting=setting, x=arm.settings[setting],
                out_scale=arm.out_scale,
                chosen_arm=chosen.name, eligible=arm in eligible,
                grid=grid if arm is chosen else None, note=note,
            )
        )  # fmt: skip
    return points


def sensitivities(arms: _Arms) -> list[Comparison]:
    """Compute how much each arm loses at rates other than its best, and the steps of the chain.

    The sensitivity of an arm at one seed is the mean over the common rates of its loss above that at its best rate,
    with losses capped at that of an untrained model. The best rate is chosen on the select split, and alpha is 1.
    Rates count if every arm with a curve was trained at them, over the seeds that all share.

    Source: Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities", section
    2.2; protocol.md section 4, "Robustness".
    """
    lines, rates, seeds = _lines(arms)
    if len(rates) < GRID_FROM or not seeds:
        return []
    ranges = f"{len(rates)} rates from {min(rates):g} to {max(rates):g}"
    rated = [_rated(arms, line, seeds) for line in lines if _candidates(line)]
    records = [
        arms.comparison(
            Term.SENSITIVITY, each.arm, stats.paired_seeds(each.by_seed), "seed", len(seeds),
            note=f"{ranges}; best rate {each.arm.settings['lr']:g}",
        )
        for each in rated
    ]  # fmt: skip
    best_of = _best_of_variants(rated)
    for ln in rated if len(rated) > 1 else []:
        if ln.arm.lineage.role == "per_token":
            stages = _stages(ln, best_of)
            records += _sensitivity_steps(arms, stages, ranges)
            if stages[0][1].lineage.role == "plain":
                records += _parts(arms, stages, ranges)
    return records


class _Rated(NamedTuple):
    """An arm at its best rate, and its sensitivity to the rate at each seed."""

    arm: _Arm
    by_seed: Floats


def _lines(arms: _Arms) -> tuple[list[list[_Arm]], set[float], list[int]]:
    """Return the arms at alpha 1, joined where only the rate differs, the rates common to all, and shared seeds."""
    found = [
        [each for each in alike if each.report and each.out_scale == 1 and not each.matched]
        for alike in arms._alike
    ]
    lines = [line for line in found if len(line) >= GRID_FROM]
    if not lines:
        return [], set(), []
    rates = set.intersection(*({arm.settings["lr"] for arm in line} for line in lines))
    lines = [[arm for arm in line if arm.settings["lr"] in rates] for line in lines]
    return lines, rates, _shared(*(arm for line in lines for arm in line))


def _candidates(line: Sequence[_Arm]) -> list[_Arm]:
    """Return the arms of a line from which its best rate is chosen."""
    return _eligible([arm for arm in line if arm.select])


def _rated(arms: _Arms, line: Sequence[_Arm], seeds: Sequence[int]) -> _Rated:
    """Return the arm at the best rate of a line, and the line's mean loss above that at this rate, by seed."""
    best, _ = _choose(_candidates(line))
    losses = np.array([[arm.report[s].sum() / arms.counts.sum() for s in seeds] for arm in line])
    above = np.minimum(losses, best.uniform) - losses[line.index(best)]
    return _Rated(best, above.mean(axis=0))


def _best_of_variants(rated: Iterable[_Rated]) -> dict[str, _Rated]:
    """Return the best arm of each variant, of those without an entropy penalty."""
    best: dict[str, _Rated] = {}
    for each in rated:
        if each.arm.is_penalised:
            continue
        rivals = [each.arm, *(best[each.arm.variant][:1] if each.arm.variant in best else [])]
        if _choose(rivals)[0] is each.arm:
            best[each.arm.variant] = each
    return best


def _stages(ln: _Rated, best_of: Mapping[str, _Rated]) -> list[tuple[int, _Arm, Floats]]:
    """Return the arms of a chain to LayerNorm, each with its place in the chain and its sensitivities."""
    chain = ln.arm.lineage.chain
    before = [
        (i, *best_of[step.variant]) for i, step in enumerate(chain[:-1]) if step.variant in best_of
    ]
    return [*before, (len(chain) - 1, *ln)]


def _sensitivity_steps(
    arms: _Arms, stages: Sequence[tuple[int, _Arm, Floats]], ranges: str
) -> Iterator[Comparison]:
    """Yield the difference in rate sensitivity between each two neighbours of a chain."""
    ln = stages[-1][1]
    chain = ln.lineage.chain
    for (i, before, left), (j, after, right) in pairwise(stages):
        interval = stats.paired_seeds(left - right)
        yield arms.comparison(
            Term.SENSITIVITY_STEP, ln, interval, "seed", len(left), against=before.name,
            step=(chain[i].variant, chain[j].variant), p=interval.p if interval.n > 1 else None,
            adds="; ".join(step.adds for step in chain[i + 1 : j + 1]), note=f"{ranges}; to {after.name}",
        )  # fmt: skip


def _parts(
    arms: _Arms, stages: Sequence[tuple[int, _Arm, Floats]], ranges: str
) -> Iterator[Comparison]:
    """Yield the difference in rate sensitivity between the ends of a chain, and its parts; see `Part`.

    Args:
        arms: the arms of one size.
        stages: place in the chain, arm, and sensitivity by seed, from the plain arm to one with a per-token norm.
        ranges: the common rates in words.
    """
    _, ln, _ = stages[-1]
    static = [k for k, (_, arm, _) in enumerate(stages) if arm.lineage.role == "static"]
    split = max(static, default=0)
    ends = {Part.ALL: (0, len(stages) - 1), Part.SCALE: (split, split + 1)}
    if static:
        ends[Part.ONE_GAIN] = (0, split)
    if split + 2 < len(stages):
        ends[Part.GRADIENT] = (split + 1, len(stages) - 1)
    chain = ln.lineage.chain
    for part in filter(ends.__contains__, Part):
        (i, before, left), (j, after, right) = (stages[k] for k in ends[part])
        interval = stats.paired_seeds(left - right)
        tested = stats.paired_seeds(left - right, level=0.90)
        yield arms.comparison(
            Term.SENSITIVITY_PART, ln, interval, "seed", len(left), against=before.name, part=part,
            step=(chain[i].variant, chain[j].variant), p=interval.p if interval.n > 1 else None,
            verdict=Verdict(stats.equivalence(tested, MARGIN)), note=f"{ranges}; to {after.name}",
            adds="; ".join(step.adds for step in chain[i + 1 : j + 1]),
        )  # fmt: skip


def _no_choices(arms: _Arms) -> list[NoChoice]:
    """Record the groups of arms among which no choice was made: an arm could have won through easier seeds.

    An arm that was chosen but has no reported seed is a separate group.
    """
    share = "select seed" if arms.select_seeds else "seed"
    missing = [(alike, f"they share no {share}") for alike in arms.not_chosen]
    missing += [
        ([arm], "it was chosen at the select seeds, but has no reported seed")
        for arm in arms.to_report
        if not _reported(arm)
    ]
    return [
        NoChoice(
            study=arms.study, arms=tuple(arm.name for arm in alike), note=note, size=arms.size,
            commit=arms.commit,
        )
        for alike, note in missing
    ]  # fmt: skip


def _settings(arms: _Arms) -> list[Setting]:
    return [
        Setting(
            study=arms.study, arm=arm.name, variant=arm.variant, values=arm.settings,
            role=arm.lineage.role, chain=arm.lineage.chain, twin=arm.lineage.twin, size=arms.size,
            label=arm.lineage.label, after=arm.lineage.after, rate=arm.rate, family=arm.family,
            matched=arm.matched and bool(arms.designs),
            n=len(arm.report), only_tried=not arm.report, commit=arms.commit, config=arm.config,
        )
        for arm in arms.arms
    ]  # fmt: skip


def _adjust_primary(compared: list[Comparison]) -> list[Comparison]:
    """Add to the records that test "Phi_dyn is 0" the p that is corrected for the number of tested arms.

    Phi_dyn is 0 where its numerator is 0, so Phi_dyn has the numerator's p. The family contains all arms
    with a per-token norm, including arms whose Phi_dyn is undefined: the set of tests must not depend on
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
        tested = plural(len(family), "arm")
        note = f"Holm-adjusted p = {p_adj:.3g} over {len(family)} {tested} with a per-token norm"
        if record.term is Term.SHARE:
            note = f"sign-flip p of its numerator = {p:.3g}; {note}"
        return replace(record, p=p, p_adj=p_adj, note=_also(record.note, note))

    return [with_p(record) for record in compared]


def passed_over(records: Iterable[Record]) -> set[str]:
    """Return the arms whose learning rate was not chosen."""
    points = [each for each in of_kind(records, ChoicePoint) if each.setting == "lr"]
    return {each.arm for each in points if each.arm != each.chosen_arm}


def confirm(records: Sequence[Record], tested: Mapping[str, str]) -> list[Comparison]:
    """Test, seed by seed, whether training changed a probe's number in arms with a per-token norm.

    These tests are the confirmatory family. For each such arm and each probe, the test is the difference of the
    probe's tested quantity between each trained run and its own initialisation. The differences of models that
    training did not change in this respect are as often above 0 as below. The p is the exact sign-flip p,
    corrected over all tests by Holm's method. A quantity that is undefined in every run counts as a test
    with p = 1, so that the size of the family does not depend on the results.

    Args:
        records: records of the study's runs and those of `compare`. Arms whose rate was not chosen are left out.
        tested: the tested quantity, by probe.

    Returns:
        Comparisons with the term `PROBE`, for the probes that were measured.

    Source: protocol.md section 5, "Families".
    """
    left_out = passed_over(records)
    measured = {(each.arm, each.probe) for each in of_kind(records, Measurement)}
    before = of_kind(records, Untrained)
    with_twin = {each.arm for each in before}
    tests = [
        _trained_minus_untrained(before, probe, quantity, arm)
        for arm in sorted(of_kind(records, Setting), key=lambda each: each.arm)
        if arm.role == "per_token" and arm.arm not in left_out
        for probe, quantity in tested.items()
        if (arm.arm, probe) in measured and arm.arm in with_twin
    ]
    family = {str(i): 1.0 if test.p is None else test.p for i, test in enumerate(tests)}
    adjusted = stats.holm(family)
    return [
        replace(
            test, p_adj=adjusted[str(i)],
            note=_also(test.note, f"Holm-adjusted p = {adjusted[str(i)]:.3g} over {len(adjusted)} tests"),
        )
        for i, test in enumerate(tests)
    ]  # fmt: skip


def _trained_minus_untrained(
    before: Sequence[Untrained], probe: str, quantity: str, arm: Setting
) -> Comparison:
    """Make one confirmatory test, over the seeds at which the quantity is defined before and after training."""
    found = {
        each.seed: each.difference
        for each in before
        if (each.arm, each.probe, each.quantity, each.group) == (arm.arm, probe, quantity, "")
        and each.statistic in ("", "mean") and each.difference is not None
    }  # fmt: skip
    unit = next(
        (each.unit for each in before if (each.probe, each.quantity) == (probe, quantity)), ""
    )
    base = Comparison(
        study=arm.study, term=Term.PROBE, probe=probe, quantity=quantity, arm=arm.arm, variant=arm.variant,
        value=None, unit=unit, cluster="seed", commit=arm.commit, config=arm.config, size=arm.size,
    )  # fmt: skip
    if not found:
        return replace(base, note="undefined before or after training, so p = 1")
    interval = stats.paired_seeds([found[seed] for seed in sorted(found, key=lambda s: s or 0)])
    p = interval.p if interval.n > 1 else None
    return replace(
        base, value=interval.value, low=interval.low, high=interval.high, p=p, n=interval.n,
        n_clusters=interval.n_clusters, note="" if p is None else f"sign-flip p = {p:.3g}",
    )  # fmt: skip


def _static_minus_ln(
    arms: _Arms, static: _Arm, choice: str, ln: _Arm, candidates: Sequence[_Arm]
) -> list[Comparison]:
    seeds = _shared(static, ln)
    if not seeds:
        return []
    difference = arms.difference(static, ln, seeds)
    tested = stats.seeds_and_documents(difference, arms.counts, level=0.90)
    verdict = Verdict(stats.equivalence(tested, MARGIN))
    bounds = ""
    if tested.low is not None and tested.high is not None:
        bounds = f" (90% interval of this test: {tested.low:+.4f} to {tested.high:+.4f})"
    note = {
        Verdict.EQUIVALENT: f"equivalent: closer than {MARGIN} nats to 0{bounds}",
        Verdict.DIFFERENT: f"different: farther than {MARGIN} nats from 0{bounds}",
        Verdict.INCONCLUSIVE: f"inconclusive against a margin of {MARGIN} nats{bounds}",
    }[verdict]
    return arms.contrast(
        Term.STATIC, static, ln, ln, verdict=verdict, choice=choice, note=note,
        n_candidates=len(candidates), optimism=arms.optimism(candidates),
    )  # fmt: skip


def _phi_dyn(arms: _Arms, plain: _Arm, static: _Arm, choice: str, ln: _Arm) -> list[Comparison]:
    """Compute Phi_dyn: the share of the benefit of LN that the best static arm does not reach."""
    seeds = _shared(plain, static, ln)
    if not seeds:
        return []
    num = arms.difference(static, ln, seeds)
    den = arms.difference(plain, ln, seeds)
    benefit = stats.seeds_and_documents(den, arms.counts)
    more: dict[str, Any] = {"unit": "share", "against": static.name, "choice": choice}
    if benefit.low is None or benefit.low <= MARGIN:
        more |= {
            "verdict": Verdict.UNDEFINED,
            "note": f"undefined, because no benefit of LN is established ({_why_undefined(benefit)})",
        }
        undefined = Interval(float("nan"), None, None, benefit.n, benefit.n_clusters)
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


def _why_undefined(benefit: Interval) -> str:
    estimate = f"benefit of LN {benefit.value:+.4f} nats"
    if benefit.n < 2:
        return f"{estimate} with one seed, which gives no interval for new seeds"
    if benefit.low is None or benefit.high is None:
        n = benefit.n_clusters
        be = "is" if n == 1 else "are"
        return f"{estimate}; {n} {plural(n, 'document')} {be} too few for an interval"
    bounds = f"{estimate}, 95% interval for new seeds {benefit.low:+.4f} to {benefit.high:+.4f}"
    if benefit.high < 0:
        return f"{bounds}: the plain arm is better"
    if benefit.low <= 0:
        return f"{bounds}: the interval contains 0"
    return f"{bounds}: the lower bound is not above {MARGIN} nats"


def _telescoping(arms: _Arms, ln: _Arm) -> list[Comparison]:
    """Split the benefit of LN into steps along the arm's own chain, over the seeds common to all steps.

    If the study lacks a member of the chain, one step leads across it and adds the parts of both.
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
        variants = (chain[i].variant, chain[j].variant)
        steps.append(
            arms.comparison(
                Term.STEP, ln, interval, "seed", len(seeds), against=a.name, step=variants, adds=adds,
                choice=choice,
            )
        )  # fmt: skip
    return steps


def _also(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _seeds(n: int) -> str:
    return f"{n} {plural(n, 'seed')}"


def _shared(*arms: _Arm) -> list[int]:
    """Return the reported seeds that the arms share."""
    return sorted(set.intersection(*(set(arm.report) for arm in arms)))


def _choosing(*arms: _Arm) -> list[int]:
    """Return the shared seeds at which a choice between the arms is made."""
    return sorted(set.intersection(*(set(arm.select) for arm in arms)))


def _can_choose(arms: Sequence[_Arm]) -> bool:
    return len(arms) < 2 or bool(_choosing(*arms))


def _check_settings(losses: pd.DataFrame) -> None:
    """Refuse an arm whose runs differ in a setting; only a gain or an alpha measured at the start may differ."""
    for arm, table in losses.groupby("arm"):
        for name in _settings_in(losses):
            values = sorted(table[name].dropna().unique())
            if len(values) > 1 and name not in ("gain", "mlp_out_scale"):
                raise UserError(
                    f"runs of arm {arm!r} differ in {name} ({values[0]:g} and {values[-1]:g}), but an arm has"
                    " one setting and several seeds: move the runs of one setting to another study"
                )


def _settings_in(losses: pd.DataFrame) -> list[str]:
    """Return the names of the columns that are settings."""
    return [name for name in SETTINGS if name in losses]


def _by_size(losses: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each size's losses, the smallest size first, with a text that distinguishes it from the others."""
    sizes = list(losses.groupby(list(SIZE), sort=True))
    differing = [i for i in range(len(SIZE)) if len({shape[i] for shape, _ in sizes}) > 1]
    for shape, table in sizes:
        yield ", ".join(f"{SIZE[i]} {shape[i]:.0f}" for i in differing), table


def _read(
    study: str,
    losses: pd.DataFrame,
    commit: str,
    size: str,
    lineages: Mapping[str, Lineage],
    select_seeds: Collection[int],
) -> _Arms:
    """Return the losses of one size as arrays over one order of documents.

    Raises:
        UserError: if a run was measured on other documents than most runs, lacks a split, or repeats a seed.
    """
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
                f" {len(runs)} runs of {study!r}: probe it again, or move it to another study"
            )
    arms: dict[str, _Arm] = {}
    for name, table in runs.items():
        first = table.iloc[0]
        seed = int(first["seed"])
        select, report = (table[table["split"] == split] for split in ("select", "report"))
        if select.empty or report.empty:
            raise UserError(
                f"run {name!r} of {study!r} lacks the select or the report split: probe it again"
            )
        name_of_arm = str(first["arm"])
        if name_of_arm not in arms:
            arms[name_of_arm] = _arm(losses[losses["arm"] == name_of_arm], lineages)
        arm = arms[name_of_arm]
        if seed in arm.report or seed in arm.select:
            raise UserError(
                f"run {name!r} is a second run of arm {arm.name!r} with seed {seed}: move it to another study"
            )
        if seed in select_seeds or not select_seeds:
            arm.select[seed] = float(select["loss_sum"].sum() / select["n_tokens"].sum())
        if seed not in select_seeds:
            arm.report[seed] = report["loss_sum"].to_numpy(dtype=np.float64)
    counts = report["n_tokens"].to_numpy(dtype=np.float64)
    return _Arms(
        study, commit, size, counts, tuple(arms[name] for name in sorted(arms)), select_seeds
    )


def _arm(table: pd.DataFrame, lineages: Mapping[str, Lineage]) -> _Arm:
    """Return an arm, still without losses, from the rows of all its runs."""
    first = table.iloc[0]
    variant = str(first["variant"])
    settings = table.groupby("run")[_settings_in(table)].first().median()
    lineage = lineages[variant]
    if settings.fillna(0).get("entropy_penalty", 0.0):
        # It minimises another loss, so it stands for no role: no arm is compared with it.
        lineage = replace(lineage, role="other")
    if first.get("constant", False):  # a run of a per-token variant that has lost its scales
        lineage = replace(lineage, role="other", twin="")
    return _Arm(
        str(first["arm"]), variant, lineage, str(first["config"]), str(first["family"]),
        {str(name): float(value) for name, value in settings.items() if not math.isnan(value)}, {}, {},
        str(first.get("rate", "")), bool(first.get("matched", False)), float(first.get("uniform", math.inf)),
    )  # fmt: skip
