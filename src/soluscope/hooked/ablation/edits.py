"""Edits of one neuron at one token as additions to the residual stream, for all pairs at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from soluscope.hooked.ablation.readout import (
    FinalNorm,
    Stage,
    centre_resid,
    n_that_fit,
    output_bias,
    resid_of,
    token_blocks,
    unembed,
)
from soluscope.hooked.activations import HookedRun

CANCELS = 8
"""Largest ratio of the summed lengths of an edit's parts to the length of the edited residual stream.
Without a neuron that held nearly all of a token, the softmax and the norm amplify the small remainder, and
the parts of the edit nearly cancel. Such a pair is recomputed through the norm and the unembedding."""


class Neurons(NamedTuple):
    """Output weights of the neurons. W is W_out, centred if ln_final centres."""

    ids: Int[Tensor, " neuron"]
    gamma: Float[Tensor, " neuron"]
    W: Float[Tensor, "neuron d_model"]
    square: Float[Tensor, " neuron"]
    """|W|^2, fp64."""
    B: Float[Tensor, "neuron d_vocab"]
    highest: Float[Tensor, " neuron"]
    """Maximum of B over the vocabulary."""
    lowest: Float[Tensor, " neuron"]


class Tokens(NamedTuple):
    """A block of tokens, before any edit."""

    ids: Int[Tensor, " t"]
    target: Int[Tensor, " t"]
    scale: Float[Tensor, "t 1"]
    """S, fp64."""
    V: Float[Tensor, "t vector d_model"]
    """R; for edits before the mid norm also the part of R that scales with the gain, and the change of R per
    unit of the norm's mean."""
    E: Float[Tensor, "t vector d_vocab"]
    """V U / S, minus its mean under p."""
    p: Float[Tensor, "t d_vocab"]
    log_p: Float[Tensor, "t d_vocab"]


class Moments(NamedTuple):
    """Quantities shared by all edits of some tokens and neurons; fp64."""

    mean_B: Float[Tensor, "t neuron"]
    """E_p[B]; E_p[E] is 0."""
    target_B: Float[Tensor, "t neuron"]
    target_E: Float[Tensor, "t vector"]
    """E at the target; meaningless without a target."""
    highest_E: Float[Tensor, "t vector"]
    lowest_E: Float[Tensor, "t vector"]


class Second(NamedTuple):
    """Covariances under p, which the bounds need too; fp64."""

    EE: Float[Tensor, "t vector vector"]
    EB: Float[Tensor, "t neuron vector"]
    BB: Float[Tensor, "t neuron"]


class Edit(NamedTuple):
    """The numbers u and w of delta = u E + w B for each pair, and quantities derived from them; fp64."""

    stage: Stage
    values: Float[Tensor, "t neuron"]
    u: Float[Tensor, "t neuron vector"]
    w: Float[Tensor, "t neuron"]
    mean: Float[Tensor, "t neuron"]
    """E_p[delta]."""
    target: Float[Tensor, "t neuron"]
    """delta at the target."""
    up: Float[Tensor, "t neuron"]
    """Upper bound on delta minus its mean, over the vocabulary."""
    down: Float[Tensor, "t neuron"]
    """Upper bound on delta's mean minus delta, over the vocabulary."""
    cancels: Bool[Tensor, "t neuron"]
    """True if the numbers above have lost their precision; see CANCELS."""


