"""P5, P6 and P20 against brute force: hooks on a whole model, autograd, and models whose answer is known."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_convert import hooked_for
from test_every_variant import (
    BOS,
    NORMED,
    ONE_SCALE,
    PER_TOKEN,
    SOLU,
    STATIC,
    WITH_GAIN,
    some_tokens,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel

from soluscope import plugins
from soluscope.data import pairs, streams
from soluscope.data.cache import open_cache
from soluscope.errors import UserError
from soluscope.evaluation.summaries import token_table
from soluscope.hooked.activations import observe, planted
from soluscope.probes import lateral_inhibition, scale_patching, scale_swap

pytestmark = pytest.mark.arithmetic
FINAL_NORMS = {"live": "", "frozen": ", final norm frozen"}
SCALE, NORMALIZED = "blocks.0.mlp.ln.hook_scale", "blocks.0.mlp.ln.hook_normalized"
MID, POST = "blocks.0.mlp.hook_mid", "blocks.0.mlp.hook_post"
FINAL_SCALE = "ln_final.hook_scale"


def stream_of(tokens, string=None, name="natural"):
    string = torch.arange(len(tokens)) if string is None else string
    string = string[:, None].expand(tokens.shape)
    return streams.Stream(name, tokens, string, torch.ones_like(tokens, dtype=torch.bool), BOS)


def some_pairs(n_pairs=4, width=9):
    """Return rows of random tokens, six per string."""
    tokens = some_tokens(6 * n_pairs, width)
    return stream_of(tokens, torch.arange(n_pairs).repeat_interleave(6), "pairs: random")


@torch.no_grad()
def hooked_logits(hooked, tokens, values, final_scale=None):
    """Return the logits with the values of the named hooks replaced."""
    values = values | ({} if final_scale is None else {FINAL_SCALE: final_scale})
    hooks = [(name, lambda _, hook: values[hook.name]) for name in values]
    return hooked.run_with_hooks(tokens, fwd_hooks=hooks)


@torch.no_grad()
def hooked_losses(hooked, tokens, values, final_scale=None):
    """Return the losses, [row pos]; nan at a row's end."""
    log_p = hooked_logits(hooked, tokens, values, final_scale).log_softmax(-1)[:, :-1]
    losses = -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(losses, (0, 1), value=torch.nan)


def same(found, wanted, atol=1e-10):
    torch.testing.assert_close(found.flatten(), wanted.flatten(), rtol=0, atol=atol, equal_nan=True)


# --- P5: swaps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
@pytest.mark.parametrize("variant", WITH_GAIN)
def test_a_swap_is_what_the_hooked_model_does_with_the_donors_scale(variant, final_norm):
    _, hooked = hooked_for(variant)
    tokens = some_tokens()
    run = observe(hooked, stream_of(tokens))
    donor = scale_swap.matched(run)
    scale = run.scale[donor].where(donor >= 0, run.scale).view(*tokens.shape, 1)
    _, cache = hooked.run_with_cache(tokens)
    final = cache[FINAL_SCALE] if final_norm == "frozen" else None
    wanted = hooked_losses(hooked, tokens, {SCALE: scale}, final) - hooked_losses(
        hooked, tokens, {}, final
    )
    wanted = wanted.flatten().where(donor >= 0, torch.nan)
    assert (~wanted.isnan()).sum() > 80
    measured = scale_swap.measure(run).tokens
    same(measured[f"swap, signed{FINAL_NORMS[final_norm]}"], wanted)
    same(measured[f"swap, absolute{FINAL_NORMS[final_norm]}"], wanted.abs())


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
@pytest.mark.parametrize("variant", ["solu_ln", "solu"])
def test_a_dose_is_what_the_hooked_model_does_with_a_multiple_of_the_gain(variant, final_norm):
    _, hooked = hooked_for(variant)
    tokens = some_tokens()
    measured = scale_swap.measure(observe(hooked, stream_of(tokens))).tokens
    _, cache = hooked.run_with_cache(tokens)
    final = cache[FINAL_SCALE] if final_norm == "frozen" else None
    own = hooked_losses(hooked, tokens, {}, final)
    for dose in (2**-2, 2**0.75, 4):
        edit = {SCALE: cache[SCALE] / dose} if variant == "solu_ln" else {POST: cache[POST] * dose}
        wanted = hooked_losses(hooked, tokens, edit, final) - own
        wanted[:, 0] = torch.nan
        same(measured[f"l({dose:.3g} g) - l(g){FINAL_NORMS[final_norm]}"], wanted)


