"""The configuration: three layers, checked when loaded, and saved so that it can be run again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from yaml import safe_dump

from soluscope import plugins
from soluscope.config import (
    Config,
    EvalConfig,
    PretrainedConfig,
    configs_dir,
    differences,
    flatten,
    for_others,
    load_config,
    load_typed,
    rate_origin,
    read_config,
    to_yaml,
)  # fmt: skip
from soluscope.config_help import help_lines, train_help
from soluscope.errors import UserError
from soluscope.launching.sweep import read_sweep
from soluscope.reading import read_yaml

TINY = ("variant=solu_ln", "size=tiny")
GROUPS = {"variant": "soluscope.variants", "data": "soluscope.data.sources"}
SIZES = sorted(path.stem for path in (configs_dir() / "size").glob("*.yaml"))
VARIANTS = plugins.names("soluscope.variants")


def refusal(*words: str) -> str:
    """Return the message with which `words` are refused, which must be one line."""
    with pytest.raises(UserError) as caught:
        load_config(words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf8")
    return str(path)


# Layers


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    assert load_config(TINY).train.weight_decay == 0.05  # config.py
    assert load_config(TINY).data == "stdlib"  # configs/base.yaml
    assert load_config(TINY).train.steps == 60  # configs/size/tiny.yaml
    yaml = written(tmp_path / "a.yaml", "train: {steps: 70, batch_size: 4, weight_decay: 0.1}")
    from_yaml = load_config([*TINY, yaml]).train
    assert (from_yaml.steps, from_yaml.batch_size, from_yaml.weight_decay) == (70, 4, 0.1)
    last = load_config([*TINY, "train.steps=80", yaml]).train
    assert (last.steps, last.batch_size, last.warmup_steps) == (80, 4, 5)


def test_later_yaml_files_win_over_earlier_ones(tmp_path: Path) -> None:
    a = written(tmp_path / "a.yaml", "train: {steps: 70, clip: 2.0}")
    b = written(tmp_path / "b.yaml", "train: {steps: 71}")
    assert load_config([*TINY, a, b]).train.steps == 71
    assert load_config([*TINY, b, a]).train.steps == 70
    assert load_config([*TINY, a, b]).train.clip == 2.0


def test_group_chosen_by_a_yaml_file_or_the_command_line_brings_its_own_file(
    tmp_path: Path,
) -> None:
    yaml = written(tmp_path / "a.yaml", "variant: solu_gain\nsize: d128\nmodel: {ctx: 64}")
    config = load_config([yaml])
    assert (config.variant, config.model.d_model, config.model.ctx) == ("solu_gain", 128, 64)
    assert load_config([yaml, "size=tiny"]).model.d_model == 32


def test_base_yaml_does_not_win_over_the_size(tmp_path: Path) -> None:
    assert load_config(["variant=solu"]).size == "demo"
    assert load_config(["variant=solu", "size=tiny"]).model.d_model == 32


def test_debug_yaml_is_a_short_run_of_its_own_study() -> None:
    config = load_config([str(configs_dir() / "debug.yaml"), "variant=solu"])
    assert (config.study, config.size, config.train.steps) == ("debug", "tiny", 20)


def test_variant_and_source_bring_their_own_parameters() -> None:
    config = load_config(["variant=solu_gain", "size=tiny", "mid.gain=2.5", "corpus.max_mb=3"])
    assert (config.mid.gain, config.corpus.max_mb) == (2.5, 3.0)
    assert load_config(["variant=gelu_ln", "size=tiny"]).mid.eps == 1e-5
    assert "mid.gain" in refusal("variant=solu", "size=tiny", "mid.gain=2.5")


def test_rate_is_the_one_given_or_the_tuned_one_of_the_variant() -> None:
    rates = "train.rates={solu: 3e-3, gelu: 4e-3}"
    assert load_config(["variant=solu", "size=demo", rates]).train.lr == 3e-3
    assert load_config(["variant=solu", "size=demo", rates, "train.lr=1e-4"]).train.lr == 1e-4
    longest = "solu_ln mid.kappa=4e-5 train.warmup_steps=9"
    rates = f"train.rates={{solu_ln: 3e-3, solu_ln mid.kappa=4e-5: 4e-3, {longest}: 5e-3}}"
    live = ["variant=solu_ln", "size=demo", rates, "mid.kappa=4e-5"]
    assert load_config(live[:-1]).train.lr == 3e-3
    assert load_config(live).train.lr == 4e-3
    assert load_config([*live, "train.warmup_steps=9"]).train.lr == 5e-3
    assert load_config([*live, "mid.kappa=4.1e-5"]).train.lr == 3e-3


def test_rate_that_nobody_tuned_is_refused() -> None:
    message = refusal("variant=solu", "size=tiny", "train.lr=null")
    assert message == (
        "size 'tiny' has no tuned rate for variant 'solu': set train.lr, or add it to train.rates in "
        "configs/size/"
    )


# The saved configuration


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_configuration_reads_back_equal(tmp_path: Path, variant: str) -> None:
    words = [f"variant={variant}", "size=demo", "seed=3", "tag=x-y", "train.lr_rest=3e-4"]
    config = load_config(words)
    path = Path(written(tmp_path / "config.yaml", to_yaml(config)))
    assert read_config(path) == config
    assert type(read_config(path).mid) is type(config.mid)
    assert read_config(path).hash == config.hash


def test_saved_configuration_runs_again_by_its_file_alone(tmp_path: Path) -> None:
    config = load_config(["variant=solu_gain", "size=demo", "mid.gain=3", "corpus.max_mb=2"])
    assert load_config([written(tmp_path / "config.yaml", to_yaml(config))]) == config


def test_saved_nested_lists_read_back_equal(tmp_path: Path) -> None:
    config = load_config([*TINY, "data=hub", "corpus.max_mb=7"])
    assert config.corpus.sets[1].text_field == "content"
    assert read_config(Path(written(tmp_path / "config.yaml", to_yaml(config)))) == config


def test_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no configuration at .* is not a run folder"):
        read_config(tmp_path / "config.yaml")


# Text and paths as they were written

TEXTS = ("no", "off", "1e10", "007", "1:30", "2024-01-01", "a: b", "# x", "- ", "\n\n", " ", "---", "*",
         "[x", "null", "'", "=", "é…")  # fmt: skip


def text_fields(config: Config) -> list[Any]:
    (hub_set,) = config.corpus.sets
    return [hub_set.name, hub_set.revision, hub_set.text_field]


@pytest.mark.parametrize("text", TEXTS)
def test_text_field_keeps_its_text_from_every_source(tmp_path: Path, text: str) -> None:
    quoted = json.dumps(text, ensure_ascii=False)
    sets = f"[{{path: x, name: {quoted}, revision: {quoted}, text_field: {quoted}}}]"
    hub = (*TINY, "data=hub")
    assert text_fields(load_config([*hub, f"corpus.sets={sets}"])) == [text] * 3
    yaml = written(tmp_path / "a.yaml", f"corpus: {{sets: {sets}}}")
    config = load_config([*hub, yaml])
    assert text_fields(config) == [text] * 3
    saved = Path(written(tmp_path / "config.yaml", to_yaml(config)))
    assert read_config(saved) == config
    files = (*TINY, "data=files", "corpus.paths=[x]")
    assert load_config([*files, f"corpus.text_field={text}"]).corpus.text_field == text
    assert load_config([*files, f"corpus.text_field={quoted}"]).corpus.text_field == text
    sweep = {"corpus.text_field": {"value": text}, "corpus.paths": {"value": ["x", text]}}
    path = tmp_path / "sweep.yaml"
    path.write_text(safe_dump({"method": "grid", "parameters": sweep}), encoding="utf8")
    (job,) = read_sweep(path, [*TINY, "data=files"]).configs
    assert (job.corpus.text_field, job.corpus.paths) == (text, ["x", text])


@pytest.mark.parametrize("text", ["no", "1e10", "12e4567", "0x10", "1_000", "TRUE", "2024-01-01"])
def test_unquoted_text_of_a_yaml_file_is_its_text(tmp_path: Path, text: str) -> None:
    yaml = written(
        tmp_path / "a.yaml", f"corpus: {{sets: [{{path: x, revision: {text}}}]}}\ntag: {text}"
    )
    config = load_config([*TINY, "data=hub", yaml])
    assert (config.corpus.sets[0].revision, config.tag) == (text, text)
    revision = written(tmp_path / "b.yaml", f"revision: {text}")
    assert load_typed(PretrainedConfig, [revision]).revision == text
    assert load_typed(PretrainedConfig, [f"revision={text}"]).revision == text


def test_key_of_a_mapping_wins_over_the_keys_that_it_merges(tmp_path: Path) -> None:
    text = """
