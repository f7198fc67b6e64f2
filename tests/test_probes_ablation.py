"""P9, P10, P17, P18 and P19 against hooks on the model itself, autograd, scipy, and planted models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from test_convert import hooked_for
from test_every_probe import stream_of
from test_every_variant import CENTRED, ONE_SCALE, PER_TOKEN, VARIANTS, some_tokens

from soluscope import plugins
from soluscope.evaluation.calibration import control_run
from soluscope.evaluation.summaries import token_table
from soluscope.hooked.ablation import Ablation
from soluscope.hooked.activations import observe, planted
from soluscope.probes import (
    _attribution,
    attribution_patching,
    diffuse_attribution,
    entropy_neurons,
    low_activation_impact,
)
from soluscope.probes._estimates import rank_correlation
from soluscope.probes._tokens import every_nth

pytestmark = pytest.mark.arithmetic

PRE, MID, SCALE, POST = (
    f"blocks.0.mlp.{name}" for name in ("hook_pre", "hook_mid", "ln.hook_scale", "hook_post")
)
ONE_GAIN = [v for v in ONE_SCALE if v not in PER_TOKEN]


def observed(variant, n_rows=3):
    model, tokens = hooked_for(variant)[1], some_tokens(n_rows)
    return model, tokens, observe(model, stream_of(tokens))


@torch.no_grad()
def losses(model, tokens, hooks=()):
    """Return the loss of each token under hooks, flat over the stream; nan at a row's end."""
    log_p = model.run_with_hooks(tokens, fwd_hooks=list(hooks)).log_softmax(-1)
    loss = -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(loss, (0, 1), value=torch.nan).flatten()


def at(stage, row, pos, edit):
    """Return a hook that edits a copy of the activations at one token."""

    def hook(values, hook):
        values = values.clone()
        edit(values[row, pos])
        return values

    return stage, hook


def place(tokens, index):
    return divmod(int(index), tokens.shape[1])


def everywhere(stage, values):
    return stage, lambda found, hook: values.to(found).view_as(found)


def mid_of(model):
    return MID if MID in model.hook_dict else POST


def value_of(estimate):
    return float(estimate.value(estimate.sums.sum(0, keepdims=True))[0])


def estimates_of(name, run):
    probe = plugins.pick("soluscope.probes", name)
    measured = probe.measure(run)
    table = token_table(run, measured)
    return table, {(e.quantity, e.x): e for e in measured.estimates}


# --- shared parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_contributions_and_what_was_there_before_add_up_to_the_targets_centred_logit(variant):
    model, tokens, run = observed(variant)
    logits = model(tokens).detach().flatten(0, 1)
    constant = run.readout.ln_b @ run.readout.W_U + run.readout.b_U
    centred = logits - constant - (logits - constant).mean(-1, keepdim=True)
    kept = run.target >= 0
    wanted = centred[kept].gather(-1, run.target[kept, None]).squeeze(-1)
    direction, scale = (
        _attribution.target_direction(run),
        _attribution.final_scale(run, _attribution.resid_final(run)),
    )
    before = (direction * (run.resid_mid + run.readout.b_out)).sum(-1) / scale
    found = _attribution.contributions(run).sum(-1) + before
    torch.testing.assert_close(found[kept], wanted, rtol=1e-9, atol=1e-9)
    assert found[~kept].isnan().all()


def test_tokens_spread_with_a_prime_stride_meet_every_position_of_a_row():
    run = observed("solu", 20)[2]
    chosen = every_nth(run, 7)
    assert (run.target[chosen] >= 0).all()
    assert set(run.pos[chosen].tolist()) == set(range(1, 31))


