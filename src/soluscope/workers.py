"""Work side by side: each piece of work is done in a worker, a process that takes one piece after another.

A worker is `python -m MODULE`, and the module calls `works`. It reads one line for each piece of work from its
stdin. If the launching process is killed, stdin is closed: a worker in the middle of a piece then gets SIGTERM, so
no worker outlives the launching process.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POLL_S = 0.5
"""Seconds between two calls of `Watcher.look`."""
MESSAGE = "\x1e"
"""First character of a line that a worker sends to the launching process; all other lines are for the user."""
STOPPED = 130
"""Exit status of a worker that was stopped by SIGTERM, after it has saved its work."""
CLOSING_S = 2.0
"""Seconds within which the last lines of a process that has ended are read."""


@dataclass(frozen=True)
class Work:
    """A piece of work."""

    name: str
    """Name of the run to work on."""
    line: str
    """Description that the worker reads, on one line."""
    after: frozenset[str] = frozenset()
    """Names of works that must have ended before this one begins."""


class Watcher(Protocol):
    """The functions that `side_by_side` calls, all of them in the calling thread."""

    def began(self, name: str) -> None:
        """Note that the work `name` is given to a worker."""

    def said(self, name: str, text: str) -> None:
        """Show a line that the worker printed for the user."""

    def heard(self, name: str, message: dict[str, Any]) -> None:
        """Take a message that the worker sent with `tell`."""

    def ended(self, name: str, status: int | None) -> None:
        """Note that the work has ended. If the worker's process ended during the work: its exit status."""

    def look(self) -> None:
        """Show the progress; called every `POLL_S` seconds."""


# --- in the launching process ---------------------------------------------------------------------


def side_by_side(module: str, works: Sequence[Work], n_workers: int, watcher: Watcher) -> None:
    """Run all works in at most `n_workers` processes at once. A process that dies ends only its own work.

    Raises:
        KeyboardInterrupt: after SIGTERM or Ctrl-C, once all workers have got SIGTERM and have ended.
    """
    lines: queue.SimpleQueue[tuple[_Worker, str]] = queue.SimpleQueue()
    waiting, workers = list(works), list[_Worker]()
    with stop_requests() as asked_to_stop:
        try:
            while waiting or any(worker.work for worker in workers):
                if asked_to_stop.is_set():
                    raise KeyboardInterrupt
                for worker in [each for each in workers if each.process.poll() is not None]:
                    workers.remove(worker)
                    _end(worker, lines, watcher)
                at_work = {worker.work.name for worker in workers if worker.work}
                for work in _ready(waiting, at_work)[: n_workers - len(at_work)]:
                    worker = next((each for each in workers if not each.work), None) or _Worker(
                        module, lines
                    )
                    workers += [] if worker in workers else [worker]
                    waiting.remove(work)
                    watcher.began(work.name)
                    worker.give(work)
                with suppress(queue.Empty):
                    _take(*lines.get(timeout=POLL_S), watcher)
                _take_all(lines, watcher)
                watcher.look()
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.process.wait()
                worker.reader.join(CLOSING_S)
            _take_all(lines, watcher)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or Ctrl-C sets, instead of interrupting the block."""
    asked = threading.Event()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda *_: asked.set())
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Worker:
    """A process that does one piece of work after another, and a thread that reads what it prints."""

    def __init__(self, module: str, lines: queue.SimpleQueue[tuple[_Worker, str]]) -> None:
        # A worker runs the code of this process, also where another version is installed.
        search_path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf8", errors="backslashreplace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search_path)), "PYTHONIOENCODING": "utf8"},
            start_new_session=True,  # only the launching process receives a terminal's Ctrl-C
        )  # fmt: skip
        self.work: Work | None = None
        self.lines = lines
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def give(self, work: Work) -> None:
        self.work = work
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has died, which the next look at it shows
            self.process.stdin.write(f"{work.line}\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        if self.work:
            self.process.terminate()
        with suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put((self, line.rstrip("\n")))


def _ready(waiting: Sequence[Work], at_work: set[str]) -> list[Work]:
    """Return the works that can begin now; if works wait for each other in a circle, the first one."""
    unfinished = at_work | {work.name for work in waiting}
    ready = [work for work in waiting if not work.after & (unfinished - {work.name})]
    return ready or ([] if at_work else list(waiting[:1]))


def _take(worker: _Worker, line: str, watcher: Watcher) -> None:
    if worker.work is None or not line:
        return
    name = worker.work.name
    if not line.startswith(MESSAGE):
        watcher.said(name, line)
        return
    message = json.loads(line.removeprefix(MESSAGE))
    if message == {}:
        worker.work = None
        watcher.ended(name, None)
    else:
        watcher.heard(name, message)


def _take_all(lines: queue.SimpleQueue[tuple[_Worker, str]], watcher: Watcher) -> None:
    with suppress(queue.Empty):
        while True:
            _take(*lines.get_nowait(), watcher)


def _end(worker: _Worker, lines: queue.SimpleQueue[tuple[_Worker, str]], watcher: Watcher) -> None:
    """Take the last lines of a process that has ended, and end its work."""
    worker.reader.join(CLOSING_S)  # a process that it started may keep its output open
    _take_all(lines, watcher)
    worker.stop()
    if worker.work:
        work, worker.work = worker.work, None
        watcher.ended(work.name, worker.process.returncode)


def ending(status: int) -> str:
    """Return how a process with this exit status ended."""
    if status >= 0:
        return f"its process ended with exit status {status}"
    try:
        return f"its process was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"its process was ended by signal {-status}"


# --- in a worker ----------------------------------------------------------------------------------


def works() -> Iterator[str]:
    """Yield the description of each piece of work, and tell the launching process when the piece has ended.

    During a piece, SIGTERM and the end of the launching process raise KeyboardInterrupt, unless the piece handles
    SIGTERM itself.
    """
    signal.signal(signal.SIGTERM, _interrupt_once)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    busy, alone = threading.Event(), threading.Event()
    threading.Thread(target=_listen, args=(lines, busy, alone), daemon=True).start()
    while (line := lines.get()) is not None:
        busy.set()
        if alone.is_set():
            return
        yield line
        busy.clear()
        tell()


def _interrupt_once(*_: Any) -> None:
    """Raise KeyboardInterrupt. A second signal is ignored: it would interrupt a piece that saves its work."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def tell(**message: Any) -> None:
    """Send a message to the launching process; without values: the piece of work has ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    # The first line end ends whatever the piece has printed last.
    os.write(1, f"\n{MESSAGE}{json.dumps(message)}\n".encode())


def tell_step(done: int, of: int, result: str) -> None:
    """Send the progress of an evaluation to the launching process: an `evaluation.one_run.Step`."""
    tell(done=done, of=of, result=result)


def _listen(
    lines: queue.SimpleQueue[str | None], busy: threading.Event, alone: threading.Event
) -> None:
    """Put each line of stdin into `lines`. At the end of stdin, stop a busy process with SIGTERM."""
    if hasattr(
        signal, "pthread_sigmask"
    ):  # signals are for the main thread, which may hold them back
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    rest = b""
    # A buffered file that another thread reads cannot be closed at the end of the process.
    while part := os.read(0, 1 << 16):
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            lines.put(line.decode())
    lines.put(None)
    alone.set()
    if busy.is_set():
        nowhere = os.open(os.devnull, os.O_WRONLY)  # nobody reads the output any more
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.kill(os.getpid(), signal.SIGTERM)
