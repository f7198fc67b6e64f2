"""A refit of the readout of the MLP's hidden layer, with everything before it and after it held.

The MLP adds F W + b to the residual stream. F holds the normalised activations of a token: one gain for all tokens,
or its own gain, times its centred activations. gamma and beta are parts of W and b. With ln_final's scale held at
its value in the unchanged model the logits are linear in W and b, so the loss is convex in them. With ln_final live
it is not convex, and the fit is a local minimum that begins at the model's own readout.

The fit minimises the mean loss plus penalty times the mean square of the change of F W, taken neuron by neuron, as
a share of the same square of F W. The penalty is chosen on other documents than those of the fit.

Source: protocol.md section 7, P7.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from soluscope.hooked.ablation.readout import FinalNorm, centre_resid
from soluscope.hooked.activations import HookedRun, Readout

PENALTIES = tuple(10.0**power for power in range(2, -7, -1))
"""Penalties in the order in which they are tried; each fit begins at the one before.

A change of F W by its own size costs `penalty` nats."""
MAX_STEPS = 100
"""Largest number of steps of L-BFGS for each penalty."""
TOLERANCE = 1e-6
"""Change of the loss in one step, in nats, at which a fit ends; likewise the largest entry of the gradient."""
NUMBERS_AT_ONCE = 2**24
"""Largest number of logits that are computed at once."""


class Weights(NamedTuple):
    """A readout of the normalised activations."""

    W: Float[Tensor, "d_mlp d_model"]
    b: Float[Tensor, " d_model"]


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of a text that have a target and are not BOS, as a readout sees them."""

    features: Float[Tensor, "token d_mlp"]
    """Normalised activations: gain times centred activations."""
    resid_mid: Float[Tensor, "token d_model"]
    scale: Float[Tensor, "token 1"] | None
    """ln_final's scale; None: it is recomputed from the edited residual stream."""
    target: Int[Tensor, " token"]
    out: Readout
    """The unchanged readout; only what follows the residual stream is used."""

    def part(self, tokens: Tensor) -> Text:
        """Return the text of some of its tokens, a mask or indices."""
        return replace(
            self, features=self.features[tokens], resid_mid=self.resid_mid[tokens],
            scale=None if self.scale is None else self.scale[tokens], target=self.target[tokens],
        )  # fmt: skip

    def losses(self, weights: Weights) -> Float[Tensor, " token"]:
        """Return each token's loss with another readout, in nats."""
        out = self.out
        resid = self.resid_mid + self.features @ weights.W + weights.b
        if out.ln_centred:
            resid = resid - resid.mean(-1, keepdim=True)
        scale = self.scale
        if scale is None:
            scale = (resid.square().mean(-1, keepdim=True) + out.ln_eps).sqrt()
        logits = (resid / scale * out.ln_w + out.ln_b) @ out.W_U + out.b_U
        return F.cross_entropy(logits, self.target, reduction="none")

    def blocks(self) -> list[Text]:
        """Return the text in parts whose logits fit into memory."""
        n = max(1, NUMBERS_AT_ONCE // self.out.W_U.shape[1])
        return [self.part(t) for t in torch.arange(len(self.target)).split(n)]

    @torch.no_grad()
    def all_losses(self, weights: Weights) -> Float[Tensor, " token"]:
        """Return the same losses in fp64, computed block by block."""
        return torch.cat([block.losses(weights).double() for block in self.blocks()])


@dataclass(frozen=True)
class Refit:
    """The readout with the lowest loss on the choosing documents, of the fits with each penalty."""

    weights: Weights
    penalty: float | None
    """None: no fit lowered the loss on the choosing documents, so the readout is the model's own."""
    converged: bool
    """False if the fit ended at `MAX_STEPS`."""


def text_of(run: HookedRun, gain: float | None, final_norm: FinalNorm) -> Text:
    """Return a text with one gain for all tokens, or with per-token gains if `gain` is None.

    Args:
        run: activations of the unchanged model.
        gain: the gain of all tokens.
        final_norm: `frozen` holds ln_final's scale at its value in the unchanged model.
    """
    some = run.subset(run.scored)
    gains = some.gain[:, None].double() if gain is None else gain
    resid = centre_resid(some, some.resid_mid + some.post @ some.readout.W_out + some.readout.b_out)
    scale = (resid.square().mean(-1, keepdim=True) + some.readout.ln_eps).sqrt()
    features = (gains * some.centred).to(run.post.dtype)
    held = scale if final_norm == "frozen" else None
    return Text(features, some.resid_mid, held, some.target, some.readout)


def own_weights(out: Readout) -> Weights:
    """Return the model's own readout of its normalised activations."""
    return Weights(out.gamma[:, None] * out.W_out, out.b_out + out.beta @ out.W_out)


def refit(fitted: Text, choosing: Text) -> Refit:
    """Return the readout that lowers the loss of `fitted` most, with the penalty that suits `choosing` best.

    The penalties are tried from the largest on, until one raises the loss on `choosing`.
    """
    search = _Search(fitted)
    best = Refit(own_weights(fitted.out), None, True)
    lowest = float(choosing.all_losses(best.weights).mean())
    for penalty in PENALTIES:
        converged = search.minimise(penalty)
        loss = float(choosing.all_losses(search.weights).mean())
        if loss >= lowest:
            break
        best, lowest = Refit(search.weights, penalty, converged), loss
    return best


class _Search:
    """L-BFGS over the change of the readout, in units in which the penalty is its squared norm.

    W = W_0 + size V / rms and b = b_0 + size v. rms holds each neuron's root mean square in F, and size^2 is the
    mean square of F W_0, neuron by neuron. So neurons of very different heights are equally well conditioned.
    """

    def __init__(self, text: Text) -> None:
        self.blocks, self.n = text.blocks(), len(text.target)
        self.start = own_weights(text.out)
        rms = text.features.double().square().mean(0).sqrt()
        size = float((rms[:, None] * self.start.W.double()).norm()) or 1.0
        dtype = self.start.W.dtype
        self.per_neuron = torch.where(rms > 0, size / rms, 0.0).to(dtype)[:, None]
        self.size = size
        self.change = Weights(*(torch.zeros_like(each) for each in self.start))
        for each in self.change:
            each.requires_grad_(True)

    @property
    def weights(self) -> Weights:
        """Return the readout that the search has reached."""
        with torch.no_grad():
            return self._weights()

    def _weights(self) -> Weights:
        change, start = self.change, self.start
        return Weights(start.W + self.per_neuron * change.W, start.b + self.size * change.b)

    def minimise(self, penalty: float) -> bool:
        """Continue to the minimum with this penalty. Return False if the search ended before."""
        optimizer = torch.optim.LBFGS(
            [*self.change], max_iter=MAX_STEPS, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=TOLERANCE, tolerance_change=TOLERANCE,
        )  # fmt: skip

        def objective() -> Tensor:
            optimizer.zero_grad()
            total = penalty * torch.stack([each.square().sum() for each in self.change]).sum()
            total.backward()
            total = total.detach().double()
            for block in self.blocks:
                loss = block.losses(self._weights()).sum() / self.n
                loss.backward()
                total += loss.detach().double()
            return total

        optimizer.step(objective)
        state = optimizer.state[self.change.W]
        return int(state["n_iter"]) < MAX_STEPS
