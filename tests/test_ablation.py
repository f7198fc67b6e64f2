"""Exact ablation compared with hooks on the model, pair by pair; fp64 unless a test states otherwise."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from test_convert import hooked_for
from test_every_probe import stream_of
from test_every_variant import ONE_SCALE, some_tokens
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope.hooked.ablation import (
    Ablation,
    changes,
    disjoint_mean,
    loss_at_gain,
    loss_at_post,
    readout,
)
from soluscope.hooked.activations import observe

pytestmark = pytest.mark.arithmetic

STAGES, FINAL_NORMS = ("post", "mid", "pre"), ("live", "frozen")


def small_model(n_layers=1, act_fn="solu_ln", eps=1e-5, peaked=1.0, **options):
    """Return a HookedTransformer in fp64 in which every parameter is random."""
    config = HookedTransformerConfig(
        n_layers=n_layers, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_mlp=24, d_vocab=500,
        act_fn=act_fn, eps=eps, dtype=torch.float64, **{"normalization_type": "LN", **options},
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = 0.4 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    for name, parameter in model.named_parameters():
        if name.endswith(("ln.w", "ln1.w", "ln2.w", "ln_final.w")):
            parameter.data += 1
    model.blocks[-1].mlp.W_in.data *= peaked
    return model


MODELS = {variant: lambda variant=variant: hooked_for(variant)[1] for variant in ONE_SCALE} | {
    "final RMSNorm": lambda: small_model(final_rms=True),
    "RMSNorm everywhere": lambda: small_model(normalization_type="RMS"),
    "no mid norm, RMSNorm": lambda: small_model(act_fn="gelu", normalization_type="RMS"),
    "eps 1e-12": lambda: small_model(eps=1e-12),
    "one neuron holds all, eps 1e-12": lambda: small_model(eps=1e-12, peaked=60.0),
    "last of two layers": lambda: small_model(n_layers=2),
}


@pytest.fixture(scope="module", params=MODELS)
def seen(request):
    """Return a model, its tokens and the run observed on them."""
    model, tokens = MODELS[request.param](), some_tokens()
    return model, tokens, observe(model, stream_of(tokens))


@pytest.fixture(scope="module")
def solu_ln():
    model, tokens = hooked_for("solu_ln")[1], some_tokens()
    return model, tokens, observe(model, stream_of(tokens))


def all_of(run):
    return torch.arange(len(run.pos))


def name_of(model, stage):
    prefix = f"blocks.{model.cfg.n_layers - 1}.mlp.hook_"
    return prefix + ("post" if stage == "mid" and prefix + "mid" not in model.hook_dict else stage)


@torch.no_grad()
def hooked_log_p(model, tokens, stage, edit, final_norm="live"):
    """Return log-probabilities when `edit` changes the values at a stage of the last MLP in place."""

    def changed(values, hook):
        values = values.clone()
        edit(values)
        return values

    hooks = [(name_of(model, stage), changed)]
    if final_norm == "frozen":
        _, cache = model.run_with_cache(tokens, names_filter="ln_final.hook_scale")
        hooks.append(("ln_final.hook_scale", lambda scale, hook: cache["ln_final.hook_scale"]))
    return model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)


def losses_of(log_p, tokens):
    """Return per-token losses, nan at the end of each row."""
    loss = -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.cat([loss, loss.new_full((len(tokens), 1), torch.nan)], dim=1)


def nothing(values):
    pass


def to_dtype(value, dtype):
    """Return a run with its numbers in another precision."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if not is_dataclass(value):
        return value
    return replace(
        value, **{f.name: to_dtype(getattr(value, f.name), dtype) for f in fields(value)}
    )


