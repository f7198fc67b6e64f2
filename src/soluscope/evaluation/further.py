"""Arms that `soluscope remove` has trained further from a study's runs, as they enter the study's comparison.

They have seen more tokens than the study's own arms. So they have no role in it: none is chosen as the best static
arm, and none is a reference. Each arm with less normalisation is compared with the arm that was trained further
unchanged, on the same batches.

Source: protocol.md section 7, P7.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from soluscope.comparison.compare import Lineage
from soluscope.config import CONSTANT
from soluscope.evaluation.stored import probing, read_losses, read_stored
from soluscope.removal.fine_tune import study_of
from soluscope.results import Measurement, of_kind
from soluscope.runs.folder import Run, check_study_links
from soluscope.text import brief_number
from soluscope.variants import label_of

UNCHANGED = "as before"
DOCUMENTS = ["split", "document", "n_tokens"]


@dataclass(frozen=True)
class Further:
    """A run that was trained further, and the run with whose weights it began."""

    run: Run
    origin: Run

    @property
    def what(self) -> str:
        """Return the change that the further training adapts to, in words."""
        if self.run.config.model.norms == CONSTANT:
            return "without per-token scales"
        same = self.run.config.variant == self.origin.config.variant
        return UNCHANGED if same else "with one gain"

    @property
    def arm(self) -> str:
        """Return the name of the arm; it does not contain the gain, which differs by seed."""
        return self._arm(self.what)

    @property
    def lineage(self) -> Lineage:
        """Return the arm's part in the comparison."""
        facts = self.origin.facts
        label = label_of(facts.variant)
        kind = ", static gain" if facts.role == "static" else ""
        if facts.role == "per_token" and facts.kappa is not None:
            kind = f", kappa {brief_number(facts.kappa)}"
        name = f"{label}{kind}" if label else facts.arm
        beside = "" if self.what == UNCHANGED else self._arm(UNCHANGED)
        told = f"{name}, then trained {self.what} for {self.run.facts.tokens:,} tokens"
        return Lineage("other", "", (), told, after=facts.arm, beside=beside)

    @property
    def rate(self) -> str:
        """Return why the learning rate was not tuned."""
        return f"is {self._lr_share:.3g} of the rate of {self.origin.facts.arm}"

    @property
    def _lr_share(self) -> float:
        return self.run.facts.lr / self.origin.facts.lr

    def _arm(self, what: str) -> str:
        words = f"{what} {self.run.facts.steps} steps {self._lr_share:.3g}".replace(" ", "-")
        return f"{self.origin.facts.arm}-then-{words}"


def trained_further(origins: Iterable[Run]) -> list[Further]:
    """Return the finished runs that began with the weights of some runs of one study.

    Two runs of one arm and seed differ in their gain only, because the select text was another one. Neither is
    returned; `doubled` names them.
    """
    return [each for alike in _by_arm_and_seed(origins) if len(alike) == 1 for each in alike]


def doubled(origins: Iterable[Run]) -> list[str]:
    """Return a line about each group of runs that are not compared, because they are one arm at one seed."""
    return [
        f"{' and '.join(each.run.dir.name for each in alike)} are one arm and differ in their gain, so none of "
        "them is compared: delete all but one"
        for alike in _by_arm_and_seed(origins)
        if len(alike) > 1
    ]


def _by_arm_and_seed(origins: Iterable[Run]) -> list[list[Further]]:
    """Return the finished runs that began with the weights of some runs of one study, grouped by arm and seed."""
    by_name = {f"{run.facts.study}/{run.facts.run}": run for run in origins}
    if not by_name:
        return []
    first = next(iter(by_name.values()))
    folder = first.dir.resolve().parent.with_name(study_of(first))
    if folder.is_symlink():
        return []
    runs = [Run(path) for path in sorted(folder.glob("*")) if Run(path).is_done()]
    if runs:
        check_study_links(folder, *runs)
    found = [
        Further(run, by_name[run.facts.init_from.run])
        for run in runs
        if run.facts.init_from is not None and run.facts.init_from.run in by_name
    ]
    groups: dict[tuple[str, int], list[Further]] = {}
    for each in found:
        groups.setdefault((each.arm, each.run.config.seed), []).append(each)
    return [*groups.values()]


def compared(origins: Iterable[Run]) -> Iterator[tuple[Further, pd.DataFrame]]:
    """Yield the runs that were measured on the documents of their origin, with their losses by document."""
    for each in trained_further(origins):
        if (losses := losses_of(each)) is not None:
            yield each, losses


def losses_of(each: Further) -> pd.DataFrame | None:
    """Return a run's losses by document; None without losses, or if its origin's are of other documents."""
    tables = []
    for run in (each.run, each.origin):
        folder = run.dir / "probes"
        if not (folder / "loss.jsonl").is_file():
            return None
        table = read_losses(folder, run)
        tables.append(table.sort_values(DOCUMENTS, ignore_index=True))
    here, there = tables
    if not here[DOCUMENTS].equals(there[DOCUMENTS]):
        return None
    name = f"{each.run.dir.parent.name}/{each.run.facts.run}"
    return here.assign(run=name, arm=each.arm, variant=each.arm)


def loss_records(each: Further) -> list[Measurement]:
    """Return a run's mean loss with its interval, as a record of the origin's study."""
    facts = each.origin.facts
    path: Path = each.run.dir / "probes"
    stored = of_kind(read_stored(path, "loss", probing(each.run.dir.parent)), Measurement)
    return [
        replace(row, study=facts.study, arm=each.arm, variant=each.arm, run=each.run.facts.run)
        for row in stored
    ]


def is_measured(each: Further) -> bool:
    """Return whether a run has losses."""
    return (each.run.dir / "probes" / "loss.jsonl").is_file()


def obstacle(each: Further) -> str:
    """Return why a run cannot be compared with its origin; empty if it can, or if the origin has no losses."""
    if not (each.origin.dir / "probes" / "loss.jsonl").is_file() or losses_of(each) is not None:
        return ""
    return (
        f"{each.run.dir.name} is not compared, because its losses are of other documents than those of "
        f"{each.origin.dir.name}: probe both studies with the same n_loss_tokens="
    )
