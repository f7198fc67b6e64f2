"""The commands: mistakes are answered in one line, at once, and no file is overwritten."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python, tiny_config, train_silently
from safetensors.torch import load_file, save_file

import soluscope
from soluscope import plugins, results
from soluscope.config import Config, EvalConfig, to_yaml
from soluscope.errors import UserError
from soluscope.evaluation.suite import evaluate
from soluscope.launching.sweep import shipped_sweeps
from soluscope.results import Measurement
from soluscope.runs.folder import Run, holder, lock

TRAIN, EVAL, REPORT, LAUNCH = "train/run.py", "eval/run.py", "eval/report.py", "sweeps/launch.py"
SOLUSCOPE = "src/soluscope/__main__.py"
HEAVY = ("torch", "lightning", "transformer_lens", "transformers", "datasets", "pandas")

# Runs many command lines in one interpreter, each as `python script words` would. After each it prints
# the heavy modules imported so far: no command line imported a module that is never printed.
RUNNER = """
import contextlib, io, json, runpy, sys
for script, *words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    status, out, err = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    heavy = [name for name in %r if name in sys.modules]
    print(json.dumps([status, out.getvalue(), err.getvalue(), heavy]))
"""


@dataclass(frozen=True)
class Answer:
    status: int
    output: str
    errors: str
    heavy: list[str]


def answers(folder: Path, *lines: tuple[str, ...]) -> list[Answer]:
    """Return the answer to each command line. All run in one fresh process, in `folder`."""
    given = json.dumps([[str(ROOT / script), *words] for script, *words in lines])
    done = run_python("-c", RUNNER % (HEAVY,), given, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [Answer(*json.loads(line)) for line in done.stdout.splitlines()]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file below a folder, except locks, their holders, and failed.json."""
    left_out = {".held_by.json", "failed.json"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("lock") and path.name not in left_out
    }


# Answers that need no heavy import

