"""Logits from the residual stream, in blocks of tokens that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from soluscope.hooked.activations import HookedRun

FinalNorm = Literal["live", "frozen"]
"""Treatment of ln_final after an edit: `live` recomputes its scale, `frozen` keeps the scale from before."""

FINAL_NORMS: dict[FinalNorm, str] = {"live": "", "frozen": ", final norm frozen"}
"""Suffix of a quantity's name for each treatment of ln_final."""

Stage = Literal["pre", "mid", "post"]
"""Activation of the MLP that an edit sets."""

TOKENS_AT_ONCE = 512

NUMBERS_AT_ONCE = 2**26
"""Largest size of a block of tokens: its vocabulary-length vectors, counted in numbers."""

TILE = {"cpu": 2**18, "cuda": 2**26}
"""Number of edited logits computed at once: on a CPU they stay in the cores' caches."""


def tile_size(like: Tensor) -> int:
    """Return how many edited logits are computed at once on the device of `like`."""
    return TILE.get(like.device.type, TILE["cpu"])


def n_that_fit(n_numbers: int) -> int:
    """Return how many arrays of `n_numbers` numbers each may be held at once."""
    return max(1, NUMBERS_AT_ONCE // n_numbers)


def token_blocks(ids: Tensor, run: HookedRun, n_vectors: int) -> Iterator[Tensor]:
    """Yield tokens in blocks, given that each token needs `n_vectors` vectors over the vocabulary."""
    fitting = n_that_fit(n_vectors * run.readout.W_U.shape[1])
    yield from ids.split(min(TOKENS_AT_ONCE, fitting))


def resid_of(
    run: HookedRun, ids: Tensor, post: Float[Tensor, "token d_mlp"]
) -> Float[Tensor, "t d_model"]:
    """Return R of the tokens `ids`, with hook_post replaced by `post`."""
    out = run.readout
    return centre_resid(run, run.resid_mid[ids] + post[ids] @ out.W_out + out.b_out)


def centre_resid(run: HookedRun, resid: Float[Tensor, "*place d_model"]) -> Tensor:
    return resid - resid.mean(-1, keepdim=True) if run.readout.ln_centred else resid


def unembed(run: HookedRun, resid: Float[Tensor, "*place d_model"]) -> Tensor:
    return (resid * run.readout.ln_w) @ run.readout.W_U


def output_bias(run: HookedRun) -> Float[Tensor, " d_vocab"]:
    return run.readout.ln_b @ run.readout.W_U + run.readout.b_U


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, target[..., None]).squeeze(-1)