def check(model, tokens, stage, values, found, final_norm="live", n_neurons=5, atol=1e-10):
    """Compare `n_neurons` pairs of each token in `found` [token neuron] with hooked forward passes.

    A pass edits one neuron at every token: in the last layer, an edit changes no logits of other tokens.
    """
    values = torch.as_tensor(values, dtype=torch.float64).expand(found.shape)
    before = losses_of(hooked_log_p(model, tokens, stage, nothing), tokens)
    generator = torch.Generator().manual_seed(5)
    neurons = torch.rand(found.shape, generator=generator).argsort(1)[:, :n_neurons]
    for neuron in neurons.T[..., None]:  # [token 1]
        there, at = neuron.view(*tokens.shape, 1), values.gather(1, neuron)

        def edit(seen, there=there, at=at):
            seen.scatter_(-1, there, at.view(there.shape).to(seen.dtype))

        after = losses_of(hooked_log_p(model, tokens, stage, edit, final_norm), tokens)
        torch.testing.assert_close(
            found.gather(1, neuron).double().view(tokens.shape), after - before,
            rtol=atol, atol=atol, equal_nan=True,
        )  # fmt: skip


# --- one pair -------------------------------------------------------------------------------------


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_edit_is_what_brute_force_hooks_give(seen, stage, final_norm):
    model, tokens, run = seen
    exact = getattr(Ablation(run, final_norm), stage)
    for values in (0.0, disjoint_mean(run, stage)):
        found = exact(all_of(run), values)
        assert found.view(*tokens.shape, -1)[:, -1].isnan().all()
        check(model, tokens, stage, values, found, final_norm)


@pytest.mark.parametrize("stage", STAGES)
def test_large_edits_too(seen, stage):
    model, tokens, run = seen
    values = 4 * torch.randn(run.post.shape, generator=torch.Generator().manual_seed(6)).double()
    check(model, tokens, stage, values, getattr(Ablation(run), stage)(all_of(run), values))


@pytest.mark.parametrize("stage", STAGES)
def test_in_fp32_every_edit_is_within_1e_4_nats_of_fp64(seen, stage):
    model, tokens, run = seen
    found = getattr(Ablation(to_dtype(run, torch.float32)), stage)(all_of(run))
    assert found.dtype == torch.float32
    check(model, tokens, stage, 0.0, found, atol=1e-4)


def test_the_neuron_that_holds_all_is_ablated_without_cancellation(seen):
    """If one activation makes up nearly all of the norm, the remainder without it is far smaller."""
    model, tokens, run = seen
    top = run.mid.abs().argmax(-1)
    before = losses_of(hooked_log_p(model, tokens, "mid", nothing), tokens)
    for stage, value in (("mid", 0.0), ("pre", -3.0)):
        found = getattr(Ablation(run), stage)(all_of(run), value)
        there = top.view(*tokens.shape, 1)

        def edit(values, there=there, value=value):
            values.scatter_(-1, there, value)

        after = losses_of(hooked_log_p(model, tokens, stage, edit), tokens)
        chosen = found.gather(1, top[:, None]).view(tokens.shape)
        torch.testing.assert_close(chosen, after - before, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_an_edit_beyond_what_exponentials_hold_is_still_exact(solu_ln):
    """With ln_final frozen, logits grow with the edit, here to thousands of nats."""
    model, tokens, run = solu_ln
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        found = Ablation(to_dtype(run, dtype), "frozen").post(all_of(run), 5e3)
        assert found[0].abs().max() > 1e3
        check(model, tokens, "post", 5e3, found, "frozen", n_neurons=3, atol=tolerance)


def test_only_some_neurons_and_tokens_give_the_same_columns_and_rows(solu_ln):
    _, _, run = solu_ln
    tokens, neurons = torch.tensor([40, 3, 17]), torch.tensor([5, 90, 2])
    exact, means = Ablation(run), disjoint_mean(run, "mid")
    whole = exact.mid(all_of(run), means)[tokens][:, neurons]
    some = exact.mid(tokens, means[tokens][:, neurons], neurons=neurons)
    torch.testing.assert_close(some, whole, rtol=0, atol=1e-13)
    by_neuron = exact.post(tokens, torch.arange(3.0), neurons=neurons)
    torch.testing.assert_close(by_neuron[:, 1], exact.post(tokens, 1.0)[:, 90], rtol=0, atol=1e-13)
    assert exact.post(tokens[:0]).shape == (0, 128)


def test_blocks_and_tiles_change_no_number(solu_ln, monkeypatch):
    _, _, run = solu_ln
    exact, values = Ablation(run), disjoint_mean(run, "post")
    whole = [exact.post(all_of(run), values), *exact.bounds(all_of(run), values)]
    whole += [exact.top(all_of(run), 9, values).change, exact.above(all_of(run), 0.1).change]
    monkeypatch.setattr(readout, "NUMBERS_AT_ONCE", 8 * 500 * 7)
    monkeypatch.setitem(readout.TILE, "cpu", 500 * 11)
    parts = [exact.post(all_of(run), values), *exact.bounds(all_of(run), values)]
    parts += [exact.top(all_of(run), 9, values).change, exact.above(all_of(run), 0.1).change]
    for part, wanted in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-13, equal_nan=True)


