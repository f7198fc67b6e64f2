"""Conversion of a run folder to a HookedTransformer: the same function, with all of TransformerLens's hooks."""

import dataclasses

import pytest
import torch
from test_every_variant import (
    BOS,
    CENTRED,
    D_VOCAB,
    NORMED,
    NORMS,
    ONE_SCALE,
    STATIC,
    VARIANTS,
    WITH_GAIN,
    rough_model,
    some_tokens,
)
from transformer_lens import HookedTransformerConfig, TransformerLensKeyValueCache

from soluscope import plugins
from soluscope.errors import UserError
from soluscope.hooked.convert import SoluscopeTransformer, check_agreement, load, to_hooked
from soluscope.runs.weights import Facts, lineage

pytestmark = pytest.mark.arithmetic


def facts_for(name):
    variant = plugins.pick("soluscope.variants", name)
    return Facts(
        run=f"{name}-s0", arm=name, variant=name, study="test", seed=0, d_model=32, n_heads=2,
        d_mlp=128, n_layers=1, ctx=32, d_vocab=D_VOCAB, hooked_act_fn=variant.hooked_act_fn,
        ln_eps=1e-5, mid_norm=None, eps=None, gain=None, bos=BOS, eos=1, pad=2, tokenizer_hash="",
        lr=1e-3, steps=1, tokens=1, precision="fp32", device="cpu", config="", commit="", versions={},
        **lineage(name),
    )  # fmt: skip


