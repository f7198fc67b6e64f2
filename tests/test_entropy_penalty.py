"""The penalty on a peaked SoLU: its value, its gradient, and the parts of a run that it does not change."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import VARIANTS, tiny_config, train_silently
from safetensors.torch import load_file

from soluscope import plugins
from soluscope.config import Config, load_config, rate_origin
from soluscope.data.cache import prepare
from soluscope.errors import UserError
from soluscope.model import Activations
from soluscope.runs.folder import Run
from soluscope.runs.weights import build_model
from soluscope.training.entropy import loss_and_missing_entropy
from soluscope.training.module import TrainingModule

BOS = 0
TOKENS = torch.tensor([[BOS, 5, 7, 9, 5], [BOS, 8, 8, 6, 5]])
SMALL = (
    "model.d_model=8",
    "model.n_heads=2",
    "model.d_mlp=12",
    "model.ctx=5",
    "model.init_std=0.7",
)
WITHOUT_SOFTMAX = {"gelu", "gelu_ln", "expu", "ln_exp"}


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("entropy")


def rough(variant: str, *words: str) -> torch.nn.Module:
    """Return a small model in fp64 whose softmax is far from uniform."""
    config = load_config([f"variant={variant}", "size=tiny", *SMALL, *words])
    model = build_model(config, 20).double()
    for name, buffer in model.named_buffers():
        if name.endswith("gain"):
            buffer.fill_(3.0)
    return model


@pytest.mark.parametrize(("variant", "words", "n_blocks"), [
    ("solu", (), 1), ("solu_ln", ("model.n_layers=2",), 1), ("solu_block", ("mid.n_blocks=3",), 3),
])  # fmt: skip
def test_missing_entropy_is_the_divergence_from_uniform_at_tokens_that_are_not_bos(
    variant: str, words: tuple[str, ...], n_blocks: int
) -> None:
    model = rough(variant, *words)
    loss, missing = loss_and_missing_entropy(model, TOKENS, BOS)
    record: Activations = {}
    model.residual(TOKENS, record)
    found = []
    for layer in range(len(model.blocks)):
        for row in record[f"blocks.{layer}.mlp.hook_pre"]:
            for token in row[1:]:
                for block in token.reshape(n_blocks, -1):
                    p = torch.softmax(block, -1)
                    uniform = torch.full_like(p, 1 / len(p))
                    found.append(
                        torch.nn.functional.kl_div(uniform.log(), p, reduction="sum").item()
                    )
    assert missing.item() == pytest.approx(sum(found) / len(found), rel=1e-12)
    assert 0.1 < float(missing) < math.log(12 / n_blocks)
    assert torch.equal(loss, model.loss(TOKENS, BOS))


def test_missing_entropy_is_0_where_all_neurons_are_equal_and_log_n_where_one_takes_all() -> None:
    model = rough("solu")
    with torch.no_grad():
        model.mlp(0).W_in.zero_()
        assert float(loss_and_missing_entropy(model, TOKENS, BOS)[1]) == pytest.approx(0, abs=1e-14)
        model.mlp(0).b_in[3] = 1000.0
        _, missing = loss_and_missing_entropy(model, TOKENS, BOS)
    assert float(missing) == pytest.approx(math.log(12), rel=1e-14)


def test_the_gradient_is_that_of_the_closed_form_and_of_finite_differences() -> None:
    """d (log n - H) / d x_j = p_j (log p_j + H), for each token, over the number of tokens that count."""
    model = rough("solu")
    _, missing = loss_and_missing_entropy(model, TOKENS, BOS)
    (by_autograd,) = torch.autograd.grad(missing, model.mlp(0).b_in)
    record: Activations = {}
    model.residual(TOKENS, record)
    p = record["blocks.0.mlp.hook_pre"][:, 1:].softmax(-1).flatten(0, 1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(by_autograd, (p * (p.log() + entropy)).mean(0), rtol=1e-12, atol=0)

    weight, step = model.mlp(0).W_in, 1e-6
    _, missing = loss_and_missing_entropy(model, TOKENS, BOS)
    (gradient,) = torch.autograd.grad(missing, weight)
    for i, j in ((0, 0), (3, 7), (7, 11)):
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                weight[i, j] += sign * step
                ends.append(float(loss_and_missing_entropy(model, TOKENS, BOS)[1]))
                weight[i, j] -= sign * step
        assert float(gradient[i, j]) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_the_training_loss_is_the_cross_entropy_plus_lambda_times_the_missing_entropy(
    runs_dir: Path,
) -> None:
    config = tiny_config(
        runs_dir, "variant=solu", "train.entropy_penalty=0.7", "train.micro_batches=2"
    )
    module = TrainingModule(config, prepare(config))
    tokens = torch.randint(3, 500, (4, 32))
    step = module.training_step(tokens, 0)
    loss, missing = loss_and_missing_entropy(module.model, tokens, module.bos)
    torch.testing.assert_close(step["loss"], loss + 0.7 * missing)
    torch.testing.assert_close(step["cross_entropy"], loss / 2)
    assert not step["cross_entropy"].requires_grad


def test_without_a_penalty_a_step_is_the_model_s_own_loss(runs_dir: Path) -> None:
    config = tiny_config(runs_dir, "variant=solu")
    module = TrainingModule(config, prepare(config))
    assert module.loss == module.model.loss
    assert isinstance(module.training_step(torch.randint(3, 500, (2, 32)), 0), torch.Tensor)


def trained(runs_dir: Path, weight: float, *words: str) -> Run:
    """Train 40 steps at a high rate, so that the penalty can act."""
    settings = (
        f"study=w{weight:g}",
        "variant=solu",
        "train.steps=40",
        "train.lr=0.02",
        "wandb=off",
    )
    penalty = f"train.entropy_penalty={weight}"
    return Run(train_silently(tiny_config(runs_dir, *settings, penalty, *words)))


def missing_of(run: Run) -> float:
    tokens = torch.randint(3, 500, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float(loss_and_missing_entropy(run.load_model(), tokens, BOS)[1])


def test_a_penalty_makes_the_softmax_less_peaked_and_a_negative_one_more(runs_dir: Path) -> None:
    less, none, more = (missing_of(trained(runs_dir, weight)) for weight in (3.0, 0.0, -0.05))
    assert less < 0.5 * none
    assert more > 1.2 * none


def test_a_run_records_its_penalty_and_logs_the_cross_entropy(runs_dir: Path) -> None:
    """With a weight of 1000 the penalty would dominate a logged loss that contained it."""
    run = trained(runs_dir, 1000.0, "train.log_every=1", "train.steps=5", "train.micro_batches=2")
    assert run.facts.entropy_penalty == run.config.train.entropy_penalty == 1000.0
    assert [row["loss"] for row in run.rows()] == pytest.approx([math.log(512)] * 5, rel=0.02)


def test_an_interrupted_run_with_a_penalty_goes_on_bit_for_bit(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soluscope.training.callback import TrainingCallback

    words = ("train.steps=12", "train.checkpoint_every=5", "train.micro_batches=2")
    whole = trained(runs_dir, 0.3, *words)
    real = TrainingCallback.on_train_batch_end

    def stopping(self, trainer, *rest):
        self.asked_to_stop = trainer.global_step == 7
        real(self, trainer, *rest)

    with monkeypatch.context() as changed:
        changed.setattr(TrainingCallback, "on_train_batch_end", stopping)
        with pytest.raises(KeyboardInterrupt):
            trained(runs_dir, 0.3, *words, "tag=again")
    again = trained(runs_dir, 0.3, *words, "tag=again")
    left, right = (load_file(run.weights) for run in (whole, again))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_without_a_softmax_refuses_a_penalty_in_one_line(variant: str) -> None:
    words = [f"variant={variant}", "size=tiny", "train.entropy_penalty=0.1"]
    if variant not in WITHOUT_SOFTMAX:
        assert load_config(words).train.entropy_penalty == 0.1
        return
    with pytest.raises(UserError, match=f"but variant {variant} has no softmax") as error:
        load_config(words)
    assert "\n" not in str(error.value)
    assert load_config([*words[:2], "train.entropy_penalty=0"]).variant == variant


def test_the_declared_softmax_is_the_one_that_the_nonlinearity_applies() -> None:
    pre = torch.randn(3, 5, 24, dtype=torch.float64) * 2
    for name in VARIANTS:
        config = load_config([f"variant={name}", "size=tiny"])
        nonlinearity = plugins.pick("soluscope.variants", name).activation(24, config.mid)
        if name not in WITHOUT_SOFTMAX:
            p = nonlinearity.log_softmax(pre).exp().flatten(-2)
            torch.testing.assert_close(nonlinearity(pre), pre * p, rtol=1e-12, atol=0)


def test_a_penalty_changes_the_id_of_a_run_and_no_penalty_keeps_it() -> None:
    def config(*words: str) -> Config:
        return load_config(["variant=solu", "size=demo", *words])

    assert config().hash == config("train.entropy_penalty=0").hash
    assert config().hash != config("train.entropy_penalty=0.1").hash
    assert rate_origin(config()) == ""
    assert "train.entropy_penalty" in rate_origin(config("train.entropy_penalty=0.1"))
