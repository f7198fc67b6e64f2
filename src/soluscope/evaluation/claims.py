"""Published claims about models without LayerNorm, tested on one run: before and after the removal of all scales.

The probes declare the claims (`Probe.claims`). All models are measured in fp64, because one claim is exactness.

Source: Baroni et al. 2025, "Transformers Don't Need LayerNorm at Inference Time"; protocol.md section 7, P7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from soluscope import plugins
from soluscope.comparison.stats import Interval, bootstrap_sums, difference_of_sums
from soluscope.evaluation.fitting import misfit
from soluscope.evaluation.stored import PACKAGE
from soluscope.hooked.activations import HookedRun
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.probes import Claim, Estimate, Probe
from soluscope.results import Bounded, ClaimTested


def probes_with_claims() -> dict[str, Probe]:
    """Return the probes that declare a claim, by name."""
    probes = {name: plugins.pick(PACKAGE, name) for name in plugins.names(PACKAGE)}
    return {name: probe for name, probe in probes.items() if probe.claims}


def tested(
    model: SoluscopeTransformer,
    before: HookedRun,
    kept: HookedRun,
    after: HookedRun,
    base: ClaimTested,
    n_draws: int,
    seed: int,
) -> Iterator[ClaimTested]:
    """Yield each claim with the numbers of three models on the same text.

    Args:
        model: the model without per-token scales.
        before: fp64 activations of the trained model.
        kept: those of the model that was trained further as it was.
        after: those of `model`.
        base: fields that all records share.
        n_draws: number of resamples.
        seed: seed of the resampling.
    """
    for name, probe in probes_with_claims().items():
        rows = [
            replace(
                base, probe=name, quantity=claim.quantity, claim=claim.text, within=claim.within,
                unit=probe.estimates[claim.quantity].unit,
            )
            for claim in probe.claims
        ]  # fmt: skip
        if why := misfit(probe, model):
            yield from (replace(row, note=why) for row in rows)
            continue
        estimates = [probe.measure(run).estimates for run in (before, kept, after)]
        for claim, row in zip(probe.claims, rows, strict=True):
            found = [_of_quantity(each, claim.quantity) for each in estimates]
            yield _tested(row, claim, *found, n_draws=n_draws, seed=seed)


def _of_quantity(estimates: tuple[Estimate, ...], quantity: str) -> Estimate | None:
    """Return the estimate of a quantity that is no point of a curve."""
    return next((each for each in estimates if each.quantity == quantity and each.x is None), None)


def _tested(
    row: ClaimTested,
    claim: Claim,
    before: Estimate | None,
    kept: Estimate | None,
    after: Estimate | None,
    *,
    n_draws: int,
    seed: int,
) -> ClaimTested:
    if before is None or kept is None or after is None:
        return replace(row, note="its number is not defined for one of the models")
    alone = [
        bootstrap_sums(each.sums, each.value, each.n, n_draws, seed)
        for each in (before, kept, after)
    ]
    change = Interval(alone[2].value - alone[0].value, None, None, after.n, len(after.sums))
    if len(after.sums) == len(before.sums):  # the same documents
        change = difference_of_sums(
            after.sums, after.value, before.sums, before.value, after.n, n_draws, seed
        )
    bounded = [_bounded(each) for each in (*alone, change)]
    row = replace(row, before=bounded[0], kept=bounded[1], after=bounded[2], change=bounded[3])
    return replace(row, holds=_holds(claim, bounded[2], bounded[3]))


def _bounded(found: Interval) -> Bounded:
    return Bounded(None if math.isnan(found.value) else found.value, found.low, found.high)


def _holds(claim: Claim, after: Bounded, change: Bounded) -> bool | None:
    """Return whether a claim holds, or None without its number or a necessary interval.

    A number that must be 0 needs no interval: where it is 0 at every token, resampling cannot move it.
    """
    if after.value is None:
        return None
    if claim.within is None:
        return None if change.high is None else change.high >= 0
    bounds = [each for each in (after.value, after.low, after.high) if each is not None]
    return max(map(abs, bounds)) <= claim.within
