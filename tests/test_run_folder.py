"""The states of a run that its folder shows: whole, half copied, at work, failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, train_silently
from safetensors.torch import load_file

from soluscope.config import Config
from soluscope.errors import UserError
from soluscope.evaluation.elsewhere import check_writable, linked
from soluscope.files import remove_folder
from soluscope.runs.folder import Run, lock
from soluscope.runs.weights import load_facts
from soluscope.training.callback import TrainingCallback
from soluscope.training.module import TrainingModule
from soluscope.variants import chain_of

WORDS = ("variant=solu_ln", "train.checkpoint_every=5", "wandb=off")
DONE = "done.json"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config(tmp_path, *WORDS)


def copied(whole: Path, config: Config, *names: str) -> Path:
    """Copy some of a finished run's files into the run folder of `config`, and return that folder."""
    for name in names:
        (config.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(whole / name, config.run_dir / name)
    return config.run_dir


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_silently(tiny_config(tmp_path_factory.mktemp("whole"), *WORDS))


def test_done_knows_how_many_bytes_the_weights_have(whole: Path) -> None:
    assert Run(whole).is_done()
    done = json.loads((whole / DONE).read_text())
    assert done["weights_bytes"] == len((whole / "model.safetensors").read_bytes())


@pytest.mark.parametrize("missing", [DONE, "model.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_not_done(
    whole: Path, config: Config, missing: str
) -> None:
    names = {DONE, "model.json", "model.safetensors"} - {missing}
    assert not Run(copied(whole, config, *names)).is_done()


def test_a_folder_whose_weights_or_last_word_are_cut_is_not_done(
    whole: Path, config: Config
) -> None:
    run_dir = copied(whole, config, DONE, "model.json", "model.safetensors")
    assert Run(run_dir).is_done()
    weights, done = run_dir / "model.safetensors", run_dir / DONE
    content, word = weights.read_bytes(), done.read_text()
    weights.write_bytes(content[:-1])
    assert not Run(run_dir).is_done()
    weights.write_bytes(content)
    done.write_text(word[: len(word) // 2])
    assert not Run(run_dir).is_done()


def test_a_run_that_an_older_version_finished_is_done(whole: Path, config: Config) -> None:
    run_dir = copied(whole, config, DONE, "model.json", "model.safetensors")
    done = json.loads((run_dir / DONE).read_text())
    del done["weights_bytes"]
    (run_dir / DONE).write_text(json.dumps(done))
    assert Run(run_dir).is_done()


def test_facts_that_an_older_version_wrote_get_their_chain_from_the_variants_folder(
    whole: Path, config: Config
) -> None:
    run_dir = copied(whole, config, "model.json")
    facts = load_facts(run_dir)
    written = json.loads((run_dir / "model.json").read_text())
    assert written["chain"][-1] == asdict(facts.chain[-1]) == asdict(chain_of("solu_ln")[-1])
    for name in ("role", "twin", "chain"):
        del written[name]
    (run_dir / "model.json").write_text(json.dumps(written))
    assert load_facts(run_dir) == facts


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_a_half_copied_run_is_finished_again_with_the_same_weights(
    whole: Path, config: Config, has_checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["config.yaml", "metrics.jsonl", DONE, "model.json", "model.safetensors"]
    run_dir = copied(whole, config, *names)
    if has_checkpoint:
        copied(whole, config, "checkpoints/last.ckpt")
    content = (run_dir / "model.safetensors").read_bytes()
    (run_dir / "model.safetensors").write_bytes(content[: len(content) // 2])
    began_at: list[int] = []
    real = TrainingCallback.on_train_batch_end

    def counting(self, trainer, *rest):  # type: ignore[no-untyped-def]
        began_at.append(trainer.global_step)
        assert not (run_dir / DONE).exists()
        real(self, trainer, *rest)

    monkeypatch.setattr(TrainingCallback, "on_train_batch_end", counting)
    train_silently(config)
    assert began_at == ([] if has_checkpoint else list(range(1, 13)))
    assert Run(run_dir).is_done()
    again, before = (load_file(run / "model.safetensors") for run in (run_dir, whole))
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert [row["step"] for row in map(json.loads, (run_dir / "metrics.jsonl").open())] == [10, 12]


def test_a_run_that_failed_says_why_until_it_is_tried_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainingModule.training_step

    def breaking(self, tokens, index):  # type: ignore[no-untyped-def]
        if self.trainer.global_step == 7:
            raise RuntimeError("the machine\nran out of something")
        return real(self, tokens, index)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", breaking)
        with pytest.raises(RuntimeError, match="ran out of something"):
            train_silently(config)
    assert Run(config.run_dir).failure() == "RuntimeError: ran out of something"
    assert not Run(config.run_dir).at_work()

    seen: list[str | None] = []

    def looking(self, tokens, index):  # type: ignore[no-untyped-def]
        seen.append(Run(config.run_dir).failure())
        return real(self, tokens, index)

    monkeypatch.setattr(TrainingModule, "training_step", looking)
    train_silently(config)
    assert seen == [None] * 7  # from step 5, the last checkpoint: an error saves nothing
    assert Run(config.run_dir).failure() is None


def test_what_is_refused_because_it_is_another_run_is_no_failure_of_this_one(
    whole: Path, config: Config
) -> None:
    copied(whole, config, "config.yaml", DONE, "model.json", "model.safetensors")
    root = config.run_dir.parents[1]
    with pytest.raises(UserError, match="has a different configuration"):
        train_silently(tiny_config(root, *WORDS, "train.lr_rest=0.5"))
    assert Run(config.run_dir).failure() is None
    assert Run(config.run_dir).is_done()


def test_a_full_disk_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "file.txt").touch()  # no folder can be made there
    run = Run(tmp_path / "file.txt" / "run")
    run.record_failure(ValueError("the loss is nan"))  # does not raise
    assert run.failure() is None
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_question_about_the_lock_makes_nothing_and_does_not_keep_a_run_from_starting(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    assert not Run(run_dir).at_work()
    assert not run_dir.exists()
    with lock(run_dir):
        assert Run(run_dir).at_work()
        with pytest.raises(UserError, match="another process is at work"), lock(run_dir):
            pass
    assert not Run(run_dir).at_work()
    with lock(run_dir):
        assert Run(run_dir).at_work()


def test_many_threads_may_ask_about_the_lock_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.lock():
        pass
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda _: run.at_work(), range(200))
        with run.lock():  # the questions do not keep a run from starting
            pass
        assert len(list(answers)) == 200
    assert not run.at_work()


def test_a_process_that_is_killed_lets_go_of_its_folder(tmp_path: Path) -> None:
    holds = "import sys, time; from pathlib import Path; from soluscope.runs.folder import lock\n"
    code = holds + "with lock(Path(sys.argv[1])):\n    print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        assert Run(tmp_path).at_work()
        with pytest.raises(UserError, match="another process is at work"), lock(tmp_path):
            pass
        holder.kill()
    assert not Run(tmp_path).at_work()
    with lock(tmp_path):
        pass


def test_the_last_row_is_the_last_whole_one(whole: Path, config: Config) -> None:
    assert Run(config.run_dir).last_row() == {}
    run_dir = copied(whole, config, "metrics.jsonl")
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert Run(run_dir).last_row() == json.loads(rows[-1])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert Run(run_dir).last_row() == json.loads(rows[-1])
    assert Run(whole).checkpoint.is_file()


# A study that cannot be written


def test_results_of_a_read_only_study_go_to_another_folder(
    tiny_study: Path, tmp_path: Path
) -> None:
    run_dir, out = tiny_study / "solu_ln-s0", tmp_path / "mine"
    before = {path: path.read_bytes() for path in tiny_study.rglob("*") if path.is_file()}
    (run,) = linked([Run(run_dir)], out)
    assert run.dir == out / "solu_ln-s0"
    assert run.is_done()
    assert run.facts == Run(run_dir).facts
    assert run.tokenizer.samefile(Run(run_dir).tokenizer)
    (run.dir / "probes").mkdir()
    with run.lock():
        pass
    assert linked([Run(run_dir)], out) == [run], "a second evaluation uses the same folder"
    assert {path: path.read_bytes() for path in tiny_study.rglob("*") if path.is_file()} == before
    assert [each.dir for each in linked([Run(run_dir)], tiny_study)] == [run_dir]


def test_out_that_holds_another_study_or_cannot_be_written_is_refused(
    tiny_study: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UserError, match="choose another out="):
        linked([Run(tiny_study / "solu_ln-s0")], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set out= to another folder"):
        linked([Run(tiny_study / "solu_ln-s0")], tmp_path / "file" / "mine")


def test_evaluation_of_a_read_only_study_names_out(
    tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tiny_study)
    with pytest.raises(UserError, match=r"cannot write .*: set out= to a folder for the results"):
        check_writable([Run(tiny_study / "solu_ln-s0")])


# Folders that others have made


def replaced(path: Path, **changes: object) -> None:
    """Replace values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def finished(whole: Path, config: Config) -> Run:
    """Return a copy of the finished run."""
    names = ["config.yaml", "metrics.jsonl", DONE, "model.json", "model.safetensors"]
    return Run(copied(whole, config, *names))


def test_a_flipped_bit_in_the_weights_is_refused(finished: Run) -> None:
    finished.load_model()
    content = bytearray(finished.weights.read_bytes())
    content[-1] ^= 1
    finished.weights.write_bytes(content)
    assert finished.is_done(), "the size is right, and a status reads no weights"
    with pytest.raises(
        UserError, match=r"model\.safetensors is not the file .*: copy it again, or"
    ):
        finished.load_model()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0.5), ("steps", 10**6), ("seed", 5), ("tokens", 1), ("study", "other"), ("variant", "solu"),
        ("d_mlp", 2**40), ("ctx", 3), ("ln_eps", 1.0), ("bos", -1), ("eos", 10**9), ("d_vocab", 2**40),
        ("n_layers", 2**40), ("n_heads", 0),
    ],
)  # fmt: skip
def test_facts_that_contradict_the_configuration_or_the_weights_are_refused(
    finished: Run, key: str, value: object
) -> None:
    replaced(finished.dir / "model.json", **{key: value})
    with pytest.raises(UserError, match=r"^[^\n]*(model\.json|model\.safetensors)[^\n]*$"):
        Run(finished.dir).load_model()


@pytest.mark.parametrize("value", [None, "x", True, [1], {"a": 1}, 10**400])
@pytest.mark.parametrize("key", ["d_model", "lr", "chain", "versions", "init_from", "eps", "bos"])
def test_facts_of_another_type_are_refused(finished: Run, key: str, value: object) -> None:
    if value is None and key in {"init_from", "eps"}:
        return
    if key == "versions" and isinstance(value, dict):
        value = {"torch": 2}
    replaced(finished.dir / "model.json", **{key: value})
    with pytest.raises(UserError, match=r"^[^\n]*model\.json is broken [^\n]*$"):
        Run(finished.dir).load_model()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"3", b"null", b'{"report_loss": "x", "select_loss": 1}', b"[" * 100_000, b"\xff",
     b'{"report_loss": 1e999, "select_loss": 1}', b'{"report_loss": 1, "select_loss": 1, "weights_bytes": 1}'],
)  # fmt: skip
def test_a_run_with_a_broken_done_json_is_not_done_and_says_why(
    finished: Run, content: bytes
) -> None:
    (finished.dir / DONE).write_bytes(content)
    assert not finished.is_done()
    with pytest.raises(
        UserError, match=r"^[^\n]*: copy the run's folder again, or give its training [^\n]*$"
    ):
        finished.check_done()


@pytest.mark.parametrize(
    "row",
    ["{", "3", "[]", '{"step": 1}', '{"step": "x", "tokens": 1, "loss": 1}', "[" * 100_000, "\x00",
     '{"step": 1, "tokens": 1, "loss": [1]}', '{"step": 1.5, "tokens": 1, "loss": 1}',
     '{"step": 1, "tokens": 1, "loss": NaN}', '{"step": 1%s, "tokens": 1, "loss": 1}' % ("0" * 400)],
)  # fmt: skip
def test_a_broken_row_of_metrics_is_skipped_and_named(
    finished: Run, capsys: pytest.CaptureFixture[str], row: str
) -> None:
    good = finished.rows()
    assert [each["step"] for each in good] == [10, 12]
    before = finished.metrics.read_text()
    finished.metrics.write_text(f"{row}\n{before}")
    assert finished.rows() == good
    assert capsys.readouterr().err.startswith(f"warning: {finished.metrics} line 1 is skipped (")
    finished.metrics.write_text(f"{before}{row}\n")
    assert finished.last_row() == {}


def test_a_pipe_in_the_place_of_a_file_does_not_hang(finished: Run) -> None:
    for name in ("metrics.jsonl", "failed.json", DONE, "model.json", "model.safetensors"):
        path = finished.dir / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert finished.last_row() == {}
    assert finished.rows() == []
    assert finished.failure() is None
    assert not finished.is_done()
    with pytest.raises(UserError, match="no model at"):
        finished.load_model()


def test_a_pipe_in_the_place_of_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    (folder / "inner").mkdir(parents=True)
    for path in (pipe, folder, tmp_path / "absent"):
        remove_folder(path)
    assert [each.name for each in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize(
    "name",
    [
        ".lock", "probes", "checkpoints", DONE, "metrics.jsonl", "probes/a.jsonl", "removal/a.parquet",
        "neurons/trained/about.json",
    ],
)  # fmt: skip
def test_a_run_with_a_link_that_leads_out_is_not_worked_on(
    finished: Run, config: Config, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("content")
    link = finished.dir / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside if name in {"probes", "checkpoints"} else outside / "precious")
    assert not finished.at_work()
    for use in (finished.lock().__enter__, finished.check_links):
        with pytest.raises(UserError, match=r"is a link"):
            use()
    with pytest.raises(UserError, match=r"is a link"):
        train_silently(config)
    assert [path.read_text() for path in outside.iterdir()] == ["content"]


@pytest.mark.parametrize(
    "name",
    ["tokens", ".data.lock", ".sweep", "sweep.json", "data.json", ".controls", "neurons", "rating"],
)
def test_a_study_with_a_link_that_leads_out_is_not_worked_on(
    finished: Run, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (finished.dir.parent / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name} is a link that leads out of"), finished.lock():
        pass
    assert not list(outside.iterdir())


def test_a_run_folder_that_is_a_link_out_of_its_study_is_not_worked_on(
    finished: Run, tmp_path: Path
) -> None:
    study = tmp_path / "received"
    study.mkdir()
    (study / "run").symlink_to(finished.dir)
    run = Run(study / "run")
    with pytest.raises(UserError, match=r"run is a link that leads out of"), run.lock():
        pass


def test_whoever_holds_a_run_removes_what_killed_processes_left_in_it(finished: Run) -> None:
    place = "00000000-1-00000000.part"
    litter = [f".model.json.{place}", f"checkpoints/.last.ckpt.{place}", f"probes/.a.parquet.{place}",
              ".done.json.4711", "checkpoints/.last.ckpt.4711", "probes/.results.jsonl.12"]  # fmt: skip
    kept = ["checkpoints/last.ckpt", "probes/a.parquet", ".hidden", "probes/.a.b"]
    for name in (*litter, *kept):
        (finished.dir / name).parent.mkdir(exist_ok=True)
        (finished.dir / name).touch()
    with finished.lock():
        pass
    assert not [name for name in litter if (finished.dir / name).exists()]
    assert all((finished.dir / name).exists() for name in kept)


def test_a_folder_of_links_is_evaluated_and_a_forged_one_is_not(
    tiny_study: Path, tmp_path: Path
) -> None:
    secret, out = tmp_path / "secret", tmp_path / "mine"
    secret.write_text("{}")
    (run,) = linked([Run(tiny_study / "solu_ln-s0")], out)
    run.check_links()
    (run.dir / DONE).unlink()
    (run.dir / DONE).symlink_to(secret)
    with pytest.raises(UserError, match=r"done\.json"):
        linked([Run(tiny_study / "solu_ln-s0")], out)
    with pytest.raises(UserError, match=r"done\.json is a link that leads out of"):
        run.check_links()
    (run.dir / DONE).unlink()
    (run.dir / "probes").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"probes is a link that leads out of"):
        linked([Run(tiny_study / "solu_ln-s0")], out)