class Edits:
    """Edits of one neuron at one token: the numbers u and w of each pair, and quantities derived from them.

    Args:
        run: activations of a model's last MLP, on any device.
        final_norm: treatment of ln_final after an edit.
    """

    @torch.no_grad()
    def __init__(self, run: HookedRun, final_norm: FinalNorm = "live") -> None:
        self.run, self.final_norm = run, final_norm
        out = run.readout
        W = centre_resid(run, out.W_out)
        B = unembed(run, W)
        B -= B.mean(-1, keepdim=True)
        self._neurons = Neurons(
            ids=torch.arange(len(W), device=W.device), gamma=out.gamma, W=W,
            square=W.double().square().sum(-1), B=B, highest=B.amax(-1), lowest=B.amin(-1),
        )  # fmt: skip
        self._bias, self._mean_unembedding = output_bias(run), out.W_U.mean(-1)
        # Change of R when the mean that the mid norm subtracts rises by one: the effect of centring.
        self._of_mean = -(out.gamma @ W) / len(W) if run.centres else torch.zeros_like(W[0])

    def _blocks(self, kind: Stage, tokens: Tensor) -> Iterator[Tokens]:
        run, out = self.run, self.run.readout
        for ids in token_blocks(tokens, run, 8):
            R = resid_of(run, ids, run.post)
            V = R[:, None]
            if kind != "post":
                o = centre_resid(run, (run.post[ids] - out.beta) @ out.W_out)
                V = torch.stack([R, o, self._of_mean.expand_as(R)], dim=1)
            scale = (R.double().square().mean(-1, keepdim=True) + out.ln_eps).sqrt()
            E = unembed(run, V) / scale[..., None].to(R)
            logits = self._bias + E[:, 0]
            p, log_p = logits.softmax(-1), logits.log_softmax(-1)
            E -= E.mean(-1, keepdim=True)
            E -= E @ p[..., None]
            yield Tokens(ids, run.target[ids], scale, V, E, p, log_p)

    def _moments(self, block: Tokens, neurons: Neurons) -> Moments:
        target = block.target.clamp_min(0)
        target_E = block.E.gather(-1, target[:, None, None].expand(*block.E.shape[:2], 1))
        return Moments(
            mean_B=self._sum_B(block.p, neurons, self._mean_unembedding),
            target_B=neurons.B[:, target].T.double(), target_E=target_E.squeeze(-1).double(),
            highest_E=block.E.amax(-1).double(), lowest_E=block.E.amin(-1).double(),
        )  # fmt: skip

    def _sum_B(self, weight: Tensor, neurons: Neurons, less: Tensor | float = 0.0) -> Tensor:
        """Return sum_v weight_v B_jv, [... neuron], through the residual stream, which has fewer dimensions.

        `less` corrects for the centring of B over the vocabulary: the unembedding's mean if the weights
        sum to one, 0 if they sum to zero.
        """
        out = self.run.readout
        return (((weight @ out.W_U.T - less) * out.ln_w) @ neurons.W.T).double()

    def _second(self, block: Tokens, neurons: Neurons, moments: Moments) -> Second:
        weighted = block.p[:, None] * block.E
        n_rows = n_that_fit(8 * block.p.shape[1])
        squares = [block.p @ rows.square().T for rows in neurons.B.split(n_rows)]
        return Second(
            EE=(weighted @ block.E.transpose(1, 2)).double(),
            EB=self._sum_B(weighted, neurons).transpose(1, 2),
            BB=(torch.cat(squares, dim=1).double() - moments.mean_B.square()).clamp_min(0),
        )

    def _edits(
        self, kind: Stage, tokens: Tensor, values: float | Tensor, neurons: Neurons
    ) -> Iterator[tuple[Tokens, Moments, Edit]]:
        given = torch.as_tensor(values, device=tokens.device)
        shape = (len(tokens), len(neurons.ids))
        if given.shape not in ((), shape[1:], shape):
            raise ValueError(
                f"values have the shape {tuple(given.shape)}: give a scalar, one value for each of the "
                f"{shape[1]} neurons, or one value for each pair, {shape}"
            )
        gain = self.run.gain
        if kind != "post" and gain.isnan().any():
            raise ValueError(
                f"{kind}: a token has several scales, so the closed form does not hold: edit hook_post"
            )
        is_bos = self.run.is_bos  # BOS may have another constant
        varies = any(
            len(part) and part.max() > 1.001 * part.min() for part in (gain[is_bos], gain[~is_bos])
        )
        if kind != "post" and self.run.eps is None and varies:
            raise ValueError(
                f"{kind}: the mid norm's gain varies, but the run has no epsilon to recompute it from: edit "
                "hook_post, or use a LayerNorm, an RMSNorm or a constant gain"
            )
        given, done = given.expand(shape), 0
        for block in self._blocks(kind, tokens):
            some = given[done : done + len(block.ids)].double()
            done += len(block.ids)
            moments = self._moments(block, neurons)
            yield block, moments, self._edit(kind, block, neurons, moments, some)

    def _edit(
        self, kind: Stage, block: Tokens, neurons: Neurons, moments: Moments, values: Tensor
    ) -> Edit:
        """Return the edit that sets each neuron to `values`: it adds c_r V_r for each r, and c_W W_j, to R."""
        if kind == "post":
            c_W = values - self.run.post[block.ids][:, neurons.ids].double()
            c = c_W[..., None].new_zeros(*c_W.shape, 1)
        else:
            factor, step = self._through_norm(kind, block.ids, neurons, values)
            c_W = step * neurons.gamma.double()
            c = torch.stack([torch.zeros_like(step), factor - 1, step], dim=-1)
        d_model, scale = neurons.W.shape[1], block.scale
        gram = (block.V @ block.V.transpose(1, 2)).double()
        VW = (block.V @ neurons.W.T).double().transpose(1, 2)  # [t neuron vector]
        added = (
            2 * (c @ gram[:, :, :1]).squeeze(-1)
            + ((c @ gram) * c).sum(-1)
            + 2 * c_W * (VW[..., 0] + (VW * c).sum(-1))
            + c_W.square() * neurons.square
        ) / d_model  # added to |R|^2 / d_model
        square = scale.square() + added
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt()[..., None]
        parts = (c.abs() @ lengths).squeeze(-1) + c_W.abs() * neurons.square.sqrt()
        cancels = ~(parts.square() <= CANCELS**2 * d_model * square) & values.isfinite()
        after = square.clamp_min(self.run.readout.ln_eps).sqrt()
        if self.final_norm == "frozen":
            added, after = torch.zeros_like(added), scale.expand_as(added)
        u = c * (scale / after)[..., None]
        u[..., 0] = -added / (after * (scale + after))  # S / S' - 1
        w = c_W / after
        bounds_E = [u * bound[:, None] for bound in (moments.highest_E, moments.lowest_E)]
        bounds_B = [w * (bound - moments.mean_B) for bound in (neurons.highest, neurons.lowest)]
        return Edit(
            kind, values, u, w, mean=w * moments.mean_B,
            target=(u * moments.target_E[:, None]).sum(-1) + w * moments.target_B,
            up=torch.maximum(*bounds_E).sum(-1) + torch.maximum(*bounds_B),
            down=-torch.minimum(*bounds_E).sum(-1) - torch.minimum(*bounds_B), cancels=cancels,
        )  # fmt: skip

    def _through_norm(
        self, kind: Stage, ids: Tensor, neurons: Neurons, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return how an edit before the mid norm changes post: `factor` and `step`, each [t neuron].

        post'_i - beta_i = factor * (post_i - beta_i) + gamma_i * step * (1 if i is the neuron j, else
        0; minus 1 / d_mlp if the norm centres). In SoLU, setting x_j to c first sets a_j to c e^c / Z, and
        then multiplies all activations by k = Z / Z'.
        """
        run, k = self.run, torch.ones_like(values)
        if kind == "pre" and run.is_solu:
            pre = run.pre[ids].double()
            log_z = pre.logsumexp(-1, keepdim=True)
            weight = (values - log_z).exp()  # e^c / Z
            k = 1 / (1 - (pre[:, neurons.ids] - log_z).exp() + weight)
            values = values * weight
        elif kind == "pre":
            values = run.mlp.nonlinearity(values)
        mid = run.mid[ids].double()
        change = values - mid[:, neurons.ids]
        gain, factor = run.gain[ids, None].double(), k
        if run.eps is not None:
            n = mid.shape[1]
            if run.centres:
                mid = mid - mid.mean(-1, keepdim=True)
            square = mid.square().mean(-1, keepdim=True)
            share = 1 - 1 / n if run.centres else 1.0
            moved = change * (2 * mid[:, neurons.ids] + share * change) / n
            after = k.square() * (square + moved).clamp_min(0)
            gain = (square + run.eps).rsqrt()
            factor = k * ((square + run.eps) / (after + run.eps)).sqrt()
        return factor, gain * factor * change

    def _recompute(
        self, block: Tokens, neurons: Neurons, edit: Edit, t: Tensor, j: Tensor
    ) -> Float[Tensor, "pair d_vocab"]:
        """Return log-probabilities after the edit at some pairs, recomputed from the edited stage on."""
        run, out, ids = self.run, self.run.readout, block.ids[t]
        stage: Tensor = getattr(run, edit.stage)
        edited = stage[ids].double().scatter(-1, neurons.ids[j, None], edit.values[t, j, None])
        if edit.stage == "pre":
            edited = edited * edited.softmax(-1) if run.is_solu else run.mlp.nonlinearity(edited)
        if edit.stage != "post":
            if run.centres:
                edited = edited - edited.mean(-1, keepdim=True)
            gain = run.gain[ids, None]
            if run.eps is not None:
                gain = (edited.square().mean(-1, keepdim=True) + run.eps).rsqrt()
            edited = gain * edited * out.gamma + out.beta
        R = centre_resid(run, run.resid_mid[ids] + edited @ out.W_out.double() + out.b_out)
        scale = block.scale[t]
        if self.final_norm == "live":
            scale = (R.square().mean(-1, keepdim=True) + out.ln_eps).sqrt()
        return (self._bias + unembed(run, (R / scale).to(block.E))).log_softmax(-1)

    def _chosen(self, neurons: Tensor | None) -> Neurons:
        if neurons is None:
            return self._neurons
        return Neurons(*(part[neurons] for part in self._neurons))


def has_target(block: Tokens) -> Bool[Tensor, "t 1"]:
    return (block.target >= 0)[:, None]