def test_donors_are_alike_and_each_token_gives_once():
    run = observe(hooked_for("solu_ln")[1], stream_of(some_tokens(40)))
    donor = scale_swap.matched(run)
    assert torch.equal(donor, scale_swap.matched(run))
    swapped = (donor >= 0).nonzero().squeeze(-1)
    counted = ~run.is_bos & (run.target >= 0)
    assert torch.equal(donor >= 0, counted)
    assert torch.equal(donor[swapped].sort().values, swapped)
    assert (donor[swapped] != swapped).all()

    def group(pos):
        return np.digitize(pos, [2, 16])

    def fifth(loss):
        return np.digitize(loss, np.quantile(run.loss[counted], [0.2, 0.4, 0.6, 0.8]), right=True)

    np.testing.assert_array_equal(group(run.pos[swapped]), group(run.pos[donor[swapped]]))
    np.testing.assert_array_equal(fifth(run.loss[swapped]), fifth(run.loss[donor[swapped]]))
    log_ratio = scale_swap.measure(run).tokens["log(g_u / g_t)"]
    assert log_ratio[swapped].sum().item() == pytest.approx(0, abs=1e-9)


def test_a_token_that_no_other_is_like_is_not_swapped():
    run = planted(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)), eps=1e-5)
    measured = scale_swap.measure(run).tokens  # positions 1 and 2 are in different groups
    assert measured["swap, absolute"].isnan().all()
    assert measured["l(2 g) - l(g)"].isnan().tolist() == [True, False, False, True]


@pytest.mark.parametrize("variant", STATIC)
def test_where_the_gain_is_one_constant_swaps_do_nothing_and_doses_do(variant):
    run = observe(hooked_for(variant)[1], stream_of(some_tokens(24)))
    probe = plugins.pick("soluscope.probes", "scale_swap")
    measured = probe.measure(run)
    table = token_table(run, measured)
    for quantity in ("swap, absolute", "log(g_u / g_t)"):
        assert table[quantity].notna().any()
        assert (table[quantity].dropna() == 0).all()
    assert table["swap up, signed"].isna().all()
    found = {e.quantity for e in measured.estimates}
    assert "dose curve" in found
    assert not any("slope" in name for name in found)
    assert table["l(2 g) - l(g)"].abs().mean() > 1e-3


def test_the_lowest_dose_is_exact_on_a_parabola_the_end_on_a_slope_and_nothing_where_it_is_flat():
    x = np.array(scale_swap.DOUBLINGS)
    curves = np.stack([(x - 0.3) ** 2, (x + 1.1) ** 2 + 5, x, -x, x * 0])
    np.testing.assert_allclose(scale_swap.lowest(curves), [0.3, -1.1, -2, 2, np.nan], atol=1e-12)


def test_the_curvature_is_the_second_derivative_in_log_gain():
    """The reference is autograd through the hooked model. The difference quotient has an error of order step^2."""
    _, hooked = hooked_for("solu_ln")
    tokens = some_tokens()
    _, cache = hooked.run_with_cache(tokens)

    def loss(log_dose):
        hook = (SCALE, lambda scale, hook: cache[SCALE] / log_dose.exp())
        log_p = hooked.run_with_hooks(tokens, fwd_hooks=[hook]).log_softmax(-1)
        return -log_p[0, :-1].gather(-1, tokens[0, 1:, None])[7]

    wanted = torch.autograd.functional.hessian(
        lambda u: loss(u).sum(), torch.tensor(0.0, dtype=torch.float64)
    )
    found = scale_swap.measure(observe(hooked, stream_of(tokens))).tokens
    assert found["curvature at the own gain"][7].item() == pytest.approx(wanted.item(), rel=0.05)


