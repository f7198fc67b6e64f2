"""Each run's own initialisation: the model before the first step, which probes measure beside the trained one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from soluscope import plugins, results
from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.data.cache import of_study, open_cache, study_facts
from soluscope.evaluation.suite import evaluate
from soluscope.hooked.activations import observe
from soluscope.hooked.convert import load_untrained
from soluscope.report.figures import QUARTILE
from soluscope.report.findings import number_key
from soluscope.results import Measurement, Untrained, of_kind
from soluscope.runs.folder import Run
from soluscope.training.module import TrainingModule

VARIANTS = plugins.names("soluscope.variants")
SETTINGS = {"n_tokens": 1000, "n_loss_tokens": 1000, "n_draws": 100, "jobs": 1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_untrained_twin_is_the_model_before_the_first_step(
    tiny_study: Path, variant: str
) -> None:
    run = Run(tiny_study / f"{variant}-s1")
    cache = open_cache(
        Path(study_facts(tiny_study)["path"])
    )  # with the training split, for the gain
    before = TrainingModule(run.config, cache).model.state_dict()
    twin = load_untrained(run)
    assert twin is not None
    found = twin.state_dict()
    for name, tensor in run.load_model().named_parameters():
        assert torch.equal(found[name], before[name]), name
        assert name.endswith((".w", ".b")) or not torch.equal(tensor, before[name]), name
    for name, gain in before.items():
        if name.endswith("gain"):
            assert torch.allclose(found[name], gain, rtol=1e-4), name


def test_numbers_before_training_are_those_of_the_twin_on_the_same_text(
    tiny_study: Path, tmp_path: Path
) -> None:
    study = tmp_path / "runs" / "tiny"
    study.mkdir(parents=True)
    for path in tiny_study.iterdir():
        if path.name == "solu_ln-s0" or not path.is_dir() or path.name == "tokens":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, study / path.name)
    asked = ["engagement", "scale_causes", "scale_freeze", "neuron_statistics"]
    config = EvalConfig(probes=asked, **SETTINGS)
    records = results.read(evaluate(study, config, lambda line: None))
    twins = of_kind(records, Untrained)
    assert {each.probe for each in twins} == {*asked}

    run = Run(study / "solu_ln-s0")
    twin, cache = load_untrained(run), of_study(study)
    assert twin is not None
    assert cache is not None
    tokenizer = Tokenizer.from_file(str(cache.tokenizer_path))
    text = streams.make("natural", cache, tokenizer, run.facts.ctx, 1000, config.seed)
    there = observe(twin, text)
    gain = there.gain[~there.is_bos].double().log()
    spread = next(
        each
        for each in twins
        if (each.quantity, each.statistic, each.positions) == ("log gain", "sd", "not BOS")
    )
    assert spread.value == pytest.approx(float(gain.std(correction=0)), rel=1e-5)

    measured = {
        number_key(each): each for each in of_kind(records, Measurement)
        if each.probe in asked and each.x is None and each.value is not None
    }  # fmt: skip
    paired = {number_key(each): each for each in twins}
    assert len(paired) == len(twins)
    alone = {key for key in measured.keys() - paired.keys() if not QUARTILE.fullmatch(str(key[-1]))}
    assert not alone  # where many values are equal, a split has other quartiles before training
    assert {each.stream for each in twins} == {each.stream for each in measured.values()}
    assert {each.positions for each in twins} >= {"BOS", "not BOS", "2-15"}
    assert any(QUARTILE.fullmatch(each.group) for each in twins)
    for key, each in paired.items():
        now = measured[key].value
        if each.value is None or each.difference is None:
            continue
        size = max(abs(now), abs(each.value))
        assert each.difference == pytest.approx(now - each.value, abs=1e-6 * size + 1e-12)
        assert each.low is None or each.low <= each.difference + 1e-9 * size
    assert not np.isnan([each.value for each in twins if each.value is not None]).any()
