"""Facts about every planted model, and the truth of each model, tested by hooks on the model itself.

No probe and no closed form is used here. A truth is tested on the model's own distribution before and
after an edit, or on its activations, which must have the values that its docstring derives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from scipy.optimize import minimize
from torch import Tensor

from soluscope import plugins
from soluscope.controls import Control, Planted, _shell
from soluscope.data.streams import Stream
from soluscope.hooked.activations import HookedRun, observe

pytestmark = pytest.mark.arithmetic

CONTROLS = plugins.names("soluscope.controls")
SCALE, MID, POST, FINAL = (
    "blocks.0.mlp.ln.hook_scale",
    "blocks.0.mlp.hook_mid",
    "blocks.0.mlp.hook_post",
    "ln_final.hook_scale",
)
Edit = Callable[[Tensor], Tensor]


def control(name: str) -> Control:
    found: Control = plugins.pick("soluscope.controls", name)
    return found


@cache
def built(name: str) -> Planted:
    return control(name).build()


@cache
def observed(name: str) -> HookedRun:
    return observe(built(name).model, built(name).streams["natural"])


def log_probs(name: str, edits: dict[str, Edit] | None = None) -> Tensor:
    """Return log probabilities of the next token at the positions after BOS of `natural`. [row pos d_vocab]"""
    planted = built(name)
    hooks = [(where, lambda x, hook, f=f: f(x)) for where, f in (edits or {}).items()]
    with torch.no_grad():
        logits = planted.model.run_with_hooks(planted.streams["natural"].tokens, fwd_hooks=hooks)
    found: Tensor = logits[:, 1:].log_softmax(-1)
    return found


def cost(name: str, edits: dict[str, Edit]) -> float:
    """Return the mean KL divergence from the model's own distribution to the edited distribution, in nats."""
    own, edited = log_probs(name), log_probs(name, edits)
    return float((own.exp() * (own - edited)).sum(-1).mean())


def by_token(name: str, where: str) -> Tensor:
    """Return the activations at each token of the vocabulary. [d_vocab d_mlp]"""
    model = built(name).model
    _, found = model.run_with_cache(torch.arange(model.cfg.d_vocab)[:, None], names_filter=where)
    activations: Tensor = found[where][:, 0]
    return activations.detach()


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def frozen(name: str) -> dict[str, Edit]:
    """Return an edit that sets one gain for all tokens: the geometric mean over the tokens after BOS."""
    log_gain = content(name, "gain").log().mean()
    return {SCALE: lambda scale: torch.full_like(scale, float((-log_gain).exp()))}


def content(name: str, field: str) -> Tensor:
    """Return a field of the observed run, without BOS."""
    run = observed(name)
    found: Tensor = getattr(run, field)[~run.is_bos]
    return found


def of_class(name: str, letter: str) -> Tensor:
    """Return whether each content token begins with `letter`."""
    vocab = built(name).streams["natural"].vocab
    starts = torch.tensor([text.startswith(letter) for text in vocab])
    return starts[content(name, "tokens")]


def spread(log_gain: Tensor) -> float:
    return float(log_gain.std(correction=0))


# --- every control --------------------------------------------------------------------------------


def test_every_planted_model_of_the_protocol_has_a_control() -> None:
    sections = [control(name).section for name in CONTROLS]
    assert set(sections) >= {f"C{k}" for k in range(1, 14)}
    assert len(set(sections)) == len(sections)


@pytest.mark.parametrize("name", CONTROLS)
def test_building_twice_gives_the_same_model_and_streams(name: str) -> None:
    first, second = control(name).build(), control(name).build()
    state = second.model.state_dict()
    for key, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert first.streams.keys() == second.streams.keys()
    for key, stream in first.streams.items():
        assert torch.equal(stream.tokens, second.streams[key].tokens)


@pytest.mark.parametrize("name", CONTROLS)
def test_the_model_is_solu_and_layernorm_or_has_no_norm_in_double_precision(name: str) -> None:
    run = observed(name)
    assert run.post.dtype == torch.float64
    assert run.is_solu == run.centres == (run.eps is not None)
    assert torch.equal(run.post, run.mid) == (run.eps is None)
    assert all(getattr(run, f).isfinite().all() for f in ("pre", "mid", "post", "scale"))
    assert len(run.vocab) == built(name).model.cfg.d_vocab == len(set(run.vocab))


@pytest.mark.parametrize("name", CONTROLS)
def test_the_next_token_depends_on_the_current_one_alone(name: str) -> None:
    rows = built(name).streams["natural"].tokens
    table = _shell.logits(built(name).model)
    assert torch.allclose(log_probs(name), table.log_softmax(-1)[rows[:, 1:]], atol=1e-10)