def test_dose_curves_are_of_an_even_share_of_the_tokens(monkeypatch):
    monkeypatch.setattr(scale_swap, "N_DOSED", 10)
    run = observe(hooked_for("solu_ln")[1], stream_of(some_tokens(8)))
    dosed = ~scale_swap.measure(run).tokens["l(2 g) - l(g)"].isnan()
    assert dosed.sum() == 10
    counted = (~run.is_bos & (run.target >= 0)).nonzero().squeeze(-1)
    places = torch.searchsorted(counted, dosed.nonzero().squeeze(-1))
    assert (places[0], places[-1]) == (0, len(counted) - 1)
    assert places.diff().float().std() < 1


def test_slopes_of_both_signs_are_those_of_polyfit():
    run = observe(hooked_for("solu_ln")[1], stream_of(some_tokens(30)))
    probe = plugins.pick("soluscope.probes", "scale_swap")
    measured = probe.measure(run)
    table = token_table(run, measured)
    found = {e.quantity: e.value(e.sums.sum(0)[None])[0] for e in measured.estimates}
    x, y = table["log(g_u / g_t)"], table["swap, signed"]
    rounding = scale_swap.SAME
    for sign, rows in (("", x.notna()), (", up", x >= -rounding), (", down", x <= rounding)):
        wanted = np.polyfit(x[rows], y[rows], 1)[0]
        assert found[f"slope{sign}"] == pytest.approx(wanted, rel=1e-9)
    assert ((y == table["swap up, signed"]) == (x > rounding)).all()
    assert ((y == table["swap down, signed"]) == (x < -rounding)).all()


# --- P6: patching ---------------------------------------------------------------------------------


@torch.no_grad()
def patched_by_hooks(hooked, stream, way, part, final_norm):
    """Return (m of the patched run, m_clean, m_corrupt), each [corruption], from a hooked forward pass."""
    tokens = stream.tokens
    rows = torch.arange(len(tokens)).view(-1, 6)
    clean, corrupt = rows[:, :1].expand(-1, 5).flatten(), rows[:, 1:].flatten()
    right, wrong = tokens[clean, -1], tokens[corrupt, -1]
    logits, cache = hooked.run_with_cache(tokens)
    receiver, donor = (corrupt, clean) if way == "denoise" else (clean, corrupt)

    def m(logits):
        row = torch.arange(len(logits))
        return logits[row, -2, right] - logits[row, -2, wrong]

    values = {}
    if part is not None:
        n, scale = cache[NORMALIZED], cache[SCALE]
        mean = (n * scale - cache[MID]).mean(-1, keepdim=True)  # minus the norm's own mean
        norm = n.norm(dim=-1, keepdim=True)
        name, value = {
            "gain": (SCALE, scale[donor]),
            "direction": (NORMALIZED, norm[receiver] * n[donor] / norm[donor]),
            "content": (POST, cache[POST][donor]),
            "mean": (NORMALIZED, n[receiver] + (mean[donor] - mean[receiver]) / scale[receiver]),
            "centred": (NORMALIZED, n[donor] * scale[donor] / scale[receiver]),
        }[part]
        own = cache[name][receiver].clone()
        own[:, -2] = value[:, -2]
        values = {name: own}
    final = cache[FINAL_SCALE][receiver] if final_norm == "frozen" else None
    patched = hooked_logits(hooked, tokens[receiver], values, final)
    return m(patched), m(logits[clean]), m(logits[corrupt])


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
@pytest.mark.parametrize("way", ["denoise", "noise"])
@pytest.mark.parametrize("variant", WITH_GAIN)
def test_a_patch_is_what_the_hooked_model_does_with_the_others_part(variant, way, final_norm):
    _, hooked = hooked_for(variant)
    stream = some_pairs()
    measured = scale_patching.measure(observe(hooked, stream)).tokens
    found = {
        part: measured[f"by row, {way}: {part}{FINAL_NORMS[final_norm]}"].view(stream.tokens.shape)
        for part in (*scale_patching.COMPONENTS, "interaction")
    }
    m = {}
    for part in (None, *scale_patching.COMPONENTS, "centred"):
        m[part], clean, corrupt = patched_by_hooks(hooked, stream, way, part, final_norm)
    kept = (clean - corrupt).abs() >= 0.5
    assert kept.sum() > 5
    for part, values in found.items():
        if part == "interaction":
            wanted = m["content"] - m["gain"] - m["centred"] + m[None]
        else:
            wanted = m[part] - corrupt if way == "denoise" else clean - m[part]
        at_corrupt = values.view(-1, 6, 9)[:, 1:, -2].flatten()
        same(at_corrupt, (wanted / (clean - corrupt)).where(kept, torch.nan))
        assert values.isnan().sum() == values.numel() - kept.sum()