model: {<<: [{n_heads: 1}, {n_heads: 4, d_mlp: 64}], d_model: 16}
tokens: {<<: {train_mb: 2, d_vocab: 300}, d_vocab: 400}
"""
    config = load_config([*TINY, written(tmp_path / "a.yaml", text)])
    assert (config.model.n_heads, config.model.d_mlp, config.model.d_model) == (1, 64, 16)
    assert (config.tokens.train_mb, config.tokens.d_vocab) == (2, 400)
    nested = "x: &x {<<: {a: 1}, a: 2}\ny: {<<: *x, b: 3}\nz: *x"
    content = read_yaml(Path(written(tmp_path / "b.yaml", nested)))
    assert content == {"x": {"a": 2}, "y": {"a": 2, "b": 3}, "z": {"a": 2}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("? [a]\n: 1", "a key is a list"),
        ("a: {<<: 1}", "<< needs a mapping"),
        ("a: 1\na: 2", "twice"),
    ],
)
def test_mapping_without_a_meaning_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(*TINY, written(tmp_path / "a.yaml", text))


def test_corpus_of_a_pretrained_model_keeps_its_text() -> None:
    words = ["data=hub", "corpus.sets=[{path: x, name: no, revision: 1e10}]", "corpus.max_mb=2"]
    text = load_typed(PretrainedConfig, words).text("hub", "bpe")
    assert (text.corpus.sets[0].name, text.corpus.sets[0].revision) == ("no", "1e10")
    assert text.corpus.max_mb == 2
    whole = load_typed(PretrainedConfig, ["data=stdlib", "corpus={max_mb: 2}"])
    assert whole.text("stdlib", "bpe").corpus.max_mb == 2


@pytest.mark.parametrize("text", ["\n\n", r"\n\n", r'"\n\n"'])
def test_separator_of_empty_lines_arrives_however_it_is_written(text: str) -> None:
    files = [*TINY, "data=files", "corpus.paths=[x]"]
    assert load_config([*files, f"corpus.separator={text}"]).corpus.separator == "\n\n"
    words = ["data=files", "corpus.paths=[x]", f"corpus.separator={text}"]
    typed = load_typed(PretrainedConfig, words).text("files", "bpe")
    assert typed.corpus.separator == "\n\n"


@pytest.mark.parametrize("text", [r'"\n\n"', r"'\n\n'", r"\n\n"])
def test_separator_of_empty_lines_arrives_from_a_file(tmp_path: Path, text: str) -> None:
    files = [*TINY, "data=files", "corpus.paths=[x]"]
    yaml = written(tmp_path / "a.yaml", f"corpus: {{separator: {text}}}")
    assert load_config([*files, yaml]).corpus.separator == "\n\n"
    sweep = f"method: grid\nparameters: {{corpus.separator: {{value: {text}}}}}"
    (job,) = read_sweep(Path(written(tmp_path / "sweep.yaml", sweep)), files).configs
    assert job.corpus.separator == "\n\n"


def test_separator_may_begin_with_the_name_of_a_tex_command() -> None:
    words = [*TINY, "data=files", "corpus.paths=[x]", r"corpus.separator=\newpage"]
    assert load_config(words).corpus.separator == r"\newpage"


def test_home_and_environment_variables_are_replaced_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    expected = ["/home/me/a", "/scratch/a", "/scratch/a"]
    for path, absolute in zip(("~/a", "$SCRATCH/a", "${SCRATCH}/a"), expected, strict=True):
        words = [
            "variant=solu_gain", "size=tiny", "data=files", f"corpus.paths=[{path}, b]",
            f"mid.gain={path}", f"runs_dir={path}", f"tokens.cache_dir={path}",
            f"tokens.prepared={path}", f"tokens.tokenizer={path}", f"train.init_from={path}",
        ]  # fmt: skip
        config = load_config(words)
        content = {key: value for key, _, value in (word.partition("=") for word in words)}
        content["corpus.paths"] = [path, "b"]
        nested = OmegaConf.to_yaml(OmegaConf.from_dotlist([f"{k}={v}" for k, v in content.items()]))
        assert load_config([written(tmp_path / "a.yaml", nested)]) == config
        grid = {key: {"value": value} for key, value in content.items()}
        sweep = Path(
            written(tmp_path / "s.yaml", safe_dump({"method": "grid", "parameters": grid}))
        )
        assert read_sweep(sweep, []).configs == (config,)
        assert (config.runs_dir, config.mid.gain, config.corpus.paths) == (
            absolute, absolute, [absolute, "b"],
        )  # fmt: skip
        tokens = config.tokens
        assert {tokens.cache_dir, tokens.prepared, tokens.tokenizer} == {absolute}
        assert config.train.init_from == absolute
        pretrained = load_typed(
            PretrainedConfig, [f"prepared={path}", f"runs_dir={path}", f"study=[{path}, b]"]
        )
        assert (pretrained.prepared, pretrained.runs_dir) == (absolute, absolute)
        assert pretrained.studies == [absolute, "b"]
    hub = load_config([*TINY, "data=hub", "corpus.sets=[{path: ~/a, revision: ~/a}]"])
    assert (hub.corpus.sets[0].path, hub.corpus.sets[0].revision) == ("/home/me/a", "~/a")
    assert load_config([*TINY, "tag=s", "runs_dir=~/${study}/$SCRATCH"]).runs_dir == (
        "/home/me/default//scratch"
    )


def test_path_with_an_unknown_variable_or_user_is_refused() -> None:
    assert refusal(*TINY, "runs_dir=$NOWHERE/runs") == (
        "the path '$NOWHERE/runs' needs the environment variable NOWHERE, which is not set: set it, or "
        "write the path without $"
    )
    assert "NOWHERE" in refusal(*TINY, "runs_dir=${NOWHERE}/runs")
    assert "there is no such user" in refusal(*TINY, "runs_dir=~nobody-here/runs")
    assert load_config([*TINY, "data=files", "corpus.paths=[~*.txt]"]).corpus.paths == ["~*.txt"]


def test_bytes_that_are_not_text_are_refused() -> None:
    assert "is not text in the encoding" in refusal(*TINY, "runs_dir=h\udce9")


def test_word_that_is_an_existing_path_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("lr=0.1, x")
    folder.mkdir()
    yaml = written(folder / "a.yaml", "train: {steps: 70}")
    assert load_config([*TINY, yaml]).train.steps == 70
    assert load_typed(EvalConfig, [written(folder / "b.yaml", "n_tokens: 300")]).n_tokens == 300
    assert load_config([*TINY, f"runs_dir={folder}"]).runs_dir == "lr=0.1, x"
    assert "no configuration file runs/lr=1/a.yaml" in refusal(*TINY, "runs/lr=1/a.yaml")
    (folder / "study").mkdir()
    assert load_typed(PretrainedConfig, [f"study={folder / 'study'}"]).studies == [
        "lr=0.1, x/study"
    ]


# The hash


PLACES = ("study=x", "tag=x", "runs_dir=x", "tokens.cache_dir=x", "train.rates={solu: 1}",
          "train.log_every=7", "train.checkpoint_every=7", "train.device=cpu",
          "train.compile=false")  # fmt: skip
NUMBERS = ("seed=1", "variant=gelu_ln", "mid.kappa=1", "mid.eps=1", "corpus.max_mb=1", "model.ctx=16",
           "model.n_heads=1", "tokens.d_vocab=300", "tokens.report_share=0.3", "train.steps=61",
           "train.lr=1", "train.beta2=0.5", "train.schedule=constant", "train.precision=bf16",
           "data=hub")  # fmt: skip


def test_hash_and_differences_do_not_see_places() -> None:
    config = load_config(TINY)
    for word in PLACES:
        other = load_config([*TINY, word])
        assert other != config, word
        assert other.hash == config.hash, word
        assert differences(config, other) == [], word


def test_hash_and_differences_see_each_number_and_name_it() -> None:
    config = load_config(TINY)
    hashes = {config.hash}
    for word in NUMBERS:
        other = load_config([*TINY, word])
        hashes.add(other.hash)
        named = {line.split("=")[0] for line in differences(config, other)}
        assert word.split("=")[0] in named, word
    assert len(hashes) == len(NUMBERS) + 1


def test_difference_says_what_is_there_and_what_is_here() -> None:
    there, here = load_config([*TINY, "train.steps=70"]), load_config([*TINY, "train.steps=80"])
    assert differences(there, here) == ["train.steps=70 there, 80 here"]


def test_run_is_named_by_variant_seed_and_tag() -> None:
    config = load_config([*TINY, "seed=4", "tag=wide", "study=s", "runs_dir=/r"])
    assert config.run_dir == Path("/r/s/solu_ln-s4-wide")
    assert (config.arm, load_config(TINY).arm) == ("solu_ln-wide", "solu_ln")


# Schemas


def schemas() -> Iterator[tuple[str, type]]:
    """Yield every dataclass whose keys a user can set, including the parameters of open sets."""
    yield "", Config
    yield "", EvalConfig
    for section, package in (("mid.", GROUPS["variant"]), ("corpus.", GROUPS["data"])):
        for name in plugins.names(package):
            yield section, plugins.pick(package, name).params


def keys_of(schema: type, prefix: str) -> Iterator[str]:
    for item in fields(schema):
        if is_dataclass(item.default_factory):
            yield from keys_of(item.default_factory, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


def shown(schema: type, prefix: str = "") -> dict[str, list[str]]:
    """Return the help on each key: its default, and the words of the first line of its meaning."""
    lines = (line for line in help_lines(schema, prefix) if not line.startswith("   "))
    return {key: entry for key, *entry in map(str.split, lines)}


@pytest.mark.parametrize(("prefix", "schema"), list(schemas()))
def test_help_lists_every_key_with_its_default_and_meaning(prefix: str, schema: type) -> None:
    found = shown(schema, prefix)
    assert list(found) == list(keys_of(schema, prefix))
    for key, (default, *meaning) in found.items():
        assert default, key
        assert meaning, key


def test_train_help_has_the_keys_of_every_variant_and_source() -> None:
    text = train_help()
    for prefix, schema in schemas():
        if schema is not EvalConfig:
            for key in keys_of(schema, prefix):
                assert re.search(rf"^  {re.escape(key)} ", text, re.MULTILINE), key


def test_help_shows_the_default_that_a_run_gets() -> None:
    defaults = {key: default for key, (default, *_) in shown(Config).items()}
    assert defaults["variant"] == "required"
    assert defaults["train.lr"] == "null"
    assert defaults["train.beta2"] == "0.99"


@pytest.mark.parametrize(("prefix", "schema"), list(schemas()))
def test_every_schema_is_frozen(prefix: str, schema: type) -> None:
    assert schema.__dataclass_params__.frozen


def test_loaded_configuration_cannot_be_changed() -> None:
    config: Any = load_config(TINY)
    for part, name in ((config, "seed"), (config.train, "steps"), (config.mid, "eps"),
                       (config.corpus, "max_mb")):  # fmt: skip
        with pytest.raises(FrozenInstanceError):
            setattr(part, name, 1)


# Files in configs/


@pytest.mark.parametrize("group", GROUPS)
def test_each_member_has_a_yaml_of_its_name_and_each_yaml_a_member(group: str) -> None:
    files = sorted(path.stem for path in (configs_dir() / group).glob("*"))
    assert files == plugins.names(GROUPS[group])


@pytest.mark.parametrize("group", ["variant", "data", "size"])
def test_each_group_file_says_its_own_name(group: str) -> None:
    for path in (configs_dir() / group).glob("*.yaml"):
        assert re.search(rf"^{group}: {path.stem}$", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize(("size", "variant"), list(product(SIZES, VARIANTS)))
def test_every_size_loads_for_every_variant(size: str, variant: str) -> None:
    config = load_config([f"size={size}", f"variant={variant}"])
    assert (config.size, config.variant) == (size, variant)
    assert config.train.lr is not None


def test_solu1l_is_the_recipe_of_the_pretrained_model() -> None:
    config = load_config(["variant=solu_ln", "size=solu1l", "data=hub"])
    model, train = config.model, config.train
    assert (model.d_model, model.d_mlp, model.n_layers) == (512, 2048, 1)
    assert (model.n_heads, model.d_model // model.n_heads) == (8, 64)
    assert (model.ctx, config.tokens.d_vocab) == (1024, 48262)
    assert (model.ln_eps, model.init_std) == (1e-5, 0.02)
    tokens_a_step = train.batch_size * model.ctx
    assert abs(train.steps * tokens_a_step - 22e9) <= tokens_a_step
    assert abs(train.warmup_steps * tokens_a_step - 3e8) <= tokens_a_step
    assert (train.lr, train.lr_rest) == (2e-3 / (512 / 256), 1e-3)
    assert (train.beta1, train.beta2, train.weight_decay, train.clip) == (0.9, 0.99, 0.05, 1.0)
    assert (train.schedule, train.final_lr_share) == ("cosine", 0.1)
    assert config.mid.epsilon(model.d_mlp) == pytest.approx(1e-5, rel=1e-12)


def test_kappa_is_epsilon_times_the_square_of_the_width() -> None:
    config = load_config([*TINY, "mid.kappa=32"])
    assert config.mid.epsilon(128) == 32 / 128**2
    assert load_config([*TINY, "mid.eps=3e-4"]).mid.epsilon(128) == 3e-4
    for d_mlp in (128, 512):
        dose = load_config(TINY).mid.epsilon(d_mlp) * d_mlp**2
        assert dose == pytest.approx(1e-5 * 2048**2)


def test_evaluation_reads_its_own_file_and_then_the_words() -> None:
    assert load_typed(EvalConfig, [], "eval.yaml").n_tokens == 10_000
    words = ["n_tokens=500", "probes=[engagement]"]
    config = load_typed(EvalConfig, words, "eval.yaml")
    assert (config.n_tokens, config.probes) == (500, ["engagement"])


# Refusals


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    assert refusal(*TINY, "train.stepz=3") == (
        "no key called 'train.stepz'. Did you mean 'train.steps'? --help lists all keys"
    )
    assert "'trian'. Did you mean 'train'?" in refusal(*TINY, "trian.steps=3")
    assert "'mid.kapa'. Did you mean 'mid.kappa'?" in refusal(*TINY, "mid.kapa=3")
    yaml = written(tmp_path / "a.yaml", "model: {d_modl: 3}")
    assert "'model.d_modl'. Did you mean 'model.d_model'?" in refusal(*TINY, yaml)


def test_unknown_parameter_of_a_variant_or_source_lists_the_known_ones() -> None:
    assert refusal("variant=solu_ln", "mid.gain=3") == (
        "no key called 'mid.gain'. Did you mean 'mid.affine'? With variant=solu_ln the keys below mid are: "
        "mid.affine, mid.eps, mid.kappa. --help lists all keys"
    )
    assert "With variant=solu the keys below mid are: none." in refusal(
        "variant=solu", "mid.gain=3"
    )
    assert "With data=stdlib the keys below corpus are: corpus.max_mb." in refusal(
        "variant=solu", "corpus.paths=[x]"
    )


def test_unknown_member_names_the_nearest_and_lists_all() -> None:
    message = refusal("variant=solu_frozen")
    assert message == (
        "no variant called 'solu_frozen'. Did you mean 'solu_frozen_ln'? There are: "
        + ", ".join(VARIANTS)
    )
    assert "no size called 'tini'. Did you mean 'tiny'?" in refusal("variant=solu", "size=tini")
    assert "no data called 'file'. Did you mean 'files'?" in refusal("variant=solu", "data=file")
    for inside in ("_parts", "../solu", "__init__"):
        assert f"no variant called {inside!r}" in refusal(f"variant={inside}")


@pytest.mark.parametrize("words", [(), ("variant=",), ("variant=null",), ("variant=???",)])
def test_missing_variant_is_asked_for_with_the_list(words: tuple[str, ...]) -> None:
    assert refusal(*words).startswith("variant has no value: set it, as in variant=")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        # wrong type
        ("train.steps=many", "train.steps: Value 'many' of type 'str' could not be converted"),
        ("train.steps=1.5", "train.steps: Value '1.5'"),
        ("train.steps=true", "train.steps: Value 'True'"),
        ("train.lr=[1]", "train.lr: "),
        ("train.schedule=linear", "train.schedule: Invalid value 'linear', expected one of"),
        ("train.device=tpu", "expected one of ['auto', 'cpu', 'cuda']"),
        ("model=3", "model=3: set keys below model"),
        ("mid=null", "mid=null: set keys below mid"),
        ("train.steps=${nowhere}", "nowhere"),
        ("train.steps=[1", "cannot read 'train.steps=[1'"),
        ("train={steps: 3, steps: 4}", "the key 'steps' is given twice"),
        # relations
        ("model.n_heads=3", "model.n_heads=3 does not divide model.d_model=32"),
        ("train.micro_batches=3", "train.micro_batches=3 does not divide train.batch_size=8"),
        ("train.warmup_steps=61", "must be between 0 and train.steps=60"),
        ("tokens.select_share=0.95", "leave a share for training"),
        # ranges
        ("model.n_heads=0", "model.n_heads=0 must be 1 or more"),
        ("model.d_mlp=0", "model.d_mlp=0 must be 1 or more"),
        ("model.ctx=2", "model.ctx=2 must be 3 or more"),
        ("model.ln_eps=0", "model.ln_eps=0.0 must be above 0"),
        ("model.init_std=nan", "model.init_std=nan must be above 0"),
        ("tokens.d_vocab=259", "tokens.d_vocab=259 must be 260 or more"),
        ("tokens.select_share=0", "tokens.select_share=0.0"),
        ("train.steps=0", "train.steps=0 must be 1 or more"),
        ("train.lr=-1", "train.lr=-1.0 must be above 0"),
        ("train.lr=inf", "train.lr=inf must be a finite number"),
        ("train.lr_rest=0", "train.lr_rest=0.0 must be above 0"),
        ("train.beta1=1.5", "train.beta1=1.5 must be in [0, 1)"),
        ("train.weight_decay=-0.1", "train.weight_decay=-0.1 must be 0 or more"),
        ("train.clip=0", "train.clip=0.0 must be above 0"),
        ("corpus.max_mb=nan", "corpus.max_mb=nan must be"),
        ("mid.eps=0", "mid.eps=0.0 must be above 0"),
        ("mid.kappa=-1", "mid.kappa=-1.0 must be above 0"),
        ("seed=-1", "seed=-1 must be 0 or more"),
        # names of folders
        ("study=../up", "study='../up' is used in a folder's name"),
        ("study=..", "study='..' is used in a folder's name"),
        ("tag=a/b", "tag='a/b' is used in a folder's name"),
        ("runs_dir=a::b", "runs_dir=a::b would be read as an address"),
        ("runs_dir=s3://bucket/runs", "give a path of this machine"),
        ("study=" + 241 * "a", "study= gives a folder a name of 241 bytes, but at most 240"),
        ("tag=" + 121 * "é", "tag= gives a folder a name of 253 bytes, but at most 240"),
        # neither key=value nor a file
        ("steps", "'steps' is neither key=value nor a .yaml file"),
        ("--steps=3", "no key called '--steps'"),
        ("nowhere.yaml", "no configuration file nowhere.yaml"),
    ],
)  # fmt: skip
def test_value_that_cannot_be_is_refused_with_its_key(word: str, says: str) -> None:
    assert says in refusal(*TINY, word)


def test_epsilon_and_kappa_together_are_refused() -> None:
    message = refusal(*TINY, "mid.eps=1e-5", "mid.kappa=3")
    assert message == ("mid.eps=1e-05 and mid.kappa=3.0 are both set: set one of them to null")
    assert "are both set" in refusal("variant=gelu_ln", "size=tiny", "mid.kappa=3")
    assert load_config(["variant=gelu_ln", "size=tiny", "mid.eps=null", "mid.kappa=3"])


def test_static_gain_is_a_number_above_zero_or_a_word() -> None:
    gain = ("variant=solu_gain", "size=tiny")
    assert load_config(gain).mid.gain == "init"
    run_dir = "runs/a/solu_ln-s{seed}"
    assert load_config([*gain, f"mid.gain={run_dir}"]).mid.gain == run_dir
    assert "must be above 0, 'init', or a finished run's folder" in refusal(*gain, "mid.gain=-1")
    assert "mid.gain: Value 'None'" in refusal(*gain, "mid.gain=null")


def test_parameter_that_a_source_cannot_do_without_is_asked_for() -> None:
    assert refusal(*TINY, "data=files") == "corpus.paths has no value: set it, as in corpus.paths=…"  # fmt: skip


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: {steps: [", "is not YAML"),
        ("- train", "contains no keys: write lines such as 'key: value'"),
        ("train: 3", "train=3: set keys below train"),
    ],
)
def test_yaml_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str, says: str) -> None:
    assert says in refusal(*TINY, written(tmp_path / "a.yaml", content))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("probes=[engagment]", "no probe called 'engagment'. Did you mean 'engagement'?"),
        ("probes=engagement", "probes: give a list, as in probes=[…]"),
        ("n_tokens=99", "n_tokens=99 must be 100 or more"),
        ("n_tokenz=200", "'n_tokenz'. Did you mean 'n_tokens'?"),
        ("seed=-1", "seed=-1 must be 0 or more"),
    ],
)
def test_evaluation_that_cannot_be_is_refused(word: str, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        load_typed(EvalConfig, [word], "eval.yaml")


def test_flattened_keys_are_the_command_lines() -> None:
    config = load_config(TINY)
    values = dict(flatten(asdict(config)))
    assert values["train.steps"] == config.train.steps
    changed = replace(config, seed=9)
    assert dict(flatten(asdict(changed))) == {**values, "seed": 9}


# --- settings for other people --------------------------------------------------------------------


def test_settings_for_others_keep_the_last_part_of_a_path_and_lose_the_folders_of_this_machine():
    words = ["variant=solu_gain", "size=tiny", "data=files", "corpus.paths=[/home/me/a/*.txt,b/c.txt]",
             "mid.gain=/home/me/runs/x/solu_ln-s0", "train.init_from=/home/me/runs/y", "runs_dir=/home/me/runs",
             "corpus.separator=/home/", "tokens.prepared=/home/me/p", "tokens.tokenizer=/home/me/t.json",
             "wandb=online"]  # fmt: skip
    given = asdict(load_config(words))
    settings = for_others(given)
    assert "/home/me" not in to_yaml(settings)
    assert settings["corpus"]["paths"] == ["*.txt", "b/c.txt"]
    assert settings["corpus"]["separator"] == "/home/"
    assert settings["mid"]["gain"] == "solu_ln-s0"
    assert (settings["tokens"]["tokenizer"], settings["train"]["init_from"]) == ("t.json", "y")
    assert not {"runs_dir", "wandb"} & settings.keys()
    assert given["runs_dir"] == "/home/me/runs"
    assert given["tokens"]["prepared"] == "/home/me/p"


def test_a_windows_path_is_a_path_too():
    words = ["variant=solu_ln", "size=tiny", "data=files", r"corpus.paths=['C:\Users\me\a.txt']"]
    assert for_others(asdict(load_config(words)))["corpus"]["paths"] == ["a.txt"]


# --- how a learning rate was chosen ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("variant=solu_ln", ""),
        ("variant=solu_ln seed=7 study=x train.threads=1 wandb=off", ""),
        ("variant=solu_ln train.lr=3e-3", "was set by hand"),
        ("variant=solu_rms", "is that of size=demo, where solu_rms was not tuned"),
        ("variant=solu_ln mid.kappa=4e-5", ""),
        (
            "variant=solu_ln mid.kappa=4e-5 train.lr=2e-3",
            "was tuned with mid.kappa=41.94, here 4e-05",
        ),
        ("variant=solu_ln train.lr=4e-3", "was tuned with mid.kappa=4e-05, here 41.94"),
        ("variant=solu_frozen_ln mid.kappa=4e-5", ""),
        ("variant=solu_gain mid.kappa=4e-5", "was tuned with mid.kappa=41.94, here 4e-05"),
        ("variant=solu_ln mid.kappa=4.2", "was tuned with mid.kappa=41.94, here 4.2"),
        ("variant=solu_ln mid.kappa=41.94", ""),
        ("variant=solu_gain mid.gain=8", "was tuned with mid.gain=init, here 8"),
        ("variant=solu train.steps=1800", "was tuned with train.steps=350, here 1800"),
        ("variant=solu model.d_mlp=512", "was tuned with model.d_mlp=256, here 512"),
        ("variant=solu size=d128", "is that of size=d128, where solu was not tuned"),
        ("variant=solu size=tiny", "was set by hand"),
    ],
)
def test_a_rate_counts_as_tuned_only_for_the_settings_it_was_tuned_with(
    words: str, why: str
) -> None:
    assert rate_origin(load_config(words.split())) == why
