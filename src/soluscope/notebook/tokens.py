"""`soluscope.tokens`: the tokens of a study, as its models read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from soluscope.data.cache import SPLITS, Rows, Split, study_facts
from soluscope.data.streams import DOCUMENT_TOKENS
from soluscope.errors import UserError
from soluscope.evaluation.one_run import tokens_of
from soluscope.memory import of_machine
from soluscope.notebook.arguments import whole
from soluscope.plugins import check_name
from soluscope.runs.folder import Run

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy.typing import NDArray
    from torch import Tensor

    from soluscope.hooked.convert import SoluscopeTransformer


def tokens(
    model: SoluscopeTransformer | str | Path,
    split: Split = "report",
    n_tokens: int | None = None,
    prepared: str | Path | None = None,
) -> Int[Tensor, "row ctx"]:
    """Return tokens of the study that a model was trained in.

    Args:
        model: a model from `soluscope.load`, or a run's folder.
        split: `report` (losses are reported on it), `select` (settings are chosen on it) or `train`. A study
            has a copy of the first two. For `train` the token cache of the training must be there.
        n_tokens: about how many tokens to return: rows spread evenly over the split, few of each document, as for
            the losses of the report. By default the whole split.
        prepared: folder of the token cache of the training, if it was moved.

    Returns:
        int64 [row ctx]. Each row is BOS and ctx - 1 tokens of the split, which continue in the next row.
        Documents follow each other, with EOS after each. The last tokens, too few for a row, are left out.

    Raises:
        UserError: if the model belongs to no study, the tokens are gone or changed, or they do not fit into
            memory.
    """
    rows, chosen = rows_of(model, split, n_tokens, prepared)
    return torch.from_numpy(rows[chosen])


def rows_of(
    model: Any, split: Split, n_tokens: int | None = None, prepared: str | Path | None = None
) -> tuple[Rows, NDArray[np.int64]]:
    """Return a split as rows, and the indices of the rows that `tokens` returns."""
    check_name("split", split, list(SPLITS))
    if n_tokens is not None:
        n_tokens = whole("n_tokens", n_tokens, 1)
    run = _run_of(model)
    cache = tokens_of(run, None if prepared is None else str(prepared))
    if split not in cache.kept:
        facts = study_facts(run.dir.parent)
        whole_cache = facts["path"]
        if prepared is not None or not Path(whole_cache).is_dir():
            raise UserError(
                f"{cache.path} has no {split} split, and the token cache of the training, {whole_cache}, is gone: "
                f"set prepared= to the folder of the whole token cache {facts['key']}"
            )
        cache = tokens_of(run, whole_cache)
    ctx = run.facts.ctx
    rows = cache.rows(split, ctx)
    chosen = np.arange(len(rows)) if n_tokens is None else rows.spread(n_tokens, DOCUMENT_TOKENS)
    needed = 2 * 8 * len(chosen) * ctx  # the tokens, and their positions in the split
    if needed > of_machine():
        raise UserError(
            f"{len(chosen) * ctx:,} tokens need {needed / 1e9:,.1f} GB, more than this machine has: set n_tokens="
        )
    return rows, chosen


def _run_of(model: Any) -> Run:
    """Return the run that a model was loaded from, or the run in a folder.

    Raises:
        UserError: if there is no such run.
    """
    wanted = "give a model from soluscope.load, or the folder of one of a study's runs"
    folder: Path | None = getattr(model, "run_dir", None)
    if isinstance(model, str | Path):
        folder = Path(model).expanduser()
        if (folder / "data.json").is_file():
            raise UserError(
                f"{folder} is a study, whose runs may differ in ctx: give the folder of one run"
            )
    if folder is None:
        facts = getattr(model, "facts", None)
        name = (
            f"{facts.run} was loaded from no study"
            if facts
            else f"model is of type {type(model).__name__}"
        )
        raise UserError(f"{name}: {wanted}")
    run = Run(folder)
    run.check_links()
    return run
