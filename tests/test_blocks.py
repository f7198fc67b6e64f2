"""Probes that read a text in blocks: the same numbers, in memory that grows by the columns alone."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, train_silently
from test_convert import hooked_for
from test_every_probe import stream_of
from test_every_variant import ONE_SCALE, some_tokens
from test_on_device import numbers

from soluscope import plugins
from soluscope.config import EvalConfig
from soluscope.evaluation import one_run
from soluscope.evaluation.calibration import control_run
from soluscope.evaluation.suite import evaluate
from soluscope.hooked import activations
from soluscope.hooked.activations import HookedRun, observe, observe_blocks
from soluscope.probes._per_token import PerToken
from soluscope.results import Measurement, of_kind, read

PER_TOKEN = [
    name
    for name in plugins.names("soluscope.probes")
    if isinstance(plugins.pick("soluscope.probes", name).measure, PerToken)
]
PLANTED = ("smear_shared", "disjoint", "pinned")


def run_of(model: str) -> HookedRun:
    if model in PLANTED:
        return control_run(model, "natural")
    return observe(hooked_for(model, torch.float32)[1], stream_of(some_tokens(9)))


def rows_of(run: HookedRun) -> Iterator[HookedRun]:
    """Yield each row of a run as a block."""
    for start, end in pairwise([*run.is_bos.nonzero().squeeze(-1).tolist(), len(run.pos)]):
        yield run.subset(torch.arange(start, end))


def test_the_probes_of_the_gain_are_read_in_blocks() -> None:
    assert {"engagement", "gain_variation"} <= {*PER_TOKEN}


@pytest.mark.parametrize("model", [*PLANTED, *ONE_SCALE])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_blocks_of_one_row_give_exactly_the_numbers_of_the_whole_run(name: str, model: str) -> None:
    run, measure = run_of(model), plugins.pick("soluscope.probes", name).measure
    wanted, found = numbers(run, measure(run)), numbers(*measure.of_blocks(rows_of(run)))
    assert found.keys() == wanted.keys()
    for column, values in wanted.items():
        assert np.array_equal(found[column], values, equal_nan=values.dtype.kind == "f"), column


def test_the_blocks_of_a_stream_are_its_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "ROWS_AT_ONCE", 4)
    model, stream = hooked_for("solu_ln")[1], stream_of(some_tokens(9))
    run, blocks = observe(model, stream), list(observe_blocks(model, stream))
    assert [len(block.pos) for block in blocks] == [4 * 32, 4 * 32, 32]
    assert torch.equal(torch.cat([block.post for block in blocks]), run.post)
    assert torch.equal(
        torch.cat([block.loss for block in blocks]).nan_to_num(), run.loss.nan_to_num()
    )


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_block_is_dropped_before_the_block_after_the_next_is_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "ROWS_AT_ONCE", 1)
    model, stream = hooked_for("solu_ln")[1], stream_of(some_tokens(9))
    alive: list[weakref.ref[HookedRun]] = []

    def watched() -> Iterator[HookedRun]:
        blocks = observe_blocks(model, stream)
        while (block := next(blocks, None)) is not None:
            alive.append(weakref.ref(block))
            assert sum(each() is not None for each in alive) <= 2
            yield block

    plugins.pick("soluscope.probes", name).measure.of_blocks(watched())
    assert len(alive) == 9


def test_an_evaluation_keeps_no_run_for_the_probes_that_read_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = train_silently(tiny_config(tmp_path, "variant=solu_ln", "train.steps=6"))
    config = EvalConfig(probes=PER_TOKEN, n_tokens=1000, n_loss_tokens=1000, n_draws=100)
    monkeypatch.setattr(one_run, "observe", lambda *words: pytest.fail("the whole run is observed"))
    rows = of_kind(read(evaluate(run_dir, config, lambda text: None)), Measurement)
    assert {*PER_TOKEN} <= {row.probe for row in rows if row.value is not None}
