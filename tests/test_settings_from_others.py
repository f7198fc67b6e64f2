"""Settings that other people wrote: each is read or refused in one line, no secret is read, and nothing hangs."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

from soluscope import memory
from soluscope.config import EvalConfig, PretrainedConfig, load_config, load_evaluation, load_typed
from soluscope.config_help import help_lines
from soluscope.engines import ray, slurm
from soluscope.errors import UserError
from soluscope.launching.launch import LaunchConfig
from soluscope.launching.sweep import read_sweep
from soluscope.reading import DEEPEST
from soluscope.runs.weights import build_model

TINY = ("variant=solu_gain", "size=tiny")
VALUES = (
    "[1]", "{a: 1}", "[[1]]", "{}", "[]", "", "null", "x", "1e12", "1e400", "-1", "0", "nan", "inf", "true",
    "9223372036854775808", "9" * 6000, "0x" + "f" * 6000, "1:30", "${oc.env:HOME}", "${oc.decode:x}", "${tag}",
    "${nowhere}", "${train}", "${", "${}", "${${tag}}", "\\${x}", "$", "{seed.x}", "{seed:99999999999}", "x" * 300,
    "\x1b[31m", "!!python/object:os.system x", "!!binary x", "!!timestamp 2020-01-01", "!!set {a}", "&a [*a]",
    "*a", "? [a]", "{[a]: b}", "[" * 200 + "]" * 200, "{a: " * 200 + "}" * 200, "'", '"', "|", "%x", "\udce9",
    "{<<: 1}", "[null]", "1.5",
)  # fmt: skip


def keys_of(schema: type, prefix: str = "") -> list[str]:
    lines = (line for line in help_lines(schema, prefix) if not line.startswith("   "))
    return [line.split()[0] for line in lines]


def refused_or_read(read) -> None:
    """Call `read`, which may raise a UserError of one line and nothing else."""
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017


TRAINING = ("seed", "study", "runs_dir", "variant", "mid", "model", "train.rates", "train.rates.solu", "train.lr",
            "train.compile", "tokens.prepared", "mid.gain", "arm", "a.b")  # fmt: skip
"""Keys of each type; keys of one type are read by the same code."""


@pytest.mark.parametrize("key", TRAINING)
def test_every_type_of_key_takes_or_refuses_every_value_in_one_line(key: str) -> None:
    for value in VALUES:
        refused_or_read(lambda value=value: load_config([*TINY, f"{key}={value}"]))


@pytest.mark.parametrize("key", ["seed", "tag", "mid.gain"])
def test_values_of_a_file_are_read_or_refused_in_one_line(key: str, tmp_path: Path) -> None:
    *sections, name = key.split(".")
    lines = ["  " * depth + f"{each}:" for depth, each in enumerate(sections)]
    path = tmp_path / "a.yaml"
    for value in VALUES:
        text = "\n".join([*lines, "  " * len(sections) + f"{name}: {value}"])
        path.write_bytes(text.encode("utf8", "surrogateescape"))
        refused_or_read(lambda: load_config([*TINY, str(path)]))


@pytest.mark.parametrize("schema", [PretrainedConfig, LaunchConfig, slurm.Params, ray.Params])
def test_keys_of_evaluation_and_engines_take_or_refuse_every_value(schema: type) -> None:
    for key in keys_of(schema):
        for value in VALUES:
            refused_or_read(lambda word=f"{key}={value}": load_typed(schema, [word]))


@pytest.mark.parametrize("key", ["sets", "paths", "separator"])
def test_keys_of_sources_take_or_refuse_every_value(key: str) -> None:
    source = "hub" if key == "sets" else "files"
    for value in VALUES:
        words = (f"data={source}", f"corpus.{key}={value}", f"corpus.{key}.0={value}")
        refused_or_read(lambda words=words: load_config([*TINY, *words[:2]]))
        refused_or_read(lambda words=words: load_config([*TINY, words[0], words[2]]))


# Secrets


SECRET = "a-secret-value"
RESOLVERS = ("${oc.env:HF_TOKEN}", "x${oc.env:HF_TOKEN,none}", "${oc.decode:${oc.env:HF_TOKEN}}",
             "${oc.select:${oc.env:HF_TOKEN}}", "${oc.create:{a: 1}}", "${ oc.env:HF_TOKEN }",
             "\\\\${oc.env:HF_TOKEN}", "${oc.dict.keys:train}", "${oc.deprecated:tag}")  # fmt: skip


@pytest.mark.parametrize("text", RESOLVERS)
@pytest.mark.parametrize("key", ["tag", "runs_dir", "train.lr", "mid.gain"])
def test_no_resolver_is_read_from_words_files_or_sweeps(
    key: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    path = tmp_path / "a.yaml"
    path.write_text("".join(f"{'  ' * depth}{name}:{'' if depth or '.' not in key else chr(10)}"
                            for depth, name in enumerate(key.split("."))) + f" '{text}'\n")  # fmt: skip
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"method: grid\nparameters: {{{key}: {{value: '{text}'}}}}\n")
    for read in (
        lambda: load_config([*TINY, f"{key}={text}"]),
        lambda: load_config([*TINY, str(path)]),
        lambda: read_sweep(sweep, TINY),
    ):
        with pytest.raises(
            UserError, match=r"may only stand for the value of another key"
        ) as caught:
            read()
        assert SECRET not in str(caught.value)


def test_value_of_another_key_may_be_used() -> None:
    config = load_config([*TINY, "tag=lr${train.lr}-${model.d_model}", "train.lr=0.5"])
    assert config.tag == "lr0.5-32"


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "OPENAI_APIKEY", "DB_PASSWORD", "aws_secret"]
)
def test_no_path_contains_a_secret(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(name, SECRET)
    path = tmp_path / "a.yaml"
    path.write_text(f"tokens: {{cache_dir: '/tmp/${name}'}}")
    for words in ([f"runs_dir=${name}/x"], [str(path)]):
        with pytest.raises(UserError) as caught:
            load_config([*TINY, *words])
        assert SECRET not in str(caught.value)
        assert "secret" in str(caught.value)


def test_environment_variable_with_another_name_is_still_part_of_a_path(monkeypatch) -> None:
    monkeypatch.setenv("TOKENS_DIR", "/tokens")
    assert load_config([*TINY, "runs_dir=$TOKENS_DIR/x"]).runs_dir == "/tokens/x"


# Texts that grow


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [" + "x, " * 10 + "]"]
    lines += [f"a{n}: &a{n} [" + f"*a{n - 1}, " * 10 + "]" for n in range(1, levels)]
    return "\n".join(lines)


GROWING = {
    "30,000 levels of a list": "tag: " + "[" * 30_000 + "]" * 30_000,
    "30,000 levels of keys": "tag: " + "{a: " * 30_000 + "}" * 30_000,
    "30,000 open brackets": "[" * 30_000,
    "levels of blocks": "\n".join(" " * n + "a:" for n in range(300)),
    "levels of dashes": "- " * 10_000 + "a",
    "ten values in ten, ten times": bomb(10),
    "keys merged ten times in ten": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9)),
    "an alias of itself": "a: &a [*a]",
    "a key of itself": "a: &a {b: *a}",
    "many values": "a: [" + "1," * 200_000 + "]",
    "a megabyte": "a: '" + "x" * 1_000_001 + "'",
}


@pytest.mark.parametrize("name", GROWING)
def test_text_that_grows_is_refused_at_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(GROWING[name])
    began = time.process_time()
    for read in (lambda: load_config([*TINY, str(path)]), lambda: read_sweep(path, TINY)):
        with pytest.raises(UserError) as caught:
            read()
        assert len(str(caught.value)) < 400
    assert time.process_time() - began < 60


def test_levels_that_a_configuration_has_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train: &train {lr_rest: 0.5}\nmodel: {ctx: 16}\n")
    assert load_config([*TINY, str(path)]).train.lr_rest == 0.5
    assert DEEPEST > 10


def test_grid_of_too_many_jobs_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    keys = (
        "seed",
        "model.ctx",
        "train.steps",
        "train.batch_size",
        "train.log_every",
        "tokens.d_vocab",
    )
    axes = "\n".join(f"  {key}: {{values: {list(range(1, 60))}}}" for key in keys)
    path = tmp_path / "sweep.yaml"
    path.write_text(f"method: grid\nparameters:\n{axes}\n")
    with pytest.raises(UserError, match=r"has 42,180,533,641 jobs, but at most 10,000"):
        read_sweep(path, TINY)


# Numbers and memory


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.steps=9223372036854775808"], "train.steps=9223372036854775808 must be between"),
        (["model.d_model=1000000000000"], "must be between"),
        (["train.threads=100000"], "train.threads=100000 must be at most 1024"),
        (["train.rates.solu=inf"], "train.rates.solu=inf must be a finite number"),
        (["mid.gain=x{seed.x}"], "mid.gain=x{seed.x}: remove all braces except {seed}"),
        (["mid.gain={seed:99999999999}"], "remove all braces except {seed}"),
        (["train.init_from={seed!r:>9999999999}"], "train.init_from={seed!r:>9999999999}: remove all"),
        (["train.rates=[1]"], "train.rates=[1]: set keys below train.rates"),
        (["data=hub", "corpus.sets={a: 1}"], "give a list, as in corpus.sets=[…]"),
    ],
)  # fmt: skip
def test_setting_that_nothing_can_use_is_named(words: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([*TINY, *words])
    assert says in str(caught.value)


def test_evaluation_without_probes_or_with_too_many_draws_is_refused() -> None:
    for word, says in (("probes=[]", "probes=[] names no probe"), ("n_draws=1000000000", "at most 1,000,000"),
                       ("n_tokens=9223372036854775808", "must be between")):  # fmt: skip
        with pytest.raises(UserError) as caught:
            load_evaluation(EvalConfig, [word])
        assert says in str(caught.value)


@pytest.mark.parametrize("variant", ["solu_ln", "gelu", "solu_gain"])
@pytest.mark.parametrize("size", ["tiny", "demo"])
def test_estimate_counts_the_parameters_and_is_a_lower_bound_of_a_step(
    variant: str, size: str
) -> None:
    config = load_config([f"variant={variant}", f"size={size}", "model.n_layers=2"])
    model = build_model(config, config.tokens.d_vocab)
    own = {name: p for name, p in model.named_parameters() if ".mlp.ln." not in name}
    assert memory.n_parameters(config) == sum(p.numel() for p in own.values())
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rows = config.train.batch_size // config.train.micro_batches
    tokens = torch.randint(3, config.tokens.d_vocab, (rows, config.model.ctx))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.loss(tokens, bos=0)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    assert 0.7 * sum(kept.values()) < memory.of_step(config) < sum(kept.values())


def test_configuration_is_refused_where_its_memory_ends() -> None:
    config = load_config([*TINY, "train.device=cpu"])
    needed = memory.STATE * memory.n_parameters(config) + memory.of_step(config)
    memory.check_training(config, needed)
    with pytest.raises(UserError, match=r"lower train.batch_size or model.ctx"):
        memory.check_training(config, needed - 1)
    with pytest.raises(UserError, match=r"lower model.d_model"):
        memory.check_training(config, memory.STATE * memory.n_parameters(config) - 1)


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_of_a_container_is_its_limit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sys/fs/cgroup" / name
    path.parent.mkdir(parents=True)
    path.write_text("max\n")
    machine = memory.of_machine(tmp_path)
    assert 1e8 < machine < math.inf
    path.write_text("1000000\n")
    assert memory.of_machine(tmp_path) == 1_000_000


LARGE = ("model.d_model=1000000000", "model.n_layers=1000000000", "model.ctx=2000000000",
         "tokens.d_vocab=2000000000", "train.batch_size=100000000", "model.d_mlp=2000000000")  # fmt: skip


@pytest.mark.parametrize("word", LARGE)
def test_command_refuses_a_run_that_does_not_fit_and_writes_nothing(
    word: str, tmp_path: Path
) -> None:
    words = ("variant=solu", "size=tiny", "train.device=cpu", f"runs_dir={tmp_path / 'runs'}", word)
    done = run_python(ROOT / "train" / "run.py", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: solu-s0 needs at least ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_sweep_refuses_a_job_that_does_not_fit_before_any_job_starts(tmp_path: Path) -> None:
    words = (
        "train.device=cpu",
        f"runs_dir={tmp_path / 'runs'}",
        "wandb=off",
        "model.d_model=1000000000",
    )
    done = run_python(ROOT / "sweeps" / "launch.py", ROOT / "sweeps" / "smoke.yaml", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "needs at least" in done.stderr
    assert list(tmp_path.iterdir()) == []