@pytest.mark.parametrize("name", CONTROLS)
def test_the_natural_rows_are_drawn_from_the_model_itself(name: str) -> None:
    """The surprisal of the rows equals the model's entropy, within 4 standard errors of the mean over rows."""
    stream = built(name).streams["natural"]
    assert (stream.tokens[:, 0] == _shell.BOS).all()
    assert (stream.tokens[:, 1:] != _shell.BOS).all()
    assert len(stream.string[:, 0].unique()) == len(stream.tokens) >= 40
    own = log_probs(name)[:, :-1]
    surprisal = -own.gather(-1, stream.tokens[:, 2:, None]).squeeze(-1)
    excess = (surprisal - entropy(own)).mean(-1)
    assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5
    assert entropy(own).mean() < math.log(own.shape[-1] - 1) - 0.3  # there is information to lose


PAIRED = [name for name in CONTROLS if "pairs" in built(name).streams]


def contrast(stream: Stream, logits: Tensor) -> Tensor:
    """Return logit[right] - logit[wrong] before the answer, [pair row], with the clean row first."""
    answers = stream.tokens[:, -1].view(-1, 1 + _shell.N_CORRUPTIONS)
    last = logits[:, -2].view(*answers.shape, -1)
    right, wrong = answers[:, :1, None], answers[:, 1:2, None]
    shape = (*answers.shape, 1)
    difference = last.gather(-1, right.expand(shape)) - last.gather(-1, wrong.expand(shape))
    return difference.squeeze(-1)


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_a_clean_row_and_five_corruptions_that_differ_in_the_last_word(name: str) -> None:
    stream = built(name).streams["pairs"]
    tokens = stream.tokens.view(-1, 1 + _shell.N_CORRUPTIONS, stream.tokens.shape[1])
    number = stream.string.view(tokens.shape)
    assert len(tokens) >= 24
    assert torch.equal(number, torch.arange(len(tokens))[:, None, None].expand(tokens.shape))
    assert (tokens[:, :, 0] == _shell.BOS).all()
    assert (tokens[:, 1:, 1:-2] == tokens[:, :1, 1:-2]).all()  # the same context
    assert (tokens[:, 1:, -2] != tokens[:, :1, -2]).all()  # another last word
    assert (tokens[:, 1:, -1] == tokens[:, 1:2, -1]).all()  # the same wrong answer
    assert (tokens[:, 0, -1] != tokens[:, 1, -1]).all()
    assert all(len(set(row.tolist())) == _shell.N_CORRUPTIONS for row in tokens[:, 1:, -2])
    with torch.no_grad():
        clean, corrupt = contrast(stream, built(name).model(stream.tokens)).split([1, 5], dim=1)
    assert (clean - corrupt > 2).all()


def patched_gain(name: str, direction: str) -> tuple[float, float]:
    """Return the least and largest share of a pair's logit difference that follows the gain of the last word.

    `denoise`: share recovered in the corrupt run by the clean run's gain. `noise`: share lost in the clean
    run by the corrupt run's gain.
    """
    planted, size = built(name), 1 + _shell.N_CORRUPTIONS
    stream = planted.streams["pairs"]
    _, cache_ = planted.model.run_with_cache(stream.tokens, names_filter=SCALE)
    scale = cache_[SCALE].view(-1, size, *cache_[SCALE].shape[1:])
    with torch.no_grad():
        own = contrast(stream, planted.model(stream.tokens))
        shares = []
        for i in range(1, size):
            source, target = (0, i) if direction == "denoise" else (i, 0)

            def patch(x: Tensor, hook: object, s: int = source, t: int = target) -> Tensor:
                x = x.clone().view(scale.shape)
                x[:, t, -2] = scale[:, s, -2]
                return x.flatten(0, 1)

            logits = planted.model.run_with_hooks(stream.tokens, fwd_hooks=[(SCALE, patch)])
            now, gap = contrast(stream, logits)[:, target], own[:, 0] - own[:, i]
            shares.append((now - own[:, i] if direction == "denoise" else own[:, 0] - now) / gap)
    found = torch.stack(shares)
    return float(found.min()), float(found.max())


# --- the shell ------------------------------------------------------------------------------------


def test_pre_for_inverts_solu() -> None:
    mid = torch.from_numpy(np.random.default_rng(0).gamma(0.3, 2.0, size=(20, 48)))
    mid[0] = 0.0
    mid[1] = torch.linspace(0, 40, 48)
    pre = _shell.pre_for(mid)
    assert torch.allclose(pre * pre.softmax(-1), mid, rtol=1e-10, atol=1e-13)


def test_pre_for_refuses_negative_activations() -> None:
    with pytest.raises(
        ValueError, match=r"is -0\.1, for which the pre-activation is not unique: pass activations"
    ):
        _shell.pre_for(torch.tensor([[0.5, -0.1]], dtype=torch.float64))


def test_the_shell_computes_what_was_planned() -> None:
    """hook_pre equals the plan. With the anchor, logits equal post @ effect to 2e-8 of the largest logit."""
    pre = _shell.normal(0, 9, 6)
    effect = _shell.random_effect(1, _shell.post(pre, 1e-3), 9)
    model = _shell.anchored(pre, effect, eps=1e-3)
    _, cache_ = model.run_with_cache(torch.arange(9)[:, None])
    assert torch.allclose(cache_["blocks.0.mlp.hook_pre"][:, 0], pre, atol=1e-12)
    mid = pre * pre.softmax(-1)
    post = (mid - mid.mean(-1, keepdim=True)) / (mid.var(-1, correction=0) + 1e-3).sqrt()[:, None]
    logits = _shell.logits(model)[:, 1:]
    planned = (post @ effect)[:, 1:]
    error = (logits - logits.mean(-1, keepdim=True)) - (planned - planned.mean(-1, keepdim=True))
    assert error.abs().max() < 2e-8 * planned.abs().max()