MISTAKES: dict[tuple[str, ...], str] = {
    (TRAIN,): "variant has no value: set it, as in variant=",
    (TRAIN, "variant=solu_frozen"): "Did you mean 'solu_frozen_ln'? There are: ",
    (TRAIN, "variant=solu", "size=big"): "no size called 'big'. There are: ",
    (TRAIN, "variant=solu", "data=stdlb"): "no data called 'stdlb'. Did you mean 'stdlib'?",
    (TRAIN, "variant=solu", "train.stepz=3"): "Did you mean 'train.steps'?",
    (TRAIN, "variant=solu", "train.steps=many"): "train.steps: Value 'many'",
    (TRAIN, "variant=solu", "model.n_heads=3"): "model.n_heads=3 does not divide model.d_model=64",
    (TRAIN, "variant=solu_ln", "mid.eps=1", "mid.kappa=1"): "both set: set one of them to null",
    (TRAIN, "variant=solu", "data=files"): "corpus.paths has no value",
    (TRAIN, "variant=solu", "train.lr=null", "train.rates.solu=null"): "train.rates.solu",
    (TRAIN, "variant=solu", "nowhere.yaml"): "no configuration file nowhere.yaml",
    (TRAIN, "variant=solu", "broken.yaml"): "broken.yaml is not YAML",
    (TRAIN, "variant=solu", "--cgf"): "unrecognized arguments: --cgf",
    (EVAL,): "0 folders given, wanted one",
    (EVAL, "a", "b"): "2 folders given, wanted one",
    (EVAL, "runs/nowhere"): "no folder runs/nowhere: name a study or a run",
    (EVAL, "--controls", "nowhere"): "no folder nowhere: name a study or a run",
    (EVAL, ".", "revision=main"): "no key called 'revision'",
    (EVAL, "solu-1l", "revison=main"): "Did you mean 'revision'?",
    (EVAL, "solu-1l", "data=stdlb"): "no data called 'stdlb'. Did you mean 'stdlib'?",
    (EVAL, ".", "probes=[engagment]"): "no probe called 'engagment'. Did you mean 'engagement'?",
    (EVAL, ".", "probes=[]"): "probes=[] names no probe",
    (LAUNCH, "grid.yaml", "eval.probes=[]"): "probes=[] names no probe",
    (TRAIN, "variant=solu", "train.rates=[1]"): "train.rates=[1]: set keys below train.rates",
    (TRAIN, "variant=solu", "train.steps=9223372036854775808"): "must be between",
    (TRAIN, "variant=solu", "train.device=cpu", "model.d_model=1000000000"): "needs at least",
    (TRAIN, "variant=solu", "tag=${oc.env:HOME}"): "may only stand for the value of another key",
    (EVAL, ".", "n_tokenz=200"): "Did you mean 'n_tokens'?",
    (
        EVAL,
        ".",
        "device=tpu",
    ): "device: Invalid value 'tpu', expected one of ['auto', 'cpu', 'cuda']",
    (REPORT,): "the following arguments are required: study",
    (REPORT, "."): "no results at results.jsonl: create it with 'soluscope probe .'",
    (REPORT, ".", "--tables", "runs/.."): "runs/.. exists already: name a new folder",
    (REPORT, ".", "tables=new", "figures=new/f"): "figures=new/f and tables=new overlap",
    (LAUNCH,): "0 sweeps given, wanted one",
    (LAUNCH, "varints"): "no sweep called 'varints'. Did you mean 'variants'? There are: demo, ",
    (SOLUSCOPE, "trian"): "no command called 'trian'. Did you mean 'train'? There are: export, ",
    (SOLUSCOPE, "train"): "variant has no value: set it, as in variant=",
    (SOLUSCOPE, "--print-completion"): "--print-completion takes one of: bash, ",
    (LAUNCH, "nowhere.yaml"): "no configuration file nowhere.yaml",
    (LAUNCH, "broken.yaml"): "broken.yaml is not YAML",
    (
        LAUNCH,
        "random.yaml",
    ): "random.yaml is not a sweep: it needs 'method: grid' and 'parameters:'",
    (LAUNCH, "twice.yaml"): "gives two jobs the folder runs/default/solu-s0-x",
    (LAUNCH, "empty.yaml"): "is an empty grid at variant: it needs 'values: [...]'",
    (LAUNCH, "studies.yaml"): "studies.yaml has the studies a, b, but a sweep must have one",
    (LAUNCH, "grid.yaml", "train.stepz=3"): "Did you mean 'train.steps'?",
    (LAUNCH, "grid.yaml", "eval.n_tokenz=300"): "Did you mean 'n_tokens'?",
}
SWEEPS = {
    "broken": "parameters: {variant: [",
    "random": "method: random\nparameters: {seed: {values: [0, 1]}}",
    "twice": "method: grid\nparameters: {variant: {value: solu}, tag: {values: [x, x]}}",
    "empty": "method: grid\nparameters: {variant: solu}",
    "studies": "method: grid\nparameters: {variant: {value: solu}, study: {values: [a, b]}}",
    "grid": "method: grid\nparameters: {variant: {value: solu}, seed: {values: [0, 1]}}",
}


def test_mistakes_are_one_line_and_status_2_before_anything_heavy_or_written(
    tmp_path: Path,
) -> None:
    for name, content in SWEEPS.items():
        (tmp_path / f"{name}.yaml").write_text(content)
    (tmp_path / "runs").mkdir()
    before = snapshot(tmp_path)
    found = answers(tmp_path, *MISTAKES)
    for (words, says), answer in zip(MISTAKES.items(), found, strict=True):
        assert (answer.status, answer.output) == (2, ""), words
        assert answer.errors.startswith("error: "), words
        assert says in answer.errors, words
        assert answer.errors.count("\n") == 1, words
        assert answer.heavy == [], words
    assert snapshot(tmp_path) == before


