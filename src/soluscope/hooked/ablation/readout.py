"""From the residual stream to logits, in blocks of tokens that fit into memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from soluscope.hooked.activations import HookedRun

FinalNorm = Literal["live", "frozen"]
"""Whether ln_final rescales after the edit, or keeps the scale it had without it."""

FINAL_NORMS: dict[FinalNorm, str] = {"live": "", "frozen": ", final norm frozen"}
"""What a probe adds to a quantity's name for each way to treat ln_final."""

Stage = Literal["pre", "mid", "post"]
"""Which of the MLP's activations an edit sets."""

TOKENS_AT_ONCE = 512

NUMBERS_AT_ONCE = 2**26
"""What a block of tokens may hold over the vocabulary, in numbers."""

TILE = {"cpu": 2**18, "cuda": 2**26}
"""Edited logits made at once, in numbers: on a CPU they stay in the cores' caches."""


def tile_size(like: Tensor) -> int:
    """Return how many edited logits are made at once on the device of `like`."""
    return TILE.get(like.device.type, TILE["cpu"])


def n_that_fit(n_numbers: int) -> int:
    """Return how many things of `n_numbers` numbers each may be held at once."""
    return max(1, NUMBERS_AT_ONCE // n_numbers)


def token_blocks(ids: Tensor, run: HookedRun, n_vectors: int) -> Iterator[Tensor]:
    """Tokens in blocks that hold `n_vectors` vectors over the vocabulary each."""
    fitting = n_that_fit(n_vectors * run.readout.W_U.shape[1])
    yield from ids.split(min(TOKENS_AT_ONCE, fitting))


def resid_of(
    run: HookedRun, ids: Tensor, post: Float[Tensor, "token d_mlp"]
) -> Float[Tensor, "t d_model"]:
    """R of the tokens `ids`, if hook_post were `post`."""
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
