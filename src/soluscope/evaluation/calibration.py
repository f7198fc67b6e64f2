"""Calibration of the probes, on models with known answers and on data without an effect.

`check_gates` validates a probe on its positive and negative controls. `false_positives` counts how
often the probe's test is positive without an effect: on untrained models, and on shuffled labels.

Source: protocol.md sections 5 ("Null calibration") and 6 ("Gate rule").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope import plugins
from soluscope.comparison.stats import (
    Interval,
    bootstrap_sums,
    cluster_bootstrap,
    equivalence,
    paired_seeds,
)
from soluscope.data import streams
from soluscope.evaluation.summaries import POSITIONS, token_table
from soluscope.hooked.activations import HookedRun, observe
from soluscope.probes import Estimate, Gate, Measured, Probe
from soluscope.probes._estimates import ratio
from soluscope.results import FalsePositives, GateResult
from soluscope.runs.weights import commit

NEAR = 0.05
"""Largest distance of a positive control's result from the analytic truth, as a share of the truth."""

NOMINAL = 0.05
N_PAIRS = 8
"""Pairs of untrained models per comparison, as many as a study has seeds."""
N_MODELS = 320
"""Size of the pool of untrained models, from which each comparison draws 16."""
N_TEXTS, WIDTH = 48, 32
BOS = 256
"""Id of BOS, after the 256 bytes, which are the tokens here."""


@lru_cache(maxsize=32)
def control_run(name: str, stream: str) -> HookedRun:
    """Return a control's activations on one of its streams."""
    planted = plugins.pick("soluscope.controls", name).build()
    return observe(planted.model, planted.streams[stream])


def check_gates(name: str, study: str = "") -> Iterator[GateResult]:
    """Validate a probe on each of its controls.

    Raises:
        UserError: if there is no such probe or control.
    """
    probe: Probe = plugins.pick("soluscope.probes", name)
    measured: dict[tuple[str, str], Measured] = {}
    for gate in probe.gates:
        run = control_run(gate.control, gate.stream)
        key = gate.control, gate.stream
        if key not in measured:
            measured[key] = probe.measure(run)
        # Two one-sided tests at 5% are equivalent to a 90% interval inside the margin.
        interval = _estimate(run, measured[key], gate, level=0.95 if gate.within is None else 0.90)
        passed, asked = judge(gate, interval)
        known = probe.quantities | probe.estimates
        how = f" ({gate.statistic})" if gate.quantity in probe.quantities else ""
        where = "".join(f", {part}" for part in (gate.group, gate.x) if part not in ("", None))
        n_strings = interval.n_clusters
        yield GateResult(
            study=study, probe=name, control=gate.control,
            section=plugins.pick("soluscope.controls", gate.control).section,
            passed=passed, sign="positive" if gate.within is None else "negative",
            measured=f"{gate.quantity}{how}{where}", asked=asked,
            stream=gate.stream, positions=gate.positions, value=interval.value,
            unit=known[gate.quantity].unit, low=interval.low, high=interval.high, n=interval.n,
            n_clusters=n_strings, cluster="string", commit=commit(),
            note=f"no interval from {n_strings} strings" if interval.low is None else "",
        )  # fmt: skip


def judge(gate: Gate, interval: Interval) -> tuple[bool, str]:
    """Return whether a gate is passed, and its condition in words."""
    if gate.within is not None:
        held = equivalence(interval, gate.within, gate.around) == "equivalent"
        asked = f"within {gate.within:g} of {gate.around:g} (90% interval)"
    elif gate.above is not None:
        held = interval.low is not None and interval.low > gate.above
        asked = f"above {gate.above:g}"
    else:
        assert gate.below is not None, "a gate has above, below or within"
        held = interval.high is not None and interval.high < gate.below
        asked = f"below {gate.below:g}"
    if gate.truth is not None:
        held = held and abs(interval.value - gate.truth) <= NEAR * abs(gate.truth)
        asked += f", truth {gate.truth:g}"
    return bool(held), asked


