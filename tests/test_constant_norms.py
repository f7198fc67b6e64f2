"""Norms that lose their per-token scale: constants, stages, schedule, conversion, and models that lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import tiny_config
from test_convert import facts_for
from test_every_variant import BOS, D_VOCAB, VARIANTS, rough_model, some_tokens

from soluscope.config import RemoveConfig, load_config
from soluscope.constant_norm import ConstantNorm, Stage, constant_norms
from soluscope.errors import UserError
from soluscope.evaluation.claims import _holds
from soluscope.hooked.ablation import loss_at_post
from soluscope.hooked.activations import observe
from soluscope.hooked.convert import check_agreement, to_hooked
from soluscope.norms import LayerNorm, StaticNorm
from soluscope.probes import Claim
from soluscope.results import Bounded
from soluscope.training.losing_norms import LosingNorms

EOS = 1
CONSTANT = ("model.norms=constant", "train.init_from=elsewhere")


def losing(name: str, dtype=torch.float64):
    """Return a variant's model whose norms can lose their scales, with the schedule of 40 steps."""
    model = rough_model(name, dtype, *CONSTANT)
    return model, LosingNorms(model, 40, BOS, EOS)


def without_scales(name: str, dtype=torch.float64):
    """Return the model after passes on some tokens and all removals."""
    model, schedule = losing(name, dtype)
    model.train()
    model.loss(some_tokens(), BOS)
    schedule.advance(40)
    return model.eval()


def rows_with_eos() -> torch.Tensor:
    tokens = some_tokens()
    tokens[0, 5] = tokens[2, 9] = EOS
    return tokens


def test_each_constant_is_the_running_mean_of_its_tokens_scales():
    norm = ConstantNorm.of(LayerNorm(4, 1e-5), 4).double().train()
    norm.stage = Stage.LIVE
    generator = torch.Generator().manual_seed(0)
    means = []
    for n_batch in range(12):
        mid = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
        is_bos = torch.tensor([True, False, False]).expand(2, 3)[..., None]
        is_eos = torch.zeros(2, 3, 1, dtype=torch.bool)
        is_eos[1, 2] = n_batch > 0  # the first batch has no EOS
        norm.marks = is_eos, is_bos
        norm(mid)
        sigma = np.sqrt(np.asarray(mid).var(-1) + 1e-5)
        content = [sigma[0, 1], sigma[0, 2], sigma[1, 1]] + [sigma[1, 2]] * (n_batch == 0)
        means.append((np.mean(content), sigma[1, 2], sigma[:, 0].mean()))

    def running(values: list[float]) -> float:
        mean = 0.0
        for place, value in enumerate(values):
            mean += max(1 / (place + 1), 0.1) * (value - mean)
        return mean

    content, eos, bos = (list(column) for column in zip(*means, strict=True))
    assert norm.constant.item() == pytest.approx(running(content))
    assert norm.eos_constant.item() == pytest.approx(running(eos[1:]))
    assert norm.bos_constant.item() == pytest.approx(running(bos))
    before = norm.constant.clone()
    with torch.no_grad():  # an evaluation moves nothing
        norm(torch.ones(2, 3, 4, dtype=torch.float64))
    assert torch.equal(norm.constant, before)


def test_each_stage_takes_the_constants_of_fewer_tokens():
    norm = ConstantNorm.of(LayerNorm(4, 1e-5), 4).double().eval()
    for name, value in (("constant", 2.0), ("eos_constant", 3.0), ("bos_constant", 5.0)):
        getattr(norm, name).fill_(value)
    norm.marks = (
        torch.tensor([[[False], [True], [False]]]),
        torch.tensor([[[True], [False], [False]]]),
    )
    mid = torch.arange(12.0, dtype=torch.float64).view(1, 3, 4) ** 2
    live = (mid.var(-1, correction=0) + 1e-5).sqrt().flatten().tolist()
    for stage, wanted in (
        (Stage.LIVE, live),
        (Stage.APART, [5, 3, 2]),
        (Stage.EOS, [5, 2, 2]),
        (Stage.ALL, [2, 2, 2]),
    ):
        norm.stage = stage
        scale = norm.denominator(norm.centred(mid))
        assert scale.flatten().tolist() == pytest.approx(wanted)
        centred = mid - mid.mean(-1, keepdim=True)
        torch.testing.assert_close(norm(mid), centred / torch.tensor(wanted).view(1, 3, 1).double())


