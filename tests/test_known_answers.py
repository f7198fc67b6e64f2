"""The comparison's answers on students whose answer is known: trained near the planted weights, by the usual code.

A student that is free to learn its embedding needs no MLP on these tasks, since the next token depends on the
current one alone (protocol.md, section 6). So the students begin near the planted weights, and their embeddings,
norms and biases are held: W_in and W_out are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from _students import TINY, Task

from soluscope.config import EvalConfig
from soluscope.results import Comparison, Located, Record, Term, Verdict, Where, of_kind

pytestmark = pytest.mark.long

NOISE = 0.05
"""Distance of the students' first weights from the planted ones; see `Task.plant`."""


def trained(
    control: str, folder: Path, n_seeds: int, plain_scale: float, gains: Sequence[float] = ()
) -> list[Record]:
    """Train plain SoLU, static gains and LayerNorm near the planted weights, and return the comparison.

    Args:
        control: the planted model.
        folder: new folder for the text and the runs.
        n_seeds: number of seeds.
        plain_scale: the scale alpha of plain SoLU's MLP output.
        gains: static gains beside the one that is matched to LayerNorm at the start; the best is chosen on select.
    """
    task = Task(control, folder, 1500)
    arms = (
        ("variant=solu", f"model.mlp_out_scale={plain_scale}"),
        ("variant=solu_frozen_ln", "mid.gain=init", f"mid.kappa={task.kappa}"),
        ("variant=solu_ln", f"mid.kappa={task.kappa}"),
        *(("variant=solu_frozen_ln", f"mid.gain={gain}", f"tag=gain{gain}") for gain in gains),
    )
    held = (f"train.lr_rest={TINY}", "train.weight_decay=0", "train.lr=1e-3")
    for arm in arms:
        near = task.plant(range(n_seeds), NOISE, *arm)
        for seed in range(n_seeds):
            task.train(
                "study=students", *arm, *held, f"seed={seed}", f"train.init_from={near}",
                "train.steps=40", "train.warmup_steps=1",
            )  # fmt: skip
    return task.compared("students", EvalConfig(probes=[], n_loss_tokens=5_000, jobs=1))


def only(records: list[Record], term: Term) -> Comparison:
    (row,) = [
        each
        for each in of_kind(records, Comparison)
        if (each.term, each.cluster, each.lr, each.design) == (term, "seed", None, "")
        and each.arm == "solu_ln"
    ]
    return row


def test_a_planted_need_for_a_scale_of_each_token_is_found(tmp_path: Path) -> None:
    """C1: one gain serves either code. Plain SoLU has the best scale for one of them, as the static arm has."""
    records = trained("smear_shared", tmp_path / "c1", n_seeds=5, plain_scale=0.5, gains=[0.5])
    assert (only(records, Term.BENEFIT).low or 0.0) > 0.3
    assert (only(records, Term.SHARE).low or 0.0) > 0.8


def test_a_planted_output_scale_is_not_taken_for_a_scale_of_each_token(tmp_path: Path) -> None:
    """C3: LayerNorm is one gain of .032. Plain SoLU has twice that scale, so LN helps, and one gain as much."""
    records = trained("pinned", tmp_path / "c3", n_seeds=5, plain_scale=0.064)
    assert (only(records, Term.BENEFIT).low or 0.0) > 0.05
    share = only(records, Term.SHARE)
    assert share.high is not None
    assert share.high < 0.1
    assert only(records, Term.STATIC).verdict is Verdict.EQUIVALENT


def test_a_need_at_single_neurons_is_not_taken_for_smearing(tmp_path: Path) -> None:
    """C15: a scale is needed at tokens of high gain, whose codes have one neuron: H-dyn and not H-smear."""
    records = trained("magnitude", tmp_path / "c15", n_seeds=7, plain_scale=0.5)
    assert (only(records, Term.SHARE).low or 0.0) > 0.8
    (located,) = (each for each in of_kind(records, Located) if not each.design)
    assert located.where is Where.HIGH_GAIN
