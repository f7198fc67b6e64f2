"""Changes of loss for all (token, neuron) pairs: evaluated over the vocabulary, bounded or queried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from soluscope.hooked.ablation.bounds import Bounds, enclosure, least_size
from soluscope.hooked.ablation.edits import (
    Edit,
    Edits,
    Neurons,
    Second,
    Tokens,
    has_target,
)
from soluscope.hooked.ablation.readout import Stage, tile_size
from soluscope.hooked.activations import HookedRun


class Changes(NamedTuple):
    """Changes returned by a query, in descending order of |change|."""

    token: Int[Tensor, " pair"]
    neuron: Int[Tensor, " pair"]
    change: Float[Tensor, " pair"]
    """Nats."""
    error: Float[Tensor, " pair"]
    """Largest possible error of `change`: 0 for an evaluated pair, else half the width of its interval."""
    n_evaluated: int
    """Number of evaluated pairs, which the bounds did not decide."""
    n_pairs: int
    """Number of all pairs of a neuron and a token with a target."""


class Ablation(Edits):
    """Edits of one neuron at one token, for all (token, neuron) pairs of a run.

    Every method takes `tokens`, indices into the run's tokens, and returns one row per token. Changes of
    loss and of the target's logit are nan for a token without a target. `values` is the new activation of
    the neuron: a scalar, one value per neuron, or one value per pair ([t neuron]). Columns are the neurons
    in `neurons`, by default all. Apart from the result, memory does not grow with the number of tokens.
    W_out U stays in memory: d_mlp * d_vocab numbers.

    Args:
        run: activations of a model's last MLP, on any device.
        final_norm: treatment of ln_final after an edit.
    """

    @torch.no_grad()
    def post(
        self,
        tokens: Int[Tensor, " t"],
        values: float | Tensor = 0.0,
        tolerance: float | None = None,
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "t neuron"]:
        """Return the change of loss, in nats, when one neuron's hook_post is set to `values`.

        Args:
            tokens: indices of the tokens.
            values: new activation. 0 removes the neuron's whole output. If the mid norm has a bias,
                readout.beta removes the part that depends on the token and keeps the bias.
            tolerance: largest error, in nats. A pair gets the midpoint of its interval (`bounds`) if the
                interval is no wider than twice the tolerance. None evaluates every pair over the whole
                vocabulary.
            neurons: indices of the neurons; all by default.

        Source: protocol.md section 8.2.
        """
        return self._change("post", tokens, values, tolerance, neurons)

    @torch.no_grad()
    def mid(
        self,
        tokens: Int[Tensor, " t"],
        values: float | Tensor = 0.0,
        tolerance: float | None = None,
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "t neuron"]:
        """Return the same for hook_mid: the norm's mean and gain change too, and with them all neurons.

        Without a mid norm, mid is post. Source: protocol.md section 8.5.
        """
        return self._change("mid", tokens, values, tolerance, neurons)

    @torch.no_grad()
    def pre(
        self,
        tokens: Int[Tensor, " t"],
        values: float | Tensor = 0.0,
        tolerance: float | None = None,
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "t neuron"]:
        """Return the same for hook_pre: in SoLU the softmax over neurons changes too.

        Any nonlinearity except SoLU must act on each neuron separately. Source: protocol.md section 8.6.
        """
        return self._change("pre", tokens, values, tolerance, neurons)

    @torch.no_grad()
    def resample(
        self,
        tokens: Int[Tensor, " t"],
        n_draws: int,
        seed: int,
        tolerance: float | None = None,
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "t neuron"]:
        """Return the change of loss when hook_post is another token's, averaged over `n_draws` draws.

        The other tokens are drawn from all other strings, without BOS: one per token and draw, the same
        for all neurons. A token's draws do not depend on the rest of `tokens`.

        Returns:
            Nats; nan for a token without a target, and nan if there is no other string.

        Source: protocol.md section 8.7.
        """
        chosen = self._chosen(neurons)
        sources = _tokens_of_others(self.run, n_draws, seed)
        parts = []
        for block in self._blocks("post", tokens):
            moments = self._moments(block, chosen)
            second = None if tolerance is None else self._second(block, chosen, moments)
            total = torch.zeros_like(moments.mean_B)
            for draw in sources[block.ids].T:
                values = self.run.post[draw.clamp_min(0)][:, chosen.ids].double()
                values = values.masked_fill((draw < 0)[:, None], torch.nan)
                edit = self._edit("post", block, chosen, moments, values)
                total += self._change_of(block, chosen, second, edit, tolerance)
            parts.append(total / n_draws)
        return self._joined(parts, chosen)

    @torch.no_grad()
    def bounds(
        self,
        tokens: Int[Tensor, " t"],
        values: float | Tensor = 0.0,
        kind: Stage = "post",
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Bounds:
        """Return the first two cumulants of each pair, and an interval that contains its change of loss.

        With delta at most `up` above and `down` below its mean under p, and with the increasing function
        phi(x) = (e^x - 1 - x) / x^2:

            log(1 + phi(-down) second) <= change - first <= log(1 + phi(up) second).

        The interval is widened by the rounding error of its sums, so that it contains the exact change in
        fp32 too. Its bounds are infinite if an edit's parts cancel (see CANCELS).

        Source: protocol.md section 8.3, with separate limits above and below delta's mean.
        """
        chosen = self._chosen(neurons)
        parts = []
        for block, moments, edit in self._edits(kind, tokens, values, chosen):
            bounds = enclosure(edit, self._second(block, chosen, moments), self.run.post.dtype)
            parts.append(Bounds(*(part.where(has_target(block), torch.nan) for part in bounds)))
        return Bounds(*(self._joined([part[i] for part in parts], chosen) for i in range(4)))

    @torch.no_grad()
    def top(self, tokens: Int[Tensor, " t"], k: int, values: float | Tensor = 0.0) -> Changes:
        """Return the k pairs with the largest |change| under `post`, each evaluated.

        Pairs are evaluated in descending order of their upper bound on |change|, until that bound is below
        the k-th largest evaluated |change|.
        """
        if k < 1:
            raise ValueError(f"top: k={k}, wanted at least 1")
        row, neuron, low, high = self._candidates(tokens, values, k=k)
        reach = torch.maximum(low.abs(), high.abs())
        order = reach.argsort(descending=True, stable=True)
        evaluated = low.new_empty(0)
        for part in order.split(max(k, 256)):
            if len(evaluated) >= k and reach[part[0]] < evaluated.abs().topk(k).values[-1]:
                break
            evaluated = torch.cat([evaluated, self._at(tokens, values, row[part], neuron[part])])
        best = evaluated.abs().argsort(descending=True, stable=True)[:k]
        chosen = order[best]
        change, error = evaluated[best], torch.zeros_like(evaluated[best])
        return self._pairs(tokens, row[chosen], neuron[chosen], change, error, len(evaluated))

    @torch.no_grad()
    def above(
        self, tokens: Int[Tensor, " t"], threshold: float, values: float | Tensor = 0.0
    ) -> Changes:
        """Return all pairs whose |change| under `post` is larger than `threshold`, in nats.

        A pair is evaluated if its interval does not decide this. For any other pair, `change` is the
        midpoint of the interval and `error` is half its width.
        """
        row, neuron, low, high = self._candidates(tokens, values, threshold=threshold)
        change, error = (low + high) / 2, (high - low) / 2
        is_open = (least_size(low, high) <= threshold) | ~error.isfinite()
        at = is_open.nonzero().squeeze(-1)
        change[at], error[at] = self._at(tokens, values, row[at], neuron[at]), 0.0
        order = change.abs().argsort(descending=True, stable=True)
        order = order[change[order].abs() > threshold]
        return self._pairs(tokens, row[order], neuron[order], change[order], error[order], len(at))

    @torch.no_grad()
    def gradient(self, tokens: Int[Tensor, " t"]) -> Float[Tensor, "t neuron"]:
        """Return d loss / d hook_post, in nats per unit of post: attribution patching's first order.

        Source: protocol.md section 8.3 (the first cumulant, linearised in the edit). Tests compare it with
        autograd.
        """
        n, parts = self._neurons, []
        for block in self._blocks("post", tokens):
            moments = self._moments(block, n)
            slope = (moments.mean_B - moments.target_B) / block.scale
            if self.final_norm == "live":
                along = (block.V[:, 0] @ n.W.T).double() / n.W.shape[1]  # S dS / d post
                slope += along / block.scale.square() * moments.target_E
            parts.append(slope.where(has_target(block), torch.nan))
        return self._joined(parts, n)

    @torch.no_grad()
    def entropy(
        self,
        tokens: Int[Tensor, " t"],
        values: float | Tensor = 0.0,
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "t neuron"]:
        """Return the change of the output distribution's entropy, in nats, when one neuron's hook_post is set.

        Tokens without a target get a value too. To isolate the effect of an entropy neuron through
        ln_final's scale, subtract the change with `final_norm` frozen from the change with it live.
        """
        chosen = self._chosen(neurons)
        parts = [
            self._evaluate(block, chosen, edit, torch.ones_like(edit.w).bool(), "entropy")
            for block, _, edit in self._edits("post", tokens, values, chosen)
        ]
        return self._joined(parts, chosen)

    @torch.no_grad()
    def target_logit(
        self, tokens: Int[Tensor, " t"], values: float | Tensor = 0.0
    ) -> Float[Tensor, "t neuron"]:
        """Return the change of the target's logit minus the mean over the vocabulary, when hook_post is set."""
        parts = []
        for block, _, edit in self._edits("post", tokens, values, self._neurons):
            mean = (edit.u @ block.E.mean(-1).double()[..., None]).squeeze(-1)  # the mean of B is 0
            parts.append((edit.target - mean).where(has_target(block), torch.nan))
        return self._joined(parts, self._neurons)

    def _change(
        self,
        kind: Stage,
        tokens: Tensor,
        values: float | Tensor,
        tolerance: float | None,
        neurons: Tensor | None,
    ) -> Tensor:
        chosen = self._chosen(neurons)
        parts = []
        for block, moments, edit in self._edits(kind, tokens, values, chosen):
            second = None if tolerance is None else self._second(block, chosen, moments)
            parts.append(self._change_of(block, chosen, second, edit, tolerance))
        return self._joined(parts, chosen)

    def _change_of(
        self,
        block: Tokens,
        neurons: Neurons,
        second: Second | None,
        edit: Edit,
        tolerance: float | None,
    ) -> Tensor:
        where, change = has_target(block).expand_as(edit.w), torch.full_like(edit.w, torch.nan)
        if second is not None and tolerance is not None:
            bounds = enclosure(edit, second, block.E.dtype)
            decided = where & (bounds.high - bounds.low <= 2 * tolerance)
            change = ((bounds.low + bounds.high) / 2).where(decided, change)
            where = where & ~decided
        return self._evaluate(block, neurons, edit, where).where(where, change)

    def _evaluate(
        self,
        block: Tokens,
        neurons: Neurons,
        edit: Edit,
        where: Bool[Tensor, "t neuron"],
        of: Literal["loss", "entropy"] = "loss",
    ) -> Tensor:
        """Return the change of loss (or entropy) over the whole vocabulary at the pairs `where`, fp64."""
        u, w, mean = (part.to(block.E) for part in (edit.u, edit.w, edit.mean))
        # Above this limit, e^delta or a probability that it multiplies may leave the dtype's range.
        furthest = 0.5 * math.log(torch.finfo(u.dtype).max)
        recomputed = where & (edit.cancels | (edit.up + edit.mean.abs() > furthest))
        entropy = -(block.p * block.log_p).sum(-1, keepdim=True)
        surprise = block.log_p + entropy
        measure = _loss_sums if of == "loss" else _entropy_sums
        sums = edit.w.new_zeros(1 if of == "loss" else 3, *edit.w.shape)
        size, d_vocab = tile_size(u), block.p.shape[1]
        space = u.new_empty(max(size, d_vocab))
        for tokens, rows, columns in _tiles(where & ~recomputed, d_vocab, size):
            B = neurons.B[rows, columns]
            delta = space[: B.numel()].view_as(B)
            by_pair = (
                part[tokens][:, rows].unbind() for part in (u, w[..., None], mean[..., None])
            )
            by_entry = (
                part[tokens, ..., columns].unbind() for part in (block.E, block.p, surprise)
            )
            tile_sums = []
            for u_t, w_t, mean_t, E_t, p_t, surprise_t in zip(*by_pair, *by_entry, strict=True):
                torch.mm(u_t, E_t, out=delta).addcmul_(w_t, B)
                tile_sums.append(measure(delta, mean_t, p_t, surprise_t))
            sums[:, tokens, rows] += torch.stack(tile_sums, dim=1)
        if of == "loss":
            result = sums[0].log() - edit.target
        else:
            result = sums[0].log1p() - (sums[1] + sums[2]) / (1 + sums[0])
        for pairs in recomputed.nonzero().split(max(1, size // d_vocab)):
            t, j = pairs.T
            after, before = self._recompute(block, neurons, edit, t, j), block.log_p[t]
            if of == "loss":
                change = (before - after).gather(-1, block.target[t, None]).squeeze(-1)
            else:
                change = (before.exp() * before - after.exp() * after).sum(-1)
            result[t, j] = change.double()
        return result

    def _candidates(
        self, tokens: Tensor, values: float | Tensor, *, k: int = 0, threshold: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return row, neuron, low and high of the pairs that may be among the k largest, or above a threshold."""
        floor = torch.full((k,), -torch.inf, dtype=torch.float64, device=tokens.device)
        none = tokens.new_empty(0)
        parts, done = [(none, none, floor[:0], floor[:0])], 0
        for block, moments, edit in self._edits("post", tokens, values, self._neurons):
            second = self._second(block, self._neurons, moments)
            bounds = enclosure(edit, second, block.E.dtype)
            low, high = (part.where(has_target(block), torch.nan) for part in bounds[2:])
            reach = torch.maximum(low.abs(), high.abs())
            if threshold is None:
                least = least_size(low, high).flatten().nan_to_num(nan=-torch.inf)
                floor = torch.cat([floor, least]).topk(k).values
            t, j = (reach >= floor[-1] if threshold is None else reach > threshold).nonzero().T
            parts.append((t + done, j, low[t, j], high[t, j]))
            done += len(block.ids)
        row, neuron, low, high = (torch.cat(part) for part in zip(*parts, strict=True))
        if threshold is None:
            kept = torch.maximum(low.abs(), high.abs()) >= floor[-1]
            row, neuron, low, high = (part[kept] for part in (row, neuron, low, high))
        return row, neuron, low, high

    def _at(
        self, tokens: Tensor, values: float | Tensor, row: Tensor, neuron: Tensor
    ) -> Float[Tensor, " pair"]:
        """Return the change of loss at some pairs, given by row of `tokens` and neuron; fp64."""
        rows, index = row.unique(return_inverse=True)
        given = torch.as_tensor(values, device=tokens.device)
        result = torch.empty(len(row), dtype=torch.float64, device=row.device)
        done = 0
        for block, _, edit in self._edits(
            "post", tokens[rows], given[rows] if given.dim() == 2 else given, self._neurons
        ):
            here = ((index >= done) & (index < done + len(block.ids))).nonzero().squeeze(-1)
            at = index[here] - done, neuron[here]
            where = torch.zeros_like(edit.w, dtype=torch.bool)
            where[at] = True
            result[here] = self._evaluate(block, self._neurons, edit, where)[at]
            done += len(block.ids)
        return result

    def _pairs(
        self,
        tokens: Tensor,
        row: Tensor,
        neuron: Tensor,
        change: Tensor,
        error: Tensor,
        n_evaluated: int,
    ) -> Changes:
        n_pairs = int((self.run.target[tokens] >= 0).sum()) * len(self._neurons.ids)
        return Changes(tokens[row], neuron, change, error, n_evaluated, n_pairs)

    def _joined(self, parts: list[Tensor], neurons: Neurons) -> Tensor:
        """Join blocks into one tensor of the run's dtype; without blocks it has 0 rows and all columns."""
        none = self.run.post.new_empty(0, len(neurons.ids))
        return torch.cat([none, *(part.to(none.dtype) for part in parts)])


def _tokens_of_others(run: HookedRun, n_draws: int, seed: int) -> Int[Tensor, "token draw"]:
    """Draw tokens for each token, uniformly from all other strings without BOS; -1 if there are none."""
    _, owner = run.string.unique(return_inverse=True)
    content = (~run.is_bos).nonzero().squeeze(-1)
    content = content[owner[content].argsort(stable=True)]  # sorted by string
    counts = torch.bincount(owner[content], minlength=int(owner.max()) + 1)
    n_own, before = counts[owner, None], (counts.cumsum(0) - counts)[owner, None]
    n_others = len(content) - n_own
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(owner), n_draws, dtype=torch.float64, generator=generator).to(run.device)
    index = (draws * n_others).long()
    index += n_own * (index >= before)  # skip the string of the token itself
    return content[index.clamp_max(len(content) - 1)].where(n_others > 0, -1)


def _tiles(
    where: Bool[Tensor, "t neuron"], d_vocab: int, size: int
) -> Iterator[tuple[slice, slice | Tensor, slice]]:
    """Yield tokens, neurons and part of the vocabulary: at most `size` entries of B per tile, or one row.

    If most pairs are wanted, tiles cover all pairs, and a tile of B stays in the cache while it is used for
    all tokens. Otherwise each token is paired with only its wanted neurons.
    """
    n_neurons = where.shape[1]
    if where.count_nonzero() > 0.5 * where.numel():
        width = min(d_vocab, max(1, size // 64))
        height = max(1, size // width)
        for left in range(0, d_vocab, width):
            for top in range(0, n_neurons, height):
                yield slice(None), slice(top, top + height), slice(left, left + width)
    else:
        wanted = where.nonzero()[:, 1].split(where.sum(-1).tolist())
        for t, neurons in enumerate(wanted):
            for rows in neurons.split(max(1, size // d_vocab)):
                if len(rows):
                    yield slice(t, t + 1), rows, slice(None)


def _loss_sums(delta: Tensor, mean: Tensor, p: Tensor, surprise: Tensor) -> Tensor:
    """Return the sum of p e^delta over these entries for each row, [1 row]; `delta` is overwritten."""
    return (delta.exp_() @ p)[None]


def _entropy_sums(delta: Tensor, mean: Tensor, p: Tensor, surprise: Tensor) -> Tensor:
    """Return sums of p, p (log p + entropy) and p (delta - mean), each times e^(delta - mean) - 1, [3 row].

    `delta` is overwritten.
    """
    delta -= mean
    growth = delta.expm1()
    return torch.stack([growth @ p, growth @ (p * surprise), (growth * delta) @ p])