def test_without_a_mid_norm_content_is_patched_and_gain_and_mean_are_nothing():
    _, hooked = hooked_for("solu")
    stream = some_pairs()
    tokens = stream.tokens
    measured = scale_patching.measure(observe(hooked, stream)).tokens
    at_corrupt = {name: x.view(-1, 6, 9)[:, 1:, -2] for name, x in measured.items()}
    kept = at_corrupt["m_clean - m_corrupt"].abs() >= 0.5
    assert kept.any()
    for part in ("gain", "mean"):
        assert at_corrupt[f"by row, denoise: {part}"][kept].abs().max() < 1e-12
    _, cache = hooked.run_with_cache(tokens)
    post = cache[POST].unflatten(0, (-1, 6)).clone()
    post[:, 1:, -2] = post[:, :1, -2]
    moved = hooked_logits(hooked, tokens, {POST: post.flatten(0, 1)}) - hooked_logits(
        hooked, tokens, {}
    )
    moved, answer = moved[:, -2].unflatten(0, (-1, 6))[:, 1:], tokens[:, -1].view(-1, 6)
    right, wrong = answer[:, :1].expand(-1, 5), answer[:, 1:]
    m = (moved.gather(-1, right[..., None]) - moved.gather(-1, wrong[..., None])).squeeze(-1)
    wanted = m / at_corrupt["m_clean - m_corrupt"]
    same(at_corrupt["by row, denoise: content"], wanted.where(kept, torch.nan))


@pytest.mark.parametrize("variant", STATIC)
def test_a_constant_gain_moves_exactly_nothing(variant):
    measured = scale_patching.measure(observe(hooked_for(variant)[1], some_pairs())).tokens
    shares = [measured[f"by row, {way}: gain"] for way in ("denoise", "noise")]
    assert all((~share.isnan()).any() for share in shares)
    assert all((share[~share.isnan()] == 0).all() for share in shares)


def test_the_headline_is_a_ratio_of_sums_and_small_differences_are_left_out():
    probe = plugins.pick("soluscope.probes", "scale_patching")
    run = observe(hooked_for("solu_ln")[1], some_pairs(30))
    measured = probe.measure(run)
    table = token_table(run, measured)
    found = {e.quantity: e for e in measured.estimates}
    size = table["m_clean - m_corrupt"].abs()
    kept = size >= 0.5
    assert 0 < kept.sum() < size.notna().sum()
    share = table["by row, noise: gain"]
    headline = found["noise: gain"]
    assert (share.notna() == kept).all()
    value = headline.value(headline.sums.sum(0)[None])[0]
    assert value == pytest.approx((share * size)[kept].sum() / size[kept].sum(), rel=1e-12)
    assert headline.n == kept.sum()
    left = found["pairs left"]
    n_left = table["string"][kept].nunique()
    assert left.value(left.sums.sum(0)[None])[0] == pytest.approx(n_left / 30)
    assert left.note == f"{n_left} of 30 pairs"


