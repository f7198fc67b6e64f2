"""Losses of a trained model's report documents after each step of the removal, minus its loss as trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from soluscope.hooked.ablation import FINAL_NORMS, best_gain
from soluscope.hooked.activations import HookedRun
from soluscope.removal.refit import Refit, own_weights, refit, text_of
from soluscope.results import ClaimTested

if TYPE_CHECKING:
    from torch import Tensor

ONE_GAIN, OWN_GAINS = "one gain", "own gains"
"""Columns of a table of losses: one gain for all tokens, and per-token gains after the same adaptation."""
FROM_START = "from the start: "
"""Beginning of the names of columns of arms that had one gain from the start of their training."""
N_PARTS = 4
"""One of this many documents chooses the penalty of the refit; the other documents are fitted."""


@dataclass(frozen=True)
class Losses:
    """Losses minus the loss as trained, one row per token that has a target and is not BOS."""

    table: pd.DataFrame
    """`document`, and for each treatment of ln_final the columns `ONE_GAIN` and perhaps `OWN_GAINS`."""
    notes: dict[str, str]
    """A remark for each treatment of ln_final."""
    claims: tuple[ClaimTested, ...] = ()
    """Tests of published claims on the model after this step."""


def frozen(report: HookedRun, choosing: HookedRun) -> Losses:
    """Return the losses with the one gain for all tokens that is best for `choosing`."""
    columns: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    own = own_weights(report.readout)
    for final_norm, how in FINAL_NORMS.items():
        gain = best_gain(choosing, final_norm)
        one, trained = (text_of(report, each, final_norm).all_losses(own) for each in (gain, None))
        columns[f"{ONE_GAIN}{how}"] = one - trained
        notes[final_norm] = f"one gain of {gain:.4g}, best on the select split"
    return Losses(_table(report, columns), notes)


def refitted(report: HookedRun, choosing: HookedRun) -> Losses:
    """Return the losses after a refit of the readout, once with the best one gain and once with per-token gains."""
    columns: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for final_norm, how in FINAL_NORMS.items():
        trained = text_of(report, None, final_norm).all_losses(own_weights(report.readout))
        gain = best_gain(choosing, final_norm)
        told = []
        for name, each in ((ONE_GAIN, gain), (OWN_GAINS, None)):
            parts = _fitted_and_choosing(choosing)
            found = refit(*(text_of(part, each, final_norm) for part in parts))
            here = text_of(report, each, final_norm)
            columns[f"{name}{how}"] = here.all_losses(found.weights) - trained
            told.append(f"{name}: {_about(found)}")
        notes[final_norm] = "; ".join(told)
    return Losses(_table(report, columns), notes)


def fine_tuned(
    report: HookedRun, one: HookedRun, own: HookedRun, from_start: Mapping[str, HookedRun]
) -> pd.DataFrame:
    """Return the losses after further training.

    Args:
        report: activations of the model as trained, on the report split.
        one: activations of the model that was trained further with one gain, or with constants in the place of all
            per-token scales, on the same text.
        own: activations of the model that was trained further as it was.
        from_start: activations of arms that had one gain from the start, by the arm's name.
    """
    models = {ONE_GAIN: one, OWN_GAINS: own} | {
        f"{FROM_START}{arm}": run for arm, run in from_start.items()
    }
    trained = report.loss[report.scored].double()
    return _table(
        report, {name: run.loss[run.scored].double() - trained for name, run in models.items()}
    )


def _about(found: Refit) -> str:
    if found.penalty is None:
        return "no refit lowers the loss on other documents, so the readout is as trained"
    return f"penalty {found.penalty:g}" + (
        "" if found.converged else ", not converged: the loss can be lower"
    )


def _fitted_and_choosing(run: HookedRun) -> tuple[HookedRun, HookedRun]:
    """Return the documents on which a readout is fitted, and the documents that choose its penalty."""
    _, rank = run.string.unique(return_inverse=True)
    chooses = rank % N_PARTS == 0
    return run.subset(~chooses), run.subset(chooses)


def _table(run: HookedRun, columns: dict[str, Tensor]) -> pd.DataFrame:
    documents = {"document": run.string[run.scored]} | columns
    return pd.DataFrame({name: np.asarray(each.cpu()) for name, each in documents.items()})