def test_help_and_cfg_answer_before_anything_heavy(tmp_path: Path) -> None:
    words = ("variant=solu_ln", "size=tiny", "train.steps=7")
    lines = [(TRAIN, "--help"), (TRAIN, *words, "--cfg"), (EVAL, "--help"),
             (EVAL, "--cfg", "n_tokens=300"), (REPORT, "--help"), (LAUNCH, "--help")]  # fmt: skip
    found = answers(tmp_path, *lines)
    assert [(a.status, a.errors, a.heavy) for a in found] == [(0, "", [])] * len(lines)
    train_help, train_cfg, eval_help, eval_cfg, report_help, launch_help = (a.output for a in found)
    for key in ("variant", "train.lr", "tokens.d_vocab", "mid.kappa", "corpus.max_mb"):
        assert f"\n  {key} " in train_help
    assert train_cfg == to_yaml(soluscope.load_config(words))
    assert "\n  n_draws " in eval_help
    assert eval_help.index("with a pretrained model:") < eval_help.index("\n  revision ")
    assert ", engagement, " in eval_help
    assert "n_tokens: 300\n" in eval_cfg
    assert "soluscope report runs/demo" in report_help
    assert "soluscope sweep variants" in launch_help
    assert ", ".join(shipped_sweeps()) in launch_help
    assert "\n  ray.cpus " in launch_help
    assert not list(tmp_path.iterdir())