@pytest.mark.parametrize("ctx", [64, 128, 256, 1024])  # 7 divides 126 and 1022
@pytest.mark.parametrize("n", [7, 11])
def test_every_position_is_met_whatever_the_length_of_rows(ctx, n):
    pos = torch.arange(ctx).repeat(12)
    run = SimpleNamespace(pos=pos, scored=(pos > 0) & (pos < ctx - 1))
    chosen = every_nth(run, n)
    assert set(run.pos[chosen].tolist()) == set(range(1, ctx - 1))
    assert len(chosen) <= run.scored.sum() / n + 1


# --- P9 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ONE_SCALE)
def test_single_neuron_effects_are_what_hooks_give_live_and_under_one_gain(variant):
    model, tokens, run = observed(variant)
    found = low_activation_impact.ablations(run)
    gain = float(run.gain[run.pos > 0].log().mean().exp())
    one_gain = (
        [everywhere(SCALE, torch.full_like(run.scale, 1 / gain))]
        if SCALE in model.hook_dict
        else []
    )
    plain, plain_static = losses(model, tokens), losses(model, tokens, one_gain)
    mean = torch.stack([run.post[(run.string != s) & (run.pos > 0)].mean(0) for s in range(3)])
    rng = np.random.default_rng(0)
    for t in rng.choice(len(found.tokens), 4, replace=False):
        token = found.tokens[t]
        row, pos = place(tokens, token)
        for j in rng.choice(128, 2, replace=False):
            zero = at(POST, row, pos, lambda post, j=j: post[j].zero_())
            to_mean = at(POST, row, pos, lambda post, j=j, row=row: post[j].copy_(mean[row, j]))
            for changes, hooks, base in (
                (found.zero, [zero], plain),
                (found.mean, [to_mean], plain),
                (found.static, [*one_gain, zero], plain_static),
            ):
                wanted = losses(model, tokens, hooks)[token] - base[token]
                assert changes[t, j].item() == pytest.approx(wanted.item(), abs=1.1e-6)


def test_a_set_is_ablated_together_live_and_under_one_gain():
    model, tokens, run = observed("solu_ln")
    found = low_activation_impact.ablations(run)
    effects = low_activation_impact.set_effects(found, 0.5)
    gain = float(run.gain[run.pos > 0].log().mean().exp())
    one_gain = everywhere(SCALE, torch.full_like(run.scale, 1 / gain))
    plain, plain_static = losses(model, tokens), losses(model, tokens, [one_gain])
    for t in (0, 5):
        token = found.tokens[t]
        row, pos = place(tokens, token)
        lowest = run.mid[token].abs().argsort()[:64]
        zero = at(POST, row, pos, lambda post, lowest=lowest: post.index_fill_(0, lowest, 0.0))
        live = (losses(model, tokens, [zero]) - plain)[token].item()
        static = (losses(model, tokens, [one_gain, zero]) - plain_static)[token].item()
        assert effects["lowest"][t].item() == pytest.approx(live, abs=1e-10)
        assert effects["lowest, D"][t].item() == pytest.approx(live - static, abs=1e-10)


def test_a_removed_set_leaves_the_mean_and_the_gain_as_they_were():
    """Subtracting the set's g gamma a from hook_post sets its mid to 0 while the mean and the gain are held."""
    model, tokens, run = observed("solu_ln")
    found = low_activation_impact.ablations(run)
    effects = low_activation_impact.set_effects(found, 0.5)
    gain = float(run.gain[run.pos > 0].log().mean().exp())
    gamma = model.blocks[0].mlp.ln.w.detach()
    one_gain = everywhere(SCALE, torch.full_like(run.scale, 1 / gain))
    plain, plain_static = losses(model, tokens), losses(model, tokens, [one_gain])
    for t in (0, 5):
        token = found.tokens[t]
        row, pos = place(tokens, token)
        lowest = run.mid[token].abs().argsort()[:64]
        written = (gamma * run.mid[token])[lowest]

        def without(g, row=row, pos=pos, lowest=lowest, written=written):
            return at(POST, row, pos, lambda post: post.index_add_(0, lowest, -g * written))

        live = (losses(model, tokens, [without(run.gain[token])]) - plain)[token].item()
        static = losses(model, tokens, [one_gain, without(gain)]) - plain_static
        assert effects["lowest, removed"][t].item() == pytest.approx(live, abs=1e-10)
        difference = live - static[token].item()
        assert effects["lowest, removed, D"][t].item() == pytest.approx(difference, abs=1e-10)