def test_a_model_that_tells_no_answers_apart_gives_no_shares_and_says_that_no_pair_is_left():
    from dataclasses import replace

    probe = plugins.pick("soluscope.probes", "scale_patching")
    run = planted(torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0)), eps=1e-5)
    run = replace(run, string=torch.zeros_like(run.string))
    (only,) = probe.measure(run).estimates
    assert (only.quantity, only.note) == ("pairs left", "0 of 1 pairs")


def test_c1s_shares_are_those_of_its_table_of_logits():
    """With the anchor, logits are linear in g: B's gain makes the logits of an A token 81.13 times larger."""
    from soluscope.evaluation.calibration import control_run

    planted_model = plugins.pick("soluscope.controls", "smear_shared").build()
    with torch.no_grad():
        table = planted_model.model(torch.arange(65)[:, None])[:, 0]
    tokens = planted_model.streams["pairs"].tokens.view(-1, 6, 5)
    a_hi, a_lo = 12 * np.exp(12) / (np.exp(12) + 31), np.e / (8 * np.e + 24)
    ratio = 4 / (np.sqrt(3) * a_lo) / (32 / (np.sqrt(31) * a_hi))
    moved, total = {"denoise": 0.0, "noise": 0.0}, 0.0
    for clean, *corrupt in tokens.tolist():
        for row in corrupt:
            (m_clean, m_corrupt) = (
                (table[own[-2], clean[-1]] - table[own[-2], row[-1]]).item() for own in (clean, row)
            )
            up = ratio if clean[-2] > 32 else 1 / ratio  # clean gain over corrupt gain
            moved["denoise"] += (up - 1) * m_corrupt
            moved["noise"] += (1 - 1 / up) * m_clean
            total += m_clean - m_corrupt
    probe = plugins.pick("soluscope.probes", "scale_patching")
    run = control_run("smear_shared", "pairs")
    found = {e.quantity: e for e in probe.measure(run).estimates}
    truths = {gate.quantity: gate.truth for gate in probe.gates if gate.control == "smear_shared"}
    for way, what in moved.items():
        sums = found[f"{way}: gain"].sums
        assert found[f"{way}: gain"].value(sums.sum(0)[None])[0] == pytest.approx(
            what / total, rel=1e-3
        )
        assert truths[f"{way}: gain"] == pytest.approx(what / total, rel=1e-3)


@pytest.mark.parametrize("n_rows", [3, 6])
def test_rows_that_are_not_pairs_of_prompts_are_refused(n_rows):
    run = observe(hooked_for("solu_ln")[1], stream_of(some_tokens(n_rows)))
    with pytest.raises(ValueError, match=rf"the {n_rows} rows of 'natural' are not pairs"):
        scale_patching.measure(run)


# --- P20: lateral inhibition ----------------------------------------------------------------------


