"""P1, P3, P15, P16, P21 and P22 against brute force: scales, directions, rotations, means and blocks."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import quad
from scipy.special import lambertw
from test_convert import hooked_for
from test_every_variant import (
    BOS,
    CENTRED,
    NORMED,
    ONE_SCALE,
    PER_TOKEN,
    STATIC,
    WITH_GAIN,
    some_tokens,
)

from soluscope import plugins
from soluscope.comparison.stats import bootstrap_sums
from soluscope.data import streams
from soluscope.evaluation.summaries import token_table
from soluscope.hooked.activations import observe, planted
from soluscope.probes import rotation, scale_causes
from soluscope.probes._tokens import start_of_each_part

pytestmark = pytest.mark.arithmetic

SOLU_1L = Path(__file__).parents[2] / "shared" / "data" / "solu1l" / "activations.npz"
MLP = "blocks.0.mlp."
ONE_GAIN = [v for v in ONE_SCALE if v not in PER_TOKEN]


def probe_named(name):
    return plugins.pick("soluscope.probes", name)


def observed(variant="solu_ln", n_rows=8, eps=None):
    """Return a rough fp64 model, its tokens, and the run that a probe sees."""
    _, hooked = hooked_for(variant)
    if eps is not None:
        hooked.blocks[0].mlp.ln.eps = eps
    tokens = some_tokens(n_rows)
    string = torch.arange(n_rows)[:, None].expand(tokens.shape)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    return hooked, tokens, observe(hooked, streams.Stream("natural", tokens, string, keep, BOS))


def numbers(name, run):
    """Return a probe's estimates, by quantity and x."""
    probe = probe_named(name)
    found = probe.measure(run).estimates
    return {(e.quantity, e.x): float(e.value(e.sums.sum(0, keepdims=True))[0]) for e in found}


def cached(hooked, tokens, name, hooks):
    """Return the values at hook `name`, flat over tokens, when the model runs with `hooks`."""
    seen = []

    def keep(value, hook):
        seen.append(value.flatten(0, 1))

    hooked.run_with_hooks(tokens, fwd_hooks=[*hooks, (name, keep)])
    return seen[0]


def loss_with_post(hooked, tokens, post):
    """Return the loss of each token, flat, with hook_post replaced; nan at a row's end."""
    hooks = [(MLP + "hook_post", lambda value, hook: post.view_as(value))]
    log_p = hooked.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)[:, :-1]
    loss = -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return F.pad(loss, (0, 1), value=torch.nan).flatten()


def mean_of_others(values, run):
    """Return the mean over the tokens of all other strings, without BOS, by a loop over strings."""
    result = torch.empty_like(values)
    for string in run.string.unique():
        others = (run.string != string) & ~run.is_bos
        result[run.string == string] = values[others].mean(0)
    return result


def same(found, wanted, atol=1e-10):
    torch.testing.assert_close(
        torch.as_tensor(found), torch.as_tensor(wanted), rtol=0, atol=atol, equal_nan=True
    )


# --- P1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-1])
@pytest.mark.parametrize("centred", [True, False])
def test_engagement_is_the_gains_elasticity_whether_the_norm_centres_or_not(centred, eps):
    """-r = d log g / d log a, by a central difference of the norm's own denominator."""
    _, _, run = observed()
    mid, out = run.mid + 0.05, run.readout  # a mean that is large enough to matter

    def scale_of(mid):
        seen = mid - mid.mean(-1, keepdim=True) if centred else mid
        return (seen.square().mean(-1) + eps).sqrt(), seen

    scale, seen = scale_of(mid)
    run = dataclasses.replace(
        run, mid=mid, scale=scale, eps=eps, centres=centred,
        post=seen / scale[:, None] * out.gamma + out.beta,
    )  # fmt: skip
    values = probe_named("engagement").measure(run).tokens
    step = 1e-5
    up, down = (-scale_of(mid * math.exp(h))[0].log() for h in (step, -step))
    same(values["r"], (down - up) / (2 * step), 1e-8)
    same(values["vq"] / (values["vq"] + values["kappa"]), values["r"], 1e-12)
    assert values["residual"].max() < 1e-12


