"""Runs in wandb, read back with wandb's own reader: after kills, without network, and without wandb."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from _wandb_server import WandbServer
from conftest import HANGS_AFTER_S, ROOT, tiny_config

from soluscope import results, wandb_client
from soluscope.config import for_others, read_config, to_yaml
from soluscope.errors import UserError
from soluscope.training import wandb_run
from soluscope.training.wandb_run import SENT_AGAIN, Tracker, check_login, mode_of

pytest.importorskip("wandb", reason="wandb is not installed")

KEY = "k" * 40
WORDS = (
    "variant=solu_ln", "size=tiny", "corpus.max_mb=1", "train.steps=60", "train.log_every=5",
    "train.checkpoint_every=20", "train.threads=1", "train.device=cpu",
)  # fmt: skip


class Server(ThreadingHTTPServer):
    """A server on loopback that counts connections. Its handler answers that the key is wrong."""

    n_connections = 0

    def process_request(self, request: Any, client_address: Any) -> None:
        self.n_connections += 1
        super().process_request(request, client_address)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Refusing(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

    do_GET = do_POST

    def log_message(self, *words: Any) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Refusing) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tracking")


def words_of(place: Path, study: str, *words: str) -> list[str]:
    runs = (f"runs_dir={place / 'runs'}", f"tokens.cache_dir={place / '.tokens'}")
    return [*WORDS, *runs, f"study={study}", *words]


def python(
    place: Path, server: Server, *words: str | Path, prefix: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python words` as on a machine without login, whose only connection is `server`."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    ways = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WANDB_BASE_URL"),
        server.address,
    )
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    return subprocess.run(
        [*prefix, sys.executable, *map(str, words)],
        env=own | ways | {"HOME": str(place), "PYTHONPATH": path} | variables,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
    )


def train(place: Path, server: Server, *words: str, **options: Any) -> None:
    done = python(place, server, ROOT / "train" / "run.py", *words, **options)
    assert done.returncode == 0, done.stderr
    assert "wandb" not in done.stdout + done.stderr, done.stderr  # wandb prints nothing


def inspect(folder: Path, *options: str) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(folder)]
    quiet = os.environ | {"WANDB_ERROR_REPORTING": "false"}
    return subprocess.run(command, env=quiet, capture_output=True, text=True, check=True).stdout


def starts(run_dir: Path) -> list[Path]:
    """Return wandb's folders of a run, one for each start, oldest first."""
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, inspect(folder).splitlines())
    return [line[kind] for line in lines if line["type"] == kind]


