"""The tokens at which a static arm loses more, on tables of losses whose truth is planted."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from _records import number as measured

from soluscope.comparison import stats
from soluscope.comparison import where as module
from soluscope.comparison.where import (
    ALL,
    BOS,
    BY_BOTH,
    BY_GAIN,
    BY_K,
    OF_CODE,
    OF_GAIN,
    where,
)
from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.errors import UserError
from soluscope.evaluation import suite
from soluscope.evaluation.loss import document_losses
from soluscope.evaluation.one_run import tokens_of
from soluscope.evaluation.token_losses import token_losses
from soluscope.hooked.convert import load_run
from soluscope.report import evidence, sections
from soluscope.report.where import sentences
from soluscope.results import (
    HIGH_GAIN,
    OUTPUT_SIZE,
    SCALED_SIZE,
    Comparison,
    Located,
    Term,
    Verdict,
    Where,
    of_kind,
)
from soluscope.runs.folder import Run

pytestmark = pytest.mark.arithmetic

STATIC = Comparison(
    study="study", term=Term.STATIC, arm="solu_ln", variant="solu_ln", against="solu_frozen_ln",
    cluster="seed", value=0.0, unit="nats / token", choice="the only candidate", n_candidates=1,
    verdict=Verdict.INCONCLUSIVE, p=0.01, p_adj=0.02,
)  # fmt: skip
"""The comparison of the mean losses, from which the tokens' comparison takes its arms."""
Effect = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def tables(
    effect: Effect | None = None,
    n_seeds: int = 8,
    seed: int = 0,
    n_documents: int = 60,
    width: int = 64,
    noise: float = 0.02,
    of_luck: float = 0.0,
    codes: Callable[[np.ndarray], np.ndarray] | None = None,
) -> dict[str, dict[int, pd.DataFrame]]:
    """Return the losses by token of a static arm and of one with a per-token norm, in rows of `width` tokens.

    Tokens of high gain are harder, and their codes more diffuse, as in untrained models.

    Args:
        effect: function from log gain, log K_eff and difficulty to the loss that the static arm adds.
        n_seeds: number of seeds.
        seed: seed of the random numbers.
        n_documents: number of documents, one row each.
        width: tokens per row, BOS included.
        noise: standard deviation, over runs, of a token's loss.
        of_luck: how much of the norm's own luck at a token its gain follows.
        codes: function from log gain to log K_eff; by default correlated with it.
    """
    random = np.random.default_rng(seed)
    n = n_documents * width
    document, pos = np.repeat(np.arange(n_documents), width), np.tile(np.arange(width), n_documents)
    of_document = np.repeat(random.normal(size=n_documents), width)
    gain = 0.4 * (0.3 * of_document + random.normal(size=n))
    log_k = 3 + 0.6 * gain / 0.4 + 0.6 * random.normal(size=n) if codes is None else codes(gain)
    hard = 3 + 0.5 * of_document + 0.5 * gain / 0.4 + random.normal(size=n)
    added = np.zeros(n) if effect is None else effect(gain, log_k, hard)
    found: dict[str, dict[int, pd.DataFrame]] = {"solu_ln": {}, "solu_frozen_ln": {}}
    for number in range(n_seeds):
        luck = random.normal(size=(2, n))
        own_gain = gain + 0.02 * random.normal(size=n) + of_luck * luck[0]
        about = {
            "document": document, "pos": pos, "token": pos, "log_gain": own_gain.astype(np.float32),
            "k_eff": np.exp(log_k).astype(np.float32),
        }  # fmt: skip
        losses = {
            "solu_ln": hard + noise * luck[0],
            "solu_frozen_ln": hard + added + noise * luck[1],
        }
        for arm, loss in losses.items():
            found[arm][number] = pd.DataFrame(about | {"loss": loss.astype(np.float32)})
    return found


def located(planted: dict[str, dict[int, pd.DataFrame]]) -> tuple[Where, dict[str, Comparison]]:
    """Return the verdict, and the comparisons for new seeds by their tokens."""
    records = where([STATIC], planted.__getitem__)
    (verdict,) = of_kind(records, Located)
    rows = [row for row in of_kind(records, Comparison) if row.cluster == "seed"]
    return verdict.where, {row.group: row for row in rows}