def test_neurons_at_zero_are_ranked_at_random_and_rounding_breaks_no_tie():
    values = torch.full((500, 8), 1e-9, dtype=torch.float64)
    values[:, 3] = 1.0
    values *= 1 + 1e-9 * torch.arange(8)
    ranks = low_activation_impact._ranks(values, -1)
    assert (ranks[:, 3] == 7).all()
    assert torch.equal(ranks.sort(-1).values, torch.arange(8.0).double().expand(500, 8))
    others = torch.cat([ranks[:, :3], ranks[:, 4:]], 1)
    assert (others.mean(0) - 3).abs().max() < 0.4  # 4.5 standard errors


def test_sets_are_matched_in_size_or_in_their_sum_of_activations():
    run = observed("solu_ln")[2]
    found = low_activation_impact.ablations(run)
    sets = low_activation_impact.sets(found, 0.25)
    mid = run.mid[found.tokens]
    n = run.gain[found.tokens, None] * (mid - mid.mean(-1, keepdim=True))
    mass = {name: (n.abs() * chosen).sum(-1) for name, chosen in sets.items()}
    assert (sets["lowest"].sum(-1) == 32).all()
    assert (sets["random"].sum(-1) == 32).all()
    assert not torch.equal(sets["lowest"], sets["random"])
    assert (mass["same |n|"] <= mass["lowest"] * (1 + 1e-9)).all()
    assert (mass["same |n|"] > 0.3 * mass["lowest"]).float().mean() > 0.5


@pytest.mark.parametrize("variant", ONE_GAIN)
def test_a_model_with_one_gain_is_its_own_surrogate(variant):
    table, found = estimates_of("low_activation_impact", observed(variant)[2])
    assert table["|D|"].max() < 1e-6
    assert value_of(found["|D| over |dl|", None]) < 1e-6
    assert ("slope of D on log gain", None) not in found


def test_what_was_published_is_the_change_of_the_prompts_mean_loss():
    """The reference is the model's own mean loss over a prompt, with one activation ablated after LayerNorm."""
    model, tokens, run = observed("solu_ln")
    found = low_activation_impact.ablations(run)
    _, by_name = estimates_of("low_activation_impact", run)
    published = {x: e for (name, x), e in by_name.items() if name == "Figure 5 (as published)"}
    token, j = found.tokens[2], 9
    row, pos = place(tokens, token)
    zero = at(POST, 0, pos, lambda post: post[j].zero_())
    prompt = tokens[row : row + 1]
    with torch.no_grad():
        change = model.run_with_hooks(prompt, return_type="loss", fwd_hooks=[zero])
        change = change - model(prompt, return_type="loss")
    assert found.zero[2, j].item() / 31 == pytest.approx(change.item(), abs=1e-6)
    total = sum(e.sums[:, 0].sum() for e in published.values())
    assert total == pytest.approx(found.zero.sum().item() / 31, abs=1e-9)


def test_lift_is_the_ratio_of_two_means_over_pairs():
    run = observed("solu_ln")[2]
    found = low_activation_impact.ablations(run)
    _, by_name = estimates_of("low_activation_impact", run)
    size, activation = found.zero.abs().numpy(), run.mid[found.tokens].abs().numpy()
    low = [size[t, np.argsort(row)[:13]] for t, row in enumerate(activation)]  # a tenth of 128
    wanted = np.mean(low) / size.mean()
    assert value_of(by_name["lift, lowest in token", None]) == pytest.approx(wanted, rel=1e-9)


