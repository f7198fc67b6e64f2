"""Facts about every variant in the folder."""

import importlib
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_config, train_silently
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope import plugins
from soluscope.config import load_config
from soluscope.data.cache import prepare
from soluscope.errors import UserError
from soluscope.hooked.convert import load_untrained
from soluscope.norms import (
    DetachedLayerNorm,
    DynamicTanh,
    FrozenBosLayerNorm,
    LayerNorm,
    RunningLayerNorm,
    StaticNorm,
    gain_matching_rms,
)
from soluscope.results import Step
from soluscope.runs.folder import Run
from soluscope.runs.weights import build_model
from soluscope.training.module import TrainingModule, parameter_groups
from soluscope.variants import chain_of, check_variant, twin_of
from soluscope.variants._parts import solu

pytestmark = pytest.mark.arithmetic

VARIANTS = plugins.names("soluscope.variants")
NORMS = {
    name: variant.build_norm(8, variant.params())
    for name in VARIANTS
    if (variant := plugins.pick("soluscope.variants", name)).build_norm
}
NORMED = [*NORMS]
ONE_SCALE = [name for name in VARIANTS if name not in NORMS or NORMS[name].one_scale]
WITH_GAIN = [name for name in NORMED if name in ONE_SCALE]
PER_TOKEN = [name for name, norm in NORMS.items() if norm.eps is not None]
STATIC = [name for name in WITH_GAIN if name not in PER_TOKEN]
CENTRED = [name for name in WITH_GAIN if NORMS[name].centres]
SOLU = [name for name in VARIANTS if plugins.pick("soluscope.variants", name).nonlinearity is solu]
D_VOCAB, BOS = 500, 0


def rough_model(name, dtype=torch.float32, *words):
    """Return an untrained model whose gains, biases and weights all differ from their initial values."""
    model = build_model(load_config([f"variant={name}", "size=tiny", *words]), D_VOCAB).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise.to(dtype)
    norm = model.mlp(0).ln
    if isinstance(norm, StaticNorm):
        norm.gain.fill_(20.0)
    if isinstance(norm, FrozenBosLayerNorm):
        norm.bos_gain.fill_(35.0)
    return model.eval()


def some_tokens(n_rows=3, ctx=32):
    tokens = torch.randint(3, D_VOCAB, (n_rows, ctx), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = BOS
    return tokens


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(VARIANTS, 2)))
def test_variants_of_one_seed_start_from_the_same_values_in_every_common_tensor(left, right):
    states = [
        dict(
            build_model(
                load_config([f"variant={v}", "size=tiny", "seed=3"]), 300
            ).named_parameters()
        )
        for v in (left, right)
    ]
    common = states[0].keys() & states[1].keys()
    assert {"embed.W_E", "blocks.0.mlp.W_in", "blocks.0.mlp.W_out", "unembed.W_U"} <= common
    assert all(torch.equal(states[0][name], states[1][name]) for name in common)


def test_another_seed_starts_from_other_values():
    models = [
        build_model(load_config(["variant=solu", "size=tiny", f"seed={s}"]), 300) for s in (0, 1)
    ]
    assert not torch.equal(models[0].mlp(0).W_in, models[1].mlp(0).W_in)


def test_initial_weights_have_the_recipes_standard_deviations():
    model = build_model(load_config(["variant=solu", "size=d128"]), 4096)
    assert model.mlp(0).W_in.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.pos_embed.W_pos.std().item() == pytest.approx(0.01, rel=0.02)
    assert model.mlp(0).b_in.abs().max().item() == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_a_token_does_not_see_those_after_it(name):
    model = rough_model(name, torch.float64)
    tokens = some_tokens()
    changed = tokens.clone()
    changed[:, 20:] = 7
    torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_is_the_mean_cross_entropy_over_targets_that_are_not_bos(name):
    model = rough_model(name, torch.float64)
    tokens = some_tokens()
    tokens[1, 9] = BOS
    log_p = model(tokens).log_softmax(-1)
    by_hand = [
        -log_p[row, pos, tokens[row, pos + 1]]
        for row in range(len(tokens))
        for pos in range(tokens.shape[1] - 1)
        if tokens[row, pos + 1] != BOS
    ]
    assert model.loss(tokens, BOS).item() == pytest.approx(
        torch.stack(by_hand).mean().item(), rel=1e-12
    )
    each = model.loss(tokens, BOS, reduction="none")
    assert each.shape == (3, 31)
    assert each[1, 8] == 0


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="older torch")
def test_chunked_loss_and_its_gradient_equal_the_plain_one(monkeypatch):
    model, tokens = rough_model("solu_ln", torch.float32), some_tokens()
    grads = []
    for limit in (2**60, 0):
        monkeypatch.setattr("soluscope.model.CHUNK_LOGITS_ABOVE", limit)
        model.zero_grad()
        loss = model.loss(tokens, BOS)
        loss.backward()
        grads.append((loss.item(), model.unembed.W_U.grad.clone(), model.mlp(0).W_in.grad.clone()))
    for plain, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(plain), torch.as_tensor(chunked), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_in_the_middle_is_never_computed_below_fp32(name, dtype):
    model, record = rough_model(name), {}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(some_tokens(), record)
    stages = [tensor for label, tensor in record.items() if ".mlp." in label]
    assert len(stages) >= 3
    assert all(tensor.dtype == torch.float32 for tensor in stages)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", NORMED)