@pytest.mark.parametrize("variant", ONE_SCALE)
def test_post_is_affine_in_mid_and_the_fit_leaves_what_polyfit_leaves(variant):
    _, _, run = observed(variant, n_rows=2)
    assert probe_named("engagement").measure(run).tokens["residual"].max() < 1e-12
    noise = torch.randn(run.post.shape, generator=torch.Generator().manual_seed(0)).double()
    noisy = dataclasses.replace(run, post=run.post + run.post.std() * noise)
    found = probe_named("engagement").measure(noisy).tokens["residual"]
    for t in (1, 30):
        seen = run.mid[t] - run.mid[t].mean() * run.centres
        line, post = run.readout.gamma * seen, noisy.post[t] - run.readout.beta
        rest = np.linalg.lstsq(line.numpy()[:, None], post.numpy(), rcond=None)[1][0]
        assert found[t].item() == pytest.approx(math.sqrt(rest) / post.norm().item(), rel=1e-9)


# --- P3 -------------------------------------------------------------------------------------------


def test_the_terms_sum_to_log_s_and_so_does_the_other_split():
    _, _, run = observed()
    values = probe_named("scale_causes").measure(run).tokens
    log_s = run.mid.std(dim=-1, correction=0).log()
    same(sum(values[name] for name in scale_causes.TERMS) - 0.5 * math.log(128), log_s, 1e-12)
    q = run.pre * run.pre.exp()
    same(values["log s(q)"], q.std(dim=-1, correction=0).log(), 1e-12)
    same(values["log s(q)"] + values["-log Z"], log_s, 1e-12)


def test_effective_numbers_are_what_their_formulas_give_token_by_token():
    _, _, run = observed(n_rows=1)
    values = probe_named("scale_causes").measure(run).tokens
    for t in range(4):
        a, p = run.mid[t].numpy(), run.pre[t].softmax(-1).numpy()
        assert values["K"][t].item() == pytest.approx((a**2).sum() / a.max() ** 2)
        assert values["PR"][t].item() == pytest.approx((a**2).sum() ** 2 / (a**4).sum())
        assert values["exp(H(p))"][t].item() == pytest.approx(np.exp(-(p * np.log(p)).sum()))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_shares_are_covariances_over_the_variance_and_sum_to_one(eps):
    _, _, run = observed(eps=eps)
    table = token_table(run, probe_named("scale_causes").measure(run))
    content = table[table["pos"] > 0]
    found = numbers("scale_causes", run)
    for what in ("log s", "log g"):
        shares = {name: found[f"share of {what}: {name}", None] for name in scale_causes.TERMS}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
        assert shares["log xmax"] + shares["log pmax"] == pytest.approx(
            found[f"share of {what}: log amax", None]
        )
    for name in scale_causes.TERMS:
        covariance = np.cov(content[name], content["log s"], ddof=0)
        assert found[f"covariance with log s: {name}", None] == pytest.approx(covariance[0, 1])
        assert found[f"share of log s: {name}", None] == pytest.approx(
            covariance[0, 1] / covariance[1, 1]
        )
        if eps == 1e-12:
            assert found[f"share of log g: {name}", None] == pytest.approx(
                found[f"share of log s: {name}", None], abs=1e-6
            )
    log_k = 2 * content["half log K"]
    log_g = run.gain[torch.tensor(content.index)].log()
    assert found["corr(log g, log K)", None] == pytest.approx(np.corrcoef(log_g, log_k)[0, 1])


def test_the_elasticity_of_the_gain_is_the_mean_of_minus_r_along_the_way():
    log_s, eps = np.array([-6.0, -5.0, -4.2, -1.0]), 1e-4
    middle = log_s.mean()

    def minus_r(x):
        return -1 / (1 + eps * math.exp(-2 * x))

    wanted = [quad(minus_r, middle, end)[0] / (end - middle) for end in log_s]
    np.testing.assert_allclose(scale_causes._mean_elasticity(log_s, eps), wanted, rtol=1e-12)
    at_the_mean = scale_causes._mean_elasticity(np.full(2, -5.0), eps)
    np.testing.assert_allclose(at_the_mean, minus_r(-5.0), rtol=1e-12)