def test_a_quantile_from_counts_below_edges_is_numpys_and_follows_the_weights():
    rng = np.random.default_rng(0)
    values, string = rng.exponential(size=20_000), rng.integers(0, 30, 20_000)
    estimate = low_activation_impact._quantile("q", values, string, 0.95, 0.0)
    assert value_of(estimate) == pytest.approx(np.quantile(values, 0.95), rel=1e-3)
    weights = rng.integers(0, 3, 30)
    repeated = np.repeat(values, weights[string])
    found = estimate.value((weights[:, None] * estimate.sums).sum(0, keepdims=True))
    assert found[0] == pytest.approx(np.quantile(repeated, 0.95), rel=5e-3)


# --- P10 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ONE_SCALE)
def test_attribution_and_both_ablation_losses_are_what_hooks_give(variant):
    model, tokens, run = observed(variant)
    table = token_table(run, plugins.pick("soluscope.probes", "diffuse_attribution").measure(run))
    nothing = everywhere(POST, torch.zeros_like(run.post))
    wanted = (losses(model, tokens, [nothing]) - losses(model, tokens)).numpy()
    np.testing.assert_allclose(table["ablation loss"], wanted, atol=1e-10)
    # As published: set one position's activations before LayerNorm to 0, and take the prompt's mean loss.
    row, pos = 1, 12
    silent = at(mid_of(model), 0, pos, lambda mid: mid.zero_())
    prompt = tokens[row : row + 1]
    with torch.no_grad():
        change = model.run_with_hooks(prompt, return_type="loss", fwd_hooks=[silent])
        change = (change - model(prompt, return_type="loss")).item()
    mid = run.mid.view(3, 32, -1)[row, pos]
    score = change / (mid.max() - mid.mean()).item()
    assert table["score (as published)"][row * 32 + pos] == pytest.approx(score, abs=1e-8)
    c = _attribution.contributions(run).numpy()
    with_target = run.target.numpy() >= 0
    k = np.abs(c).sum(-1) ** 2 / (c**2).sum(-1)
    np.testing.assert_allclose(table["K_dla"][with_target], k[with_target])


def test_the_ratio_that_the_study_compared_is_the_gain_itself():
    """(max n - mean n) / (max a - mean a) equals the gain at every token."""
    model, tokens, run = observed("solu_ln")
    _, cache = model.run_with_cache(tokens)
    n = cache["blocks.0.mlp.ln.hook_normalized"].flatten(0, 1)
    outlier = lambda x: x.amax(-1) - x.mean(-1)  # noqa: E731
    torch.testing.assert_close(outlier(n) / outlier(run.mid), run.gain, rtol=1e-9, atol=0)


def test_dealing_out_output_weights_keeps_a_tokens_sum_of_contributions():
    run = observed("solu_ln")[2]
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    u, W_out = _attribution.target_direction(run), run.readout.W_out[order]
    scale = _attribution.final_scale(run, _attribution.resid_final(run))[:, None]
    dealt = run.post * (u @ W_out.T) / scale
    kept = (run.target >= 0).numpy()
    factor = (_attribution.contributions(run).abs().sum(-1) / dealt.abs().sum(-1))[:, None]
    written = (run.post * factor) @ W_out
    resid = run.resid_mid + run.readout.b_out + written
    k = dealt.abs().sum(-1).square() / dealt.square().sum(-1)
    bias = run.readout.ln_b @ run.readout.W_U + run.readout.b_U
    kept_loss = []
    for stream in (run.resid_mid + run.readout.b_out, resid):
        centred = stream - stream.mean(-1, keepdim=True)
        normal = centred / _attribution.final_scale(run, stream)[:, None]
        logits = (normal * run.readout.ln_w) @ run.readout.W_U + bias
        target = run.target.clamp(min=0)[:, None]
        kept_loss.append(logits.logsumexp(-1) - logits.gather(-1, target).squeeze(-1))
    removed = kept_loss[0] - kept_loss[1]
    wanted = torch.where(removed.abs() > 1e-3, removed * k, 0.0).numpy()
    found = next(diffuse_attribution._null_scores(run))
    np.testing.assert_allclose(found[kept], wanted[kept], atol=1e-8)