def test_the_fast_norm_is_the_formula(name):
    norm = rough_model(name, torch.float64).mlp(0).ln
    mid = torch.rand(5, 128, dtype=torch.float64, generator=seeded()) / 128
    centred = norm.centred(mid)
    torch.testing.assert_close(
        norm(mid), norm.affine(centred / norm.denominator(centred)), rtol=1e-10, atol=1e-12
    )


def test_epsilon_by_kappa_is_kappa_over_d_mlp_squared():
    model = build_model(load_config(["variant=solu_ln", "size=tiny", "mid.kappa=42"]), 300)
    assert model.mlp(0).ln.eps == pytest.approx(42 / 128**2)
    solu_1l = load_config(["variant=solu_ln", "size=solu1l"])
    assert solu_1l.mid.epsilon(2048) == pytest.approx(1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_finite_gradient(name):
    model = rough_model(name, torch.float64)
    model.loss(some_tokens(), BOS).backward()
    for label, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, label
        assert parameter.grad.isfinite().all(), label
        assert parameter.grad.abs().max() > 0 or "attn.b_K" in label, label


def test_scale_without_gradient_has_the_outputs_of_layer_norm_and_the_gradient_at_a_constant_scale():
    mid = torch.rand(5, 8, dtype=torch.float64, generator=seeded()).requires_grad_()
    detached, live = DetachedLayerNorm(8, 1e-3).double(), LayerNorm(8, 1e-3).double()
    torch.testing.assert_close(detached(mid), live(mid), rtol=1e-12, atol=0)
    onto = torch.rand(5, 8, dtype=torch.float64, generator=seeded())
    scale = (mid.var(-1, correction=0, keepdim=True) + 1e-3).sqrt().detach()
    wanted = (onto - onto.mean(-1, keepdim=True)) / scale
    (here,) = torch.autograd.grad((detached(mid) * onto).sum(), mid)
    torch.testing.assert_close(here, wanted, rtol=1e-12, atol=1e-14)
    (there,) = torch.autograd.grad((live(mid) * onto).sum(), mid)
    assert not torch.allclose(there, wanted)


@pytest.mark.parametrize("name", ["solu_scalar", "solu_dyt"])
def test_learned_gain_starts_at_the_matched_gain_and_has_no_weight_decay(name):
    config = load_config([f"variant={name}", "size=tiny"])
    model = build_model(config, 300)
    norm = model.mlp(0).ln
    norm.gain.fill_(7.0)
    assert norm.present_gain().item() == 7.0
    with torch.no_grad():
        norm.log_factor.fill_(0.5)
    assert norm.present_gain().item() == pytest.approx(7 * math.exp(0.5))
    groups = parameter_groups(model, config)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(norm.log_factor)] == 0


def test_running_gain_follows_the_batches_in_training_alone():
    norm = RunningLayerNorm(8, eps=1e-3).double()
    norm.gain.fill_(7.0)
    batches = torch.rand(4, 2, 5, 8, dtype=torch.float64, generator=seeded())
    log_gain = math.log(7)
    for mid in batches:
        by_hand = np.log(1 / np.sqrt(mid.numpy().var(-1) + 1e-3)).mean()
        log_gain += 0.01 * (by_hand - log_gain)
        norm(mid)
        assert norm.present_gain().item() == pytest.approx(math.exp(log_gain), rel=1e-12)
    norm.eval()
    norm(batches[0])
    with torch.no_grad():
        norm.train()(batches[0])
    assert norm.present_gain().item() == pytest.approx(math.exp(log_gain), rel=1e-12)
    assert not norm.log_factor.requires_grad


