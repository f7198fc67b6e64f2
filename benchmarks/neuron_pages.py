"""Size of the site of a study's neurons, and the time that Chromium needs to list, filter, sort and open them.

    python benchmarks/neuron_pages.py runs/demo/solu_ln-s0
    python benchmarks/neuron_pages.py runs/demo/solu_ln-s0 2048 6

The neurons that are stored in the run are copied until there are 2,048 of them, and every number of a copy is a
little different, as it would be. Their data files are made once and copied for each of 6 arms. Nothing is trained.
The script prints one JSON line: the CPU seconds to make one arm's files, their number and size, and for each action
in Chromium the wall-clock seconds and the CPU seconds of the page's thread.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from soluscope.neurons import site, stored
from soluscope.neurons.stored import Neurons

KEPT = ("neuron", "range", "rank", "peak", "half", "row", "pos", "document")
"""Columns that stay as they are."""


class Copies(Neurons):
    """Stored neurons, copied until there are `n` of them."""

    def __init__(self, folder: Path, n: int) -> None:
        super().__init__(folder)
        self.once = self.about.n_neurons
        self.about = replace(self.about, n_neurons=n)

    @property
    def _bounds(self) -> dict[str, int]:
        return super()._bounds | {"neuron": self.once}  # of the tables in the files

    def groups(self) -> Any:
        parts = [*super().groups()]
        for copy in range(-(-self.about.n_neurons // self.once)):
            for part in parts:
                yield self._copy(part, copy)

    def _table(self, name: str, filters: Any = None) -> pd.DataFrame:
        table = super()._table(name, filters)
        copies = range(-(-self.about.n_neurons // self.once))
        return pd.concat([self._copy(table, copy) for copy in copies], ignore_index=True)

    def _copy(self, table: pd.DataFrame, copy: int) -> pd.DataFrame:
        found = table.assign(neuron=table["neuron"] + copy * self.once)
        random = np.random.default_rng(copy)
        for name in found.select_dtypes("float").columns.difference(list(KEPT)):
            found[name] *= random.normal(1, 0.05, len(found))
        return found[found["neuron"] < self.about.n_neurons]


def main(run: str, n_neurons: str = "2048", n_arms: str = "6") -> None:
    neurons, n = Copies(stored.read(run).folder, int(n_neurons)), int(n_arms)
    arms: list[Neurons] = [neurons, *(_named(neurons, number) for number in range(1, n))]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        begin = time.process_time()
        site.write_data(place, [neurons])
        facts: dict[str, Any] = {"cpu seconds for one arm": round(time.process_time() - begin, 1)}
        for number in range(1, n):
            _copy_data(place / site.DATA, number)
        (place / site.PAGE).write_text(site.page("large", arms))
        sizes = [path.stat().st_size for path in (place / site.DATA).iterdir()]
        facts |= {"files": len(sizes), "MB": round(sum(sizes) / 1e6, 1)}
        facts["MB before the first table"] = round(
            sum((place / site.DATA / f"{site.key(i)}.js").stat().st_size for i in range(n)) / 1e6, 2
        )
        print(json.dumps(facts | opened(place / site.PAGE)))


def _named(neurons: Copies, number: int) -> Copies:
    found = Copies(neurons.folder, neurons.about.n_neurons)
    found.about = replace(found.about, run=f"arm{number}-s0")
    return found


def _copy_data(folder: Path, number: int) -> None:
    """Copy the data files of the first arm under the names of another one."""
    first, other = site.key(0), site.key(number)
    for path in [*folder.glob(f"{first}.js"), *folder.glob(f"{first}-*.js")]:
        text = path.read_text().replace(f'"{first}', f'"{other}', 1)
        (folder / path.name.replace(first, other, 1)).write_text(text)


SET = """([id, value]) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event("input"));
}"""
DRAWN = "() => document.getElementById('cards').dataset.drawn"


def opened(page: Path) -> dict[str, Any]:
    """Return wall-clock and CPU seconds of each action; empty without a browser."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        return {}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(0)
        session = tab.context.new_cdp_session(tab)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        found: dict[str, Any] = {}

        def timed(name: str, act: Callable[[], Any]) -> None:
            before, begin = _cpu(session), time.perf_counter()
            act()
            wall = time.perf_counter() - begin
            found[name] = [round(wall, 2), round(_cpu(session) - before, 2)]

        def ready() -> None:
            tab.goto(page.as_uri())
            while not tab.evaluate("() => document.body.dataset.ready"):
                tab.wait_for_timeout(20)

        def another() -> None:
            before = tab.evaluate(DRAWN)
            tab.keyboard.press("j")
            while tab.evaluate(DRAWN) == before:
                tab.wait_for_timeout(20)

        timed("first table and neuron", ready)
        timed("all arms in one list", lambda: tab.evaluate(SET, ["run", ""]))
        timed("sort all by effect", lambda: tab.evaluate(SET, ["sort", "effect"]))
        timed("filter all by drop", lambda: tab.evaluate(SET, ["drop", "0.01"]))
        timed("search all for a rule", lambda: tab.evaluate(SET, ["query", "token"]))
        timed("show beside it", lambda: tab.evaluate(SET, ["beside", "m1"]))
        timed("next neuron", another)
        timed("next neuron of the same file", another)
        browser.close()
    return found


def _cpu(session: Any) -> float:
    metrics = session.send("Performance.getMetrics")["metrics"]
    return float({each["name"]: each["value"] for each in metrics}["TaskDuration"])


if __name__ == "__main__":
    main(*sys.argv[1:])