def by_step(history: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return the rows of the curves by step, without wandb's own columns. A step sent twice keeps its last row."""
    own = ({k: v for k, v in row.items() if not k.startswith("_")} for row in history)
    return {row["step"]: row for row in own}


def rows(*folders: Path) -> dict[int, dict[str, Any]]:
    return by_step([record["item"] for one in folders for record in records(one, "history")])


def first_run(run_dir: Path) -> dict[str, Any]:
    return records(starts(run_dir)[0], "run")[0]


def metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    return {line["step"]: line for line in lines}


# --- an offline run -------------------------------------------------------------------------------


def can_strace() -> bool:
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def offline(place: Path, server: Server) -> Path:
    """Return a run that has a key and the setting wandb=offline."""
    before = server.n_connections
    prefix = ("strace", "-f", "-qq", "-e", "trace=connect", "-o", str(place / "strace.txt"))
    train(place, server, *words_of(place, "whole", "wandb=offline"),
          prefix=prefix if can_strace() else (), WANDB_API_KEY=KEY)  # fmt: skip
    assert server.n_connections == before
    return place / "runs" / "whole" / "solu_ln-s0"


def test_wandb_has_every_row_of_the_metrics(offline: Path) -> None:
    (folder,) = starts(offline)
    assert len(metrics(offline)) == 12
    assert rows(folder) == metrics(offline)
    steps = {record["name"]: record.get("step_metric") for record in records(folder, "metric")}
    assert {name for name, by in steps.items() if by == "step"} == metrics(offline)[5].keys() - {
        "step"
    }


def test_the_summary_is_done_json(offline: Path) -> None:
    summary = json.loads(inspect(starts(offline)[0], "--summary"))["summary"]
    done = json.loads((offline / "done.json").read_text())
    assert {"select_loss", "report_loss", "tokens", "seconds"} <= done.keys()
    assert {name: summary[name] for name in done} == done


def test_runs_are_grouped_by_study_and_found_by_flat_keys(offline: Path) -> None:
    (run,) = records(starts(offline)[0], "run")
    assert (run["run_group"], run["display_name"]) == ("whole", "solu_ln-s0")
    assert run["project"] == "soluscope"
    logged = run["config"]["update"]
    config = read_config(offline / "config.yaml")
    expected = {
        "variant": "solu_ln", "seed": 0, "study": "whole", "size": "tiny", "arm_name": "solu_ln", "lr": 4e-3,
        "config": config.hash, "kappa": pytest.approx(41.94304), "gain": None, "d_model": 32, "d_mlp": 128,
        "n_layers": 1, "tokens": 60 * 8 * 32,
    }  # fmt: skip
    assert {key: logged.get(key) for key in expected} == expected
    assert not [key for key in logged if "." in key]
    assert logged["resolved"] == json.loads(json.dumps(for_others(asdict(config))))
    assert str(offline.parents[1]) not in json.dumps(logged)


def test_the_model_is_an_artifact_that_says_what_it_is_and_is_not_copied(offline: Path) -> None:
    (artifact,) = records(starts(offline)[0], "artifact")
    assert (artifact["type"], artifact["name"]) == ("model", "whole-solu_ln-s0")
    assert json.loads(artifact["metadata"]) == json.loads((offline / "model.json").read_text())
    found = {entry["path"]: entry["local_path"] for entry in artifact["manifest"]["contents"]}
    saved = Path(found.pop("config.yaml"))
    assert read_config(saved).hash == read_config(offline / "config.yaml").hash
    assert str(offline.parents[1]) not in saved.read_text()
    own = {name: offline / name for name in ("model.safetensors", "model.json")}
    expected = own | {"tokenizer.json": offline.parent / "tokenizer.json"}
    assert found == {name: str(path) for name, path in expected.items()}


def test_wandb_stores_nothing_about_the_machine_the_user_and_the_command(offline: Path) -> None:
    (stored,) = starts(offline)[0].glob("*.wandb")
    content = stored.read_bytes()
    for word in (str(ROOT / "train"), sys.executable, "CPython", "executable", "--study"):
        assert word.encode() not in content, word


def test_all_files_of_wandb_but_its_log_lie_in_the_run_folder(offline: Path, place: Path) -> None:
    elsewhere = {p.relative_to(place).parts[0] for p in place.rglob("*wandb*")} - {"runs"}
    assert elsewhere <= {".cache"}
    cached = [path for path in (place / ".cache").rglob("*") if path.is_file()]
    assert all(path.suffix == ".log" for path in cached if "wandb" in str(path.relative_to(place)))


@pytest.mark.skipif(not can_strace(), reason="strace is not installed, or may not trace here")
def test_offline_no_process_connects_to_anything(offline: Path, place: Path) -> None:
    calls = (place / "strace.txt").read_text().splitlines()
    assert any("AF_UNIX" in call for call in calls)  # to wandb's service, so the trace includes it
    assert not [call for call in calls if "AF_INET" in call]


def test_probes_join_the_run_once_with_tables_and_figures(
    offline: Path, place: Path, server: Server
) -> None:
    code = (
        "import sys; from pathlib import Path; from soluscope.evaluation import suite; "
        "from soluscope.config import EvalConfig; "
        "words = EvalConfig(probes=['engagement'], n_tokens=500, n_loss_tokens=1000, n_draws=100); "
        "[suite.evaluate(Path(sys.argv[1]), words) for _ in range(2)]"
    )
    before = server.n_connections
    done = python(place, server, "-c", code, offline)
    assert done.returncode == 0, done.stderr
    assert server.n_connections == before
    trained, probed = starts(offline)  # and no third folder
    (first,), (second,) = records(trained, "run"), records(probed, "run")
    assert (first["run_id"], first["project"]) == (second["run_id"], second["project"])
    media = probed / "files" / "media"
    for name in ("engagement", "loss", "tokens"):
        (path,) = (media / "table" / "probes").glob(f"{name}_*.table.json")
        table = json.loads(path.read_text())
        got = [dict(zip(table["columns"], values, strict=True)) for values in table["data"]]
        stored = results.read(offline / "probes" / f"{name}.jsonl")
        about_the_run = [asdict(each) for each in stored if isinstance(each, results.OfRun)]
        assert about_the_run
        assert got == [dict.fromkeys(table["columns"]) | values for values in about_the_run]
    figures = {p.name.partition("_")[0] for p in (media / "plotly" / "engagement").iterdir()}
    assert "Engagement r, median token" in figures
    assert {entry["path"].partition("/")[0] for r in records(probed, "artifact")
            for entry in r["manifest"]["contents"]} == {"probes"}  # fmt: skip


# --- kills ----------------------------------------------------------------------------------------

# The real training, which calls `then` right after step `at`.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from soluscope.config import load_config
from soluscope.training.callback import TrainingCallback
from soluscope.training.run import train
at, *words = sys.argv[1:]
def service():
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, name, _, parent = stat.read_text().split()[:4]
        except OSError:
            continue
        if name == "(wandb-core)" and int(parent) == os.getpid():
            return int(pid)
real = TrainingCallback.on_train_batch_end
def watched(self, trainer, *rest):
    real(self, trainer, *rest)
    if trainer.global_step == int(at):
        then()
TrainingCallback.on_train_batch_end = watched
"""
KILL_ALL = """
def then():
    time.sleep(1)
    os.kill(service(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
train(load_config(words))
"""


@pytest.fixture(scope="module")
def killed(place: Path, server: Server) -> tuple[Path, dict[int, dict[str, Any]]]:
    """Return a run that was killed at step 37 with wandb's service, and was then trained to completion.

    Also return the rows logged before the kill, which wandb's first folder must contain.
    """
    words = words_of(place, "killed", "wandb=offline", "seed=3")
    run_dir = place / "runs" / "killed" / "solu_ln-s3"
    done = python(place, server, "-c", CHILD + KILL_ALL, "37", *words)
    assert done.returncode == -signal.SIGKILL, done.stderr
    logged = metrics(run_dir)
    train(place, server, *words)
    return run_dir, logged


@pytest.mark.long
def test_a_sigkill_takes_no_row_and_the_resumed_run_is_the_same(killed) -> None:
    run_dir, logged = killed
    first, second = starts(run_dir)
    assert list(logged) == list(range(5, 36, 5))
    assert rows(first) == logged
    ids = {record["run_id"] for folder in (first, second) for record in records(folder, "run")}
    assert ids == {json.loads((run_dir / "wandb.json").read_text())["id"]}
    assert rows(first, second) == metrics(run_dir)
    assert list(rows(second)) == list(range(5, 61, 5))  # rows before the checkpoint are sent again


def test_wandb_sync_makes_one_whole_run_of_what_was_written_offline(
    killed, place: Path, server: Server
) -> None:
    run_dir, _ = killed
    command = ("-m", "wandb", "sync", "--yes", *starts(run_dir))
    with WandbServer() as wandbs:
        done = python(place, server, *command, **wandbs.environment())
    assert done.returncode == 0, done.stderr
    (run,) = wandbs.runs.values()
    assert (run.id, run.project) == (first_run(run_dir)["run_id"], "soluscope")
    assert by_step(run.history) == metrics(run_dir)
    (model,) = wandbs.artifacts.values()
    assert model.committed
    assert model.files["model.safetensors"] == (run_dir / "model.safetensors").read_bytes()


class Listening:
    """A stand-in for wandb's run."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def define_metric(self, name: str, step_metric: str) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self.steps.append(row["step"])


@pytest.mark.parametrize(("is_new", "n_sent"), [(True, 250), (False, SENT_AGAIN)])
def test_a_wandb_run_that_is_new_to_a_resumed_run_gets_all_its_rows(tmp_path, is_new, n_sent):
    """This happens when an agent takes over a run that was begun without it."""
    run = Listening()
    Tracker(run, tmp_path, is_new).catch_up([{"step": step} for step in range(250)])
    assert run.steps == list(range(250))[-n_sent:]


FAILING = """
def then():
    os.kill(service(), signal.SIGKILL)
    time.sleep(0.5)
config = load_config(words)
train(config)
then = lambda: None
blocked = load_config([*words, "seed=1"])
blocked.run_dir.mkdir(parents=True)
(blocked.run_dir / "wandb").write_text("in the way")
train(blocked)
train(load_config([*words, "seed=2"]))
"""


@pytest.mark.long
def test_a_wandb_that_fails_is_told_once_and_stops_nothing(place: Path, server: Server) -> None:
    words = words_of(place, "failing", "wandb=offline")
    done = python(place, server, "-c", CHILD + FAILING, "12", *words)
    assert done.returncode == 0, done.stderr
    study = place / "runs" / "failing"
    for seed in range(3):
        assert (study / f"solu_ln-s{seed}" / "done.json").is_file()
        assert len(metrics(study / f"solu_ln-s{seed}")) == 12
    told = [line for line in done.stderr.splitlines() if "━" not in line]
    assert len(told) == 2
    assert "solu_ln-s0 is no longer tracked" in told[0]
    assert "solu_ln-s1 is not tracked" in told[1]
    (folder,) = starts(study / "solu_ln-s2")  # the next run has a service again
    assert rows(folder) == metrics(study / "solu_ln-s2")


ONLINE = """
import json
from dataclasses import asdict
from _wandb_server import WandbServer
from soluscope.training import wandb_run
wandb_run.FINISH_SECONDS = 3
def then():
    raise RuntimeError("the machine ran out of something")
config = load_config(words)
with WandbServer() as server:
    os.environ |= server.environment()
    try:
        train(config)
    except RuntimeError:
        pass
    then = lambda: None
    train(config)
    (run,) = server.runs.values()
    (model,) = server.artifacts.values()
    print(json.dumps({"history": run.history, "summary": run.summary, "config": run.config, "id": run.id,
                      "exit_code": run.exit_code, "committed": model.committed, "group": run.group}))
    server.refusing = True
    train(load_config([*words, "seed=1"]))  # the key is refused from here on
    server.refusing = False
    at, then = 12, lambda: server.__exit__()
    train(load_config([*words, "seed=2"]))
"""


@pytest.mark.long
def test_online_a_resumed_run_goes_on_and_a_server_that_goes_stops_nothing(
    place: Path, server: Server
) -> None:
    words = words_of(place, "online")
    done = python(place, server, "-c", CHILD + ONLINE, "37", *words)
    assert done.returncode == 0, done.stderr
    study = place / "runs" / "online"
    sent = json.loads(done.stdout)
    run_dir = study / "solu_ln-s0"
    assert by_step(sent["history"]) == metrics(run_dir)
    done_json = json.loads((run_dir / "done.json").read_text())
    assert {name: sent["summary"].get(name) for name in done_json} == done_json
    assert sent["config"]["variant"] == "solu_ln"
    assert (sent["group"], sent["exit_code"], sent["committed"]) == ("online", 0, True)
    assert sent["id"] == json.loads((run_dir / "wandb.json").read_text())["id"]
    for seed in (1, 2):
        assert (study / f"solu_ln-s{seed}" / "done.json").is_file()
    told = [line for line in done.stderr.splitlines() if "━" not in line]
    assert [line.partition(": ")[2].split(" ")[0] for line in told[:2]] == ["solu_ln-s0"] * 2
    assert "solu_ln-s1 is kept offline for 'wandb sync'" in told[2]
    assert "solu_ln-s2 is at http" in told[3]
    assert "solu_ln-s2 is no longer tracked" in told[4]
    assert len(told) == 5
    assert rows(*starts(study / "solu_ln-s1")) == metrics(study / "solu_ln-s1")


# --- agents, keys, and no wandb -------------------------------------------------------------------


def test_under_an_agent_the_run_is_the_agents(place: Path, server: Server, tmp_path: Path) -> None:
    parameters = tmp_path / "sweep.yaml"  # as the agent writes it
    parameters.write_text("wandb_version: 1\nseed: {value: 7}\ntrain.lr: {value: 0.002}\n")
    words = words_of(place, "swept", "seed=7", "train.lr=2e-3")
    before = server.n_connections
    train(place, server, *words, WANDB_SWEEP_ID="sw33p", WANDB_RUN_ID="agents-id",
          WANDB_PROJECT="agents-project", WANDB_SWEEP_PARAM_PATH=str(parameters))  # fmt: skip
    assert server.n_connections == before  # without a key, a run is offline
    run_dir = place / "runs" / "swept" / "solu_ln-s7"
    (folder,) = starts(run_dir)
    (run,) = records(folder, "run")
    assert (run["run_id"], run["project"]) == ("agents-id", "agents-project")
    assert run["sweep_id"] == "sw33p"
    assert run["run_group"] == "swept"
    logged = run["config"]["update"]
    expected = {"variant": "solu_ln", "seed": 7, "study": "swept", "size": "tiny", "lr": 0.002}
    assert {key: logged.get(key) for key in expected} == expected
    kept = json.loads((run_dir / "wandb.json").read_text())
    assert (kept["id"], kept["project"]) == ("agents-id", "agents-project")


def test_a_refused_key_is_one_line_before_anything_starts(place: Path, server: Server) -> None:
    words = words_of(place, "refused", "wandb=online")
    done = python(place, server, ROOT / "train" / "run.py", *words, WANDB_API_KEY=KEY)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"error: wandb=online, .* user is not logged in; .*wandb login.*", line)
    assert KEY not in line
    left = {path.name for path in (place / "runs" / "refused").rglob("*") if path.is_file()}
    assert left <= {".lock", "config.yaml"}


ASK = (
    "import os, sys; from soluscope.commands import run_command; "
    "from soluscope.training.wandb_run import check_login; "
    "run_command(lambda words: check_login(words[0]), sys.argv[1:])"
)


@pytest.mark.parametrize(
    ("key", "said"), [({}, "there is no key"), ({"WANDB_API_KEY": "short"}, "40+ characters")]
)
def test_online_without_a_good_key_is_one_line(place, server, key, said) -> None:
    before = server.n_connections
    done = python(place, server, "-c", ASK, "online", **key)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: wandb=online, ")
    assert said in line
    assert server.n_connections == before


def test_asking_the_server_leaves_no_service_to_the_jobs_that_follow(place, server) -> None:
    code = (
        "import os; from soluscope.errors import UserError; from soluscope.training.wandb_run import check_login\n"
        "try: check_login('online')\n"
        "except UserError: print(os.environ.get('WANDB_SERVICE'))"
    )
    done = python(place, server, "-c", code, WANDB_API_KEY=KEY)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.long
def test_off_and_missing_wandb_train_without_it(place: Path, server: Server) -> None:
    code = """
import sys
from soluscope.config import load_config
from soluscope.errors import UserError
from soluscope.training.run import train
words = sys.argv[1:]
train(load_config([*words, "wandb=off"]))
assert not [name for name in sys.modules if name.partition(".")[0] == "wandb"]
sys.modules["wandb"] = None
train(load_config([*words, "seed=1"]))
try:
    train(load_config([*words, "seed=2", "wandb=offline"]))
except UserError as error:
    print(error)
"""
    before = server.n_connections
    words = words_of(place, "without", "train.steps=10")
    done = python(place, server, "-c", code, *words, WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wandb=offline needs the wandb package (")
    assert server.n_connections == before
    study = place / "runs" / "without"
    for seed in (0, 1):
        assert (study / f"solu_ln-s{seed}" / "done.json").is_file()
    assert not list(study.rglob("*wandb*"))


@pytest.mark.parametrize("word", ["true", "True", "1", "yes", "on"])
def test_wandb_disabled_is_off_whatever_is_asked_for(monkeypatch, word: str) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_DISABLED", word)
    assert {wandb_run.mode_of(chosen) for chosen in (None, "offline", "online")} == {"off"}
    monkeypatch.setenv("WANDB_DISABLED", "false")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run.mode_of(None) == "offline"


@pytest.mark.parametrize(
    ("word", "most"), [("disabled", "off"), ("offline", "offline"), ("dryrun", "offline")]
)
def test_environment_limits_every_request(monkeypatch, word: str, most: str) -> None:
    monkeypatch.delenv("WANDB_DISABLED", raising=False)
    monkeypatch.setenv("WANDB_MODE", word)
    assert mode_of("online") == most
    assert mode_of("off") == "off"
    check_login("online")  # asks no server
    with pytest.raises(UserError, match=f"limits wandb to {most}"):
        wandb_client.sign_in("--wandb", "add --dry-run")


def test_home_that_cannot_be_written_moves_the_log_of_wandb(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "file" / "cache"))
    wandb_client.package()
    moved = Path(os.environ["WANDB_CACHE_DIR"])
    assert moved.is_dir()
    assert not moved.is_relative_to(tmp_path / "file")
    wandb_client.package()
    assert Path(os.environ["WANDB_CACHE_DIR"]) == moved


@pytest.mark.parametrize("n_letters", [127, 128, 129, 240])
def test_names_that_wandb_gets_are_short_enough_and_distinct(n_letters: int) -> None:
    first, second = (wandb_run._shortened("a" * (n_letters - 1) + end) for end in "xy")
    assert len(first) == min(n_letters, 128)
    assert first != second
    if n_letters <= 128:
        assert first.endswith("x")


def test_model_of_a_run_with_a_long_name_is_an_artifact(tmp_path: Path) -> None:
    run_dir = tmp_path / ("s" * 120) / ("r" * 120)
    run_dir.mkdir(parents=True)
    for name in ("model.safetensors", "model.json", "../tokenizer.json"):
        (run_dir / name).write_text("x")
    (run_dir / "config.yaml").write_text(to_yaml(tiny_config(tmp_path, "variant=solu")))
    facts = {"study": "s" * 120, "run": "r" * 120}
    assert len(wandb_run._model_artifact(run_dir, facts).name) <= 128


def test_a_disabled_environment_is_off_without_importing_wandb(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode_of(None) == "off"
    assert mode_of("offline") == "off"


# --- studies of other people ----------------------------------------------------------------------

EVALUATE = """
import sys; from pathlib import Path
from soluscope.evaluation.wandb_probes import send_probes
from soluscope.runs.folder import Run
send_probes(Run(Path(sys.argv[1])), sys.argv[2] if len(sys.argv) > 2 else None)
"""


@pytest.fixture
def received(offline: Path, tmp_path: Path) -> Path:
    """Return a probed run that another user has trained with wandb=online, for a project of that user."""
    study = Path(shutil.copytree(offline.parent, tmp_path / "study"))
    run_dir = study / offline.name
    shutil.rmtree(run_dir / "wandb")
    (run_dir / "probes").mkdir(exist_ok=True)
    for path in (run_dir / "probes").iterdir():
        path.unlink()
    gate = {"kind": "gate", "study": "s", "probe": "p"}
    (run_dir / "probes" / "p.jsonl").write_text(json.dumps(gate) + "\n")
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("wandb: offline", "wandb: online"))
    known = json.loads((offline / "wandb.json").read_text())
    there = {"entity": "mallory", "project": "loot", "wandb": "online"}
    (run_dir / "wandb.json").write_text(json.dumps(known | there))
    return run_dir


@pytest.mark.parametrize("signature", ["theirs", "none", "empty", "number"])
@pytest.mark.parametrize("variables", [{}, {"WANDB_MODE": "disabled"}, {"WANDB_MODE": "offline"}])
def test_received_run_is_not_sent(place, server, received, variables, signature) -> None:
    path = received / "wandb.json"
    known = json.loads(path.read_text())
    changed = {"none": None, "empty": "", "number": 1}.get(signature, known["signature"])
    path.write_text(json.dumps(known | {"signature": changed}))
    before, files = server.n_connections, path.read_text()
    done = python(place, server, "-c", EVALUATE, received, WANDB_API_KEY=KEY, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert server.n_connections == before
    assert path.read_text() == files
    assert not (received / "wandb").exists()


def test_received_run_goes_to_the_users_own_project_when_asked(place, server, received) -> None:
    there = json.loads((received / "wandb.json").read_text())
    before = server.n_connections
    done = python(place, server, "-c", EVALUATE, received, "offline", WANDB_API_KEY=KEY)
    assert done.returncode == 0, done.stderr
    assert server.n_connections == before
    (run,) = records(starts(received)[0], "run")
    assert run["project"] == "soluscope"
    assert run.get("entity") != "mallory"
    assert run["run_id"] != there["id"]


@pytest.mark.parametrize(("word", "mode"), [("online", "disabled"), ("off", "online")])
def test_environment_and_off_win_over_a_run_trained_here(
    place, server, offline, tmp_path, word, mode
):
    run_dir = Path(shutil.copytree(offline.parent, tmp_path / "study")) / offline.name
    n_starts, before = len(starts(run_dir)), server.n_connections
    variables = {"WANDB_API_KEY": KEY, "WANDB_MODE": mode}
    done = python(place, server, "-c", EVALUATE, run_dir, word, **variables)
    assert done.returncode == 0, done.stderr
    assert (len(starts(run_dir)), server.n_connections) == (n_starts, before)


def test_wandb_json_that_was_changed_is_not_continued(
    offline: Path, place: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    known = json.loads((offline / "wandb.json").read_text())
    assert wandb_run.identity(offline)["id"] == known["id"]
    for change in (
        {"entity": "mallory"},
        {"project": "loot"},
        {"id": "x"},
        {"wandb": "online"},
        {"signature": ""},
    ):
        (tmp_path / "wandb.json").write_text(json.dumps(known | change))
        assert wandb_run.identity(tmp_path) == {}
    for text in ("", "[]", "null", "[" * 100_000, '{"signature": []}', "\udc80"):
        (tmp_path / "wandb.json").write_text(text, errors="surrogateescape")
        assert wandb_run.identity(tmp_path) == {}
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    assert wandb_run.identity(offline) == {}


def test_user_without_a_writable_home_has_runs_without_identity(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    wandb_run.write_identity(tmp_path, {"id": "x"})
    assert json.loads((tmp_path / "wandb.json").read_text()) == {"id": "x"}
    assert wandb_run.identity(tmp_path) == {}


SETTINGS = """
import json
from soluscope.wandb_client import allowed, package
package()
from wandb.sdk import wandb_setup
def shown():
    s = wandb_setup.singleton().settings
    return [s.base_url, s.entity, s.project, s.mode]
first = shown()
package().teardown()
package()
print(json.dumps([first, shown(), allowed()]))
"""


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
@pytest.mark.parametrize("mode", ["", "online", "offline", "disabled"])
def test_settings_inside_a_study_are_not_read_but_for_a_lesser_mode(
    server, tmp_path, folder, mode
) -> None:
    (tmp_path / folder).mkdir()
    lines = [
        "[default]",
        "base_url = http://127.0.0.1:1",
        "entity = mallory",
        "project = loot",
        "api_key = x",
    ]
    text = "\n".join([*lines, f"mode = {mode}"] if mode else lines)
    (tmp_path / folder / "settings").write_text(text + "\n")
    done = python(tmp_path, server, "-c", SETTINGS)
    assert done.returncode == 0, done.stderr
    first, again, most = json.loads(done.stdout)
    assert first == again == [server.address, None, None, "online"]
    assert most == {"offline": "offline", "disabled": "off"}.get(mode, "online")