@pytest.mark.parametrize("control", ["pinned", "lateral", "monosemantic"])
def test_there_is_no_rank_correlation_with_a_gain_that_hardly_moves(control):
    _, found = estimates_of("diffuse_attribution", control_run(control, "natural"))
    assert not [name for name, _ in found if name.startswith(diffuse_attribution.PARTIAL)]
    assert abs(value_of(found["gain at top positions over all", None])) < 1e-4


def test_the_permuted_null_is_the_mean_of_its_deals():
    run = control_run("smear_shared", "natural")
    table, found = estimates_of("diffuse_attribution", run)
    content = (table["pos"] > 0).to_numpy()
    _, code, counts = np.unique(run.tokens.numpy(), return_inverse=True, return_counts=True)
    given = [
        run.loss.numpy(), run.pos.numpy(), np.log(counts[code]), run.resid_mid.norm(dim=-1).numpy(),
    ]  # fmt: skip
    log_gain = run.gain.log().numpy()[content]
    string = table["string"][content]
    alone = [
        value_of(
            rank_correlation("", score[content], log_gain, string, [g[content] for g in given])
        )
        for score in diffuse_attribution._null_scores(run)
    ]
    assert len(set(alone)) == diffuse_attribution.N_DEALS
    partial = diffuse_attribution.PARTIAL
    null = value_of(found[f"{partial}, W_out permuted", None])
    assert null == pytest.approx(np.mean(alone), abs=1e-12)
    less = value_of(found[f"{partial}, less permuted", None])
    assert less == pytest.approx(value_of(found[partial, None]) - null, abs=1e-12)


def test_the_published_score_goes_with_the_scale_even_where_the_gain_has_no_effect():
    """Section 1.6: 1 / (max - mean) rises with 1/s. In `absorbed`, no output of the MLP reaches a logit."""
    _, found = estimates_of("diffuse_attribution", control_run("absorbed", "natural"))
    inverse = found["inverse outlier score (as published) against 1/s", None]
    assert value_of(inverse) > 0.8
    # All scores are 0 there: no token is at the top.
    assert ("gain at top positions over all", None) not in found
    assert (diffuse_attribution.PARTIAL, None) not in found


def test_figure_6_leaves_out_bos_and_types_of_few_documents_unless_as_published():
    run = control_run("smear_shared", "natural")
    _, found = estimates_of("diffuse_attribution", run)
    notes = {
        name: {e.note for (quantity, _), e in found.items() if quantity == name}
        for name in ("MLP DLA by token", "MLP DLA by token (as published)")
    }
    assert "<|BOS|>" in notes["MLP DLA by token (as published)"]
    assert "<|BOS|>" not in notes["MLP DLA by token"]
    shown = [e for (quantity, _), e in found.items() if quantity == "MLP DLA by token"]
    assert min(len(e.sums) for e in shown) >= diffuse_attribution.MIN_STRINGS


# --- P17 ------------------------------------------------------------------------------------------