def test_a_run_with_a_running_gain_keeps_it_and_begins_with_the_matched_one(tmp_path):
    run = Run(train_silently(tiny_config(tmp_path, "variant=solu_ema", "mid.kappa=4e-5")))
    norm = run.load_model().mlp(0).ln
    assert run.facts.gain == pytest.approx(norm.present_gain().item())
    assert norm.present_gain().item() != norm.gain.item()
    before = load_untrained(run, "cpu")
    assert before.blocks[0].mlp.ln.present_gain().item() == norm.gain.item()


@pytest.mark.parametrize("name", ["solu_ln", "solu_frozen_ln"])
def test_affine_false_is_the_norm_with_weights_one_and_biases_zero(name):
    config = load_config([f"variant={name}", "size=tiny", "mid.affine=false"])
    bare = build_model(config, D_VOCAB).mlp(0).ln
    full = build_model(load_config([f"variant={name}", "size=tiny"]), D_VOCAB).mlp(0).ln
    assert not [*bare.parameters()]
    for norm in (bare, full):
        if isinstance(norm, StaticNorm):
            norm.gain.fill_(3.0)
    mid = torch.rand(5, 128, generator=seeded()) / 128
    torch.testing.assert_close(bare(mid), full(mid))
    check_variant(name, config.mid, 128)


def test_affine_is_refused_where_the_norm_is_no_layer_norm():
    with pytest.raises(UserError, match="affine"):
        load_config(["variant=solu_rms", "size=tiny", "mid.affine=false"])


@pytest.mark.parametrize("name", STATIC)
def test_matched_gain_gives_the_output_the_rms_of_the_norm_it_is_matched_to(name):
    norm = rough_model(name).mlp(0).ln
    for parameter in norm.parameters():
        parameter.data = torch.full_like(parameter, float(parameter is getattr(norm, "w", None)))
    mid = torch.rand(64, 128, generator=seeded()).square() / 128
    for buffer in norm.buffers():
        buffer.fill_(gain_matching_rms(norm, mid, eps=1e-4))
    wanted = norm.matched_to(128, 1e-4)(mid)
    assert norm(mid).square().mean().item() == pytest.approx(
        wanted.square().mean().item(), rel=1e-4
    )


@pytest.mark.parametrize(
    ("name", "twin"),
    [(v, w) for v in VARIANTS if (w := plugins.pick("soluscope.variants", v).twin)],
)
def test_a_twin_has_the_centring_and_affine_part_of_its_norm_and_is_matched_to_it(name, twin):
    norm, static = NORMS[name], NORMS[twin]
    assert (static.centres, static.affine_part) == (norm.centres, norm.affine_part)
    assert static.matched_to.centres == norm.centres


def test_a_static_gain_that_nobody_set_gives_nan_not_a_number():
    model = build_model(load_config(["variant=solu_gain", "size=tiny"]), 300)
    assert model(some_tokens() % 300).isnan().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_chain_runs_from_a_root_to_the_variant_by_what_each_member_adds(name):
    variant = plugins.pick("soluscope.variants", name)
    *before, last = chain_of(name)
    assert last == Step(name, variant.adds if variant.after else "")
    assert tuple(before) == (chain_of(variant.after) if variant.after else ())
    assert bool(variant.adds) == bool(variant.after)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_twin_is_a_static_variant_with_the_same_nonlinearity(name):
    variant = plugins.pick("soluscope.variants", name)
    assert twin_of(name) == variant.twin
    if variant.twin:
        twin = plugins.pick("soluscope.variants", variant.twin)
        assert (variant.role, twin.role) == ("per_token", "static")
        assert twin.nonlinearity is variant.nonlinearity


def test_a_chain_in_a_circle_and_a_member_that_is_not_there_are_refused(monkeypatch):
    first, second = VARIANTS[:2]

    def edit(name, **fields):
        module = importlib.import_module(f"soluscope.variants.{name}")
        monkeypatch.setattr(module, "VARIANT", replace(module.VARIANT, **fields))

    edit(first, after=second)
    edit(second, after=first)
    with pytest.raises(UserError, match=f"is a circle \\({first} after {second} after {first}\\)"):
        chain_of(first)
    edit(second, after="solu_gian", twin="solu_gian")
    with pytest.raises(UserError, match=f"variant {second} has after='solu_gian': no variant"):
        chain_of(first)
    with pytest.raises(UserError, match=f"variant {second} has twin='solu_gian': no variant"):
        twin_of(second)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_computes_what_it_declares(name):
    config = load_config([f"variant={name}", "size=tiny"])
    check_variant(name, config.mid, config.model.d_mlp)