def test_values_of_a_wrong_shape_are_refused(solu_ln):
    _, _, run = solu_ln
    with pytest.raises(
        ValueError, match=r"shape \(7,\): give a scalar, one value for each of the 128"
    ):
        Ablation(run).post(torch.arange(4), torch.zeros(7))


def test_a_gain_that_varies_without_an_epsilon_is_refused_before_the_norm(solu_ln):
    _, _, run = solu_ln
    with pytest.raises(ValueError, match="mid: the mid norm's gain varies"):
        Ablation(replace(run, eps=None)).mid(torch.arange(4))


# --- sets, means and other tokens -----------------------------------------------------------------


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
def test_sets_of_neurons_are_edited_jointly(seen, final_norm):
    model, tokens, run = seen
    lowest = run.post.abs().argsort(-1)[:, : run.post.shape[1] // 2]
    for post in (run.post.scatter(-1, lowest, 0.0), torch.zeros_like(run.post), run.post * 2 + 1):
        by_row = post.view(*tokens.shape, -1)
        log_p = hooked_log_p(model, tokens, "post", lambda x, to=by_row: x.copy_(to), final_norm)
        found = loss_at_post(run, post, final_norm).view(tokens.shape)
        torch.testing.assert_close(
            found, losses_of(log_p, tokens), rtol=0, atol=1e-10, equal_nan=True
        )


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
def test_loss_at_a_gain_is_what_hooks_give(seen, final_norm):
    model, tokens, run = seen
    factors = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
    found = loss_at_gain(run, run.gain[:, None] * factors, final_norm)
    for column, factor in zip(found.T, factors, strict=True):
        static = run.readout.beta

        def edit(post, factor=factor, static=static):
            post.sub_(static).mul_(factor).add_(static)

        wanted = losses_of(hooked_log_p(model, tokens, "post", edit, final_norm), tokens)
        torch.testing.assert_close(
            column.view(tokens.shape), wanted, rtol=0, atol=1e-10, equal_nan=True
        )


def test_a_disjoint_mean_is_over_all_other_strings_without_bos(solu_ln):
    _, _, run = solu_ln
    for stage in STAGES:
        found = disjoint_mean(run, stage)
        for string in range(3):
            others = getattr(run, stage)[(run.string != string) & (run.pos > 0)].mean(0)
            rows = found[run.string == string]
            torch.testing.assert_close(rows, others.expand_as(rows), rtol=1e-12, atol=1e-14)
    assert disjoint_mean(run.subset(run.string == 0), "post").isnan().all()


def test_one_resampled_draw_is_the_edit_to_some_token_of_another_string(solu_ln):
    _, _, run = solu_ln
    exact, neurons = Ablation(run), torch.tensor([4, 77])
    tokens = torch.tensor([3, 40, 70])
    found = exact.resample(tokens, 1, seed=0, neurons=neurons)
    sources = []
    for row, token in enumerate(tokens):
        others = ((run.string != run.string[token]) & (run.pos > 0)).nonzero().squeeze(-1)
        changes = torch.cat(
            [exact.post(token[None], run.post[i, neurons], neurons=neurons) for i in others]
        )
        difference = (changes - found[row]).abs().sum(-1)
        assert difference.min() < 1e-13
        sources.append(others[difference.argmin()])
        if row == 0:
            mean, sd = changes.mean(0), changes.std(0)
            many = exact.resample(token[None], 400, seed=1, neurons=neurons)[0]
            assert ((many - mean).abs() < 4 * sd / 20).all()
    again = exact.resample(tokens[1:2], 1, seed=0, neurons=neurons)
    torch.testing.assert_close(again[0], found[1], rtol=0, atol=1e-14)


def test_resampling_averages_its_draws_and_needs_another_string(solu_ln):
    _, _, run = solu_ln
    exact, tokens, neurons = Ablation(run), all_of(run)[::7], torch.arange(0, 128, 9)
    sources = changes._tokens_of_others(run, 5, seed=3)[tokens]
    draws = [exact.post(tokens, run.post[i][:, neurons], neurons=neurons) for i in sources.T]
    found = exact.resample(tokens, 5, seed=3, neurons=neurons)
    wanted = torch.stack(draws).mean(0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13, equal_nan=True)
    close = exact.resample(tokens, 5, seed=3, tolerance=1e-3, neurons=neurons)
    assert 0 < (close - found).abs().nan_to_num().max() < 1e-3
    assert ((run.string[sources] != run.string[tokens, None]) & (run.pos[sources] > 0)).all()
    alone = run.subset(run.string == 0)
    assert Ablation(alone).resample(torch.arange(3), 2, 0).isnan().all()


# --- bounds and queries ---------------------------------------------------------------------------


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
@pytest.mark.parametrize("stage", STAGES)
def test_the_interval_always_holds_the_change(seen, stage, final_norm):
    """All pairs, for edits from tiny to far outside the activations. The tests above check the change itself."""
    _, _, run = seen
    tokens = all_of(run)[run.target >= 0]
    exact, generator = Ablation(run, final_norm), torch.Generator().manual_seed(7)
    noise = torch.randn(len(tokens), run.post.shape[1], generator=generator, dtype=torch.float64)
    for size in (1e-3, 1.0, 20.0):
        values = getattr(run, stage)[tokens] + size * noise
        bounds = exact.bounds(tokens, values, stage)
        change = getattr(exact, stage)(tokens, values)
        rounding = 1e-14 * (1 + change.abs())  # error of the sum of exponentials
        assert (bounds.low <= change + rounding).all()
        assert (change - rounding <= bounds.high).all()
        if size == 1e-3:  # for small delta the expansion is accurate
            # For a smaller second cumulant, the change minus its first order is mostly rounding error.
            measurable = bounds.second > 1e3 * rounding
            by_two = bounds.first + bounds.second / 2
            error = ((change - by_two).abs() / bounds.second)[measurable]
            assert measurable.any()
            assert error.median() < 1e-2


def test_in_fp32_the_interval_holds_what_evaluation_in_fp64_gives(seen):
    _, _, run = seen
    tokens = all_of(run)[run.target >= 0]
    single = to_dtype(run, torch.float32)
    wanted = Ablation(to_dtype(single, torch.float64)).post(tokens)
    bounds = Ablation(single).bounds(tokens)
    rounding = 1e-14 * (1 + wanted.abs())  # error of the sum of exponentials in fp64
    assert (bounds.low <= wanted + rounding).all()
    assert (wanted - rounding <= bounds.high).all()


def test_no_pair_is_off_by_more_than_the_tolerance(seen):
    _, _, run = seen
    exact = Ablation(run)
    for stage in STAGES:
        wanted = getattr(exact, stage)(all_of(run))
        for tolerance in (1e-2, 1e-4, 0.0):
            found = getattr(exact, stage)(all_of(run), 0.0, tolerance)
            torch.testing.assert_close(
                found, wanted, rtol=0, atol=tolerance + 1e-13, equal_nan=True
            )
        decided = exact.bounds(all_of(run), kind=stage)
        assert ((decided.high - decided.low) < 2e-2).float().mean() > 0.2


@pytest.mark.parametrize("k", [1, 7, 300])
def test_the_top_pairs_are_those_of_brute_force(seen, k):
    _, _, run = seen
    tokens, exact = all_of(run)[1::2].contiguous(), Ablation(run)
    values = disjoint_mean(run, "post")[tokens]
    whole = exact.post(tokens, values).nan_to_num()
    found = exact.top(tokens, k, values)
    wanted = whole.abs().flatten().topk(k).values
    torch.testing.assert_close(found.change.abs(), wanted, rtol=0, atol=1e-13)
    row = torch.searchsorted(tokens, found.token)
    torch.testing.assert_close(whole[row, found.neuron], found.change, rtol=0, atol=1e-13)
    assert (
        k <= found.n_evaluated < found.n_pairs == (run.target[tokens] >= 0).sum() * whole.shape[1]
    )


def test_all_pairs_above_a_threshold_are_found_and_no_other(seen):
    _, _, run = seen
    exact = Ablation(run)
    whole = exact.post(all_of(run)).nan_to_num()
    for share in (0.5, 0.9, 0.999):
        threshold = float(whole.abs().quantile(share))
        found = exact.above(all_of(run), threshold)
        assert len(found.token) == (whole.abs() > threshold).sum()
        truth = whole[found.token, found.neuron]
        assert (truth.abs() > threshold).all()
        assert ((found.change - truth).abs() <= found.error + 1e-13).all()
        assert found.n_evaluated < found.n_pairs


def test_fewer_pairs_than_asked_for_are_all_there_are(solu_ln):
    _, _, run = solu_ln
    exact = Ablation(run)
    assert len(exact.top(torch.tensor([5]), 1000).token) == 128
    assert len(exact.above(torch.tensor([5]), 1e6).token) == 0
    assert len(exact.top(torch.tensor([31]), 3).token) == 0  # without a target
    with pytest.raises(ValueError, match="k=0"):
        exact.top(all_of(run), 0)


# --- other quantities -----------------------------------------------------------------------------


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
def test_the_gradient_is_autograds(seen, final_norm):
    model, tokens, run = seen
    post = run.post.view(*tokens.shape, -1).clone().requires_grad_()
    hooks = [(name_of(model, "post"), lambda values, hook: post)]
    if final_norm == "frozen":
        _, cache = model.run_with_cache(tokens)
        hooks.append(("ln_final.hook_scale", lambda s, hook: cache["ln_final.hook_scale"].detach()))
    losses = losses_of(model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1), tokens)
    losses[:, :-1].sum().backward()
    found = Ablation(run, final_norm).gradient(all_of(run))
    with_target = run.target >= 0
    wanted = post.grad.flatten(0, 1)
    torch.testing.assert_close(found[with_target], wanted[with_target], rtol=0, atol=1e-11)
    assert found[~with_target].isnan().all()