def test_the_shell_refuses_embeddings_that_cannot_carry_the_plan() -> None:
    W_E = torch.eye(4, 7, dtype=torch.float64)
    W_E[3] = W_E[2]
    rest = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(7), torch.zeros(7, 4)
    with pytest.raises(ValueError, match="rows depend on each other"):
        _shell.assemble(W_E, _shell.normal(0, 4, 3), *rest, eps=1e-5)


# --- C1 -------------------------------------------------------------------------------------------

A_HI = 12 * math.exp(12) / (math.exp(12) + 31)
A_LO = math.e / (8 * math.e + 24)


def test_c1_gain_is_that_of_its_docstring() -> None:
    gain, is_a = content("smear_shared", "gain"), of_class("smear_shared", "A")
    assert torch.allclose(gain[is_a], gain.new_tensor(32 / (math.sqrt(31) * A_HI)), rtol=1e-9)
    assert torch.allclose(gain[~is_a], gain.new_tensor(4 / (math.sqrt(3) * A_LO)), rtol=1e-8)
    assert gain[is_a][0] == pytest.approx(0.479039, rel=2e-6)
    assert gain[~is_a][0] == pytest.approx(38.865, rel=2e-5)
    assert spread(gain.log()) == pytest.approx(2.195, abs=1e-3)
    assert is_a.double().mean() == pytest.approx(0.525, abs=1e-3)


def test_c1_loses_its_predictions_at_any_one_gain() -> None:
    costs = [
        cost("smear_shared", {SCALE: lambda s, g=gain: torch.full_like(s, 1 / g)})
        for gain in np.geomspace(0.1, 100, 13)
    ]
    assert min(costs) > 0.7
    assert cost("smear_shared", frozen("smear_shared")) > 5


def test_c1_activations_of_b_are_a_two_hundredth_of_sums_of_those_of_a() -> None:
    mid = by_token("smear_shared", MID)[1:]
    a, b = mid.split(32)
    assert torch.allclose(a, A_HI * torch.eye(32, dtype=a.dtype), atol=1e-12)
    members = b > 0.01
    assert (members.sum(-1) == 8).all()
    ratio = A_LO / A_HI
    assert ratio == pytest.approx(0.00495, abs=5e-6)
    assert torch.allclose(b, ratio * members.double() @ a, atol=1e-12)