def test_soluscope_lists_its_commands_and_completes_them(tmp_path: Path) -> None:
    helped, bare, completed = answers(
        tmp_path, (SOLUSCOPE, "--help"), (SOLUSCOPE,), (SOLUSCOPE, "--print-completion", "bash")
    )
    assert helped == bare
    assert (helped.status, helped.errors, helped.heavy) == (0, "", [])
    names = plugins.names("soluscope.commands")
    assert {"neurons", "probe", "rate", "remove", "report", "sweep", "train"} < {*names}
    assert all(f"\n  {name} " in helped.output for name in names)
    assert (completed.status, completed.heavy) == (0, [])
    assert all(name in completed.output for name in (*names, "--dry-run", "--false-positives"))


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf8"])
def test_help_errors_and_progress_print_in_any_encoding_at_any_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Run each --help, a refusal and the report's table as a narrow terminal without colours does."""
    for name, value in {"PYTHONIOENCODING": encoding, "COLUMNS": "40", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    script = """
import sys
from soluscope import commands, plugins
helps = [["--help"], *([name, "--help"] for name in plugins.names(commands.PACKAGE))]
for words in [*helps, ["train", "variant=solu", "tag=é…"]]:
    sys.argv = ["soluscope", *words]
    try:
        commands.main()
    except SystemExit as end:
        print(end.code)
"""
    done = run_python("-c", script, cwd=tmp_path, encoding=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n0\n") == 1 + len(plugins.names("soluscope.commands"))
    assert done.stderr.startswith("error: tag=")
    assert "\x1b" not in done.stdout + done.stderr
    assert ("..." if encoding != "utf8" else "…") in done.stdout
    keys = done.stdout[done.stdout.index("\n  variant  required\n") :].splitlines()
    assert all(len(line) <= 40 for line in keys if line.startswith("      "))


def test_printed_configuration_can_be_given_back(tmp_path: Path) -> None:
    words = ("variant=solu_gain", "size=tiny", "mid.gain=2.5", "--cfg")
    (first,) = answers(tmp_path, (TRAIN, *words))
    (tmp_path / "again.yaml").write_text(first.output)
    (second,) = answers(tmp_path, (TRAIN, "again.yaml", "--cfg"))
    assert second.output == first.output


def test_mistake_is_status_2_to_the_shell() -> None:
    done = run_python(ROOT / TRAIN, "variant=solu_frozen")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no variant called 'solu_frozen'. Did you mean")
    assert done.stderr.count("\n") == 1


def test_report_is_made_without_torch_and_skips_a_broken_last_line(tmp_path: Path) -> None:
    loss = Measurement(
        study="s", probe="loss", quantity="loss", value=3.0, unit="nats / token",
        run="solu-s0", arm="solu", variant="solu", seed=0, stream="natural",
    )  # fmt: skip
    results.write(tmp_path / "results.jsonl", [loss])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"study": "s", "probe": "lo')
    (answer,) = answers(tmp_path, (REPORT, "."))
    assert answer.status == 0, answer.errors
    assert answer.errors.splitlines()[0].startswith("warning: results.jsonl line 2 is not a record")
    assert "report: report.html" in answer.output
    assert not {"torch", "lightning", "transformer_lens", "transformers"} & set(answer.heavy)


# Bad input that needs a run


@pytest.fixture
def study(tiny_study: Path, tmp_path: Path) -> Path:
    """Return a study with one finished run, solu_ln-s0, for tests to damage."""
    for name in ("solu_ln-s0", "data.json", "tokenizer.json", "tokens"):
        source, copy = tiny_study / name, tmp_path / "tiny" / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy)
    return tmp_path / "tiny"


@pytest.fixture
def words(tiny_study: Path) -> tuple[str, ...]:
    """Return the words that started the run in `study`, except its path."""
    tokens = f"tokens.cache_dir={tiny_study.parent / '.tokens'}"
    return ("variant=solu_ln", "seed=0", "study=tiny", tokens)


@pytest.fixture
def config(study: Path, words: tuple[str, ...]) -> Config:
    """Return the configuration of the run in `study`."""
    return tiny_config(study.parent, *words)


def refusal(action: Any, *arguments: Any) -> str:
    """Return the message with which `action` is refused, which must be one line."""
    with pytest.raises(UserError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unfinished(run_dir: Path) -> Path:
    """Make the run look as if it had been killed after its last checkpoint, and return the checkpoint."""
    (run_dir / "done.json").unlink()
    return Run(run_dir).checkpoint


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_finished_run_is_left_as_it_is(config: Config) -> None:
    before = snapshot(config.run_dir)
    assert train_silently(config) == config.run_dir
    assert snapshot(config.run_dir) == before


@pytest.mark.parametrize("finished", [True, False])
def test_run_folder_of_another_configuration_is_refused_and_untouched(
    study: Path, words: tuple[str, ...], finished: bool
) -> None:
    if not finished:
        unfinished(study / "solu_ln-s0")
    before = snapshot(study)
    other = tiny_config(study.parent, *words, "train.steps=13", "train.lr=1e-3")
    assert refusal(train_silently, other) == (
        f"{study / 'solu_ln-s0'} has a different configuration (train.lr=0.004 there, 0.001 here and "
        "1 more keys): set tag= or study= to train this configuration in another folder"
        + (
            f"; with train.init_from={study / 'solu_ln-s0'} it starts with these weights"
            if finished
            else ""
        )
    )
    assert snapshot(study) == before


def test_start_that_was_refused_does_not_bind_the_folder(
    study: Path, words: tuple[str, ...]
) -> None:
    wrong = tiny_config(study.parent, *words, "tag=x", "tokens.d_vocab=300")
    before = snapshot(study)
    assert refusal(train_silently, wrong).startswith(f"{study} was trained on other tokens (cache ")
    assert snapshot(study) == {**before, "solu_ln-s0-x/config.yaml": to_yaml(wrong).encode()}
    right = tiny_config(study.parent, *words, "tag=x")
    assert (train_silently(right) / "done.json").is_file()
    assert snapshot(study).items() >= before.items()


def test_study_that_was_moved_is_evaluated_anywhere_or_names_prepared(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = json.loads((study / "data.json").read_text())
    moved = data | {"path": f"runs/.tokens/{data['key']}"}  # relative to the folder of the training
    (study / "data.json").write_text(json.dumps(moved))
    config = EvalConfig(probes=[], n_tokens=1000, n_loss_tokens=1000, n_draws=100, jobs=1)
    evaluate(study, config, lambda line: None)
    first = (study / "results.jsonl").read_bytes()
    assert not (tmp_path / "runs").exists()
    for folder in ("tokens", "solu_ln-s0/probes"):
        shutil.rmtree(study / folder)
    said = refusal(evaluate, study, config, lambda line: None)
    assert f"set prepared= to the folder of the token cache {data['key']}" in said
    evaluate(study, replace(config, prepared=data["path"]), lambda line: None)
    assert (study / "results.jsonl").read_bytes() == first


def test_truncated_checkpoint_is_one_line_and_status_2(study: Path, config: Config) -> None:
    checkpoint = unfinished(config.run_dir)
    cut(checkpoint)
    before = snapshot(study)
    (study.parent / "config.yaml").write_text(to_yaml(config))
    done = run_python(ROOT / TRAIN, study.parent / "config.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        f"error: cannot read the checkpoint {checkpoint}"
    )
    assert "delete it to train the run from step 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(study) == before


def test_checkpoint_that_is_no_checkpoint_is_refused(config: Config) -> None:
    for content in (b"", b"not a checkpoint"):
        (config.run_dir / "done.json").unlink(missing_ok=True)
        Run(config.run_dir).checkpoint.write_bytes(content)
        assert "cannot read the checkpoint" in refusal(train_silently, config)


def test_checkpoint_of_another_shape_is_refused_and_names_the_tensor(
    config: Config, tiny_study: Path
) -> None:
    checkpoint = unfinished(config.run_dir)
    shutil.copy(Run(tiny_study / "gelu-s0").checkpoint, checkpoint)
    message = refusal(train_silently, config)
    assert message.startswith(f"the checkpoint {checkpoint} does not fit this configuration: ")
    assert ".mlp.ln.b is missing in the checkpoint and (128,) here" in message
    loaded = torch.load(Run(tiny_study / "solu_ln-s0").checkpoint, weights_only=True)
    loaded["state_dict"]["model.unembed.W_U"] = torch.zeros(32, 7)
    torch.save(loaded, checkpoint)
    before = snapshot(config.run_dir)
    message = refusal(train_silently, config)
    assert "model.unembed.W_U is (32, 7) in the checkpoint and (32, 512) here" in message
    assert snapshot(config.run_dir) == before


def test_truncated_weights_are_refused_and_made_again_as_the_message_says(config: Config) -> None:
    path = config.run_dir / "model.safetensors"
    whole = path.read_bytes()
    cut(path)
    message = refusal(soluscope.load, config.run_dir)
    assert message.startswith(f"cannot read {path} (")
    assert message.endswith(
        f"delete {config.run_dir / 'done.json'} and run the training command again"
    )
    (config.run_dir / "done.json").unlink()
    train_silently(config)
    assert path.read_bytes() == whole
    assert soluscope.load(config.run_dir).facts.run == "solu_ln-s0"


def test_weights_that_are_missing_shaped_otherwise_or_not_finite_are_refused_by_name(
    config: Config,
) -> None:
    path = config.run_dir / "model.safetensors"
    weights = load_file(path)
    broken = weights["blocks.0.mlp.W_in"].clone()
    broken[3, 4] = float("nan")
    for changed, says in (
        ({"blocks.0.mlp.W_in": broken}, "blocks.0.mlp.W_in contains values that are not finite"),
        ({"blocks.0.mlp.W_in": torch.zeros(3, 4)}, "size mismatch for blocks.0.mlp.W_in"),
        ({"more": torch.zeros(3)}, 'Unexpected key(s) in state_dict: "more"'),
    ):
        save_file({**weights, **changed}, path)
        assert says in refusal(soluscope.load, config.run_dir)
    save_file({name: w for name, w in weights.items() if name != "unembed.b_U"}, path)
    assert 'Missing key(s) in state_dict: "unembed.b_U"' in refusal(soluscope.load, config.run_dir)


def test_run_that_is_not_there_or_not_finished_is_refused(study: Path) -> None:
    missing = study / "no-s0"
    assert refusal(soluscope.load, missing) == f"no model at {missing}: the run does not exist"
    (study / "solu_ln-s0" / "model.json").unlink()
    assert "has not finished: finish training it" in refusal(soluscope.load, study / "solu_ln-s0")
    (study / "solu_ln-s0" / "model.json").write_text("{")
    assert "model.json is broken" in refusal(soluscope.load, study / "solu_ln-s0")


def test_second_process_on_a_run_folder_is_refused(config: Config) -> None:
    unfinished(config.run_dir)
    before = snapshot(config.run_dir)
    with lock(config.run_dir):
        assert refusal(train_silently, config) == (
            f"another process is at work in {config.run_dir}{holder(config.run_dir)}: wait until it ends, or set "
            "tag= or study="
        )
        assert snapshot(config.run_dir) == before
    assert (train_silently(config) / "done.json").is_file()


def test_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    config = tiny_config(tmp_path / "file", "variant=solu")
    assert refusal(train_silently, config) == (
        f"cannot write {config.run_dir}: Not a directory; set runs_dir to another folder"
    )
    assert (tmp_path / "file").read_text() == "a file where the folder should be"


def test_tokenizer_of_another_study_is_refused(study: Path, config: Config) -> None:
    path = study / "tokenizer.json"
    path.write_text(path.read_text() + "\n")  # the same number of entries, so only the hash differs
    message = refusal(soluscope.load, config.run_dir)
    assert message.startswith(f"{path} (sha256 ")
    assert "is not the tokenizer that solu_ln-s0 was trained with" in message
    path.unlink()
    assert refusal(soluscope.load, config.run_dir).startswith(f"no tokenizer at {path}")


def test_static_gain_of_a_run_without_a_norm_is_refused(
    words: tuple[str, ...], tiny_study: Path, tmp_path: Path
) -> None:
    gain = ("variant=solu_gain", "study=other")
    for run, says in (
        ("gelu-s{seed}", "has no per-token gain"),
        ("none-s{seed}", "does not exist"),
    ):
        config = tiny_config(tmp_path, *words, *gain, f"mid.gain={tiny_study / run}")
        assert says in refusal(train_silently, config)


def test_disk_full_while_saving_keeps_the_last_good_checkpoint(
    study: Path, words: tuple[str, ...]
) -> None:
    """The run continues from step 12 to 24, where no file larger than 100 kB can be written."""
    longer = tiny_config(study.parent, *words, "train.steps=24")
    checkpoint = unfinished(longer.run_dir)
    yaml = longer.run_dir / "config.yaml"
    yaml.write_text(to_yaml(longer))
    good = checkpoint.read_bytes()
    assert len(good) > 100_000
    limit = (100_000, 100_000)
    done = run_python(
        ROOT / TRAIN, yaml, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot save the checkpoint of step 24 (")
    assert last.endswith(f"free disk space; the checkpoint of step 12 stays in {checkpoint}")
    assert "Traceback" not in done.stderr
    assert checkpoint.read_bytes() == good
    assert [path.name for path in checkpoint.parent.iterdir()] == ["last.ckpt"]
    assert not (longer.run_dir / "done.json").exists()
    train_silently(longer)
    assert json.loads((longer.run_dir / "done.json").read_text())["steps"] == 24


def test_evaluation_without_a_finished_run_is_refused(study: Path, tmp_path: Path) -> None:
    main = plugins.pick("soluscope.commands", "probe").run
    unfinished(study / "solu_ln-s0")
    before = snapshot(study)
    for folder in (study, study / "solu_ln-s0", tmp_path):
        assert refusal(main, [str(folder)]).startswith(f"no finished run in {folder}: train some")
    assert snapshot(study) == before