def at_high_gain(gain: np.ndarray, log_k: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """Plant H-dyn: the static arm loses .1 nats more at the quarter of highest gain."""
    return 0.1 * (gain > np.quantile(gain, 0.75))


def at_diffuse_codes(gain: np.ndarray, log_k: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """Plant H-smear: the same, only where K_eff is above the median of tokens of this gain."""
    return at_high_gain(gain, log_k, hard) * (log_k > 3 + 0.6 * gain / 0.4)


def at_hard_tokens(gain: np.ndarray, log_k: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """Plant an arm that is worse in proportion to the loss, whatever the gain."""
    return 0.03 * hard


def test_smearing_is_located_at_diffuse_codes_of_high_gain():
    verdict, rows = located(tables(at_diffuse_codes))
    assert verdict is Where.DIFFUSE
    assert rows[OF_CODE].value == pytest.approx(0.1, abs=0.02)
    assert rows[BY_BOTH[-1]].value > 0.08 > 0.02 > rows[BY_BOTH[-2]].value
    assert rows[BY_GAIN[0]].verdict is Verdict.EQUIVALENT


def test_a_scale_that_is_needed_at_high_gain_is_located_there_whatever_the_code():
    verdict, rows = located(tables(at_high_gain))
    assert verdict is Where.HIGH_GAIN
    assert rows[OF_GAIN].value == pytest.approx(0.1, abs=0.02)
    assert rows[OF_CODE].verdict is Verdict.EQUIVALENT
    assert (
        rows[BY_K[3]].value > rows[BY_K[0]].value
    )  # K_eff follows the gain, which the contrast holds


def test_nothing_is_located_where_the_arms_do_not_differ():
    verdict, rows = located(tables())
    assert verdict is Where.NOT_HIGH_GAIN
    assert {rows[name].verdict for name in (ALL, OF_GAIN, OF_CODE)} == {Verdict.EQUIVALENT}


def test_an_arm_that_is_worse_at_hard_tokens_is_not_located_at_high_gain():
    verdict, rows = located(tables(at_hard_tokens))
    assert rows[BY_GAIN[3]].low > rows[BY_GAIN[0]].high  # the gain is high where tokens are hard
    assert verdict is Where.NOT_HIGH_GAIN
    assert rows[OF_GAIN].verdict is Verdict.EQUIVALENT


def test_the_luck_of_a_run_is_not_taken_for_an_effect_of_its_gain():
    planted = tables(of_luck=0.4, noise=0.1)
    verdict, rows = located(planted)
    assert verdict in (Where.NOT_HIGH_GAIN, Where.OPEN)
    own = [
        float((static["loss"] - ln["loss"])[ln["log_gain"] > ln["log_gain"].quantile(0.75)].mean())
        for ln, static in zip(planted["solu_ln"].values(), planted["solu_frozen_ln"].values(), strict=True)
    ]  # fmt: skip
    assert np.mean(own) < -0.05  # sorted by each run's own gain, the difference is far from 0
    assert abs(rows[BY_GAIN[3]].value) < 0.01
    assert abs(rows[OF_GAIN].value) < 0.01


@pytest.mark.parametrize(
    ("log_k", "wanted"), [(0.0, Where.HIGH_GAIN), (math.log(8), Where.ALL_DIFFUSE)]
)
def test_equal_codes_are_judged_by_whether_they_are_diffuse(log_k: float, wanted: Where):
    codes = lambda gain: np.full(len(gain), log_k)  # noqa: E731
    verdict, rows = located(tables(at_high_gain, codes=codes))
    assert verdict is wanted
    assert OF_CODE not in rows


def test_each_fixed_design_has_its_own_verdict_and_its_own_correction():
    """The same arm has both designs' rows; a design with one arm is not corrected for those of the other."""
    fixed = replace(STATIC, design="alpha 1", against="static of alpha 1")
    two = replace(fixed, arm="solu_ln of alpha 1")
    main, other = tables(at_high_gain), tables()
    of_arm = {
        "solu_ln": main["solu_ln"], "solu_frozen_ln": main["solu_frozen_ln"],
        "static of alpha 1": other["solu_frozen_ln"], "solu_ln of alpha 1": other["solu_ln"],
    }  # fmt: skip
    records = where(
        [STATIC, two, replace(two, arm="again")], (of_arm | {"again": other["solu_ln"]}).__getitem__
    )
    verdicts = {(each.design, each.arm): each.where for each in of_kind(records, Located)}
    assert verdicts[("", "solu_ln")] is Where.HIGH_GAIN
    assert verdicts[("alpha 1", "solu_ln of alpha 1")] is Where.NOT_HIGH_GAIN
    rows = [
        each
        for each in of_kind(records, Comparison)
        if each.group == OF_GAIN and each.p is not None
    ]
    n_tests = {each.design: each.note.split("over ")[1] for each in rows}
    assert n_tests == {"": "2 contrasts", "alpha 1": "4 contrasts"}
    assert {each.design for each in of_kind(records, Comparison) if each.term is Term.WHERE} == {
        "",
        "alpha 1",
    }


def test_few_seeds_do_not_settle_where_the_arms_differ():
    for n_seeds in (1, 2, 4):
        verdict, rows = located(tables(at_high_gain, n_seeds))
        assert verdict is Where.OPEN
        assert rows[OF_GAIN].value == pytest.approx(0.1, abs=0.02)
    assert rows[OF_GAIN].p == 0.125


def test_the_contrasts_of_all_arms_are_corrected_together():
    planted = tables(at_high_gain)
    planted["other"] = tables()["solu_ln"]
    arms = [STATIC, replace(STATIC, arm="other")]
    rows = [
        row
        for row in of_kind(where(arms, planted.__getitem__), Comparison)
        if row.term is Term.CONTRAST and row.cluster == "seed"
    ]
    assert len(rows) == 4
    wanted = stats.holm({f"{row.arm}{row.group}": row.p for row in rows})
    assert {f"{row.arm}{row.group}": row.p_adj for row in rows} == wanted
    assert all("over 4 contrasts" in row.note for row in rows)


def test_no_effect_is_found_in_more_studies_than_the_level_allows():
    """Of 40 studies without an effect, 5% may find one: more than 6 would have a probability of .4%."""
    verdicts = [
        located(tables(seed=seed, n_documents=24, width=32, of_luck=0.2))[0] for seed in range(40)
    ]
    assert sum(each not in (Where.NOT_HIGH_GAIN, Where.OPEN) for each in verdicts) <= 6


def test_the_numbers_by_hand():
    """Four tokens after BOS in two documents; at equal gain codes and losses one quartile holds one token."""
    about = {"document": [0, 0, 0, 1, 1, 1], "pos": [0, 1, 2, 0, 1, 2], "token": [9, 1, 2, 9, 3, 4]}
    ln = pd.DataFrame(about | {"log_gain": [9, 1, 2, 9, 3, 4], "k_eff": [1] * 6, "loss": [1.0] * 6})
    static = ln.assign(loss=[2.0, 1.1, 1.2, 4.0, 1.3, 1.8])
    _, rows = located({"solu_ln": {0: ln}, "solu_frozen_ln": {0: static}})
    values = {name: row.value for name, row in rows.items()}
    assert values[ALL] == pytest.approx((0.1 + 0.2 + 0.3 + 0.8) / 4)
    assert values[BOS] == pytest.approx(2.0)
    assert [values[name] for name in BY_GAIN] == pytest.approx([0.1, 0.2, 0.3, 0.8])


def test_contrasts_compare_tokens_of_one_stratum():
    values = np.array([1.0, 2.0, 5.0, 10.0, 30.0, 7.0])
    one = np.array([True, False, False, True, False, True])
    stratum = np.array([0, 0, 0, 1, 1, 2])  # the last has no other token
    tokens = module._Tokens(np.array([0, 0, 1, 1, 2, 2]), np.ones(6, bool), (), None)
    found = module._matched(values, tokens, one, ~one, stratum)
    # 1 * 2 / 3 times (1 - 3.5), and 1 * 1 / 2 times (10 - 30)
    assert found.value == pytest.approx((2 / 3 * -2.5 + 1 / 2 * -20) / (2 / 3 + 1 / 2))
    assert found.n.sum() == pytest.approx(5)
    assert found.influence.sum() == pytest.approx(0, abs=1e-12)


def test_the_influence_of_a_document_is_what_leaving_it_out_changes():
    random = np.random.default_rng(1)
    n, n_documents = 4000, 50
    values, stratum = random.normal(size=n), random.integers(0, 4, n)
    one, document = random.random(n) < 0.4, random.integers(0, n_documents, n)
    values += 0.5 * random.normal(size=n_documents)[document]
    tokens = module._Tokens(document, np.ones(n, bool), (), None)
    found = module._matched(values, tokens, one, ~one, stratum)
    left_out = []
    for each in range(n_documents):
        kept = document != each
        rest = module._Tokens(document[kept], np.ones(kept.sum(), bool), (), None)
        without = module._matched(values[kept], rest, one[kept], ~one[kept], stratum[kept])
        left_out.append(found.value - without.value)
    # Leaving a document out also moves the strata's weights, which the influence holds.
    assert np.corrcoef(left_out, found.influence)[0, 1] > 0.95
    assert np.std(left_out) == pytest.approx(np.std(found.influence), rel=0.15)


def test_a_group_in_few_documents_has_no_interval():
    def in_few(gain: np.ndarray) -> np.ndarray:
        return np.zeros(len(gain))

    planted = tables(codes=in_few, n_documents=60)
    for of_arm in planted.values():
        for table in of_arm.values():
            table["log_gain"] = table["log_gain"].where(table["document"] >= 15, 9.0)
    _, rows = located(planted)
    assert rows[BY_GAIN[3]].low is None
    assert rows[ALL].low is not None


def test_other_tokens_are_refused():
    planted = tables(n_seeds=2)
    planted["solu_ln"][1] = planted["solu_ln"][1].assign(token=0)
    with pytest.raises(UserError, match="not measured on the same tokens: probe them again"):
        where([STATIC], planted.__getitem__)


def test_arms_without_losses_by_token_are_left_out():
    assert where([STATIC], lambda arm: {}) == []
    assert where([replace(STATIC, lr=0.1)], tables().get) == []


# --- from runs to the report ----------------------------------------------------------------------

SMALL = EvalConfig(probes=[], n_tokens=200, n_loss_tokens=1000, n_draws=100, jobs=1)


@pytest.fixture(scope="module")
def evaluated(tiny_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a study of three arms at two seeds, with its losses by token and its results."""
    study = tmp_path_factory.mktemp("by_token") / "tiny"
    arms = ("solu", "solu_frozen_ln", "solu_ln")
    runs = [f"{arm}-s{seed}" for arm in arms for seed in (0, 1)]
    others = {path.name for path in tiny_study.iterdir() if (path / "config.yaml").is_file()}
    shutil.copytree(tiny_study, study, ignore=lambda *_: others - {*runs})
    suite._evaluate_runs(suite.finished_runs(study), SMALL, lambda text: None)
    suite.write_results(study)
    return study


@pytest.mark.parametrize("name", ["solu-s0", "solu_ln-s1"])
def test_the_losses_by_token_are_the_reported_ones_at_their_gains_and_codes(
    evaluated: Path, name: str
):
    run = Run(evaluated / name)
    model, cache = load_run(run), tokens_of(run)
    table = token_losses(model, cache, SMALL)
    wanted = document_losses(model, cache, "report", SMALL).set_index("document").sort_index()
    found = table.groupby("document")["loss"].agg(["sum", "count"])
    assert found["count"].tolist() == wanted["n_tokens"].tolist()
    assert found["sum"].tolist() == pytest.approx(wanted["loss_sum"].tolist(), rel=1e-5)

    stream = streams.from_cache(cache, "report", model.facts.ctx, SMALL.n_loss_tokens, "report")
    _, hooks = model.run_with_cache(stream.tokens)
    has_target = torch.cat([stream.tokens[:, 1:] != stream.bos, stream.tokens[:, :1] < 0], dim=1)
    mid = hooks["blocks.0.mlp.hook_mid" if "ln" in name else "blocks.0.mlp.hook_post"].double()
    norm = hooks["blocks.0.mlp.ln.hook_scale"] if "ln" in name else torch.ones_like(mid[..., :1])
    k_eff = mid.square().sum(-1) / mid.square().max(-1).values
    assert table["k_eff"].to_numpy() == pytest.approx(k_eff[has_target].numpy(), rel=1e-5)
    log_gain = -norm[..., 0].double().log()[has_target]
    assert table["log_gain"].to_numpy() == pytest.approx(log_gain.numpy(), abs=1e-5)
    assert (table["token"].to_numpy() == stream.tokens[has_target].numpy()).all()


def test_a_study_says_at_which_tokens_its_arms_differ(evaluated: Path):
    records = suite.results.read(evaluated / "results.jsonl")
    (verdict,) = of_kind(records, Located)
    rows = {
        row.group: row
        for row in of_kind(records, Comparison)
        if row.term is Term.WHERE and row.cluster == "seed"
    }
    mean = next(row for row in of_kind(records, Comparison) if row.term is Term.STATIC)
    n = {name: len(pd.read_parquet(evaluated / f"{name}-s0/probes/tokens.parquet").query(where))
         for name, where in (("solu", "pos > 0"), ("solu_ln", "pos == 0"))}  # fmt: skip
    both = (rows[ALL].value * n["solu"] + rows[BOS].value * n["solu_ln"]) / sum(n.values())
    assert both == pytest.approx(mean.value, abs=1e-6)
    assert (verdict.arm, verdict.against, verdict.where) == (mean.arm, mean.against, Where.OPEN)
    (section,) = (each for each in sections.build(records) if each.name == "where")
    assert len(section.plots) == 1
    (text,) = sentences(records)
    assert "It is not settled at which tokens the arms differ." in text


def test_losses_by_token_that_were_changed_are_refused(evaluated: Path, tmp_path: Path):
    study = Path(shutil.copytree(evaluated, tmp_path / "tiny"))
    path = study / "solu_ln-s0" / "probes" / "tokens.parquet"
    table = pd.read_parquet(path)
    table.assign(loss=table["loss"] * 2).to_parquet(path, index=False)
    with pytest.raises(UserError, match=r"tokens\.parquet is not as it was written"):
        suite.write_results(study)


@pytest.mark.parametrize("place", Where)
def test_the_evidence_follows_from_the_verdict(place: Where):
    records = where([STATIC], tables(n_seeds=2).__getitem__)
    ln = [replace(each, where=place) for each in of_kind(records, Located)]
    size = measured(  # of the static arm, below the threshold of 5
        OUTPUT_SIZE, SCALED_SIZE, 1.0, statistic="median", arm=STATIC.against, run="static-s0"
    )
    equal = [
        replace(row, verdict=Verdict.EQUIVALENT) if row.group == HIGH_GAIN else row
        for row in of_kind(records, Comparison)
    ]
    dyn, smear = evidence._where([*equal, *ln, size], "solu_ln").verdicts[3:]
    wanted = {
        Where.DIFFUSE: ("consistent", "consistent"),
        Where.HIGH_GAIN: ("consistent", "inconsistent"),
        Where.NOT_HIGH_GAIN: ("not settled", "inconsistent"),
        Where.OPEN: ("not settled", "not settled"),
    }
    assert (dyn, smear) == wanted.get(place, (dyn, smear))
    assert (smear == "inconsistent") == (place in (Where.HIGH_GAIN, Where.NOT_HIGH_GAIN))


def test_a_high_gain_that_most_tokens_share_does_not_rule_out_smearing():
    """86% of the tokens have a diffuse code and nearly the highest gain, as in the control `ceiling`.

    The static arm loses .05 nats at each of them, and nothing at the others, whose losses are far lower. So tokens
    of equal loss differ in nothing, and the top quarter of the gain loses no more than the rest.
    """
    random = np.random.default_rng(0)
    planted = tables(n_documents=48)
    is_diffuse = random.random(48 * 64) < 0.86
    for number in range(8):
        luck = 0.01 * random.normal()
        log_gain = np.where(is_diffuse, 0.0, -2.8) + 0.03 * random.normal(size=len(is_diffuse))
        added = np.where(is_diffuse, 0.05, luck) + 0.05 * random.normal(size=len(is_diffuse))
        for arm, of_seeds in planted.items():
            table = of_seeds[number]
            table["log_gain"], table["k_eff"] = log_gain, np.where(is_diffuse, 8.0, 1.0)
            table["loss"] += 6.0 * is_diffuse + (added if arm == STATIC.against else 0.0)
    place, rows = located(planted)
    assert place is Where.NOT_HIGH_GAIN
    assert rows[HIGH_GAIN].low > 0.03
    records = where([STATIC], planted.__getitem__)
    size = measured(
        OUTPUT_SIZE, SCALED_SIZE, 1.0, statistic="median", arm=STATIC.against, run="static-s0"
    )
    seen = evidence._where([*records, size], "solu_ln")
    assert seen.verdicts[3:] == ("not settled", "not settled")
    (sentence,) = sentences([*records, size])
    assert "This does not rule out H-smear" in sentence