def _estimate(run: HookedRun, measured: Measured, gate: Gate, level: float) -> Interval:
    """Return the number that a gate tests, with its interval."""
    if gate.quantity in measured.tokens:
        table = token_table(run, measured)
        here = table[POSITIONS[gate.positions](table["pos"].to_numpy())]
        return cluster_bootstrap(here[gate.quantity], here["string"], gate.statistic, level=level)
    wanted = (gate.quantity, gate.group, gate.x)
    for estimate in measured.estimates:
        if (estimate.quantity, estimate.group, estimate.x) == wanted:
            return bootstrap_sums(estimate.sums, estimate.value, estimate.n, level=level)
    return Interval(float("nan"), None, None, 0, 0)


# --- false positives ------------------------------------------------------------------------------


def false_positives(name: str, n_draws: int = 200, study: str = "") -> Iterator[FalsePositives]:
    """Count how often a probe's test finds a difference that does not exist.

    Untrained models: two groups of eight models that differ only in their seeds are compared as two
    variants would be, by the t interval of their paired differences. This measures the error of
    comparisons between variants. A probe's own offset cancels in it; the negative controls test the offset.
    Shuffled labels: the field that the probe names in `shuffle` is permuted over tokens, and a draw counts
    as positive if the interval of the tested quantity excludes 0. If the probe names no field, documents
    are assigned at random to two groups, and the interval is that of the difference between the groups.

    The models are drawn from a pool of 320, so draws share some models; the binomial interval ignores this.
    A rate passes if the nominal 5% lies inside its interval.

    Raises:
        UserError: if there is no such probe.
    """
    probe: Probe = plugins.pick("soluscope.probes", name)
    tallies = {
        "untrained models": _untrained(probe, n_draws),
        "shuffled labels": _shuffled(probe, n_draws),
    }
    for source, outcomes in tallies.items():
        base = FalsePositives(
            study=study, probe=name, tested=probe.tested, source=source, passed=None, value=None,
            unit="share", cluster="draw", commit=commit(), note=f"{probe.tested} is not defined on these models",
        )  # fmt: skip
        if len(outcomes):
            test = binomtest(int(outcomes.sum()), len(outcomes))
            low, high = test.proportion_ci()
            base = replace(
                base, passed=bool(low <= NOMINAL <= high), value=float(outcomes.mean()),
                low=float(low), high=float(high), n=len(outcomes), n_clusters=len(outcomes),
                note=f"nominal {NOMINAL:g}",
            )  # fmt: skip
        yield base


def _untrained(probe: Probe, n_draws: int) -> NDArray[np.bool_]:
    """Return per draw whether a difference was found between models that differ only in their seeds."""
    estimates = (_tested(probe, untrained_run(seed, probe.streams[0])) for seed in range(N_MODELS))
    values = np.array([float(each.value(each.sums.sum(0)[None])[0]) for each in estimates if each])
    values = values[~np.isnan(values)]
    if len(values) < 2 * N_PAIRS:
        return np.array([], dtype=bool)
    generator = np.random.default_rng(0)
    groups = [generator.choice(values, size=(2, N_PAIRS), replace=False) for _ in range(n_draws)]
    return np.array([_leaves_out_zero(paired_seeds(left - right)) for left, right in groups])


def _shuffled(probe: Probe, n_draws: int) -> NDArray[np.bool_]:
    """Return per draw whether an effect was found in labels that were assigned at random."""
    generator = np.random.default_rng(1)
    outcomes = []
    for draw in range(n_draws):
        run = untrained_run(draw, probe.streams[0])
        if probe.shuffle:
            run = _permuted(run, probe.shuffle, generator)
        estimate = _tested(probe, run)
        if estimate is None:
            continue
        if not probe.shuffle:
            estimate = _between_halves(estimate, generator)
        interval = bootstrap_sums(estimate.sums, estimate.value, estimate.n, n_draws=1000)
        if interval.low is not None:
            outcomes.append(_leaves_out_zero(interval))
    return np.array(outcomes, dtype=bool)


