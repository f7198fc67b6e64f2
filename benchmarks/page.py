"""Size of a study's page, and the time until Chromium shows its first figure.

    python benchmarks/page.py runs/demo/results.jsonl
    python benchmarks/page.py runs/demo/results.jsonl 160

The second line makes a larger study of the first one: its arms and seeds are copied under new names until it has
160 runs, and every number of a copy is a little different, as it would be. Nothing is trained. The script prints
one JSON line with the seconds to make the page, the bytes of the page and of its parts, and, with Chromium and
Playwright, the seconds until the page is loaded and until its first figure is drawn.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from soluscope import results
from soluscope.report import page
from soluscope.results import Comparison, Number, OfRun, Record, Setting, of_kind

SEEDS = 8
"""Seeds of each arm in a study that is made larger."""


def main(path: str, n_runs: str = "") -> None:
    records: list[Record] = results.read(Path(path))
    if n_runs:
        records = larger(records, int(n_runs))
    begin = time.perf_counter()
    html = page.render(records)
    facts: dict[str, object] = {
        "runs": len({record.run for record in records if isinstance(record, OfRun)}),
        "records": len(records),
        "seconds to make it": round(time.perf_counter() - begin, 1),
        "bytes": len(html.encode()),
        "bytes of parts": parts(html),
    }
    print(json.dumps(facts | opened(html)))


def parts(html: str) -> dict[str, int]:
    """Return the bytes of a page's library, figures, tables and token view."""
    patterns = {
        "library": r'id="packed-library">(.*?)</script>',
        "figures": r'id="packed-figures">(.*?)</script>',
        "tables": r"<table>(.*?)</table>",
        "tokens": r'<div class="tokens">(.*?)</section>',
    }
    return {
        name: sum(len(each) for each in re.findall(pattern, html, flags=re.S))
        for name, pattern in patterns.items()
    }


def larger(records: list[Record], n_runs: int) -> list[Record]:
    """Return a study of `n_runs` runs at eight seeds, made of copies of a study's records."""
    random = np.random.default_rng(0)
    arms = list(dict.fromkeys(each.arm for each in of_kind(records, Setting)))
    seeds = sorted(
        {each.seed for each in records if isinstance(each, OfRun) and each.seed is not None}
    )
    n_arms = n_runs // SEEDS
    made = [record for record in records if not record.arm]
    for place in range(n_arms):
        copy = place // len(arms)
        for record in records:
            if record.arm == arms[place % len(arms)]:
                made += _copies(record, copy, seeds, random)
    return made


def _copies(
    record: Record, copy: int, seeds: list[int], random: np.random.Generator
) -> Iterator[Record]:
    """Yield a record for a copy of its arm; a record of a run, for each seed that its own seed stands for."""
    changed: dict[str, Any] = {"arm": _named(record.arm, copy)}
    if isinstance(record, Setting):
        more = {
            name: record.values[name] * (1 + copy)
            for name in ("kappa", "gain")
            if name in record.values
        }
        changed |= {"values": record.values | more, "n": SEEDS}
    if isinstance(record, Comparison):
        changed["against"] = record.against and _named(record.against, copy)
    for seed in range(SEEDS) if isinstance(record, OfRun) else (None,):
        if isinstance(record, OfRun) and seed is not None:
            if record.seed != seeds[seed % len(seeds)]:
                continue
            changed |= {"seed": seed, "run": f"{changed['arm']}-s{seed}"}
        if isinstance(record, Number) and record.value is not None:
            shift = 0.01 * record.value * random.normal()
            names = ("value", "low", "high")
            known = {name: getattr(record, name) for name in names}
            changed |= {name: value + shift for name, value in known.items() if value is not None}
        yield replace(record, **changed)


def _named(arm: str, copy: int) -> str:
    return f"{arm}-copy{copy}" if copy else arm


def opened(html: str) -> dict[str, object]:
    """Return the seconds until the page is loaded and until its first figure is drawn; empty without a browser."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        return {}
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "report.html"
        path.write_text(html)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        begin = time.perf_counter()
        tab.goto(path.as_uri(), timeout=0)
        loaded = time.perf_counter() - begin
        tab.wait_for_selector(".main-svg", timeout=0)
        drawn = time.perf_counter() - begin
        browser.close()
    return {"seconds to load": round(loaded, 2), "seconds to the first figure": round(drawn, 2)}


if __name__ == "__main__":
    main(*sys.argv[1:])
