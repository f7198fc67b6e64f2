"""A run's loss at each token of the report split, with its gain and its code, for comparisons between arms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch.nn.functional as F

from soluscope.config import EvalConfig
from soluscope.data import streams
from soluscope.data.cache import TokenCache
from soluscope.hooked.activations import HookedRun, observe_blocks
from soluscope.hooked.convert import SoluscopeTransformer

MOST_TOKENS = 2**16
"""Most tokens of a run whose losses are stored, about 1 MB."""
INTEGERS = ("document", "pos", "token")
NUMBERS = ("loss", "log_gain", "k_eff")


def token_losses(
    model: SoluscopeTransformer, cache: TokenCache, config: EvalConfig
) -> pd.DataFrame:
    """Return the loss at each token of the report split that has a target, in reading order.

    Up to `MOST_TOKENS` tokens, these are the targets whose mean loss is reported.

    Returns:
        Columns `document`, the number of the target's document in the split; `pos`, the token's position in its
        row; `token`; `loss` of the target in nats; `log_gain` of the mid norm; and `k_eff` = |a|^2 / max(a)^2.
        The last three are fp32.
    """
    n_tokens = min(config.n_loss_tokens, MOST_TOKENS)
    stream = streams.from_cache(cache, "report", model.facts.ctx, n_tokens, "report")
    tables = [_of_block(block) for block in observe_blocks(model, stream)]
    return pd.concat(tables, ignore_index=True)


def _of_block(block: HookedRun) -> pd.DataFrame:
    """Return the table of some whole rows."""
    columns = {
        "document": F.pad(block.string[1:], (0, 1)),  # of the next token, which is the target
        "pos": block.pos, "token": block.tokens, "loss": block.loss,
        "log_gain": block.gain.double().log(), "k_eff": block.k_eff,
    }  # fmt: skip
    has_target = block.target >= 0
    values = {name: column[has_target].numpy(force=True) for name, column in columns.items()}
    dtypes = dict.fromkeys(INTEGERS, np.int32) | dict.fromkeys(NUMBERS, np.float32)
    return pd.DataFrame({name: values[name].astype(dtype) for name, dtype in dtypes.items()})