def centred_target_logit(model, tokens, run, hooks=()):
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks)).flatten(0, 1)
    target = run.target.clamp(min=0)[:, None]
    return logits.gather(-1, target).squeeze(-1) - logits.mean(-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_direct_effects_of_mlp_and_neurons_are_what_hooks_give(variant):
    model, tokens, run = observed(variant)
    table = token_table(run, plugins.pick("soluscope.probes", "exact_dla").measure(run))
    kept = (run.target >= 0).numpy()
    plain = centred_target_logit(model, tokens, run)

    def removed(post):
        gone = [everywhere(POST, post)]
        return (plain - centred_target_logit(model, tokens, run, gone)).numpy()

    wanted = removed(torch.zeros_like(run.post))
    np.testing.assert_allclose(table["MLP: direct effect"][kept], wanted[kept], atol=1e-10)
    frozen = ("ln_final.hook_scale", model.run_with_cache(tokens)[1]["ln_final.hook_scale"])
    gone = everywhere(POST, torch.zeros_like(run.post))
    error = losses(model, tokens, [gone, everywhere(*frozen)]) - losses(model, tokens, [gone])
    np.testing.assert_allclose(table["MLP: error in loss"][kept], error.abs()[kept], atol=1e-10)
    attributed, size, off = _attribution.contributions(run), 0.0, 0.0
    for j in range(run.post.shape[1]):
        post = run.post.clone()
        post[:, j] = 0
        true = removed(post)
        size, off = size + np.abs(true), off + np.abs(attributed[:, j].numpy() - true)
    np.testing.assert_allclose(table["neurons: effect"][kept], size[kept], atol=1e-9)
    np.testing.assert_allclose(table["neurons: error"][kept], off[kept], atol=1e-9)


def test_attribution_is_exact_once_the_final_norms_scale_is_one_constant():
    """As in LN-free checkpoints, epsilon is 1e12 and the weights are a million times as large."""
    model, tokens = hooked_for("solu_ln")[1], some_tokens(20)
    before = estimates_of("exact_dla", observe(model, stream_of(tokens)))[1]
    model.ln_final.eps = 1e12
    model.ln_final.w.data *= 1e6
    after = estimates_of("exact_dla", observe(model, stream_of(tokens)))[1]
    for name in ("NMAE: MLP", "NMAE: neurons", "NMAE in loss: MLP", "NMAE in loss: neurons"):
        assert value_of(before[name, None]) > 0.01
        assert value_of(after[name, None]) < 1e-6


# --- P18 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ONE_SCALE)
def test_gradients_through_and_past_the_gain_are_autograds(variant):
    model, tokens, run = observed(variant)
    tokens_at = (run.target >= 0).nonzero().squeeze(-1)
    gradient = Ablation(run).gradient(tokens_at)
    through, detached = attribution_patching.gradients_of_mid(run, tokens_at, gradient)
    for found, hooks in ((through, []), (detached, [(SCALE, lambda scale, hook: scale.detach())])):
        kept = {}

        def keep(mid, hook, kept=kept):
            kept["mid"] = mid.detach().requires_grad_()
            return kept["mid"]

        used = [(mid_of(model), keep), *(h for h in hooks if h[0] in model.hook_dict)]
        log_p = model.run_with_hooks(tokens, fwd_hooks=used).log_softmax(-1)
        loss = -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).sum()
        (wanted,) = torch.autograd.grad(loss, kept["mid"])
        torch.testing.assert_close(found, wanted.flatten(0, 1)[tokens_at], rtol=1e-7, atol=1e-9)


def test_attribution_patching_becomes_exact_as_the_effects_become_small():
    """The first-order estimate misses a second-order term: halving W_out halves the relative error."""
    errors = []
    for factor in (1e-2, 5e-3):
        model, tokens = hooked_for("solu_frozen_ln")[1], some_tokens()
        model.blocks[0].mlp.W_out.data *= factor
        run = observe(model, stream_of(tokens))
        at_tokens = attribution_patching.approximations(run)
        exact, found = (part["first order"] for part in (at_tokens.exact, at_tokens.found))
        errors.append(((found - exact).abs().sum() / exact.abs().sum()).item())
    assert errors[0] < 0.1
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.1)


