"""Training: batches, schedule, static gains, resuming, and losses that are not finite."""

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, train_silently
from safetensors.torch import load_file

from soluscope import plugins
from soluscope.config import load_config
from soluscope.data.cache import open_cache, prepare
from soluscope.errors import UserError
from soluscope.runs.folder import Run
from soluscope.runs.weights import build_model, load_facts
from soluscope.training.batches import Batches, batch_rows
from soluscope.training.held_out import is_point
from soluscope.training.module import TrainingModule, parameter_groups, rate
from soluscope.training.static_gain import set_gain


@pytest.mark.parametrize("n_rows", [1, 2, 7, 64, 1000])
def test_an_epoch_takes_each_row_once(n_rows):
    drawn = np.concatenate([batch_rows(5, step, 1, n_rows) for step in range(2 * n_rows)])
    assert sorted(drawn[:n_rows]) == list(range(n_rows))
    assert sorted(drawn[n_rows:]) == list(range(n_rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = (batch_rows(0, step, 500, 500) for step in (0, 1))
    other = batch_rows(1, 0, 500, 500)
    assert (first == second).mean() < 0.05
    assert (first == other).mean() < 0.05


def test_the_order_of_rows_has_no_pattern_that_a_correlation_sees():
    order = batch_rows(3, 0, 20_000, 20_000)
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03


def test_batches_straddle_epochs_without_loss():
    in_one = batch_rows(0, 0, 30, 7)
    in_many = np.concatenate([batch_rows(0, step, 3, 7) for step in range(10)])
    assert (in_one == in_many).all()


def test_batches_are_the_same_for_every_variant(tmp_path):
    """The batches come from the real data loader of each variant's run."""
    seen = {}
    for variant in plugins.names("soluscope.variants"):
        config = tiny_config(tmp_path, f"variant={variant}", "seed=4", "train.micro_batches=2")
        batches = Batches(config, prepare(config))
        batches.trainer = type("At", (), {"global_step": 3})
        stream = iter(batches.train_dataloader())
        seen[variant] = torch.cat([next(stream) for _ in range(4)])
    reference = seen[plugins.names("soluscope.variants")[0]]
    assert reference.shape == (16, 32)  # two steps of two micro-batches of four rows
    assert all(torch.equal(reference, tokens) for tokens in seen.values())


def test_the_rate_warms_up_then_falls_as_a_cosine_to_its_final_share():
    config = load_config(["variant=gelu", "size=tiny", "train.steps=110", "train.warmup_steps=10"])
    assert [rate(step, config) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert rate(60, config) == pytest.approx(0.55)
    assert rate(110, config) == pytest.approx(0.1)


def test_parameter_groups_are_the_recipes():
    config = load_config(["variant=solu_ln", "size=tiny", "train.lr=3e-3", "train.lr_rest=2e-3"])
    model = build_model(config, 300)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    by_name = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert by_name.keys() == set(names.values())
    for name, settings in by_name.items():
        if name in ("embed.W_E", "pos_embed.W_pos") or name.rsplit(".", 1)[1][0] in "wb":
            assert settings == (2e-3, 0.0), name
        else:
            assert settings == ((2e-3 if name == "unembed.W_U" else 3e-3), 0.05), name


# The child process runs the real training, and sends itself SIGKILL right after step `at`.
CHILD = """
import os, signal, sys
from conftest import tiny_config, train_silently
from pathlib import Path
from soluscope.training.callback import TrainingCallback
runs, at, *words = sys.argv[1:]
config = tiny_config(Path(runs), *words)
real = TrainingCallback.on_train_batch_end
def dying(self, trainer, *rest):
    real(self, trainer, *rest)
    if trainer.global_step == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
TrainingCallback.on_train_batch_end = dying
train_silently(config)
"""


def killed(runs_dir, at, *words):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    command = [sys.executable, "-c", CHILD, str(runs_dir), str(at), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True).returncode


def without_speed(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


# right after a checkpoint; with 15 steps lost after it
@pytest.mark.parametrize("at", [pytest.param(37, marks=pytest.mark.long), 52])
def test_a_killed_run_goes_on_bit_for_bit_as_if_it_had_not_been(tmp_path, at):
    words = ["variant=solu_ln", "train.steps=100", "train.checkpoint_every=37", "train.snapshots=9"]
    whole = train_silently(tiny_config(tmp_path, "study=whole", *words))
    assert killed(tmp_path, at, "study=killed", *words) == -signal.SIGKILL
    interrupted = tmp_path / "killed" / "solu_ln-s0"
    assert not (interrupted / "done.json").exists()
    checkpoint = torch.load(interrupted / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 37
    train_silently(tiny_config(tmp_path, "study=killed", *words))
    left, right = (load_file(run / "model.safetensors") for run in (whole, interrupted))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert without_speed(whole) == without_speed(interrupted)
    kept = [
        json.loads((run / "done.json").read_text())["snapshots"] for run in (whole, interrupted)
    ]
    assert kept[0] == kept[1]
    assert [*kept[0]] == ["1", "2", "3", "5", "8", "13", "22", "36", "60"]


def test_sigterm_saves_where_it_was(tmp_path):
    child = CHILD.replace("signal.SIGKILL", "signal.SIGTERM")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    words = ["variant=solu_ln", "train.steps=100", "train.checkpoint_every=90", "study=term"]
    command = [sys.executable, "-c", child, str(tmp_path), "20", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr
    saved = tmp_path / "term" / "solu_ln-s0" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] in (20, 21)


def test_ctrl_c_within_a_step_is_heard_after_it_and_the_run_goes_on_bit_for_bit(
    tmp_path, monkeypatch
):
    words = ["variant=solu_ln", "train.steps=12"]
    whole = train_silently(tiny_config(tmp_path, "study=whole", *words))
    real, steps = torch.optim.AdamW.step, []

    def interrupted(self, *rest, **options):
        done = real(self, *rest, **options)
        steps.append(len(steps) + 1)
        if len(steps) == 7:  # the weights have changed, and Lightning has not counted the step yet
            os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    config = tiny_config(tmp_path, "study=stopped", *words)
    with pytest.raises(KeyboardInterrupt):
        train_silently(config)
    assert len(steps) == 7
    saved = config.run_dir / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 7
    train_silently(config)
    left, right = (load_file(run / "model.safetensors") for run in (whole, config.run_dir))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_finished_run_is_left_alone(tmp_path):
    config = tiny_config(tmp_path, "variant=gelu", "train.steps=3", "train.warmup_steps=0")
    run_dir = train_silently(config)
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.name != ".lock"}
    train_silently(config)
    assert before == {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.name != ".lock"}


def test_micro_batches_give_the_batchs_gradient(tmp_path):
    runs = [
        train_silently(
            tiny_config(
                tmp_path, "variant=gelu", "train.steps=5", f"tag=m{m}", f"train.micro_batches={m}"
            )
        )
        for m in (1, 4)
    ]
    one, four = (load_file(run / "model.safetensors") for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=2e-5)


def test_a_diverging_loss_stops_with_step_batch_checkpoint_and_knob(tmp_path):
    words = [
        "variant=gelu",
        "train.steps=60",
        "train.warmup_steps=20",
        "train.lr=1e4",
        "train.log_every=5",
    ]
    config = tiny_config(tmp_path, *words, "train.checkpoint_every=5")
    with pytest.raises(UserError) as refusal:
        train_silently(config)
    message = str(refusal.value)
    assert "at step" in message
    assert "batch of train rows" in message
    assert "last good checkpoint" in message
    assert "lower train.lr, now 10000" in message
    assert "\n" not in message
    assert not (config.run_dir / "done.json").exists()


def test_a_nan_loss_names_the_first_bad_step_and_its_rows(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "variant=gelu", "train.steps=20", "train.checkpoint_every=4")
    real = TrainingModule.training_step

    def breaking(self, tokens, index):
        loss = real(self, tokens, index)
        return loss * float("nan") if self.trainer.global_step == 6 else loss

    monkeypatch.setattr(TrainingModule, "training_step", breaking)
    rows = batch_rows(0, 6, 8, len(prepare(config).rows("train", 32)))
    with pytest.raises(
        UserError,
        match=rf"loss is nan at step 7 .*train rows {rows[0]}, {rows[1]}, .*last.ckpt, step 4",
    ):
        train_silently(config)
    kept = torch.load(config.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 4


def test_init_gain_is_near_one_over_root_epsilon_where_epsilon_pins(tmp_path):
    """With kappa far above the variance, the gain of LayerNorm is 1/sqrt(eps), and so is the matched gain."""
    config = tiny_config(tmp_path, "variant=solu_frozen_ln", "mid.kappa=1e5")
    model = build_model(config, prepare(config).meta["d_vocab"])
    set_gain(model, config, prepare(config))
    assert float(model.mlp(0).ln.gain) == pytest.approx((1e5 / 128**2) ** -0.5, rel=1e-3)


def test_gain_from_a_run_is_its_geometric_mean_and_is_stored(tiny_study, tmp_path):
    source = tiny_study / "solu_ln-s{seed}"
    config = tiny_config(
        tmp_path,
        "variant=solu_gain",
        "seed=1",
        f"mid.gain={source}",
        "train.steps=3",
        "train.warmup_steps=0",
    )
    facts = load_facts(train_silently(config))
    ln_run = Run(tiny_study / "solu_ln-s1")
    model, ln_facts = ln_run.load_model(), ln_run.facts
    rows = prepare(config).rows("select", 32)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), 8192 // 32)).astype(int)
    record = {}
    model(torch.from_numpy(rows[chosen]), record)
    gains = 1 / record["blocks.0.mlp.ln.hook_scale"][:, 1:].double()
    assert facts.gain == pytest.approx(gains.log().mean().exp().item(), rel=1e-5)
    assert ln_facts.kappa == pytest.approx(41.94304)


def test_gain_from_a_run_without_a_per_token_gain_is_refused(tiny_study, tmp_path):
    config = tiny_config(tmp_path, "variant=solu_gain", f"mid.gain={tiny_study / 'gelu-s0'}")
    with pytest.raises(UserError, match="is a run of gelu, which has no per-token gain to average"):
        train_silently(config)


def test_done_holds_the_loss_of_the_saved_weights_on_both_splits(tiny_study):
    run = Run(tiny_study / "solu_ln-s0")
    model, facts = run.load_model(), run.facts
    done = json.loads((tiny_study / "solu_ln-s0" / "done.json").read_text())
    config = load_config(["variant=solu_ln", "size=tiny"])
    cache_path = json.loads((tiny_study / "data.json").read_text())["path"]
    cache = open_cache(Path(cache_path))
    rows = cache.rows("report", facts.ctx)
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), config.train.val_tokens // 32)).astype(
        int
    )
    tokens = torch.from_numpy(rows[chosen])
    log_p = model(tokens).log_softmax(-1)[:, :-1]
    by_hand = -log_p.gather(-1, tokens[:, 1:, None]).mean().item()
    assert done["report_loss"] == pytest.approx(by_hand, rel=1e-5)
    assert facts.tokens == 12 * 8 * 32


def test_metrics_follow_engagement_during_training(tiny_study):
    with_norm = [json.loads(s) for s in (tiny_study / "solu_ln-s0" / "metrics.jsonl").open()]
    without = [json.loads(s) for s in (tiny_study / "solu-s0" / "metrics.jsonl").open()]
    assert [line["step"] for line in with_norm] == [10, 12]
    assert all(0 < line["r"] < 1 and line["gain"] > 0 for line in with_norm)
    assert all("r" not in line for line in without)
    eps = 41.94304 / 128**2
    for line in with_norm:  # r and gain follow from the same variance
        assert 1 - line["r"] == pytest.approx(eps * line["gain"] ** 2, rel=1e-3)


def test_metrics_follow_the_loss_on_held_out_documents(tiny_study):
    rows = [json.loads(s) for s in (tiny_study / "solu_ln-s0" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [10, 12]
    model = Run(tiny_study / "solu_ln-s0").load_model()
    cache = open_cache(Path(json.loads((tiny_study / "data.json").read_text())["path"]))
    select = cache.rows("select", 32)
    tokens = torch.from_numpy(
        select[np.linspace(0, len(select) - 1, min(len(select), 125)).astype(int)]
    )
    log_p = model(tokens).log_softmax(-1)[:, :-1]
    by_hand = -log_p.gather(-1, tokens[:, 1:, None]).mean().item()
    assert rows[-1]["held_out_loss"] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_a_step_causes_few_page_faults_once_freed_memory_is_kept():
    code = """
import resource, torch
from soluscope.config import load_config
from soluscope.memory import keep_freed_memory
from soluscope.runs.weights import build_model
torch.set_num_threads(1)
model = build_model(load_config(["variant=solu", "size=demo"]), 2048)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        model.zero_grad()
        model.loss(torch.randint(3, 2048, (32, 64)), 0).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed_memory()
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 4096  # the logits of one step alone have 4,096 pages


@pytest.mark.parametrize(
    ("steps", "log_every", "n"), [(450, 10, 15), (12, 10, 2), (10_000, 10, 17), (7, 1, 7)]
)
def test_a_run_has_about_sixteen_held_out_points_and_one_at_its_end(steps, log_every, n):
    words = ["variant=solu", "size=tiny", f"train.steps={steps}", "train.warmup_steps=0"]
    config = load_config([*words, f"train.log_every={log_every}"])
    logged = {*range(log_every, steps, log_every), steps}
    points = [step for step in sorted(logged) if is_point(step, config)]
    assert len(points) == n
    assert points[-1] == steps


def test_a_bare_machine_trains_from_a_carried_cache(tiny_study, tmp_path):
    cache = json.loads((tiny_study / "data.json").read_text())["path"]
    code = f"""
import sys
import lightning  # first, because it uses some of the packages below if they are installed
absent = "rich.progress jaxtyping pandas pyarrow scipy plotly transformer_lens datasets tokenizers"
sys.modules |= dict.fromkeys(absent.split())
from soluscope.config import load_config
from soluscope.training.run import train
train(load_config(["variant=solu_ln", "size=tiny", "train.steps=2", "train.warmup_steps=0",
                   "corpus.max_mb=1", "tokens.prepared={cache}", "runs_dir={tmp_path}"]))
assert "wandb" not in sys.modules
assert "soluscope.hooked.convert" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "default" / "solu_ln-s0" / "done.json").is_file()


def test_the_logged_loss_is_the_steps_mean_over_its_micro_batches(tmp_path):
    words = ["variant=gelu", "train.steps=2", "train.warmup_steps=0", "train.log_every=1"]
    logged = []
    for m in (1, 4):
        run_dir = train_silently(
            tiny_config(tmp_path, *words, f"tag=m{m}", f"train.micro_batches={m}")
        )
        logged.append([line["loss"] for line in without_speed(run_dir)])
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    assert logged[0][0] == pytest.approx(np.log(512), rel=0.01)


def test_a_gradient_that_is_not_finite_stops_before_the_checkpoint_takes_it(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "variant=gelu", "train.steps=20", "train.checkpoint_every=4")
    real = TrainingModule.configure_gradient_clipping

    def breaking(self, *words, **keys):
        if self.trainer.global_step == 6:
            self.model.unembed.b_U.grad[0] = torch.nan
        real(self, *words, **keys)

    monkeypatch.setattr(TrainingModule, "configure_gradient_clipping", breaking)
    with pytest.raises(UserError, match=r"gradient's norm is nan at step 7 .*last.ckpt, step 4"):
        train_silently(config)
    kept = torch.load(config.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(t.isfinite().all() for t in kept["state_dict"].values())


def test_a_ctx_longer_than_a_validation_split_is_refused_before_training(tmp_path):
    config = tiny_config(tmp_path, "variant=gelu", "model.ctx=100000")
    with pytest.raises(UserError, match=r"model.ctx=100000 is longer than the whole \w+ split"):
        train_silently(config)
    assert not (config.run_dir / "metrics.jsonl").exists()


def test_the_saved_configuration_and_facts_name_the_precision(tiny_study):
    facts = load_facts(tiny_study / "solu_ln-s0")
    assert (facts.precision, facts.device) == ("fp32", "cpu")
    assert "precision: fp32" in (tiny_study / "solu_ln-s0" / "config.yaml").read_text()


def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_only_finished(tmp_path):
    config = tiny_config(tmp_path, "variant=solu_frozen_ln", "train.steps=14")
    run_dir = train_silently(config)
    weights, losses = load_file(run_dir / "model.safetensors"), without_speed(run_dir)
    done = json.loads((run_dir / "done.json").read_text())
    for name in ("done.json", "model.safetensors", "model.json"):
        (run_dir / name).unlink()
    train_silently(config)
    again = load_file(run_dir / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert without_speed(run_dir) == losses
    assert json.loads((run_dir / "done.json").read_text()) | {"seconds": 0} == done | {"seconds": 0}


def test_gradients_do_not_depend_on_the_order_of_threads() -> None:
    config = load_config(["variant=solu_ln", "size=demo"])
    model = build_model(config, 2048)
    tokens = torch.randint(3, 50, (32, 64), generator=torch.Generator().manual_seed(0))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(20):
            model.zero_grad()
            model.loss(tokens, bos=0).backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    finally:
        torch.set_num_threads(n_threads)
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


# --- train.init_from -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Return a folder of runs with a finished run of solu_ln and one of its static twin, 12 steps each."""
    runs_dir = tmp_path_factory.mktemp("init_from")
    for variant in ("solu_ln", "solu_frozen_ln"):
        train_silently(tiny_config(runs_dir, "study=first", f"variant={variant}"))
    return runs_dir


def started_from(runs_dir, run, *words):
    return tiny_config(
        runs_dir, "study=more", f"train.init_from={runs_dir / 'first' / run}", *words
    )


def test_a_run_starts_with_the_weights_of_another_and_draws_the_next_rows(first):
    config = started_from(first, "solu_ln-s{seed}", "variant=solu_ln")
    cache = prepare(config)
    module = TrainingModule(config, cache)
    trained = load_file(first / "first" / "solu_ln-s0" / "model.safetensors")
    state = module.model.state_dict()
    assert state.keys() == trained.keys()
    assert all(torch.equal(state[name], trained[name]) for name in state)
    batches, size = Batches(config, cache), config.train.batch_size
    batches.trainer = type("Trainer", (), {"global_step": 0})()
    rows = next(iter(batches.train_dataloader().sampler))
    assert rows.tolist() == batch_rows(0, 12, size, len(batches.rows)).tolist()


def test_the_origin_is_recorded_with_all_its_steps_and_changes_the_id(first):
    words = ("variant=solu_ln", "train.schedule=constant", "tag=on")
    config = started_from(first, "solu_ln-s0", *words)
    run = Run(train_silently(config))
    assert run.config.train.init_from == str(first / "first" / "solu_ln-s0")
    assert (run.facts.steps, run.facts.init_from.steps) == (12, 12)
    again = tiny_config(first, f"train.init_from={run.dir}", "variant=solu_ln", "tag=again")
    origin = load_facts(train_silently(again)).init_from
    assert (origin.run, origin.config) == ("more/solu_ln-s0-on", config.hash)
    assert (origin.steps, origin.tokens) == (24, 2 * run.facts.tokens)
    plain = tiny_config(first, *words)
    assert len({config.hash, again.hash, plain.hash}) == 3
    assert plain.hash == tiny_config(first, *words, "train.init_from=null").hash


def test_a_killed_run_with_an_origin_goes_on_bit_for_bit(first):
    words = (
        f"train.init_from={first / 'first' / 'solu_ln-s0'}",
        "variant=solu_ln",
        "train.checkpoint_every=5",
    )
    whole = train_silently(tiny_config(first, "study=whole", *words))
    assert killed(first, 7, "study=killed", *words) == -signal.SIGKILL
    interrupted = train_silently(tiny_config(first, "study=killed", *words))
    left, right = (load_file(run / "model.safetensors") for run in (whole, interrupted))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert without_speed(whole) == without_speed(interrupted)


def test_a_static_norm_keeps_its_gain_and_takes_the_weights_of_a_per_token_norm(first):
    words = ("variant=solu_frozen_ln", "train.steps=1", "train.warmup_steps=0")
    kept = load_facts(train_silently(started_from(first, "solu_frozen_ln-s0", *words, "tag=kept")))
    assert kept.gain == load_facts(first / "first" / "solu_frozen_ln-s0").gain
    chosen = started_from(first, "solu_frozen_ln-s0", *words, "tag=chosen", "mid.gain=3")
    assert load_facts(train_silently(chosen)).gain == 3
    config = started_from(first, "solu_ln-s0", *words)
    model = TrainingModule(config, prepare(config)).model
    trained = Run(first / "first" / "solu_ln-s0").load_model()
    assert torch.equal(model.mlp(0).ln.w, trained.mlp(0).ln.w)
    assert model.mlp(0).ln.gain.isfinite()


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("solu_ln-s0", ["model.ctx=16"], r"pos_embed.W_pos is \(32, 32\) there and \(16, 32\) here"),
        ("solu_ln-s0", ["model.d_mlp=64"], r"mlp.W_in is \(32, 128\) there and \(32, 64\) here"),
        ("solu_ln-s0", ["variant=solu"], r"mlp.ln.b is \(128,\) there and missing here"),
        ("solu_ln-s0", ["model.n_layers=2"], r"blocks.1.attn.W_K is missing there"),
        ("solu_ln-s0", ["tokens.d_vocab=400"], r"different tokenizer: set tokens.tokenizer="),
        ("solu_ln-s9", [], r"train.init_from: no model at .*: the run does not exist"),
    ],
)  # fmt: skip
def test_an_origin_that_does_not_fit_is_refused(first, run, words, message):
    config = started_from(first, run, "variant=solu_ln", "study=refused", *words)
    with pytest.raises(UserError, match=message) as refused:
        TrainingModule(config, prepare(config))
    assert len(str(refused.value).splitlines()) == 1


def test_a_run_is_not_its_own_origin_and_more_steps_are_possible_under_a_tag(first):
    with pytest.raises(UserError, match="is the folder of this run itself: set tag= or study="):
        tiny_config(
            first,
            "variant=solu_ln",
            "study=first",
            f"train.init_from={first}/first/../first/solu_ln-s0",
        )
    with pytest.raises(
        UserError, match=r"set tag= .*; with train.init_from=\S+solu_ln-s0 it starts"
    ):
        train_silently(tiny_config(first, "variant=solu_ln", "study=first", "train.steps=40"))
