"""The rating page as a process: kill -9 loses no confirmed rating, and only this machine can reach it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest
from conftest import HANGS_AFTER_S, ROOT

from soluscope.rating.database import Database

pytest.importorskip("uvicorn")
SERVER = ROOT / "tests" / "_rating_server.py"


@contextmanager
def served(study: Path, n_neurons: int = 40) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start a server and yield its process and the address that it printed; kill it at the end."""
    study.mkdir(parents=True, exist_ok=True)
    search_path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(study), str(n_neurons)],
        env={**os.environ, "PYTHONPATH": search_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


class Browser:
    """A person's browser: one connection with a cookie."""

    def __init__(self, address: str, name: str) -> None:
        parts = urlsplit(address)
        self.host = parts.netloc
        self.connection = http.client.HTTPConnection(self.host, timeout=HANGS_AFTER_S)
        self.headers = {"Origin": f"http://{self.host}"}
        reply = self._ask("GET", f"/?{parts.query}")
        self.headers["Cookie"] = str(reply.getheader("set-cookie")).split(";")[0]
        assert self.post("/begin", name=name) == 303

    def _ask(self, method: str, path: str, body: str = "") -> http.client.HTTPResponse:
        self.connection.request(method, path, body, self.headers)
        reply = self.connection.getresponse()
        reply.read()
        return reply

    def post(self, path: str, **fields: str) -> int:
        return self._ask("POST", path, urlencode(fields)).status


def rate_until_killed(address: str, name: str, first: int, confirmed: list[int]) -> None:
    """Send one answer after another, and note each place whose rating the server has confirmed."""
    try:
        browser = Browser(address, name)
        for place in range(first, 10_000):
            if (
                browser.post("/rate", place=str(place), answer="no", hypothesis=f"at {place}")
                != 303
            ):
                return
            confirmed.append(place)
    except (OSError, http.client.HTTPException):
        return


def kill_once(study: Path, number: int, confirmed: dict[str, list[int]]) -> None:
    """Let two people rate, kill the server at a moment that depends on `number`, and check the database."""
    with served(study) as (process, address):
        database = Database(study / "rating" / "ratings.sqlite")
        before = database.raters()
        threads = [
            threading.Thread(
                target=rate_until_killed,
                args=(address, name, before.get(name, 0), confirmed[name]),
            )
            for name in confirmed
        ]
        for each in threads:
            each.start()
        while not any(confirmed[name][before.get(name, 0) :] for name in confirmed):
            assert any(each.is_alive() for each in threads)
            time.sleep(0.001)
        time.sleep(0.0137 * number % 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(HANGS_AFTER_S)
        for each in threads:
            each.join(HANGS_AFTER_S)
    with sqlite3.connect(database.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    stored = database.raters()
    for name, places in confirmed.items():
        assert places == list(range(len(places)))
        # The last answer may be on the disk although its confirmation did not reach the browser.
        assert len(places) <= stored.get(name, 0) <= len(places) + 1
        texts = [each.hypothesis for each in database.ratings() if each.rater == name]
        assert texts == [f"at {place}" for place in range(len(texts))]
        places[:] = range(len(texts))


@pytest.mark.slow
def test_a_killed_server_loses_no_confirmed_rating(tmp_path: Path) -> None:
    confirmed: dict[str, list[int]] = {"ann": [], "bob": []}
    for number in range(4):
        kill_once(tmp_path / "first", number, confirmed)


@pytest.mark.long
def test_fifty_kills_lose_no_confirmed_rating(tmp_path: Path) -> None:
    confirmed: dict[str, list[int]] = {}
    for number in range(50):
        study = tmp_path / str(number // 10) / "first"  # a new study before its items are all rated
        confirmed = {"ann": [], "bob": []} if number % 10 == 0 else confirmed
        kill_once(study, number, confirmed)


def test_the_page_is_on_the_loopback_address_alone_and_a_used_port_is_refused(
    tmp_path: Path,
) -> None:
    with served(tmp_path / "first", n_neurons=6) as (_, address):
        parts = urlsplit(address)
        assert parts.hostname == "127.0.0.1"
        assert parts.port
        assert len(parts.query.removeprefix("token=")) >= 43  # 32 random bytes
        with socket.socket() as probing:  # another address of this machine, as on a network
            probing.settimeout(5)
            assert probing.connect_ex(("127.0.0.2", parts.port)) != 0
        with Database(tmp_path / "first" / "rating" / "ratings.sqlite")._reading() as connection:
            assert connection.execute("SELECT count(*) FROM item").fetchone()[0] > 12