def test_changed_pre_activations_give_the_gain_that_hooks_give():
    hooked, tokens, run = observed(eps=1e-5)
    values = probe_named("scale_causes").measure(run).tokens

    def change(name, edit):
        hooks = [(MLP + name, lambda value, hook: edit(value.flatten(0, 1)).view_as(value))]
        return -cached(hooked, tokens, MLP + "ln.hook_scale", hooks).squeeze(-1).log() + (
            run.scale.log()
        )

    same(values["x doubled"], change("hook_pre", lambda x: 2 * x))
    same(values["x halved"], change("hook_pre", lambda x: x / 2))
    same(
        values["softmax at temperature 2"],
        change("hook_mid", lambda a: run.pre * (run.pre / 2).softmax(-1)),
    )
    content = (~run.is_bos).nonzero().squeeze(-1)
    partner = content.roll(len(content) // 2)
    assert (run.string[content] != run.string[partner]).all()
    shape = run.pre / run.pre.amax(-1, keepdim=True)
    other = torch.arange(len(run.pos)).index_copy(0, content, partner)
    magnitude = run.pre.amax(-1, keepdim=True)
    for what, edited in (
        ("another's magnitude", shape * magnitude[other]),
        ("another's shape", shape[other] * magnitude),
        ("another's both", run.pre[other]),
    ):
        wanted = change("hook_pre", lambda x, edited=edited: edited)
        same(values[what], wanted.where(~run.is_bos, torch.nan))
    found = numbers("scale_causes", run)
    both = found["swap share: magnitude", None] + found["swap share: shape", None]
    assert both == pytest.approx(1, abs=1e-12)


def test_another_tokens_magnitudes_in_a_tokens_own_ranks_have_that_tokens_gain():
    """The gain does not depend on ranks. So the probe swaps magnitudes and relative sizes."""
    _, _, run = observed()
    own, other = run.pre[5], run.pre[40]
    swapped = torch.empty_like(own)
    swapped[own.argsort()] = other.sort().values
    mid = swapped * swapped.softmax(-1)
    same((mid.var(correction=0) + run.eps).rsqrt(), run.gain[40], 1e-12)


def test_without_a_softmax_its_terms_are_nan_and_the_others_shares_still_sum_to_one():
    _, _, run = observed("gelu_ln")
    values = probe_named("scale_causes").measure(run).tokens
    for name in ("log xmax", "log pmax", "-log Z", "exp(H(p))", *scale_causes.CHANGES):
        assert values[name].isnan().all()
    found = numbers("scale_causes", run)
    names = ("log amax", "half log K", "centring")
    assert sum(found[f"share of log s: {name}", None] for name in names) == pytest.approx(1)
    assert ("share of log s: log xmax", None) not in found


@pytest.mark.parametrize("variant", STATIC)
def test_a_constant_gain_has_nothing_to_share_out(variant):
    _, _, run = observed(variant)
    found = numbers("scale_causes", run)
    assert not [q for q, _ in found if q.startswith(("share of log g", "corr", "swap"))]
    terms = scale_causes.TERMS if run.is_solu else ("log amax", "half log K", "centring")
    shares = [found[f"share of log s: {name}", None] for name in terms]
    assert sum(shares) == pytest.approx(1)


def inverse_solu(mid):
    """Return pre-activations from which SoLU makes `mid`, if the lowest of them are close to x = -1.

    The minimum of x e^x / Z is -1 / (e Z), which gives Z. A negative activation has two solutions x,
    below and above -1. They are chosen so that the denominator of the softmax is this Z.
    """
    rows = []
    for a in mid:
        z = -1 / (math.e * a.min())
        above = lambertw(np.maximum(a * z, -1 / math.e)).real
        below = np.where(a < 0, lambertw(np.clip(a * z, -1 / math.e, -1e-12), -1).real, above)
        above, below = (np.where(np.isnan(x), -1.0, x) for x in (above, below))
        surplus = np.exp(above).sum() - z
        x = above.copy()
        saved = np.exp(above) - np.exp(below)
        for j in saved.argsort()[::-1]:
            if saved[j] <= surplus:
                x[j], surplus = below[j], surplus - saved[j]
        rows.append(x)
    return np.stack(rows)


def test_shares_in_solu_1l_are_section_7s():
    if not SOLU_1L.is_file():
        pytest.skip("the pretrained SoLU-1L's activations are not beside this clone")
    mid = np.load(SOLU_1L)["hook_mid"].astype(np.float64)
    pre = torch.from_numpy(inverse_solu(mid))
    run = dataclasses.replace(planted(torch.from_numpy(mid)[None], eps=1e-5), pre=pre)
    assert run.is_solu
    found = numbers("scale_causes", run)
    shares = [found[f"share of log s: {name}", None] for name in scale_causes.TERMS]
    np.testing.assert_allclose(shares, [0.80, 1.38, -1.16, -0.02], atol=0.006)
    # The sd of log g is .0043, so g has no variation to explain, and its correlation is not given.
    assert ("corr(log g, log K)", None) not in found


# --- P15 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1 / 64, 0.5, 2.0, 64.0])
@pytest.mark.parametrize(
    ("variant", "eps"),
    [
        ("solu_ln", 1e-12),
        ("solu_ln", 1e-4),
        ("solu_ln", 1e2),
        *((variant, None) for variant in WITH_GAIN),
    ],
)
def test_scaled_activations_through_the_mid_norm_are_the_closed_form(variant, eps, factor):
    hooked, tokens, run = observed(variant, eps=eps)
    name = MLP + "ln.hook_normalized"
    hooks = [(MLP + "hook_mid", lambda mid, hook: factor * mid)]
    before, after = (cached(hooked, tokens, name, h).norm(dim=-1) for h in ([], hooks))
    grown = (after / before)[~run.is_bos]
    found = numbers("scale_invariance", run)
    wanted = (grown - 1).abs().mean(), (grown / factor - 1).abs().mean()
    for quantity, value in zip(("invariance", "linearity"), wanted, strict=True):
        error = found[f"{quantity} error of n", factor]
        assert error == pytest.approx(value.item(), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("variant", ONE_SCALE)
def test_a_scaled_residual_stream_is_what_hooks_give(variant):
    hooked, tokens, run = observed(variant)
    hooks = [("blocks.0.hook_resid_mid", lambda resid, hook: 2 * resid)]
    after = cached(hooked, tokens, MLP + "hook_post", hooks)
    values = probe_named("scale_invariance").measure(run).tokens
    W_out = hooked.W_out[0].detach()
    for what, one, two in (("post", run.post, after), ("O", run.post @ W_out, after @ W_out)):
        change = (two - one).norm(dim=-1) / one.norm(dim=-1)
        same(values[f"relative change of {what} at 2"], change)
        cosine = F.cosine_similarity(one, two, dim=-1)
        same(values[f"1 - cosine of {what} at 2"], 1 - cosine)
    assert change.median() < 1e-4  # ln2's epsilon is 1e-5 of the residual stream's variance


def test_the_mlp_is_evaluated_at_evenly_spaced_tokens_only_where_there_are_many():
    run = planted(torch.randn(40, 60, 4, generator=torch.Generator().manual_seed(0)), eps=1e-5)
    values = probe_named("scale_invariance").measure(run).tokens
    chosen = (~values["relative change of post at 2"].isnan()).nonzero().squeeze(-1)
    assert len(chosen) == 1000
    assert set(chosen.diff().tolist()) == {2, 3}
    assert not values["linearity error of n at 2"].isnan().any()


# --- P16 ------------------------------------------------------------------------------------------


def linear_mlp(n_tokens=30, d_model=6, d_mlp=9):
    """Return a run whose MLP is O = resid W_in W_out, and the matrix W_in W_out."""
    generator = torch.Generator().manual_seed(0)
    resid = torch.randn(1, n_tokens, d_model, generator=generator, dtype=torch.float64)
    W_in, W_out = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((d_model, d_mlp), (d_mlp, d_model))
    )
    run = planted(resid)
    mlp = dataclasses.replace(
        run.mlp,
        W_in=W_in,
        W_out=W_out,
        b_in=torch.zeros(d_mlp),
        b_out=torch.ones(d_model),
        norm=None,
    )
    readout = dataclasses.replace(run.readout, beta=torch.zeros(d_mlp).double())
    return dataclasses.replace(run, mlp=mlp, readout=readout), W_in @ W_out


def test_a_linear_mlp_gives_the_closed_forms():
    """O = M u cos + M v sin gives D, the length of a quarter ellipse, and one sign change per neuron."""
    run, M = linear_mlp()
    values = probe_named("rotation").measure(run).tokens
    found = numbers("rotation", run)
    chosen = start_of_each_part((~run.is_bos).nonzero().squeeze(-1), rotation.N_TOKENS)
    assert chosen.tolist() == list(range(1, 30))
    resid = run.resid_mid[chosen]
    side = resid.roll(len(resid) // 2, 0)
    side = (
        side - (side * resid).sum(-1, keepdim=True) / resid.square().sum(-1, keepdim=True) * resid
    )
    side *= (resid.norm(dim=-1) / side.norm(dim=-1))[:, None]
    O_u, O_v = resid @ M, side @ M
    for degrees in (0.0, 45.0, 90.0, 180.0):
        theta = math.radians(degrees)
        away = (O_u * (math.cos(theta) - 1) + O_v * math.sin(theta)).norm(dim=-1)
        wanted = (away / O_u.norm(dim=-1)).mean().item()
        assert found["D: token", degrees] == pytest.approx(wanted, abs=1e-12)
    for row, token in enumerate(chosen.tolist()):

        def speed(theta, u=O_u[row], v=O_v[row]):
            return (v * math.cos(theta) - u * math.sin(theta)).norm().item()

        length = quad(speed, 0, math.pi / 2)[0] / (O_v - O_u)[row].norm().item()
        assert values["length: token"][token].item() == pytest.approx(length, rel=1e-4)
    assert (values["sign switches: token"][chosen] == 1).all()
    assert (values["effective polytopes: token"][chosen] > 1).all()
    assert values["longest step, added by the gain: token"][chosen].abs().max() < 1e-12


def brute_path(hooked, tokens, run, token, side, hold_gain=False):
    """Return O and pre-activations along the path from `token`, with hook_resid_mid replaced by the path."""
    resid = run.resid_mid[token]
    centred = resid - resid.mean()
    side = side - side.mean()
    side = side - (side @ centred) / (centred @ centred) * centred
    side = side / side.norm() * centred.norm()
    theta = torch.linspace(0, math.pi, 257, dtype=torch.float64)[:, None]
    path = centred * theta.cos() + side * theta.sin()
    row, pos = divmod(token, tokens.shape[1])
    tiled = tokens[row].expand(257, -1)

    def replace(value, hook):
        value[:, pos] = path
        return value

    hooks = [("blocks.0.hook_resid_mid", replace)]
    if hold_gain:
        hooks.append((MLP + "ln.hook_scale", lambda scale, hook: scale[:1].expand_as(scale)))
    post = cached(hooked, tiled, MLP + "hook_post", hooks).view(257, tokens.shape[1], -1)
    pre = cached(hooked, tiled, MLP + "hook_pre", hooks).view(257, tokens.shape[1], -1)
    return (post[:, pos] @ hooked.W_out[0]).detach(), pre[:, pos].detach()


@pytest.mark.parametrize("kind", ["token", "feature"])
@pytest.mark.parametrize("variant", [*PER_TOKEN, "solu"])
def test_a_path_is_what_replacing_the_residual_stream_gives(variant, kind):
    hooked, tokens, run = observed(variant, n_rows=2)
    values = probe_named("rotation").measure(run).tokens
    ln2 = hooked.blocks[0].ln2
    content = (~run.is_bos).nonzero().squeeze(-1)
    partner = content.roll(len(content) // 2)
    for place in (0, 17, 61):
        token = int(content[place])
        side = run.resid_mid[partner[place]]
        if kind == "feature":  # the rest of ln2's Jacobian is along the token itself and the mean
            strongest = int(run.pre[partner[place]].argmax())
            side = (ln2.w * hooked.W_in[0][:, strongest]).detach()
        out, pre = brute_path(hooked, tokens, run, token, side)
        steps = out.diff(dim=0).norm(dim=-1)
        away = (out - out[0]).norm(dim=-1)
        found = {name: values[f"{name}: {kind}"][token].item() for name in rotation.STATISTICS}
        assert found["length"] == pytest.approx((steps[:128].sum() / away[128]).item(), rel=1e-9)
        longest = (steps[:128].max() / steps[:128].sum()).item()
        assert found["longest step"] == pytest.approx(longest, rel=1e-9)
        assert found["plateau"] == (away[:129] >= away[128] / 2).nonzero()[0].item() / 128
        unit = out.diff(dim=0) / steps[:, None]
        turned = (unit[1:] * unit[:-1]).sum(-1).clamp(-1, 1).arccos().sum() / (math.pi * 255 / 256)
        assert found["turning"] == pytest.approx(turned.item(), rel=1e-6)
        assert found["argmax switches"] == (pre.argmax(-1).diff() != 0).sum()
        assert found["sign switches"] == ((pre > 0).int().diff(dim=0) != 0).sum() / 128
        stays = Counter(map(tuple, (pre > 0).tolist()))
        entropy = -sum(n / 257 * math.log(n / 257) for n in stays.values())
        assert found["effective polytopes"] == pytest.approx(math.exp(entropy), rel=1e-9)
        if variant in NORMED:
            held, _ = brute_path(hooked, tokens, run, token, side, hold_gain=True)
            held_steps = held[:129].diff(dim=0).norm(dim=-1)
            added = longest - (held_steps.max() / held_steps.sum()).item()
            assert found["longest step, added by the gain"] == pytest.approx(added, abs=1e-11)


@pytest.mark.parametrize("variant", ONE_GAIN)
def test_a_constant_gain_adds_no_step(variant):
    values = probe_named("rotation").measure(observed(variant)[2]).tokens
    for kind in rotation.KINDS:
        added = values[f"longest step, added by the gain: {kind}"]
        assert added[~added.isnan()].abs().max() < 1e-12
        assert (~added.isnan()).sum() == rotation.N_TOKENS


def test_an_mlp_that_writes_nothing_has_no_path():
    run, _ = linear_mlp()
    silent = dataclasses.replace(run.mlp, W_out=torch.zeros_like(run.mlp.W_out))
    run = dataclasses.replace(run, mlp=silent)
    values = probe_named("rotation").measure(run).tokens
    assert values["length: random"].isnan().all()
    assert math.isnan(numbers("rotation", run)["D: random", 90.0])


# --- P21 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", CENTRED)
def test_loss_without_centring_is_what_brute_force_hooks_give(variant):
    hooked, tokens, run = observed(variant)
    norm = hooked.blocks[0].mlp.ln
    gamma, beta = norm.w.detach(), norm.b.detach()
    values = probe_named("centring").measure(run).tokens
    before = loss_with_post(hooked, tokens, run.post)
    rms = (run.mid.square().mean(-1) + (run.eps or 0)).rsqrt()
    ratio = run.gain / rms
    gains = {"mean left in": run.gain, "RMS": rms}
    gains["RMS, gain matched"] = rms * mean_of_others(ratio.log()[:, None], run)[:, 0].exp()
    for name, gain in gains.items():
        if variant in STATIC and name != "mean left in":
            assert values[name].isnan().all()
            continue
        plain = gain[:, None] * run.mid * gamma + beta
        post = plain + mean_of_others(run.post - plain, run)
        same(values[name], loss_with_post(hooked, tokens, post) - before)
        assert values[name].abs().nanmean() > 1e-4


@pytest.mark.parametrize("variant", ONE_SCALE)
def test_centring_is_removable_from_what_the_mlp_writes(variant):
    """((a - m) gamma) W_out = sum_j a_j v_j up to rounding, by a loop over neurons at one token."""
    _, _, run = observed(variant)
    assert probe_named("centring").measure(run).tokens["linear residual"].max() < 1e-12
    gamma, W_out, a = run.readout.gamma, run.readout.W_out, run.mid[7]
    kbar = sum(gamma[i] * W_out[i] for i in range(128)) / 128
    total = sum(a[j] * (gamma[j] * W_out[j] - kbar) for j in range(128))
    same(total, ((a - a.mean()) * gamma) @ W_out, 1e-12)


@pytest.mark.parametrize("variant", [v for v in ONE_SCALE if v not in CENTRED])
def test_what_does_not_centre_has_no_centring_to_lose(variant):
    values = probe_named("centring").measure(observed(variant)[2]).tokens
    assert values["mean left in"].isnan().all()
    assert (values["angle"] > 0).all()


# --- P22 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", [4, 8])
@pytest.mark.parametrize("variant", [v for v in PER_TOKEN if v in CENTRED])
def test_loss_at_the_blocks_own_gains_is_what_brute_force_hooks_give(variant, n_blocks):
    hooked, tokens, run = observed(variant)
    norm = hooked.blocks[0].mlp.ln
    gamma, beta = norm.w.detach(), norm.b.detach()
    values = probe_named("blocked_norm").measure(run).tokens
    size = 128 // n_blocks
    blocks = run.mid.view(-1, n_blocks, size)
    alone = F.layer_norm(blocks, (size,), eps=norm.eps)
    own = (blocks.var(-1, correction=0) + norm.eps).rsqrt()
    spread = own.log().std(-1, correction=0)
    same(values[f"sd of log g, {n_blocks} blocks"], spread, 1e-9)
    offset = (blocks.mean(-1) - run.mid.mean(-1, keepdim=True)) * run.gain[:, None]
    offset = offset[..., None].expand_as(blocks)
    joint = run.gain[:, None, None] * (blocks - blocks.mean(-1, keepdim=True))
    before = loss_with_post(hooked, tokens, run.post)
    match = (
        mean_of_others(joint.square().mean(-1), run) / mean_of_others(alone.square().mean(-1), run)
    ).sqrt()
    for name, factor in (("own gains", 1.0), ("own gains, matched", match[..., None])):
        post = gamma * (factor * alone + offset).flatten(1) + beta
        wanted = loss_with_post(hooked, tokens, post) - before
        same(values[f"{name}, {n_blocks} blocks"], wanted)
        assert wanted.abs().nanmean() > 1e-3


def test_blocks_that_hold_the_same_activations_lose_nothing_by_their_own_gains():
    _, _, run = observed()
    mid = run.mid[:, :16].repeat(1, 8).roll(3, dims=0)
    gain = (mid.var(-1, correction=0) + run.eps).rsqrt()
    post = gain[:, None] * (mid - mid.mean(-1, keepdim=True)) * run.readout.gamma + run.readout.beta
    run = dataclasses.replace(run, mid=mid, post=post, scale=1 / gain)
    values = probe_named("blocked_norm").measure(run).tokens
    for n_blocks in (4, 8):
        assert values[f"sd of log g, {n_blocks} blocks"].max() < 1e-9
        assert values[f"own gains, {n_blocks} blocks"].nan_to_num().abs().max() < 1e-9
        assert values[f"own gains, matched, {n_blocks} blocks"].nan_to_num().abs().max() < 1e-9


@pytest.mark.parametrize("variant", ONE_GAIN)
def test_a_norm_without_a_gain_by_token_has_no_gains_by_block(variant):
    values = probe_named("blocked_norm").measure(observed(variant)[2]).tokens
    assert all(column.isnan().all() for column in values.values())


# --- controls, derived by hand ---------------------------------------------------------------------


def test_c1s_shares_are_the_differences_of_its_two_kinds_of_tokens():
    """Closed forms of controls/smear_shared.py: x = 12 on one neuron of 32, or 1 on eight."""
    from soluscope.evaluation.calibration import control_run

    run = control_run("smear_shared", "natural")
    a = {
        "log xmax": math.log(12),
        "log pmax": 12 - math.log(math.exp(12) + 31),
        "half log K": 0.0,
        "centring": 0.5 * math.log(31 / 32),
    }
    b = {
        "log xmax": 0.0,
        "log pmax": 1 - math.log(8 * math.e + 24),
        "half log K": 0.5 * math.log(8),
        "centring": 0.5 * math.log(3 / 4),
    }
    total = sum(a.values()) - sum(b.values())
    probe = probe_named("scale_causes")
    for estimate in probe.measure(run).estimates:
        what, _, term = estimate.quantity.partition(": ")
        if what in ("share of log s", "share of log g") and term in a:
            interval = bootstrap_sums(estimate.sums, estimate.value, estimate.n)
            assert interval.value == pytest.approx((a[term] - b[term]) / total, abs=1e-7)
            assert interval.high - interval.low < 1e-9


def test_c1s_blocks_hold_what_its_docstring_says():
    """At an A token one of 4 blocks is active: the sd of log g is the gap to silence times sqrt(3) / 4."""
    from soluscope.evaluation.calibration import control_run

    run = control_run("smear_shared", "natural")
    a_hi = 12 * math.exp(12) / (math.exp(12) + 31)
    gap = 0.5 * math.log(1e12) + 0.5 * math.log(a_hi**2 * 7 / 64)
    spread = probe_named("blocked_norm").measure(run).tokens["sd of log g, 4 blocks"]
    is_a = (run.tokens >= 1) & (run.tokens <= 32)
    same(spread[is_a], torch.full_like(spread[is_a], gap * math.sqrt(3) / 4), 1e-6)
    assert gap * math.sqrt(3) / 4 == pytest.approx(6.58, abs=0.01)


def test_c1s_gain_adds_the_step_that_its_gates_comment_derives():
    """Between two A tokens, O turns by up to 6 sqrt 2 + 1 per unit of theta. A held gain gives shorter steps."""
    from soluscope.evaluation.calibration import control_run

    run = control_run("smear_shared", "natural")
    values = probe_named("rotation").measure(run).tokens
    chosen = start_of_each_part((~run.is_bos).nonzero().squeeze(-1), rotation.N_TOKENS)
    is_a = (run.tokens[chosen] >= 1) & (run.tokens[chosen] <= 32)
    a_to_a = chosen[is_a & is_a.roll(len(chosen) // 2)]
    theta = torch.linspace(0, math.pi / 2, 129, dtype=torch.float64)
    x = 12 * torch.stack([theta.cos(), theta.sin()], dim=-1)
    a = x * x.exp() / (x.exp().sum(-1, keepdim=True) + 30)
    held = a.diff(dim=0).norm(dim=-1)
    live = (6 * math.sqrt(2) + 1) * math.pi / 256 / (math.pi / 2)
    assert live == pytest.approx(0.0741, abs=1e-4)
    assert (held.max() / held.sum()).item() == pytest.approx(0.0379, abs=1e-4)
    found = {
        name: values[f"{name}: token"][a_to_a].nanmean().item()
        for name in ("longest step", "longest step, added by the gain")
    }
    assert found["longest step"] == pytest.approx(live, rel=0.05)
    added = live - (held.max() / held.sum()).item()
    assert found["longest step, added by the gain"] == pytest.approx(added, rel=0.1)