def test_agreement_and_overlap_are_counted_within_a_token():
    run = observed("solu_ln")[2]
    table, _ = estimates_of("attribution_patching", run)
    found = attribution_patching.approximations(run)
    for name in attribution_patching.METHODS:
        exact, guess = found.exact[name].numpy(), found.found[name].numpy()
        for t in (0, 7):
            token = int(found.tokens[t])
            best, guessed = (set(np.argsort(-np.abs(part[t]))[:10]) for part in (exact, guess))
            overlap = len(best & guessed) / 10
            large = np.abs(exact[t]) > 1e-6
            same = (np.sign(exact[t]) == np.sign(guess[t]))[large].mean()
            assert table[f"top-10 overlap: {name}"][token] == pytest.approx(overlap)
            assert table[f"sign agreement: {name}"][token] == pytest.approx(same)


# --- P19 ------------------------------------------------------------------------------------------


def entropies(model, tokens, hooks=()):
    with torch.no_grad():
        log_p = model.run_with_hooks(tokens, fwd_hooks=list(hooks)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).flatten()


@pytest.mark.parametrize("variant", ONE_SCALE)
def test_total_and_direct_effects_on_entropy_and_the_mid_norms_share_are_what_hooks_give(variant):
    model, tokens, run = observed(variant)
    found = entropy_neurons.effects(run)
    frozen = everywhere(
        "ln_final.hook_scale", model.run_with_cache(tokens)[1]["ln_final.hook_scale"]
    )
    t, j = 3, 40
    token = found.tokens[t]
    row, pos = place(tokens, token)
    zero = at(POST, row, pos, lambda post: post[j].zero_())
    plain = entropies(model, tokens)[token]
    total = entropies(model, tokens, [zero])[token] - plain
    direct = entropies(model, tokens, [zero, frozen])[token] - plain
    assert found.total[t, j].item() == pytest.approx(total.item(), abs=1e-10)
    assert found.direct[t, j].item() == pytest.approx(direct.item(), abs=1e-10)
    gone = at(mid_of(model), row, pos, lambda mid: mid[j].zero_())
    whole = (losses(model, tokens, [gone]) - losses(model, tokens))[token].item()
    both = (found.loss + found.loss_through)[t, j].item()
    assert both == pytest.approx(whole, abs=1.1e-6)
    if variant not in {*PER_TOKEN, *CENTRED}:
        assert found.loss_through[t, j].item() == pytest.approx(0, abs=2.1e-6)


@pytest.mark.parametrize("variant", PER_TOKEN)
def test_how_far_a_neuron_moves_the_gain_is_the_gains_derivative(variant):
    run = observed(variant)[2]
    mid = run.mid.clone().requires_grad_()
    centred = mid - mid.mean(dim=-1, keepdim=True) if variant in CENTRED else mid
    log_gain = -0.5 * (centred.square().mean(dim=-1) + run.eps).log()
    (slope,) = torch.autograd.grad(log_gain.sum(), mid)
    wanted = (run.mid * slope).abs()
    torch.testing.assert_close(entropy_neurons.gain_elasticity(run), wanted, rtol=1e-8, atol=0)


def test_facts_of_the_weights_are_those_of_the_centred_matrices():
    run = observed("solu_ln")[2]
    found, out = entropy_neurons.weights(run), run.readout
    W = (out.W_out - out.W_out.mean(-1, keepdim=True)).numpy()
    U = (out.ln_w[:, None] * out.W_U).numpy()
    U = U - U.mean(0)  # centring by ln_final
    U = U - U.mean(1, keepdims=True)
    cosine = (W @ U) / np.outer(np.linalg.norm(W, axis=1), np.linalg.norm(U, axis=0))
    np.testing.assert_allclose(found["LogitVar"], cosine.var(axis=1), rtol=1e-8)
    left, singular, _ = np.linalg.svd(U, full_matrices=False)
    assert singular[-1] < 1e-10  # the direction (1, ..., 1), which W does not have either
    share = ((W / np.linalg.norm(W, axis=1, keepdims=True)) @ left) ** 2
    np.testing.assert_allclose(found["null share, lowest 1%"], share[:, -2], atol=1e-8)
    counts = np.bincount(run.tokens[run.pos > 0], minlength=U.shape[1])
    seen = counts > 0
    wanted = [np.corrcoef(row[seen], np.log(counts[seen]))[0, 1] for row in W @ U]
    np.testing.assert_allclose(found["correlation with log unigram"], wanted, atol=1e-9)