def _tested(probe: Probe, run: HookedRun) -> Estimate | None:
    """Return the tested quantity as a function of sums over strings; for a per-token quantity, its mean."""
    measured = probe.measure(run)
    if probe.tested in measured.tokens:
        table = token_table(run, measured)
        content = table[table["pos"] > 0]
        values = content[probe.tested]
        return ratio(probe.tested, values, values * 0 + 1, content["string"])
    wanted = (each for each in measured.estimates if each.quantity == probe.tested)
    return next(wanted, None)


def _between_halves(estimate: Estimate, generator: np.random.Generator) -> Estimate:
    """Return the difference of an estimate between two random halves of the strings."""
    n_strings, n_parts = estimate.sums.shape
    inside = (generator.permutation(n_strings) < n_strings // 2)[:, None]
    sums = np.concatenate([estimate.sums * inside, estimate.sums * ~inside], axis=1)

    def difference(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return estimate.value(sums[:, :n_parts]) - estimate.value(sums[:, n_parts:])

    return replace(estimate, sums=sums, value=difference)


def _permuted(run: HookedRun, field: str, generator: np.random.Generator) -> HookedRun:
    """Return `run` with one field permuted over the tokens that are not BOS."""
    values = getattr(run, field).clone()
    content = (~run.is_bos).nonzero().squeeze(-1)
    values[content] = values[content[torch.from_numpy(generator.permutation(len(content)))]]
    return replace(run, **{field: values})


def _leaves_out_zero(interval: Interval) -> bool:
    low, high = interval.low, interval.high
    return low is not None and high is not None and not low <= 0 <= high


def untrained_run(seed: int, stream: str) -> HookedRun:
    """Return a run of an untrained SoLU model with an active LayerNorm, on bytes of Python's library."""
    config = HookedTransformerConfig(
        n_layers=1, d_model=32, n_ctx=WIDTH, d_head=16, n_heads=2, d_mlp=64, d_vocab=BOS + 1,
        act_fn="solu_ln", normalization_type="LN", init_weights=False, device="cpu",
    )  # fmt: skip
    model = HookedTransformer(config, move_to_device=False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith((".b_Q", ".b_K", ".b_V")):
            parameter.data.normal_(0, 0.3, generator=generator)
        else:
            parameter.data.fill_(1.0 if name.endswith(".w") else 0.0)
    model.blocks[0].mlp.ln.eps = 1e-12
    return observe(model, _byte_pairs() if stream.startswith(streams.PAIRS) else _byte_texts())


@lru_cache(maxsize=1)
def _byte_texts() -> streams.Stream:
    """Return stretches of 31 bytes, each from another file."""
    texts = (text.encode() for text in streams.standard_library("code", 0.0, 1.0))
    long_enough = (text for text in texts if len(text) > 1000 + 40 * N_TEXTS + WIDTH)
    rows = [
        (i, list(text[1000 + 40 * i : 999 + 40 * i + WIDTH]))
        for i, text in enumerate(islice(long_enough, N_TEXTS))
    ]
    return _of_bytes(rows, "natural")


@lru_cache(maxsize=1)
def _byte_pairs() -> streams.Stream:
    """Return five corrupted rows per clean row, all of random letters, so that nothing distinguishes them."""
    generator = np.random.default_rng(2)
    rows = [(i, generator.integers(97, 123, 8).tolist()) for i in range(N_TEXTS) for _ in range(6)]
    return _of_bytes(rows, f"{streams.PAIRS}letters")


def _of_bytes(rows: list[tuple[int, list[int]]], name: str) -> streams.Stream:
    vocab = (*(bytes([b]).decode("latin1") for b in range(BOS)), "<|BOS|>")
    return replace(streams.from_rows(rows, BOS, WIDTH, name), vocab=vocab)