def _curvature(features: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the second derivative of the mean KL by the flattened weights of a readout, at its prediction q."""
    n, d = q.shape[1], features.shape[1]
    found = np.zeros((d, n, d, n))
    diagonal = np.einsum("ta,tb,tv->vab", features, features, q, optimize=True)
    found[:, np.arange(n), :, np.arange(n)] = diagonal
    weighted = (features[:, :, None] * q[:, None]).reshape(len(q), -1)
    return (found.reshape(d * n, d * n) - weighted.T @ weighted) / len(q)


def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve a singular system: a constant that is added to all logits does not change the softmax."""
    shifted = matrix + 1e-12 * np.eye(len(matrix))
    found: np.ndarray = scipy.linalg.cho_solve(scipy.linalg.cho_factor(shifted), right.ravel())
    return found.reshape(right.shape)


def test_c1_no_readout_at_a_constant_gain_comes_within_4_tenths_of_a_nat() -> None:
    """Minimising bounds the least mean KL of linear readouts with a bias from above; duality bounds it from below.

    min over W of mean [lse(F W)_t - P_t (F W)_t - H(P_t)] = max over Q with F' Q = F' P of
    mean [H(Q_t) - H(P_t)]. So each Q with these moments gives a lower bound. F is mid with a column of ones.
    Let q be the prediction of W. With Newton's step, Q = q (1 + F step - mean of F step under q) has
    these moments. P has them too, and between Q and P there is a point without negative entries. The
    two bounds meet, whatever the order of sums.
    """
    log_p = _shell.logits(built("smear_shared").model)[1:, 1:].log_softmax(-1).numpy()
    p, n = np.exp(log_p), len(log_p)
    mid = by_token("smear_shared", MID)[1:].numpy() / A_HI
    features = np.hstack([mid, np.ones((n, 1))])

    def mean_kl(w: np.ndarray) -> float:
        log_q = scipy.special.log_softmax(features @ w, axis=1)
        return float((p * (log_p - log_q)).sum() / n)

    def value_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(-1, n)
        q = scipy.special.softmax(features @ w, axis=1)
        return mean_kl(w), (features.T @ (q - p) / n).ravel()

    near = minimize(value_and_slope, np.zeros(features.shape[1] * n), jac=True, method="L-BFGS-B",
                    options={"maxiter": 100})  # fmt: skip
    w, above, below = near.x.reshape(-1, n), np.inf, -np.inf
    for _ in range(100):
        q = scipy.special.softmax(features @ w, axis=1)
        slope = features.T @ (q - p) / n
        step = -_solved(_curvature(features, q), slope)
        moved = features @ step
        change = q * (1 + moved - (q * moved).sum(1, keepdims=True)) - p
        change *= min(1.0, (p[change < 0] / -change[change < 0]).min())  # no probability below 0
        kept = np.maximum(p + change, 0)
        above, below = mean_kl(w), ((p * log_p).sum() - scipy.special.xlogy(kept, kept).sum()) / n
        if above - below < 1e-4:
            break
        size = 1.0
        while mean_kl(w + size * step) > above + 1e-4 * size * (slope * step).sum():
            size /= 2
        w += size * step
    assert above == pytest.approx(0.4020, abs=2e-4)
    assert above - 1e-4 < below <= above
    # The error of the lower bound is at most W' (F' Q - F' P), where W is the best readout.
    assert abs(features.T @ (kept - p)).max() * abs(w).sum() / n < 1e-4

    alike = p.mean(0)
    assert (p * (log_p - np.log(alike))).sum() / n == pytest.approx(1.5163, abs=1e-4)


def test_c1_graded_gain_alone_lifts_b_over_weak_a() -> None:
    gain = content("smear_graded", "gain")[:, None]
    mid = content("smear_graded", "mid")[:, :16]
    is_a = of_class("smear_graded", "A")
    mean = content("smear_graded", "mid").mean(-1, keepdim=True)
    strong, weak = mid[is_a] > 1, mid[is_a] < 1
    on = mid[~is_a] > 0.01
    assert (strong.sum(-1) == 1).all()
    assert (on.sum(-1) == 8).all()
    for value, levels, b_over_weak_a in (
        (mid, (4, 0.6, 0.06, 0), False),
        (gain * mid, (5.64, 0.85, 2.31, 0), True),
        (mid - mean, (3.59, 0.19, 0.045, -0.015), False),
        (gain * (mid - mean), (5.06, 0.27, 1.73, -0.58), True),
    ):
        a, b = value[is_a], value[~is_a]
        for found, level in zip((a[strong], a[weak], b[on], b[~on]), levels, strict=True):
            assert torch.allclose(found, found.new_tensor(level), atol=0.006)
        assert (b[on].min() > a[weak].max()) == b_over_weak_a
    assert cost("smear_graded", frozen("smear_graded")) > 1


# --- C2 -------------------------------------------------------------------------------------------


def test_c2_loses_its_predictions_at_the_mean_gain() -> None:
    assert cost("disjoint", frozen("disjoint")) > 5


def test_c2_is_the_same_model_with_one_gain_and_a_gamma_for_each_neuron() -> None:
    gain, is_a = content("disjoint", "gain"), of_class("disjoint", "A")
    a, b = gain[is_a][0], gain[~is_a][0]
    assert float(a) == pytest.approx(0.672197, rel=2e-6)
    assert float(b) == pytest.approx(86.482, rel=2e-5)
    gamma = torch.cat([a.expand(32), b.expand(32)])
    edits: dict[str, Edit] = {SCALE: torch.ones_like, POST: lambda post: post * gamma}
    assert torch.allclose(log_probs("disjoint", edits), log_probs("disjoint"), atol=1e-5)


# --- C3 -------------------------------------------------------------------------------------------


def test_c3_is_pinned() -> None:
    variance = content("pinned", "mid").var(-1, correction=0)
    r = variance / (variance + observed("pinned").eps)
    is_a = of_class("pinned", "A")
    assert torch.allclose(r[is_a], r.new_tensor(4.594e-6), rtol=1e-3)
    assert torch.allclose(r[~is_a], r.new_tensor(6.779e-7), rtol=1e-3)
    assert spread(content("pinned", "gain").log()) < 1e-6
    own, edited = log_probs("pinned"), log_probs("pinned", frozen("pinned"))
    assert (own - edited).abs().max() < 1e-4


def test_c3_reads_small_distributed_activations_all_the_same() -> None:
    """Silencing B's eight neurons destroys B's predictions, although none of these neurons is ever large."""
    own = log_probs("pinned")
    edited = log_probs("pinned", {MID: lambda mid: torch.where(mid < 0.1, 0.0, mid)})
    is_b = ~of_class("pinned", "A").view(own.shape[:2])
    lost = (own.exp() * (own - edited)).sum(-1)
    assert lost[is_b].mean() > 0.3
    assert lost[~is_b].max() < 1e-9


# --- C4 -------------------------------------------------------------------------------------------


def test_c4_norm_is_engaged_and_its_gain_is_one_number() -> None:
    run = observed("uniform")
    variance = run.mid.var(-1, correction=0)
    assert (1 - variance / (variance + run.eps)).max() < 1.2e-10
    assert torch.allclose(run.gain, run.gain.new_tensor(10.1374), rtol=1e-5)
    assert run.gain.max() / run.gain.min() - 1 < 1e-12
    assert spread(run.pre.exp().sum(-1).log()) < 1e-12


def test_c4_patching_its_gain_does_nothing() -> None:
    own = log_probs("uniform")
    backwards = log_probs("uniform", {SCALE: lambda scale: scale.flip(0, 1)})
    assert torch.allclose(own, backwards, atol=1e-9)
    for direction in ("denoise", "noise"):
        assert patched_gain("uniform", direction) == pytest.approx((0, 0), abs=1e-12)


# --- C5 -------------------------------------------------------------------------------------------


def test_c5_gain_varies_as_in_c1() -> None:
    gain, is_a = content("absorbed", "gain"), of_class("absorbed", "A")
    assert torch.allclose(gain[is_a], gain.new_tensor(0.479039), rtol=2e-6)
    assert torch.allclose(gain[~is_a], gain.new_tensor(38.865), rtol=2e-5)
    assert spread(gain.log()) > 2


@pytest.mark.parametrize(
    "edits",
    [
        {SCALE: lambda scale: scale.flip(0, 1)},
        {SCALE: lambda scale: scale / 2},
        {MID: torch.zeros_like},
        {POST: torch.zeros_like},
        {POST: lambda post: post.flip(-1)},
    ],
    ids=["gains of others", "double gain", "no activations", "no MLP", "other neurons"],
)
def test_c5_nothing_that_the_mlp_writes_changes_a_prediction(edits: dict[str, Edit]) -> None:
    # With B's gain on an A token's activations, the MLP writes 81 times more than without an edit.
    allowed = 1e-5 if SCALE not in edits else 1e-3
    assert (log_probs("absorbed", edits) - log_probs("absorbed")).abs().max() < allowed
    assert cost("absorbed", edits) < 1e-6


def test_c5_freezing_the_gain_costs_nothing() -> None:
    assert cost("absorbed", frozen("absorbed")) < 1e-6


# --- C6 and C7 ------------------------------------------------------------------------------------


def test_c6_only_noising_the_gain_shows() -> None:
    assert patched_gain("and_gate", "denoise") == pytest.approx((0, 0), abs=1e-9)
    removed = 1 - 0.479039 / 38.865
    assert removed == pytest.approx(0.98767, abs=1e-5)
    assert patched_gain("and_gate", "noise") == pytest.approx((removed, removed), abs=1e-5)


def test_c6_needs_the_content_too() -> None:
    """A corrupt token's activations reach no logit, whatever the gain."""
    table = _shell.logits(built("and_gate").model)[:, 1:]
    corrupt = table[1 + 24 :]
    assert torch.allclose(corrupt, corrupt.mean(-1, keepdim=True).expand(corrupt.shape), atol=1e-6)
    assert table[1:25].std(-1).min() > 1


def test_c7_only_denoising_the_gain_shows() -> None:
    assert patched_gain("or_gate", "denoise") == pytest.approx((0.99943, 0.99943), abs=1e-4)
    assert patched_gain("or_gate", "noise") == pytest.approx((0.00057, 0.00057), abs=1e-4)


def test_c7_logit_differences_are_those_of_its_docstring() -> None:
    stream = built("or_gate").streams["pairs"]
    with torch.no_grad():
        found = contrast(stream, built("or_gate").model(stream.tokens))
    assert torch.allclose(found[:, 0] / 5, found.new_tensor(1.00686), atol=2e-5)
    assert torch.allclose(found[:, 1:] / 5, found.new_tensor(0.02013), atol=2e-5)


def test_c7_ln2_scale_is_one_number() -> None:
    _, cache_ = built("or_gate").model.run_with_cache(built("or_gate").streams["natural"].tokens)
    scale = cache_["blocks.0.ln2.hook_scale"]
    assert torch.allclose(scale, scale.flatten()[0], rtol=1e-12)


# --- C8 -------------------------------------------------------------------------------------------


def test_c8_mean_varies_with_the_class_and_the_gain_does_not() -> None:
    run, is_a = observed("centring"), of_class("centring", "A")
    assert torch.allclose(run.gain, run.gain.new_tensor(0.06**-0.5), rtol=1e-9)
    mean = content("centring", "mid").mean(-1)
    assert torch.allclose(mean, torch.where(is_a, 0.4, 0.16).double(), atol=1e-12)


def test_c8_sign_after_centring_tells_the_class_of_small_activations() -> None:
    mid, is_a = content("centring", "mid"), of_class("centring", "A")
    signal = mid[:, :16]
    centred = signal - mid.mean(-1, keepdim=True)
    weak = signal[is_a] < 1
    assert (weak.sum(-1) == 15).all()
    assert signal.min() > 0
    assert signal[is_a].min() > signal[~is_a].max()  # before centring, every A is above every B
    assert -0.1301 < centred[is_a][weak].min() < centred[is_a][weak].max() < -0.0699
    assert 0.0099 < centred[~is_a].min() < centred[~is_a].max() < 0.0701


def test_c8_needs_the_mean_taken_off_and_not_the_gain() -> None:
    assert cost("centring", frozen("centring")) < 1e-12
    run = observed("centring")
    rows = built("centring").streams["natural"].tokens.shape
    mean = run.mid.mean(-1, keepdim=True)
    kept = (run.post + run.gain[:, None] * mean).view(*rows, -1)
    assert cost("centring", {POST: lambda post: kept}) > 1


# --- C9 -------------------------------------------------------------------------------------------


def test_c9_mean_gain_with_bos_is_exactly_one_over_n() -> None:
    rows = built("bos_gain").streams["natural"].tokens.shape
    gain = observed("bos_gain").gain.view(rows)
    bos, rest = 1.03150, 10.1374
    assert torch.allclose(gain[:, 0], gain.new_tensor(bos), rtol=1e-5)
    assert torch.allclose(gain[:, 1:], gain.new_tensor(rest), rtol=1e-5)
    assert spread(gain[:, 1:].log()) < 1e-12
    n = torch.arange(1, rows[1] + 1).double()
    published = gain.cumsum(-1) / n
    assert torch.allclose(published, rest - (rest - bos) / n, rtol=1e-5)


# --- C10 and C11 ----------------------------------------------------------------------------------


def firing_classes(name: str) -> list[set[int]]:
    """Return the classes for which each neuron fires, after checking that it fires for all their tokens."""
    from soluscope.controls.monosemantic import CLASS_OF

    mid = by_token(name, MID)
    fires = mid > mid.max() / 10
    assert torch.allclose(mid[1:][fires[1:]], mid[1:].max(), rtol=1e-9)
    assert mid[~fires].abs().max() < 1e-12
    owners = torch.tensor(CLASS_OF)
    found = []
    for column in fires.T:
        classes = set(owners[column].tolist())
        assert torch.equal(torch.isin(owners, torch.tensor(sorted(classes))), column)
        found.append(classes)
    return found


def test_c10_each_neuron_fires_for_one_class_at_one_height() -> None:
    assert firing_classes("monosemantic") == [{c} for c in range(32)]
    post = by_token("monosemantic", POST)
    high = post > 0
    assert torch.allclose(post[high], post.new_tensor(31**0.5), rtol=1e-9)
    assert torch.allclose(post[~high], post.new_tensor(-(31**-0.5)), rtol=1e-9)
    gain = content("monosemantic", "gain")
    assert torch.allclose(gain, gain.new_tensor(1.0315), rtol=1e-5)


def test_c11_each_neuron_fires_for_four_classes_of_which_no_two_share_another() -> None:
    *neurons, of_bos = firing_classes("polysemantic")
    assert of_bos == {31}
    assert all(len(classes) == 4 for classes in neurons)
    pairs = [(c, d) for classes in neurons for c in classes for d in classes if c < d]
    assert len(pairs) == len(set(pairs))
    gain = content("polysemantic", "gain")
    assert torch.allclose(gain, gain.new_tensor(2.0508), rtol=1e-4)
    post = by_token("polysemantic", POST)[1:]
    assert torch.allclose(post[post > 0], post.new_tensor(7**0.5), rtol=1e-9)


def test_c10_and_c11_name_every_class_by_its_own_tokens() -> None:
    from soluscope.controls.monosemantic import CLASSES

    assert len(CLASSES) == 31
    assert all(len(members) == 4 for members in CLASSES)


# --- C12 ------------------------------------------------------------------------------------------


def without_entropy_neuron(post: Tensor) -> Tensor:
    post = post.clone()
    post[..., -1] = 0
    return post


def test_c12_neuron_writes_in_the_null_space_of_the_unembedding() -> None:
    model = built("entropy_neuron").model
    W_out, W_U = model.blocks[0].mlp.W_out, model.unembed.W_U
    assert (W_out[-1] @ W_U).abs().max() == 0
    assert torch.linalg.matrix_rank(W_U) == len(W_U) - 1
    assert W_out[-1].norm() > 2 * W_out[:-1].norm(dim=-1).max()


def test_c12_ablating_it_sharpens_predictions_through_the_final_scale_alone() -> None:
    own = log_probs("entropy_neuron")
    ablated = log_probs("entropy_neuron", {POST: without_entropy_neuron})
    change = entropy(own) - entropy(ablated)
    level = content("entropy_neuron", "mid")[:, -1].view(change.shape)
    by_level = [float(change[(level - a).abs() < 1e-9].mean()) for a in (0, 0.04, 0.08, 0.12)]
    assert change.min() > 0
    assert by_level == pytest.approx([0.19, 0.45, 1.23, 1.62], abs=0.005)
    tokens = built("entropy_neuron").streams["natural"].tokens
    _, cache_ = built("entropy_neuron").model.run_with_cache(tokens, names_filter=FINAL)
    held: dict[str, Edit] = {POST: without_entropy_neuron, FINAL: lambda scale: cache_[FINAL]}
    assert torch.allclose(log_probs("entropy_neuron", held), own, atol=1e-12)


def test_c12_no_other_neuron_acts_through_the_scale_alone() -> None:
    model = built("entropy_neuron").model
    read = model.blocks[0].mlp.W_out[:-1] @ model.unembed.W_U
    assert (read - read.mean(-1, keepdim=True)).norm(dim=-1).min() > 1


# --- C13 ------------------------------------------------------------------------------------------


def pointwise(pre: Tensor) -> Tensor:
    """Return SoLU with its denominator replaced by the geometric mean over content tokens."""
    return pre * (pre - content("lateral", "pre").logsumexp(-1).mean()).exp()


def test_c13_logits_of_one_content_are_one_over_z() -> None:
    z = by_token("lateral", "blocks.0.mlp.hook_pre")[1:].exp().sum(-1).view(4, 16)
    expected = torch.tensor([45.746, 64.832, 99.344, 193.159], dtype=z.dtype)
    assert torch.allclose(z, expected[:, None].expand(z.shape), rtol=1e-5)
    table = _shell.logits(built("lateral").model)[1:, 1:]
    table = (table - table.mean(-1, keepdim=True)).view(4, 16, -1)
    assert torch.allclose(table * z[..., None], table[:1] * z[:1, :, None], rtol=1e-3, atol=1e-2)
    assert float(table[0].std(correction=0)) == pytest.approx(4, abs=0.2)


def test_c13_needs_softmax_and_not_the_norm() -> None:
    pre = content("lateral", "pre")
    rows = built("lateral").streams["natural"].tokens.shape
    edited = pointwise(observed("lateral").pre).view(*rows, -1)
    assert pre.logsumexp(-1).std() > 0.4
    assert cost("lateral", {MID: lambda mid: edited}) > 0.1
    assert cost("lateral", frozen("lateral")) < 1e-6
    assert spread(content("lateral", "gain").log()) < 1e-4


def test_c13_competitor_writes_nothing() -> None:
    assert built("lateral").model.blocks[0].mlp.W_out[-1].abs().max() == 0


# --- P16's controls, and C10 rotated --------------------------------------------------------------


def on_the_way(name: str, start: int, end: int, steps: int = 256) -> tuple[Tensor, Tensor]:
    """Return pre-activations and O while the residual stream turns from one token to another, 0 to pi."""
    model = built(name).model
    W_E = model.embed.W_E.detach()
    theta = torch.linspace(0, math.pi, steps + 1, dtype=W_E.dtype)[:, None]
    path = (W_E[start] * theta.cos() + W_E[end] * theta.sin())[:, None]
    hooks = [("blocks.0.hook_resid_mid", lambda resid, hook: path)]
    seen: dict[str, Tensor] = {}
    hooks += [
        (where, lambda x, hook, w=where: seen.update({w: x[:, 0].detach()}))
        for where in ("blocks.0.mlp.hook_pre", POST)
    ]
    model.run_with_hooks(torch.ones(steps + 1, 1, dtype=torch.long), fwd_hooks=hooks)
    return seen["blocks.0.mlp.hook_pre"], seen[POST] @ model.blocks[0].mlp.W_out.detach()


def lengths_on_the_way(out: Tensor) -> tuple[float, float]:
    """Return path length over end-to-end distance, and longest step over path length, from 0 to pi/2."""
    step = out[:129].diff(dim=0).norm(dim=-1)
    return float(step.sum() / (out[128] - out[0]).norm()), float(step.max() / step.sum())


def test_relu_few_falls_silent_between_two_tokens() -> None:
    pre, out = on_the_way("relu_few", 3, 11)
    edge = math.cos(math.pi / 8)
    theta = torch.linspace(0, math.pi, 257, dtype=pre.dtype)
    assert torch.allclose(pre[:, 2], (theta.cos() - edge) / (1 - edge), atol=1e-9)
    assert torch.allclose(pre[:, 10], (theta.sin() - edge) / (1 - edge), atol=1e-9)
    others = [k for k in range(16) if k not in (2, 10)]
    assert torch.allclose(pre[:, others], pre.new_tensor(-edge / (1 - edge)), atol=1e-9)
    assert out[33:96].abs().max() == 0
    assert lengths_on_the_way(out) == pytest.approx((1.36931, 0.030390), rel=1e-4)


def test_linear_mlp_goes_round_an_ellipse() -> None:
    pre, out = on_the_way("linear_mlp", 3, 11)
    theta = torch.linspace(0, math.pi, 257, dtype=pre.dtype)[:, None]
    assert torch.allclose(out, out[0] * theta.cos() + out[128] * theta.sin(), atol=1e-9)
    assert lengths_on_the_way(out) == pytest.approx((1.09798, 0.0079), rel=1e-3)


@pytest.mark.parametrize("name", ["relu_few", "linear_mlp"])
def test_after_each_token_its_successor_is_likeliest(name: str) -> None:
    table = _shell.logits(built(name).model)[1:, 1:]
    centred = table - table.mean(-1, keepdim=True)
    wanted = 3 * (torch.eye(16, dtype=table.dtype).roll(1, dims=1) - 1 / 16)
    assert torch.allclose(centred, wanted, atol=1e-6)


def test_c10_rotated_computes_what_its_classes_do_and_no_neuron_is_one_of_them() -> None:
    from soluscope.controls.monosemantic import CLASS_OF, VOCAB

    plain = 6 * torch.eye(32, dtype=torch.float64)[list(CLASS_OF)]
    wanted = plain @ _shell.random_effect(1, plain, len(VOCAB))
    table = _shell.logits(built("rotated").model)
    error = (table - wanted)[:, 1:]
    assert (error - error.mean(-1, keepdim=True)).abs().max() < 1e-6 * wanted.abs().max()
    mid = by_token("rotated", POST)
    assert torch.allclose(mid.norm(dim=-1), mid.new_tensor(6), rtol=1e-9)
    assert mid.abs().max() < 5
    # The rms is 6 / sqrt(32) = 1.06, and the values are spread like a Gaussian's.
    assert (mid.abs() > 0.6).double().mean() > 0.4


# --- C14, C15 and C16 -----------------------------------------------------------------------------


def least_static_kl(name: str) -> tuple[float, float]:
    """Return the mean KL over the text of the best readout of mid at one gain, and of the best single distribution.

    The readout is linear in mid with a bias, as every readout at one gain is. The problem is convex; at the
    minimum that is found the gradient is below 5e-4.
    """
    model = built(name).model
    log_p = _shell.logits(model)[1:, 1:].log_softmax(-1).numpy()
    p, n = np.exp(log_p), len(log_p)
    share = np.ones(n) / n
    for _ in range(300):
        share = share @ p  # to the stationary distribution
    mid = by_token(name, MID)[1:].numpy()
    u, sizes, _ = np.linalg.svd(np.hstack([mid / mid.max(), np.ones((n, 1))]), full_matrices=False)
    features = u[:, sizes > 1e-12 * sizes[0]] * math.sqrt(n)

    def value_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        log_q = scipy.special.log_softmax(features @ flat.reshape(-1, n), axis=1)
        slope = features.T @ (share[:, None] * (np.exp(log_q) - p))
        return float((share[:, None] * p * (log_p - log_q)).sum()), slope.ravel()

    found = minimize(value_and_slope, np.zeros(features.shape[1] * n), jac=True, method="L-BFGS-B",
                     options={"maxiter": 2000, "maxfun": 4000})  # fmt: skip
    assert abs(found.jac).max() < 5e-4
    alike = share @ p
    return found.fun, float((share[:, None] * p * (log_p - np.log(alike))).sum())


def test_c14_has_a_low_r_at_most_tokens_and_a_gain_that_varies() -> None:
    gain, r, is_b = (
        content("ceiling", "gain"),
        content("ceiling", "engagement"),
        of_class("ceiling", "b"),
    )
    assert 0.65 < is_b.double().mean() < 0.8
    assert torch.allclose(r[is_b], r.new_tensor(1 / 26), rtol=1e-9)
    assert torch.allclose(r[~is_b], r.new_tensor(0.998492), rtol=1e-5)
    assert gain[is_b].min() / gain[~is_b].max() == pytest.approx(25.25, abs=0.005)
    mid = by_token("ceiling", MID)[1:]
    assert ((mid[32:] > 0.01).sum(-1) == 8).all()
    assert (mid[:32, :32] > 0.01).sum() == 32  # the same neurons


def test_c14_needs_a_gain_for_each_token() -> None:
    least, alike = least_static_kl("ceiling")
    assert least == pytest.approx(0.107, abs=0.003)
    assert alike == pytest.approx(0.326, abs=0.003)


def test_c15_erases_the_height_of_a_code_of_one_neuron() -> None:
    post = by_token("magnitude", POST)[1:]
    assert torch.allclose(post[:32], post[32:], rtol=1e-6)
    table = _shell.logits(built("magnitude").model)[1:, 1:]
    assert torch.allclose(table[:32], table[32:], atol=1e-5)
    mid = by_token("magnitude", MID)[1:]
    assert ((mid > 1e-12).sum(-1) == 1).all()
    gain, is_a = content("magnitude", "gain"), of_class("magnitude", "A")
    assert gain[~is_a].min() / gain[is_a].max() == pytest.approx(148.83, abs=0.05)


def test_c15_needs_a_gain_for_each_token() -> None:
    least, alike = least_static_kl("magnitude")
    assert least == pytest.approx(0.680, abs=0.003)
    assert alike == pytest.approx(1.529, abs=0.003)
    assert least_static_kl("smear_shared")[0] > 0.3


def test_c16_depends_on_the_gain_only_with_the_final_scale_frozen() -> None:
    assert cost("swallowed", frozen("swallowed")) < 1e-6
    tokens = built("swallowed").streams["natural"].tokens
    _, kept = built("swallowed").model.run_with_cache(tokens, names_filter=FINAL)
    held: dict[str, Edit] = {**frozen("swallowed"), FINAL: lambda scale: kept[FINAL]}
    assert cost("swallowed", held) > 1