def middle_of(name, d_mlp, **params):
    """Return the function from pre to post of a variant in fp64, with weights and biases drawn at random."""
    variant = plugins.pick("soluscope.variants", name)
    settings = replace(variant.params(), **params)
    activation, norm = variant.activation(d_mlp, settings), variant.build_norm(d_mlp, settings)
    generator = seeded()
    for parameter in norm.parameters():
        parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    norm.double()
    return lambda pre: norm(activation(pre))


def some_pre(d_mlp=32):
    return torch.randn(6, d_mlp, dtype=torch.float64, generator=seeded())


def test_layer_norm_of_solu_is_that_of_x_exp_x_where_the_softmaxs_denominator_is_d_mlp():
    """Elhage et al. 2022, section 4.3, at one kappa; adding a constant to x sets the denominator."""
    solu_ln, ln_exp = middle_of("solu_ln", 32), middle_of("ln_exp", 32)
    pre = some_pre()
    at_n = pre - pre.logsumexp(-1, keepdim=True) + math.log(32)
    torch.testing.assert_close(ln_exp(at_n), solu_ln(at_n), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(ln_exp(pre), solu_ln(pre), rtol=1e-2)  # epsilon counts at kappa 41.9


def test_layer_norm_of_solu_is_that_of_x_exp_x_at_any_denominator_without_epsilon():
    solu_ln, ln_exp = (middle_of(name, 32, kappa=1e-14) for name in ("solu_ln", "ln_exp"))
    torch.testing.assert_close(ln_exp(some_pre()), solu_ln(some_pre()), rtol=1e-10, atol=1e-10)


def test_layer_norm_of_solu_is_that_of_x_exp_x_with_each_tokens_own_epsilon():
    solu_ln = middle_of("solu_ln", 32, eps=1e-3)
    for pre in some_pre():
        z = pre.exp().sum().item()
        ln_exp = middle_of("ln_exp", 32, eps=1e-3 * (z / 32) ** 2)
        torch.testing.assert_close(ln_exp(pre), solu_ln(pre), rtol=1e-12, atol=1e-14)


def test_x_exp_x_is_computed_neuron_by_neuron_and_held_at_e_to_the_30():
    expu = plugins.pick("soluscope.variants", "expu").activation(32, None)
    pre = some_pre().requires_grad_()
    torch.testing.assert_close(expu(pre), pre * pre.exp() / 32, rtol=1e-14, atol=0)
    (gradient,) = torch.autograd.grad(expu(pre).sum(), pre)
    torch.testing.assert_close(gradient, (1 + pre) * pre.exp() / 32, rtol=1e-13, atol=1e-15)
    far = torch.tensor([-1e3, 0.0, 31.0, 1e3], requires_grad=True)
    values = expu(far)
    wanted = torch.tensor([0, 0, 31 * math.exp(30) / 32, 1e3 * math.exp(30) / 32])
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(LayerNorm(4, 1e-5)(values).square().sum(), far)
    assert gradient.isfinite().all()


def test_blocks_are_separate_models_of_solu_and_layer_norm():
    """Each block of 8 neurons computes what solu_ln computes with 8 neurons, its own weights and the same kappa."""
    block, solu_ln = (
        plugins.pick("soluscope.variants", name) for name in ("solu_block", "solu_ln")
    )
    norm = block.build_norm(32, block.params(kappa=0.5, n_blocks=4)).double()
    for parameter in norm.parameters():
        parameter.data = torch.rand(32, dtype=torch.float64, generator=seeded())
    pre = some_pre()
    post = norm(block.activation(32, block.params(n_blocks=4))(pre))
    one = solu_ln.build_norm(8, solu_ln.params(kappa=0.5)).double()
    for start in range(0, 32, 8):
        part = slice(start, start + 8)
        one.w.data, one.b.data = norm.w[part].detach(), norm.b[part].detach()
        torch.testing.assert_close(post[:, part], one(solu(pre[:, part])), rtol=1e-12, atol=1e-14)


def test_the_dose_of_blocks_is_epsilon_times_the_square_of_their_width():
    params = plugins.pick("soluscope.variants", "solu_block").params(kappa=32, n_blocks=4)
    assert params.epsilon(128) == pytest.approx(32 / 32**2)
    assert params.dose(128) == pytest.approx(32)


@pytest.mark.parametrize("n_blocks", [0, 5, 128])
def test_blocks_that_do_not_divide_the_neurons_are_refused(n_blocks):
    config = load_config(["variant=solu_block", "size=tiny", f"mid.n_blocks={n_blocks}"])
    with pytest.raises(UserError, match=rf"mid.n_blocks={n_blocks} does not cut d_mlp=128 into"):
        check_variant("solu_block", config.mid, 128)


def test_dynamic_tanh_is_linear_in_small_activations_and_bounded_by_its_weights():
    norm = DynamicTanh(4).double()
    norm.gain.fill_(3.0)
    with torch.no_grad():
        norm.log_factor.fill_(math.log(2))  # alpha is 6
        norm.w.copy_(torch.tensor([1.0, 2, 3, 4]))
        norm.b.fill_(0.5)
    mid = torch.tensor([0.0, 1e-9, 0.1, 50], dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([0.5, 0.5 + 12e-9, 0.5 + 3 * math.tanh(0.6), 4.5]).to(mid)
    torch.testing.assert_close(norm(mid), wanted, rtol=1e-6, atol=0)
    scale = norm.denominator(mid)
    by_hand = torch.tensor([1 / 6, 1 / 6, 0.1 / math.tanh(0.6), 50]).to(mid)
    torch.testing.assert_close(scale, by_hand, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(norm.affine(mid / scale).sum(), mid)
    torch.testing.assert_close(slope[:2], torch.tensor([6.0, 12]).double(), rtol=1e-9, atol=0)


def test_bos_has_its_own_constant_at_the_first_position_or_where_the_mask_says():
    norm = rough_model("solu_frozen_ln_bos", torch.float64).mlp(0).ln
    mid = torch.rand(2, 3, 128, dtype=torch.float64, generator=seeded())
    centred = mid - mid.mean(-1, keepdim=True)
    masks = torch.tensor([[1, 0, 0], [1, 0, 0]]), torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]])
    for marked, is_bos in ((False, masks[0]), (True, masks[1])):
        norm.is_bos = is_bos.bool() if marked else None
        gain = torch.where(is_bos[:, -3:, None] == 1, 35.0, 20.0)  # the mask's last three positions
        wanted = gain * centred * norm.w + norm.b
        torch.testing.assert_close(norm(mid), wanted, rtol=1e-12, atol=1e-14)