def test_a_constant_that_no_batch_has_shown_is_the_general_one():
    norm = ConstantNorm.of(LayerNorm(4, 1e-5), 4)
    norm.constant.fill_(2.0)
    norm.advance(Stage.APART)
    assert norm.eos_constant.item() == norm.bos_constant.item() == 2.0


def test_the_norms_are_removed_in_the_order_of_baroni_et_al():
    model, schedule = losing("solu_ln")
    names = {norm: name for name, norm in constant_norms(model).items()}
    told = [(at, [names[norm] for norm in norms], stage) for at, norms, stage in schedule.removals]
    each = ["blocks.0.ln2", "blocks.0.mlp.ln", "blocks.0.ln1", "ln_final"]
    assert [norms for _, norms, _ in told] == [*([name] for name in each), each, each]
    assert [stage for *_, stage in told] == [Stage.APART] * 4 + [Stage.EOS, Stage.ALL]
    assert [at for at, *_ in told] == [3, 6, 10, 13, 16, 20]  # n times 20 / 6, rounded down
    schedule.advance(12)
    stages = [norm.stage for norm in schedule.norms]
    assert stages == [Stage.APART] * 3 + [Stage.LIVE]


def test_a_resumed_training_continues_at_its_stage_with_the_same_constants():
    first, schedule = losing("solu_ln")
    first.train().loss(rows_with_eos(), BOS)
    schedule.advance(8)
    resumed, again = losing("solu_ln")
    resumed.load_state_dict(first.state_dict())
    again.advance(8)
    assert [norm.stage for norm in again.norms] == [norm.stage for norm in schedule.norms]
    with torch.no_grad():
        assert torch.equal(resumed(rows_with_eos()), first(rows_with_eos()))


def test_a_training_that_is_too_short_for_the_removals_is_refused():
    with pytest.raises(UserError, match="6 removals of per-token scales need 12 optimizer steps"):
        LosingNorms(rough_model("solu_ln", torch.float64, *CONSTANT), 11, BOS, EOS)


def test_a_static_gain_stays_as_it_is_and_other_norms_get_constants():
    assert constant_norms(rough_model("gelu", torch.float64, *CONSTANT)).keys() == {
        "blocks.0.ln1", "blocks.0.ln2", "ln_final",
    }  # fmt: skip
    static = rough_model("solu_frozen_ln", torch.float64, *CONSTANT)
    assert isinstance(static.mlp(0).ln, StaticNorm)