@pytest.mark.parametrize("final_norm", FINAL_NORMS)
def test_changes_of_entropy_and_target_logit_are_what_hooks_give(seen, final_norm):
    model, tokens, run = seen
    exact = Ablation(run, final_norm)
    for value in (0.0, 6.0):
        entropy = exact.entropy(all_of(run), value).view(*tokens.shape, -1)
        logit = exact.target_logit(all_of(run), value).view(*tokens.shape, -1)
        before = hooked_log_p(model, tokens, "post", nothing)
        for pos, neuron in ((0, 1), (9, 20), (30, 11)):

            def edit(values, pos=pos, neuron=neuron, value=value):
                values[:, pos, neuron] = value

            after = hooked_log_p(model, tokens, "post", edit, final_norm)
            change = (-(log_p.exp() * log_p).sum(-1)[:, pos] for log_p in (after, before))
            torch.testing.assert_close(
                entropy[:, pos, neuron], torch.sub(*change), rtol=0, atol=1e-10
            )
            centred = ((x - x.mean(-1, keepdim=True))[:, pos] for x in (after, before))
            wanted = torch.sub(*centred).gather(-1, tokens[:, pos + 1, None]).squeeze(-1)
            torch.testing.assert_close(logit[:, pos, neuron], wanted, rtol=0, atol=1e-10)


def test_entropy_beyond_what_exponentials_hold(solu_ln):
    model, tokens, run = solu_ln
    found = Ablation(run, "frozen").entropy(torch.tensor([9]), 5e3)[0, 20]
    after, before = (
        hooked_log_p(model, tokens, "post", edit, "frozen")[0, 9]
        for edit in (lambda values: values[0, 9, 20].fill_(5e3), nothing)
    )
    wanted = -torch.special.entr(before.exp()).sum() + torch.special.entr(after.exp()).sum()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