def test_each_of_two_constants_is_matched_to_its_own_tokens(tmp_path):
    """All BOS tokens are equal before training, so the matched constant is the gain that LayerNorm has there."""
    words = ("mid.kappa=.05", "seed=3")
    bos = tiny_config(tmp_path, "variant=solu_frozen_ln_bos", *words)
    cache = prepare(bos)
    norm = TrainingModule(bos, cache).model.mlp(0).ln
    live = TrainingModule(tiny_config(tmp_path, "variant=solu_ln", *words), cache).model
    one = TrainingModule(tiny_config(tmp_path, "variant=solu_frozen_ln", *words), cache).model
    record = {}
    live(torch.from_numpy(cache.rows("train", 32)[np.arange(2)]), record)
    gain = record["blocks.0.mlp.ln.hook_scale"][:, 0].reciprocal()
    torch.testing.assert_close(gain, norm.bos_gain.expand(2, 1), rtol=1e-4, atol=0)
    assert norm.gain == one.mlp(0).ln.gain
    assert abs(norm.bos_gain / norm.gain - 1) > 1e-3


def test_a_variant_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'solu_frozen_ln'"):
        plugins.pick("soluscope.variants", "solu_frozn_ln")


def test_solu_ln_is_transformer_lenss_own_model():
    """The reference uses TransformerLens's modules only, not our conversion, and takes all our weights."""
    model = rough_model("solu_ln", torch.float64, "mid.eps=1e-5")
    config = HookedTransformerConfig(
        n_layers=1, d_model=32, n_ctx=32, d_head=16, n_heads=2, d_mlp=128, d_vocab=D_VOCAB,
        act_fn="solu_ln", normalization_type="LN", eps=1e-5, dtype=torch.float64, device="cpu",
    )  # fmt: skip
    theirs = HookedTransformer(config)
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert all("attn" in name for name in missing)  # the masks of attention
    torch.testing.assert_close(theirs(some_tokens()), model(some_tokens()), rtol=1e-12, atol=1e-12)


def test_two_layers_are_allowed():
    config = load_config(["variant=solu_ln", "size=tiny", "model.n_layers=2"])
    model = build_model(config, D_VOCAB)
    record = {}
    model(some_tokens(), record)
    assert "blocks.1.mlp.hook_mid" in record
