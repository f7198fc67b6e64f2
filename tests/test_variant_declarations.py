"""A variant whose computation differs from its declaration is refused before it is trained."""

import sys
import types
from dataclasses import replace

import pytest
import torch
from conftest import tiny_config, train_silently
from test_convert import facts_for
from test_every_variant import D_VOCAB
from test_probes_causal import some_tokens, stream_of
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from soluscope import plugins
from soluscope.config import load_config
from soluscope.errors import UserError
from soluscope.hooked.activations import observe
from soluscope.hooked.convert import to_hooked
from soluscope.model import LanguageModel
from soluscope.norms import DynamicTanh, FrozenRMSNorm, LayerNorm, PerTokenNorm
from soluscope.variants import ACT_FNS, Variant, check_variant
from soluscope.variants._parts import LayerNormParams, solu

NAME = "own_scale"


class OwnScale(PerTokenNorm):
    """An RMS norm as a new variant would write it: its epsilon is `self.eps`, and it has no bias."""

    centres = False
    affine_part = ("w",)


class HiddenEpsilon(FrozenRMSNorm):
    """A per-token norm with its epsilon in a buffer, where code that reads norms does not find it."""

    def __init__(self, length, epsilon):
        super().__init__(length)
        self.register_buffer("epsilon", torch.tensor(epsilon))

    def denominator(self, centred):
        return (centred.square().mean(dim=-1, keepdim=True) + self.epsilon).sqrt()

    def forward(self, mid):
        return self.affine(mid / self.denominator(mid))


class HiddenBias(OwnScale):
    """A norm with a bias that it does not declare."""

    def __init__(self, length, eps):
        super().__init__(length, eps)
        self.b = torch.nn.Parameter(torch.zeros(length))


class ShiftedGain(LayerNorm):
    """A norm with the declaration of LayerNorm that uses its gain differently."""

    def affine(self, normalized):
        return normalized * (1 + self.w) + self.b

    forward = PerTokenNorm.forward


def builder(kind):
    return lambda d_mlp, params: kind(d_mlp, params.epsilon(d_mlp))


def odd(base=OwnScale, **members):
    """Return a builder of norms that differ from `base` in some members."""
    return builder(type("Odd", (base,), members))


HIDDEN_EPSILON = {"build_norm": builder(HiddenEpsilon), "role": "static"}
ODD = {
    "an epsilon in a buffer": (
        HIDDEN_EPSILON,
        "the mid norm HiddenEpsilon: its denominator differs from the declared eps=None, one constant for all",
    ),
    "no declared centring": (
        {"build_norm": odd(PerTokenNorm, affine_part=("w",))},
        "the mid norm Odd declares no centres",
    ),
    "no declared affine part": (
        {"build_norm": odd(PerTokenNorm, centres=False)},
        "the mid norm Odd declares no affine_part",
    ),
    "a norm of another library": (
        {"build_norm": lambda d_mlp, params: torch.nn.LayerNorm(d_mlp)},
        "the mid norm LayerNorm is not a subclass of MidNorm",
    ),
    "a mean that is subtracted": (
        {"build_norm": odd(centred=lambda self, mid: mid - mid.mean(-1, keepdim=True))},
        "the mid norm Odd: its centred differs from the declared centres=False",
    ),
    "another epsilon": (
        {"build_norm": odd(denominator=lambda self, a: (a.square().mean(-1, True) + 1).sqrt())},
        r"the mid norm Odd: its denominator differs from the declared eps=0.0409\d*, sqrt\(mean square",
    ),
    "denominators without an axis": (
        {"build_norm": odd(denominator=lambda self, a: a.square().mean(-1).sqrt())},
        r"the mid norm Odd gives denominators of shape \[8\] for 8 tokens: return one per token, \[8, 1\]",
    ),
    "LayerNorm's declaration with a gain of 1 + w": (
        {"build_norm": builder(ShiftedGain)},
        r"the mid norm ShiftedGain: its affine differs from the declared affine_part=\('w', 'b'\)",
    ),
    "another forward": (
        {"build_norm": odd(forward=lambda self, mid: mid)},
        r"the mid norm Odd: its forward differs from the declared affine\(centred / denominator\)",
    ),
    "a bias that is not declared": (
        {"build_norm": builder(HiddenBias)},
        r"the mid norm HiddenBias has the parameters \(w, b\) and declares affine_part=\('w',\)",
    ),
    "an act_fn that TransformerLens does not have": (
        {"hooked_act_fn": "softmax_ln"},
        "has hooked_act_fn='softmax_ln', but TransformerLens has only gelu, ",
    ),
    "an act_fn without hook_mid": (
        {"hooked_act_fn": "solu"},
        "has a mid norm and hooked_act_fn='solu'",
    ),
    "an act_fn with a hook_mid that is not there": (
        {"build_norm": None},
        "has no mid norm and hooked_act_fn='solu_ln'",
    ),
    "a per-token norm as static": (
        {"role": "static"},
        "has role='static', but its norm implies role='per_token'",
    ),
    "no norm as per_token": (
        {"build_norm": None, "hooked_act_fn": "solu"},
        "has role='per_token', but its norm implies role='plain'",
    ),
    "a scale for each neuron that is not declared": (
        {
            "build_norm": odd(
                DynamicTanh,
                __init__=lambda self, d_mlp, eps: DynamicTanh.__init__(self, d_mlp),
                one_scale=True,
            )
        },
        r"the mid norm Odd gives denominators of shape \[8, 32\] for 8 tokens: return one per token, \[8, 1\]",
    ),
    "a scale for each neuron as static": (
        {"build_norm": lambda d_mlp, params: DynamicTanh(d_mlp), "role": "static"},
        "has role='static', but its norm implies role='other'",
    ),
    "no nonlinearity": (
        {"nonlinearity": None},
        "the declaration has both or neither of nonlinearity and build_nonlinearity",
    ),
    "a twin that is not there": (
        {"twin": "solu_gian"},
        "has twin='solu_gian': no variant called 'solu_gian'. Did you mean 'solu_gain'?",
    ),
}