def test_the_knee_is_where_singular_values_fall_most():
    run = observed("solu_ln")[2]
    d_model, d_vocab = run.readout.W_U.shape
    generator = torch.Generator().manual_seed(0)

    def frame(n, k):
        """Return k orthonormal directions of length n whose entries add up to 0, so that centring keeps them."""
        numbers = torch.randn(n, k, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(numbers - numbers.mean(0)).Q

    left, right = frame(d_model, d_model - 1), frame(d_vocab, d_model - 1)
    singular = torch.linspace(5, 1, d_model - 1, dtype=torch.float64)
    singular[-5:] *= 1e-3
    mixed = torch.rand(run.post.shape[1], 5, generator=generator, dtype=torch.float64)
    flat = _attribution.with_readout(
        run,
        W_U=left * singular @ right.T,
        W_out=mixed @ left[:, -5:].T,
        ln_w=torch.ones_like(run.readout.ln_w),
    )
    found = entropy_neurons.weights(flat)
    torch.testing.assert_close(found["null share, past the knee"], torch.ones_like(mixed[:, 0]))
    last = (mixed[:, -1] / mixed.norm(dim=-1)).square()
    torch.testing.assert_close(found["null share, lowest 1%"], last)


def test_the_p_of_a_neuron_is_students_where_strings_have_equal_counts():
    excess = np.random.default_rng(0).normal(0.1, 1, (30, 4))  # one token per string
    found = entropy_neurons._p(excess, np.arange(30))
    np.testing.assert_allclose(found, ttest_1samp(excess, 0).pvalue, rtol=1e-9)


def test_the_largest_of_many_means_is_0_on_average_where_all_are():
    """The plain maximum of 32 means over 240 tokens would be about 2 standard errors, .13."""
    run = planted(torch.zeros(48, 6, 2))
    content = (~run.is_bos).nonzero().squeeze(-1).numpy()
    rng = np.random.default_rng(0)
    found = [
        value_of(entropy_neurons._of_the_largest("", values, content, run))
        for values in rng.normal(size=(100, len(content), 32))
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / 10
    one = rng.normal(size=(len(content), 32))
    one[:, 5] -= 2
    value = value_of(entropy_neurons._of_the_largest("", one, content, run))
    assert value == pytest.approx(-one[:, 5].mean())


def test_one_of_32_neurons_is_discovered_on_either_half_and_confirmed_on_the_other():
    _, found = estimates_of("entropy_neurons", control_run("entropy_neuron", "natural"))
    share = found["share of neurons confirmed as entropy neurons", None]
    assert value_of(share) == 1 / 32
    assert len(share.sums) == 1  # no interval


def test_of_the_planted_neurons_exactly_the_entropy_neuron_is_discovered():
    from soluscope.controls.entropy_neuron import ENTROPY_NEURON

    run = control_run("entropy_neuron", "natural")
    table = entropy_neurons.measure(run).neurons
    assert table["is entropy neuron"].nonzero().flatten().tolist() == [ENTROPY_NEURON]
    assert table["TE - DE"].abs().argmax() == ENTROPY_NEURON
    assert table["DE"][ENTROPY_NEURON].abs() < 1e-10
    assert table["null share, lowest 1%"].argmax() == ENTROPY_NEURON
    assert table["null share, lowest 1%"][ENTROPY_NEURON] > 1 - 1e-9
    assert table["LogitVar"].argmin() == ENTROPY_NEURON
    assert table["W_out norm"].argmax() == ENTROPY_NEURON