def test_the_off_diagonal_share_is_that_of_autograds_jacobian():
    generator = torch.Generator().manual_seed(0)
    for spread in (0.1, 1.0, 4.0):
        x = spread * torch.randn(12, generator=generator, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(lambda x: x * x.softmax(-1), x).abs()
        wanted = 1 - jacobian.diagonal().sum() / jacobian.sum()
        found = lateral_inhibition._off_diagonal_share(x, x.softmax(-1))
        assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
@pytest.mark.parametrize("variant", ONE_SCALE)
def test_each_cell_of_the_2x2_is_what_the_hooked_model_does(variant, final_norm):
    _, hooked = hooked_for(variant)
    tokens = some_tokens()
    measured = lateral_inhibition.measure(observe(hooked, stream_of(tokens))).tokens
    _, cache = hooked.run_with_cache(tokens)
    final = cache[FINAL_SCALE] if final_norm == "frozen" else None
    edits: dict[str, dict[str, torch.Tensor]] = {}
    if variant in SOLU:
        log_z = cache["blocks.0.mlp.hook_pre"].logsumexp(-1, keepdim=True)
        name = MID if variant in NORMED else POST
        constant = (log_z - log_z[:, 1:].mean()).exp()
        edits["Z const"] = {name: cache[name] * constant}
    if variant in PER_TOKEN:
        scale = cache[SCALE][:, 1:].log().mean().exp().expand(cache[SCALE].shape)
        edits["g const"] = {SCALE: scale}
    if len(edits) == 2:
        edits["Z and g const"] = edits["Z const"] | edits["g const"]
    live = hooked_losses(hooked, tokens, {}, final)
    changes = {
        cell: hooked_losses(hooked, tokens, edit, final) - live for cell, edit in edits.items()
    }
    how = FINAL_NORMS[final_norm]
    for cell in lateral_inhibition.CELLS:
        same(measured[f"{cell}{how}"], changes.get(cell, torch.full_like(live, torch.nan)))
    if len(edits) == 3:
        z, g, both = changes.values()
        same(measured[f"Z x g interaction{how}"], both - z - g)
        assert changes["g const"].nan_to_num().abs().max() > 1e-3
    else:
        assert measured[f"Z x g interaction{how}"].isnan().all()


def test_both_constant_is_one_number_times_x_exp_x():
    run = observe(hooked_for("solu_ln")[1], stream_of(some_tokens()))
    log_z = run.pre.logsumexp(-1)
    post = lateral_inhibition._posts(run, log_z)["Z and g const"]
    content = ~run.is_bos
    constant = (run.gain.log() - log_z)[content].mean().exp()
    pointwise = constant * run.pre * run.pre.exp()
    wanted = (pointwise - pointwise.mean(-1, keepdim=True)) * run.readout.gamma + run.readout.beta
    torch.testing.assert_close(post, wanted, rtol=1e-10, atol=1e-12)


def test_z_cancels_under_a_live_layer_norm_without_epsilon_and_not_with_one():
    changes = []
    for eps in (1e-20, 1e-1):
        _, hooked = hooked_for("solu_ln")
        hooked.blocks[0].mlp.ln.eps = eps
        run = observe(hooked, stream_of(some_tokens()))
        changes.append(lateral_inhibition.measure(run).tokens["Z const"].nan_to_num().abs().max())
    assert changes[0] < 1e-9
    assert changes[1] > 1e-4


# --- the pairs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache_of(tiny_study):
    return open_cache(Path(json.loads((tiny_study / "data.json").read_text())["path"]))


@pytest.fixture(scope="module")
def tokenizer_of(cache_of):
    return Tokenizer.from_file(str(cache_of.tokenizer_path))


@pytest.mark.parametrize("family", pairs.FAMILIES)
def test_rows_of_a_pair_differ_in_one_place_and_in_their_answer(cache_of, tokenizer_of, family):
    name = f"pairs: {family}"
    stream = streams.make(name, cache_of, tokenizer_of, 32, 4000, 0)
    again = streams.make(name, cache_of, tokenizer_of, 32, 4000, 0)
    other = streams.make(name, cache_of, tokenizer_of, 32, 4000, 1)
    assert torch.equal(stream.tokens, again.tokens)
    assert not torch.equal(stream.tokens, other.tokens)
    assert stream.keep.all()
    assert streams.unit_of(stream.name) == "pair"
    n_rows, width = stream.tokens.shape
    assert n_rows % 6 == 0
    assert n_rows // 6 == 4000 // (6 * width)
    assert (stream.string == torch.arange(n_rows // 6).repeat_interleave(6)[:, None]).all()
    rows = stream.tokens.view(-1, 6, width)
    assert (rows[:, :, 0] == cache_of.meta["bos"]).all()
    clean, corrupt = rows[:, :1], rows[:, 1:]
    assert (clean[:, :, -1] != corrupt[:, :, -1]).all()
    assert (clean[:, :, -2] == corrupt[:, :, -2]).all()  # the position that is read
    if family != "prefix":
        assert ((clean != corrupt)[:, :, :-1].sum(-1) == 1).all()
        swapped = corrupt[(clean != corrupt) & (torch.arange(width) < width - 1)].view(-1, 5)
        assert (swapped.sort(-1).values.diff(dim=-1) > 0).all()  # five different corruptions
    if family == "induction":
        assert (rows[:, :, 5] == clean[:, :, 1]).all()
        assert (clean[:, :, -1] == clean[:, :, 2]).all()
        assert (corrupt[:, :, 1:5] != corrupt[:, :, 5:6]).all()


@pytest.mark.parametrize("family", pairs.FAMILIES)
def test_pairs_are_observed_and_patched_in_a_model_of_that_tokenizer(tiny_study, cache_of,
                                                                     tokenizer_of, family):  # fmt: skip
    from soluscope.hooked.convert import load

    stream = streams.make(f"pairs: {family}", cache_of, tokenizer_of, 32, 500, 0)
    run = observe(load(tiny_study / "solu_ln-s0"), stream)
    measured = scale_patching.measure(run).tokens["m_clean - m_corrupt"]
    assert (~measured.isnan()).sum() == len(stream.tokens) * 5 // 6
    assert len(stream.tokens) == 6 * 30  # 500 tokens are too few for 30 pairs, the minimum


def test_prefixes_are_the_report_splits_and_the_wrong_answer_is_what_usually_follows(
    cache_of, tokenizer_of
):
    stream = streams.make("pairs: prefix", cache_of, tokenizer_of, 32, 4000, 0)
    text = cache_of.stream("report").astype(np.int64).tolist()
    windows = {tuple(text[i : i + 8]): i for i in range(len(text) - 7)}
    followers = {}
    for token, following in itertools.pairwise(text):
        followers.setdefault(token, Counter())[following] += 1
    words = set(streams.single_token_words(tokenizer_of))
    for pair in stream.tokens.view(-1, 6, 9)[:, :, 1:].tolist():
        clean, *corrupt = pair
        assert tuple(clean) in windows
        assert cache_of.meta["eos"] not in clean
        counts = followers[clean[-2]]
        usual = max(
            n for token, n in counts.items() if token not in (clean[-1], cache_of.meta["eos"])
        )
        for row in corrupt:
            assert counts[row[-1]] == usual
            assert words.issuperset(row[:-2])


def test_with_names_and_nouns_in_the_vocabulary_they_are_used(cache_of):
    known = "Mary John James Robert Michael William David"
    nouns = [
        form for noun in ["file", "name", "value", "line", "method"] for form in (noun, f"{noun}s")
    ]
    fixed = ["and", "met", "told", "The", "of", "is", "are"]
    fillers = [f"word{c}" for c in "abcdefghijkl"]
    entries = [f"Ġ{word}" for word in (*known.split(), *nouns, *fixed, *fillers)] + ["."]
    tokenizer = Tokenizer(WordLevel({entry: i for i, entry in enumerate(entries)}))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    words = streams.single_token_words(tokenizer)

    def prompts(family):
        rows = pairs.make(family, cache_of, tokenizer, words, 32, 10_000, 0)
        return [[entries[token].removeprefix("Ġ") for token in ids] for _, ids in rows]

    for row in prompts("name swap"):
        a, _, b, *_ = row
        assert row == [a, "and", b, "met", ".", b, "told", a]
        assert {a, b} <= set(known.split())
    subjects = prompts("subject swap")
    for row in subjects:
        assert (row[0], row[2]) == ("The", "of")
        assert row[1] in nouns
        assert row[-1] == ("are" if row[1].endswith("s") else "is")
    assert [row[-1] for row in subjects[::6]] == ["is", "are"] * 100


def test_too_few_words_or_too_short_a_context_are_refused(cache_of, tokenizer_of):
    words = streams.single_token_words(tokenizer_of)
    with pytest.raises(
        UserError, match=r"2 tokens .* whole words, .* need 10: raise tokens.d_vocab"
    ):
        pairs.make("induction", cache_of, tokenizer_of, [words[-1], words[-2]], 32, 1000, 0)
    with pytest.raises(
        UserError, match=r"7 tokens long, but the model reads only 6: raise model.ctx"
    ):
        streams.make("pairs: induction", cache_of, tokenizer_of, 6, 1000, 0)
    with pytest.raises(UserError, match="no stream called 'pairs: nothing'"):
        streams.make("pairs: nothing", cache_of, tokenizer_of, 32, 1000, 0)