@pytest.mark.parametrize("name", VARIANTS)
def test_until_the_first_removal_every_variant_computes_what_it_did(name):
    model, _ = losing(name)
    torch.testing.assert_close(
        model(some_tokens()), rough_model(name, torch.float64)(some_tokens())
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_without_scales_every_variant_is_converted_exactly_and_survives_folding(name):
    model = without_scales(name)
    hooked = to_hooked(model, facts_for(name))
    assert check_agreement(model, hooked) < 1e-10
    tokens = rows_with_eos()
    hooked.process_weights_(fold_ln=True)
    torch.testing.assert_close(  # TransformerLens rewrites weights in fp32
        hooked(tokens).log_softmax(-1), model(tokens).log_softmax(-1), rtol=1e-5, atol=1e-6
    )


def test_a_model_whose_scales_are_constant_by_construction_loses_nothing():
    """Embeddings have mean 0 and one length in half of the stream; the MLP writes one vector into the rest."""
    config = load_config(["variant=solu_ln", "size=tiny", *CONSTANT])
    from soluscope.runs.weights import build_model

    model = build_model(config, D_VOCAB).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        half = config.model.d_model // 2
        rows = torch.randn(D_VOCAB, half, generator=generator, dtype=torch.float64)
        rows -= rows.mean(-1, keepdim=True)
        model.embed.W_E.zero_()[:, :half] = rows / rows.norm(dim=-1, keepdim=True)
        model.pos_embed.W_pos.zero_()
        model.blocks[0].attn.W_O.zero_()
        mlp = model.mlp(0)
        mlp.W_in.zero_()
        mlp.b_in.copy_(torch.randn(len(mlp.b_in), generator=generator))
        mlp.W_out.zero_()[:, half:] = torch.randn(len(mlp.W_out), half, generator=generator)
        mlp.W_out[:, half:] -= mlp.W_out[:, half:].mean(-1, keepdim=True)
        model.unembed.W_U.copy_(torch.randn(model.unembed.W_U.shape, generator=generator))
    schedule = LosingNorms(model, 40, BOS, EOS)
    tokens = rows_with_eos()
    with_norms = model.train()(tokens)
    schedule.advance(40)
    torch.testing.assert_close(model(tokens), with_norms, rtol=1e-12, atol=1e-12)
    assert with_norms.std() > 0.1  # the logits differ from token to token


def direct_effects(hooked, tokens):
    """Return the centred logits minus those without one part of the stream, by part, and their direct attribution.

    The reference removes a part by a hook before ln_final, which then computes its scale again.
    """
    logits, cache = hooked.run_with_cache(tokens)
    parts = {
        name: cache[name]
        for name in (
            "hook_embed",
            "hook_pos_embed",
            "blocks.0.hook_attn_out",
            "blocks.0.hook_mlp_out",
        )
    }

    def centred(x):
        return x - x.mean(-1, keepdim=True)

    effects, attributions = {}, {}
    for name, part in parts.items():

        def without(resid, hook, part=part):
            return resid - part

        removed = hooked.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_post", without)])
        effects[name] = centred(logits - removed)
        scale = cache["ln_final.hook_scale"]
        attributions[name] = centred(centred(part) / scale * hooked.ln_final.w @ hooked.unembed.W_U)
    rest = centred(hooked.ln_final.b @ hooked.unembed.W_U + hooked.unembed.b_U)
    return centred(logits) - rest, effects, attributions


@pytest.mark.parametrize("without", [True, False])
def test_direct_effects_equal_their_attributions_and_add_up_only_without_scales(without):
    trained = without_scales("solu_ln") if without else rough_model("solu_ln", torch.float64)
    hooked = to_hooked(trained, facts_for("solu_ln"))
    logits, effects, attributions = direct_effects(hooked, some_tokens())

    def error(found, wanted):
        return ((found - wanted).abs().sum() / wanted.abs().sum()).item()

    torch.testing.assert_close(
        sum(attributions.values()), logits
    )  # in every model, at the scale as it is
    errors = [error(sum(effects.values()), logits)]
    errors += [error(attributions[name], effects[name]) for name in effects]
    assert max(errors) < 1e-6 if without else min(errors) > 0.01


def test_removing_the_mlp_from_a_run_without_scales_is_linear():
    """The activations that probes see have the constant too: the closed forms divide by it."""
    from soluscope.data.streams import Stream

    hooked = to_hooked(without_scales("solu_ln"), facts_for("solu_ln"))
    tokens = some_tokens()
    stream = Stream(
        "natural",
        tokens,
        torch.arange(3)[:, None].expand(3, 32),
        torch.ones_like(tokens).bool(),
        BOS,
    )
    run = observe(hooked, stream)
    assert run.eps is None
    assert run.scale.unique().numel() == 1

    def remove(post, hook):
        return torch.zeros_like(post)

    logits = hooked.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_post", remove)])
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    found = loss_at_post(run, torch.zeros_like(run.post))[run.target >= 0]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_model_without_scales_needs_a_trained_run(tmp_path):
    with pytest.raises(UserError, match="needs the weights of a trained run"):
        tiny_config(tmp_path, "variant=gelu", "model.norms=constant")


@pytest.mark.parametrize(
    ("within", "after", "change", "holds"),
    [
        (1e-6, Bounded(0.0), Bounded(-0.2), True),
        (1e-6, Bounded(1e-9, 0, 2e-9), Bounded(-0.2), True),
        (1e-6, Bounded(1e-9, 0, 2e-3), Bounded(-0.2), False),
        (None, Bounded(0.5), Bounded(-0.2, -0.3, -0.1), False),
        (None, Bounded(0.5), Bounded(-0.2, -0.3, 0.1), True),
        (None, Bounded(0.5), Bounded(-0.2), None),
        (1e-6, Bounded(None), Bounded(None), None),
    ],
)
def test_a_claim_holds_if_its_number_is_0_or_its_change_is_not_below_0(
    within, after, change, holds
):
    assert _holds(Claim("x", "text", within), after, change) is holds


def test_a_removal_of_all_scales_without_further_training_is_refused():
    with pytest.raises(UserError, match="fine_tune_tokens=0, but norms=all removes the scales"):
        RemoveConfig(norms="all", fine_tune_tokens=0)