@pytest.fixture
def added(monkeypatch):
    """Return a function that adds a variant to the folder: SoLU and `OwnScale`, with some fields changed."""

    def add(**fields):
        variant = Variant(
            nonlinearity=solu, hooked_act_fn="solu_ln", role="per_token",
            build_norm=builder(OwnScale), params=LayerNormParams,
        )  # fmt: skip
        module = types.ModuleType(f"soluscope.variants.{NAME}")
        module.VARIANT = replace(variant, **fields)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        names = plugins.names

        def with_it(package):
            return [*names(package), NAME] if package == "soluscope.variants" else names(package)

        monkeypatch.setattr(plugins, "names", with_it)
        return module.VARIANT

    return add


def config_of(*words):
    """Return a configuration of the added variant, which has no YAML file."""
    return replace(load_config(["variant=solu_rms", "size=tiny", *words]), variant=NAME)


@pytest.mark.parametrize("fault", ODD)
def test_a_variant_with_a_false_declaration_is_refused_with_the_part_that_differs(added, fault):
    fields, message = ODD[fault]
    added(**fields)
    with pytest.raises(UserError, match=f"^variant {NAME}:? {message}"):
        check_variant(NAME, LayerNormParams(), 32)


def test_act_fns_are_transformer_lenss():
    assert {*ACT_FNS} <= SUPPORTED_ACTIVATIONS.keys()
    assert [name for name in SUPPORTED_ACTIVATIONS if name.endswith("_ln")] == ["solu_ln"]


def test_an_epsilon_in_a_buffer_is_refused_before_training(added, tmp_path):
    added(**HIDDEN_EPSILON)
    config = replace(tiny_config(tmp_path, "variant=solu_rms"), variant=NAME)
    with pytest.raises(
        UserError, match="HiddenEpsilon: its denominator differs from the declared eps=None"
    ):
        train_silently(config)
    assert not (config.study_dir / "data.json").exists()  # it is written before the first step
    assert not (config.run_dir / "metrics.jsonl").exists()


def test_a_false_declaration_is_refused_by_the_conversion_too(added):
    variant = added(**HIDDEN_EPSILON)
    config = config_of()
    trained = LanguageModel(config.model, variant, config.mid, D_VOCAB, 0)
    with pytest.raises(
        UserError, match="HiddenEpsilon: its denominator differs from the declared eps=None"
    ):
        to_hooked(trained, facts_for("solu_rms"))


def test_an_rms_norm_of_a_variants_own_converts_and_has_its_engagement(added):
    variant = added()
    config = config_of("mid.kappa=.1")
    check_variant(NAME, config.mid, config.model.d_mlp)
    trained = LanguageModel(config.model, variant, config.mid, D_VOCAB, 0).double()
    run = observe(to_hooked(trained, facts_for("solu_rms")), stream_of(some_tokens()))
    assert (run.centres, run.eps) == (False, pytest.approx(0.1 / 128**2))
    square = run.mid.square().mean(-1)
    torch.testing.assert_close(run.engagement, square / (square + run.eps), rtol=1e-12, atol=0)
    torch.testing.assert_close(run.engagement, 1 - run.eps * run.gain**2, rtol=1e-9, atol=0)
    assert run.engagement.min() > 0