def hooked_for(name, dtype=torch.float64):
    trained = rough_model(name, dtype)
    return trained, to_hooked(trained, facts_for(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_agrees_to_1e_10_in_fp64(name):
    trained, hooked = hooked_for(name)
    assert check_agreement(trained, hooked) < 1e-10
    record, tokens = {}, some_tokens()
    logits = trained(tokens, record)
    hooked_logits, cache = hooked.run_with_cache(tokens)
    torch.testing.assert_close(hooked_logits, logits, rtol=1e-10, atol=1e-10)
    compared = [key for key in record if key in cache]
    assert {"blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_post"} <= set(compared)
    assert ("blocks.0.mlp.hook_mid" in compared) == (name in NORMED)
    assert ("blocks.0.mlp.ln.hook_scale" in compared) == (name in NORMED)
    for key in compared:
        torch.testing.assert_close(cache[key], record[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_stage_agrees_to_1e_4_in_fp32(name):
    trained, hooked = hooked_for(name, torch.float32)
    assert check_agreement(trained, hooked) < 1e-4
    tokens = some_tokens()
    assert hooked(tokens, return_type="loss").item() == pytest.approx(
        trained.loss(tokens, BOS).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", NORMED)
def test_hooks_come_in_transformer_lenss_order(name):
    _, hooked = hooked_for(name)
    _, cache = hooked.run_with_cache(some_tokens())
    names = list(cache.keys())
    wanted = [
        "blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_mid", "blocks.0.mlp.ln.hook_scale",
        "blocks.0.mlp.ln.hook_normalized", "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out",
        "ln_final.hook_scale",
    ]  # fmt: skip
    assert sorted(wanted, key=names.index) == wanted
    assert cache["blocks.0.mlp.ln.hook_scale"].shape == (3, 32, 1 if name in ONE_SCALE else 128)


@pytest.mark.parametrize("name", [n for n in NORMED if NORMS[n].bos_apart])
def test_bos_keeps_its_constant_behind_padding_and_in_a_row_that_is_read_in_parts(name):
    _, hooked = hooked_for(name)
    tokens = some_tokens()
    whole = hooked(tokens)
    padding = torch.full((3, 4), 2)
    mask = torch.cat([padding * 0, torch.ones_like(tokens)], dim=1)[:, :32]
    padded = hooked(torch.cat([padding, tokens], dim=1)[:, :32], attention_mask=mask)
    torch.testing.assert_close(padded[:, 4:], whole[:, :28], rtol=1e-9, atol=1e-9)
    cache = TransformerLensKeyValueCache.init_cache(hooked.cfg, "cpu", 3)
    parts = [
        hooked(part, past_kv_cache=cache, attention_mask=torch.ones_like(part))
        for part in tokens.split((10, 1, 21), dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hooked(tokens), whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", WITH_GAIN)
def test_the_gain_is_one_over_hook_scale_and_normalized_comes_before_gamma_and_beta(name):
    _, hooked = hooked_for(name)
    _, cache = hooked.run_with_cache(some_tokens())
    mid, scale = cache["blocks.0.mlp.hook_mid"], cache["blocks.0.mlp.ln.hook_scale"]
    centred = mid - mid.mean(-1, keepdim=True) if name in CENTRED else mid
    torch.testing.assert_close(cache["blocks.0.mlp.ln.hook_normalized"], centred / scale)
    norm = hooked.blocks[0].mlp.ln
    if name in STATIC:
        gain = 20 * (norm.log_factor.exp().item() if norm.learned else 1)
        torch.testing.assert_close(scale[:, 1:], torch.full_like(scale[:, 1:], 1 / gain))
        at_bos = 35 if norm.bos_apart else gain
        torch.testing.assert_close(scale[:, 0], torch.full_like(scale[:, 0], 1 / at_bos))
    gamma, beta = getattr(norm, "w", 1.0), getattr(norm, "b", 0.0)
    post = cache["blocks.0.mlp.ln.hook_normalized"] * gamma + beta
    torch.testing.assert_close(cache["blocks.0.mlp.hook_post"], post)


@pytest.mark.parametrize("name", NORMED)
def test_patching_the_scale_reaches_the_logits(name):
    _, hooked = hooked_for(name)
    tokens = some_tokens()
    double = lambda scale, hook: scale * 2  # noqa: E731
    patched = hooked.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.ln.hook_scale", double)])
    assert (patched - hooked(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_output_scale_multiplies_what_the_mlp_writes_and_is_folded_into_w_out(name):
    scaled = rough_model(name, torch.float64, "model.mlp_out_scale=0.3")
    plain = rough_model(name, torch.float64)
    plain.mlp(0).W_out.data *= 0.3
    torch.testing.assert_close(scaled(some_tokens()), plain(some_tokens()), rtol=1e-12, atol=1e-12)
    state = scaled.folded()
    assert torch.equal(state["blocks.0.mlp.W_out"], plain.mlp(0).W_out)
    same = {key for key, tensor in scaled.state_dict().items() if torch.equal(tensor, state[key])}
    assert same == state.keys() - {"blocks.0.mlp.W_out"}
    hooked = to_hooked(scaled, facts_for(name))
    torch.testing.assert_close(hooked(some_tokens()), scaled(some_tokens()), rtol=1e-10, atol=1e-10)


def test_a_model_that_computes_something_else_is_refused_with_where_and_by_how_much():
    trained = rough_model("solu_ln")
    facts = dataclasses.replace(facts_for("solu_ln"), ln_eps=1e-2)
    with pytest.raises(UserError, match=r"disagrees with the trained model: \S+ differs by \d"):
        to_hooked(trained, facts)


def test_another_epsilon_in_the_mid_norm_is_refused():
    trained, hooked = hooked_for("solu_ln")
    hooked.blocks[0].mlp.ln.eps = 1e-2
    with pytest.raises(UserError, match="differs by"):
        check_agreement(trained, hooked)


def test_a_tensor_without_a_place_is_refused():
    trained = rough_model("solu")
    trained.register_buffer("surplus", torch.zeros(1))
    with pytest.raises(UserError, match=r"unexpected tensors \['surplus'\]"):
        to_hooked(trained, facts_for("solu"))


def test_a_norm_that_transformer_lens_would_leave_out_is_refused():
    trained = rough_model("solu_ln")
    facts = dataclasses.replace(
        facts_for("solu_ln"), hooked_act_fn="solu"
    )  # without _ln, no hook_mid
    with pytest.raises(UserError, match=r"has no blocks.0.mlp.\S+: check hooked_act_fn"):
        to_hooked(trained, facts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_finished_run_loads_with_tokenizer_and_facts_and_generates(tiny_study, variant):
    model = load(tiny_study / f"{variant}-s0")
    assert model.facts.variant == variant
    tokens = model.to_tokens("def f(x):")
    assert tokens[0, 0] == model.facts.bos
    assert model.to_string(tokens[0, 1:]) == "def f(x):"
    text = model.generate("import", max_new_tokens=3, verbose=False)
    assert text.startswith("<|BOS|>import") or text.startswith("import")
    _, cache = model.run_with_cache("def f(x):")
    assert cache["blocks.0.attn.hook_pattern"].shape[1] == model.facts.n_heads
    assert "blocks.0.hook_resid_post" in cache


def test_a_replaced_norm_moves_with_the_model_and_its_gain_is_the_one_used():
    trained, hooked = hooked_for("solu_gain", torch.float32)
    hooked = torch.nn.Module.to(hooked, torch.float64)
    norm = hooked.blocks[0].mlp.ln
    mid = torch.rand(1, 2, 128, dtype=torch.float64)
    assert norm(mid).dtype == torch.float64
    norm.gain.fill_(3.0)
    torch.testing.assert_close(norm(mid), 3 * mid)
    assert float(trained.mlp(0).ln.gain) == 20


REWRITES = (
    "fold_layer_norm", "center_writing_weights", "center_unembed", "fold_value_biases",
    "refactor_factored_attn_matrices",
)  # fmt: skip
"""Methods of HookedTransformer that return rewritten weights."""


def small_transformer(**settings):
    """Return an untrained SoluscopeTransformer with random weights and other settings of TransformerLens."""
    config = {
        "n_layers": 2, "d_model": 32, "n_ctx": 32, "d_head": 16, "n_heads": 2, "d_mlp": 128, "d_vocab": D_VOCAB,
        "act_fn": "solu_ln", "normalization_type": "LN", "init_weights": False, "device": "cpu",
    }  # fmt: skip
    model = SoluscopeTransformer(HookedTransformerConfig(**config | settings), move_to_device=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.5)
    model.facts = facts_for("solu_ln")
    return model


def log_probs(model, tokens):
    return model(tokens).log_softmax(-1)


@pytest.mark.parametrize("name", VARIANTS)
def test_processing_the_weights_leaves_every_log_probability_and_the_mid_norm_unchanged(name):
    _, hooked = hooked_for(name, torch.float32)
    tokens = some_tokens()
    before, (_, cache) = log_probs(hooked, tokens), hooked.run_with_cache(tokens)
    hooked.process_weights_(fold_ln=True, refactor_factored_attn_matrices=True)
    assert hooked.cfg.normalization_type == "LNPre"
    torch.testing.assert_close(log_probs(hooked, tokens), before, rtol=1e-4, atol=1e-4)
    _, folded = hooked.run_with_cache(tokens)
    assert {key for key in cache if ".mlp." in key} == {key for key in folded if ".mlp." in key}
    for key in cache:
        if ".mlp." in key:
            torch.testing.assert_close(folded[key], cache[key], rtol=1e-3, atol=1e-5)
    hooked.process_weights_()  # a second time changes nothing
    torch.testing.assert_close(log_probs(hooked, tokens), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", REWRITES)
@pytest.mark.parametrize("name", VARIANTS)
def test_rewritten_weights_give_the_same_log_probabilities(name, method):
    _, hooked = hooked_for(name)
    tokens = some_tokens()
    before = log_probs(hooked, tokens)
    hooked.load_state_dict(getattr(hooked, method)(hooked.state_dict()))
    torch.testing.assert_close(log_probs(hooked, tokens), before, rtol=1e-4, atol=1e-4)


def test_weights_of_another_run_are_processed_into_that_run():
    _, hooked = hooked_for("solu_ln")
    other, _ = hooked_for("solu_ln")
    with torch.no_grad():
        other.blocks[0].mlp.W_out.mul_(2)
    hooked.load_and_process_state_dict(other.state_dict())
    wanted = other(some_tokens()).log_softmax(-1)
    torch.testing.assert_close(log_probs(hooked, some_tokens()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"final_rms": True},  # the final norm does not centre
        {"positional_embedding_type": "shortformer"},  # positions are added after ln1
        {"d_mlp": 32},  # d_model and d_mlp cannot be distinguished by shape
        {"dtype": torch.bfloat16},
    ],
)
def test_processing_that_would_make_another_model_is_refused_and_changes_nothing(settings):
    model, tokens = small_transformer(**settings), some_tokens()
    before = model(tokens)
    for process in (model.process_weights_, lambda: model.fold_layer_norm(model.state_dict())):
        with pytest.raises(UserError, match=r"would make another model of solu_ln-s0|bfloat16"):
            process()
    assert torch.equal(model(tokens), before)


def test_weights_that_do_not_fit_are_not_processed():
    model = small_transformer()
    weights = model.state_dict()
    short = {name: tensor for name, tensor in weights.items() if name != "unembed.W_U"}
    for wrong in (short, weights | {"surplus": torch.zeros(1)}):
        with pytest.raises(UserError, match=r"do not fit the model: (unembed.W_U|surplus) is"):
            model.load_and_process_state_dict(wrong)
    weights = {name: tensor.clone() for name, tensor in weights.items()}
    model.process_weights_()
    with pytest.raises(UserError, match=r"ln1.b is \(32,\) where the model has none"):
        model.load_and_process_state_dict(weights)  # a folded model has no place for them


def test_the_weights_of_a_trained_model_are_not_drawn_again():
    with pytest.raises(UserError, match="init_weights would draw new matrices"):
        small_transformer().init_weights()


def test_input_beyond_ctx_is_refused_in_one_line():
    model = small_transformer()
    row = some_tokens()[:1]
    assert model(row).shape[1] == 32
    kwargs = {"stop_at_eos": False, "verbose": False, "use_past_kv_cache": False}
    assert (
        model.generate(row[:, :28], max_new_tokens=5, **kwargs).shape[1] == 33
    )  # the last is not read
    too_long = torch.cat([row, row], dim=1)
    for use in (
        lambda: model(too_long),
        lambda: model.run_with_cache(too_long),
        lambda: model.generate(too_long, max_new_tokens=1, **kwargs),
        lambda: model.generate(row, max_new_tokens=9, **kwargs),
    ):
        with pytest.raises(UserError, match=r"(33|64) tokens, and the model has ctx=32 positions"):
            use()


def test_generation_beyond_ctx_is_refused_in_one_line(tiny_study):
    model = load(tiny_study / "solu_ln-s0")
    with pytest.raises(UserError, match=r"33 tokens, and the model has ctx=32 positions"):
        model.generate("import", max_new_tokens=60, stop_at_eos=False, verbose=False)
    with pytest.raises(UserError, match="tokens, and the model has ctx=32 positions"):
        model.generate("import os\n" * 100, max_new_tokens=9, stop_at_eos=False, verbose=False)
