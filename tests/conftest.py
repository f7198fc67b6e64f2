"""Helpers and fixtures of several test files: a trained study, and the probes' results on the controls."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from soluscope import commands, plugins
from soluscope.config import Config, load_config

# A second thread does not speed up models this small. Where other processes use the cores, the threads
# wait for each other: 20 times slower on two cores with -n 2. Child processes inherit the variable.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests of wandb set this themselves. All other tests send no curves.
os.environ["WANDB_MODE"] = "disabled"

ROOT = Path(__file__).parents[1]
VARIANTS = plugins.names("soluscope.variants")
SEEDS = (0, 1)
HANGS_AFTER_S = 600
"""Seconds after which a test stops waiting for another process. No test measures time: a machine may be busy."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests and the large files, so that no process has a long file left at the end."""
    items.sort(key=lambda each: (not each.get_closest_marker("slow"), -each.path.stat().st_size))


def tiny_config(runs_dir: Path, *words: str) -> Config:
    """Return a configuration whose run takes about a second.

    Args:
        runs_dir: folder of the runs; `runs_dir`/.tokens holds the tokens.
        words: the variant, and other settings to change.
    """
    places = (f"runs_dir={runs_dir}", f"tokens.cache_dir={runs_dir / '.tokens'}")
    small = (
        "size=tiny",
        "corpus.max_mb=1",
        "train.steps=12",
        "train.threads=1",
        "train.precision=fp32",
    )
    return load_config([*small, *places, *words])


def train_silently(config: Config) -> Path:
    """Train without progress bars, and return the run's folder."""
    from rich.progress import Progress

    from soluscope.training.run import train

    return train(config, Progress(disable=True))


def run_python(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `python words` with soluscope on its path, and capture its output; options as for subprocess.run."""
    search_path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
        **options,
    )


def command(
    name: str, *words: str | Path, cwd: str | Path = ".", status: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run `soluscope name words` in this process, where everything is imported, and capture its output.

    Args:
        name: the command.
        words: its words.
        cwd: folder to run it in.
        status: exit status that it must have; None for any.
    """
    out, errors = io.StringIO(), io.StringIO()
    with (
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as end,
    ):
        commands.run(name, [str(word) for word in words])
    assert isinstance(end.value.code, int)
    assert status in (None, end.value.code), errors.getvalue()
    return subprocess.CompletedProcess(
        [name, *words], end.value.code, out.getvalue(), errors.getvalue()
    )


def shared_by_workers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return the session's temporary folder, the same for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium, for tests with `_browser.needs_browser`; skip them without Playwright."""
    from _browser import CHROMIUM

    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        for context in [*found.contexts]:
            context.close()
        found.close()


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Return runs/tiny: every variant at seeds 0 and 1, trained for 12 steps. Copy it before you change it."""
    runs_dir = shared_by_workers(tmp_path_factory, worker_id) / "runs"
    runs_dir.mkdir(exist_ok=True)
    with FileLock(runs_dir / ".lock"):
        for variant in VARIANTS:
            for seed in SEEDS:
                words = ("study=tiny", f"variant={variant}", f"seed={seed}")
                train_silently(tiny_config(runs_dir, *words))
    return runs_dir / "tiny"


@pytest.fixture(scope="session")
def tiny_neurons(
    tiny_study: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> Path:
    """Return a study of one run with stored neurons and their pages. Copy it before you change it."""
    from soluscope.config import NeuronsConfig
    from soluscope.neurons import site
    from soluscope.neurons.compute import compute

    folder = shared_by_workers(tmp_path_factory, worker_id) / "neurons"
    folder.mkdir(exist_ok=True)
    study = folder / "study"
    with FileLock(folder / ".lock"):
        if not (study / "neurons").is_dir():
            for name in ("data.json", "tokenizer.json", "tokens", "solu_ln-s0"):
                source = tiny_study / name
                copy = shutil.copytree if source.is_dir() else shutil.copy
                study.mkdir(exist_ok=True)
                copy(source, study / name)
            compute(study, NeuronsConfig(n_tokens=1500, device="cpu"), lambda text: None)
            site.build(study)
    return study


@pytest.fixture(scope="session")
def gates(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[[str], Path]:
    """Return a function from a probe to the file of its results on its controls, computed once, for a study e2e."""
    folder = shared_by_workers(tmp_path_factory, worker_id) / "gates"
    folder.mkdir(exist_ok=True)

    def file_of(probe: str) -> Path:
        from soluscope import results
        from soluscope.evaluation.calibration import check_gates
        from soluscope.evaluation.summaries import stored_words

        path = folder / f"controls-{probe}.jsonl"
        with FileLock(folder / f".{probe}"):
            if not path.is_file():
                words = stored_words(probe, plugins.pick("soluscope.probes", probe), "e2e")
                results.write(path, [words, *check_gates(probe, study="e2e")])
        return path

    return file_of
