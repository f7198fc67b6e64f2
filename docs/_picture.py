"""Draw the README's picture from a study's results: `python docs/_picture.py runs/demo`.

Writes docs/images/demo.svg: the loss of each arm minus that of plain SoLU, with two 95% intervals. The thick one is
for these models on other documents, the thin one for models of new seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from soluscope.results import Comparison, Term, of_kind, read

REFERENCE = "solu"
OUT = Path(__file__).parent / "images" / "demo.svg"
STYLES = {"document": {"linewidth": 6, "alpha": 0.45}, "seed": {"linewidth": 1.2}}


def main(study: Path) -> None:
    """Draw one row per variant, the lowest loss at the top."""
    rows = [
        row for row in of_kind(read(study / "results.jsonl"), Comparison)
        if row.term is Term.DIFFERENCE and row.against == REFERENCE and row.lr is None
    ]  # fmt: skip
    order = sorted({row.arm for row in rows}, key=lambda arm: -_value(rows, arm))
    matplotlib.rcParams.update({"svg.hashsalt": "soluscope", "font.size": 11})
    figure, axes = plt.subplots(figsize=(8, 2.9))
    for row in rows:
        if row.low is not None and row.high is not None:
            height = order.index(row.arm)
            axes.plot([row.low, row.high], [height, height], color="#00796b", **STYLES[row.cluster])
    for height, arm in enumerate(order):
        axes.plot(_value(rows, arm), height, "o", color="#004d40")
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel(f"loss minus the loss of {REFERENCE}, nats per token (left: lower loss)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, metadata={"Date": None, "Creator": None})
    print(f"{OUT} is written")


def _value(rows: list[Comparison], arm: str) -> float:
    return next(row.value for row in rows if row.arm == arm and row.value is not None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
