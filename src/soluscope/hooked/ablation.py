"""Exact closed forms: what the loss would be under an edit of the MLP, without running the model again.

An edit of a token's hidden layer moves that token's residual stream, and through the last MLP
nothing else: every (token, neuron) is a problem of its own. In a model of one layer this is all that
the edit does. In a deeper one it is all that an edit of the last MLP does, and a HookedRun holds no
other; edits of earlier layers need hooks.

R is the residual stream that enters ln_final, centred if ln_final centres, and S its scale; with
U = diag(ln_final.w) W_U the logits are l = b + R U / S. An edit adds to R some of a few vectors V_r of
the token and some of the neuron's own row W_j of W_out, so that S becomes S' and

    delta_v = l'_v - l_v = sum_r u_r E_rv + w B_jv,   E_r = V_r U / S (V_0 = R),   B_j = W_j U,

and the loss changes by log E_p[e^delta] - delta_target, p being the model's own distribution. Edits
differ in the numbers u and w alone: one kernel evaluates them all, one enclosure bounds them all.
What softmax does not see is taken away: from B its mean over the vocabulary, from E its mean under p.

Numbers a pair are fp64; what is as long as the vocabulary has the run's dtype. In fp32 the rounding of
exponentials leaves an evaluated change off by about 1e-7 nats, whatever its size. Intervals are
narrower than that for small changes, so that a tolerance makes these both faster and closer.

Source: science.md section 8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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

CANCELS = 8
"""How much longer the parts of an edit may be than what they sum to. Without a neuron that held nearly
all of a token, the softmax and the norm blow up what little is left: the parts nearly cancel, and
such a pair, if any one of a token, is run through the norm and the unembedding anew."""

ROUNDING = 8
"""Slack of the enclosure in units of the dtype's epsilon, per nat that an edit can move a logit."""


# --- any edit, one a token ------------------------------------------------------------------------


@torch.no_grad()
def loss_at_gain(
    run: HookedRun, gains: Float[Tensor, "token edit"], final_norm: FinalNorm = "live"
) -> Float[Tensor, "token edit"]:
    """Each token's loss if the mid norm had multiplied by `gains` instead of its own gain.

    post = gain * (centred * gamma) + beta, whether or not the norm centres, so what W_out writes
    splits into a static part and one that is proportional to the gain: R' = r0 + (gain / own gain) o.
    Two vectors over the vocabulary a token then give the loss at any gain.

    Args:
        run: activations of a model whose mid norm is of that form, or has none (own gain 1).
        gains: one or more gains a token, above 0.
        final_norm: what ln_final does.

    Returns:
        Nats, nan where the token has no target.

    Source: science.md section 8.4; tests hold it to brute-force hooks.
    """
    out, bias = run.readout, _bias(run)
    losses = torch.full_like(gains, torch.nan)
    with_target = (run.target >= 0).nonzero().squeeze(-1)
    n_at_once = max(1, _tile_size(gains) // (gains.shape[1] * len(bias)))
    for block in _blocks(with_target, run, 8):
        alpha = gains[block] / run.gain[block, None]  # [token edit]
        r0 = _centred(run, run.resid_mid[block] + out.b_out + out.beta @ out.W_out)
        o = _centred(run, (run.post[block] - out.beta) @ out.W_out)
        square = (
            r0.square().mean(-1, keepdim=True)
            + 2 * alpha * (r0 * o).mean(-1, keepdim=True)
            + alpha.square() * o.square().mean(-1, keepdim=True)
        )  # [token edit]
        if final_norm == "frozen":
            square = (r0 + o).square().mean(-1, keepdim=True).expand_as(alpha)
        scale = (square + out.ln_eps).sqrt()
        A0, Ao = _unembed(run, r0), _unembed(run, o)  # [token d_vocab]
        weights = torch.stack([1 / scale, alpha / scale, torch.ones_like(scale)], dim=-1)
        vectors = torch.stack([A0, Ao, bias.expand_as(A0)], dim=1)
        target = run.target[block, None].expand_as(alpha)
        parts = (part.split(n_at_once) for part in (weights, vectors, target))
        losses[block] = torch.cat(
            [_cross_entropy(w @ v, y) for w, v, y in zip(*parts, strict=True)]
        )
    return losses


@torch.no_grad()
def loss_at_post(
    run: HookedRun, post: Float[Tensor, "token d_mlp"], final_norm: FinalNorm = "live"
) -> Float[Tensor, " token"]:
    """Each token's loss if hook_post had been `post`: any set of neurons at once, edited in any way.

    Args:
        run: activations of the model's last MLP.
        post: what replaces run.post. Zeros remove all that the neurons write; b_out stays.
        final_norm: what ln_final does.

    Returns:
        Nats, nan where the token has no target.

    Source: science.md section 8.2, at one unembedding a token.
    """
    bias = _bias(run)
    losses = torch.full_like(post[:, 0], torch.nan)
    for block in _blocks((run.target >= 0).nonzero().squeeze(-1), run, 4):
        resid = _resid(run, block, post)
        own = resid if final_norm == "live" else _resid(run, block, run.post)
        scale = (own.square().mean(-1, keepdim=True) + run.readout.ln_eps).sqrt()
        losses[block] = _cross_entropy(bias + _unembed(run, resid) / scale, run.target[block])
    return losses


@torch.no_grad()
def disjoint_mean(run: HookedRun, stage: Stage) -> Float[Tensor, "token d_mlp"]:
    """Mean activations for mean ablation: over all strings but the token's own, BOS left out.

    A mean over the token's own string too would put back some of what is ablated.

    Returns:
        One row a token, equal within a string; nan where there is no other string.

    Source: science.md section 8.7.
    """
    values: Tensor = getattr(run, stage)
    _, owner = run.string.unique(return_inverse=True)
    content = (~run.is_bos).nonzero().squeeze(-1)
    counts = torch.bincount(owner[content], minlength=int(owner.max()) + 1)[:, None]
    sums = values.new_zeros(len(counts), values.shape[1], dtype=torch.float64)
    for block in content.split(TOKENS_AT_ONCE):
        sums.index_add_(0, owner[block], values[block].double())
    others = (sums.sum(0) - sums) / (counts.sum() - counts)  # 0 / 0 is nan
    return others.to(values.dtype)[owner]


# --- one neuron at one token, for all pairs -------------------------------------------------------


class Bounds(NamedTuple):
    """What is known of each pair's change of loss before it is evaluated; nats."""

    first: Float[Tensor, "t neuron"]
    """E_p[delta] - delta_target: the change to first order in delta, of an edit of any size."""
    second: Float[Tensor, "t neuron"]
    """Var_p[delta]: first + second / 2 is the change to second order."""
    low: Float[Tensor, "t neuron"]
    high: Float[Tensor, "t neuron"]
    """low <= change <= high, infinite where the pair has to be run anew."""


class Pairs(NamedTuple):
    """Pairs that a query found, the largest |change| first."""

    token: Int[Tensor, " pair"]
    neuron: Int[Tensor, " pair"]
    change: Float[Tensor, " pair"]
    """Nats."""
    error: Float[Tensor, " pair"]
    """How far `change` may be off: 0 where the pair was evaluated, else half its interval."""
    n_evaluated: int
    """How many pairs the bounds left open."""
    n_pairs: int
    """How many there are."""


class _Neurons(NamedTuple):
    """What each neuron writes. W is W_out as ln_final centres it."""

    ids: Int[Tensor, " neuron"]
    gamma: Float[Tensor, " neuron"]
    W: Float[Tensor, "neuron d_model"]
    square: Float[Tensor, " neuron"]
    """|W|^2, fp64."""
    B: Float[Tensor, "neuron d_vocab"]
    highest: Float[Tensor, " neuron"]
    """max of B over the vocabulary."""
    lowest: Float[Tensor, " neuron"]


class _Tokens(NamedTuple):
    """Some tokens as they are, before any edit."""

    ids: Int[Tensor, " t"]
    target: Int[Tensor, " t"]
    scale: Float[Tensor, "t 1"]
    """S, fp64."""
    V: Float[Tensor, "t vector d_model"]
    """R; for edits before the mid norm also what it writes, and what it writes for its mean."""
    E: Float[Tensor, "t vector d_vocab"]
    """Less its mean under p."""
    p: Float[Tensor, "t d_vocab"]
    log_p: Float[Tensor, "t d_vocab"]


class _Moments(NamedTuple):
    """What all edits of some tokens and neurons share; fp64."""

    mean_B: Float[Tensor, "t neuron"]
    """E_p[B]; that of E is 0."""
    target_B: Float[Tensor, "t neuron"]
    target_E: Float[Tensor, "t vector"]
    """E at the target; meaningless where there is none."""
    highest_E: Float[Tensor, "t vector"]
    lowest_E: Float[Tensor, "t vector"]


class _Second(NamedTuple):
    """Covariances under p, which bounds need besides; fp64."""

    EE: Float[Tensor, "t vector vector"]
    EB: Float[Tensor, "t neuron vector"]
    BB: Float[Tensor, "t neuron"]


class _Edit(NamedTuple):
    """delta = u E + w B for each pair, and what follows from it at once; fp64."""

    stage: Stage
    values: Float[Tensor, "t neuron"]
    u: Float[Tensor, "t neuron vector"]
    w: Float[Tensor, "t neuron"]
    mean: Float[Tensor, "t neuron"]
    """E_p[delta]."""
    target: Float[Tensor, "t neuron"]
    """delta at the target."""
    up: Float[Tensor, "t neuron"]
    """No entry of delta is further above its mean than this."""
    down: Float[Tensor, "t neuron"]
    """Nor further below."""
    cancels: Bool[Tensor, "t neuron"]
    """Whether all of this has lost its digits; see CANCELS."""


class Ablation:
    """Edits of one neuron at one token, for all (token, neuron) pairs of a run.

    Every method takes `tokens`, indices into the run's tokens, and gives one row for each; nan where a
    token has no target. `values` are what the neuron is set to: one number, one a neuron, or one a
    pair ([t neuron]), the neurons being those asked for (`neurons`; by default all). Beside the result
    nothing grows with the number of tokens. W_out U is held, d_mlp * d_vocab numbers.

    Args:
        run: activations of a model's last MLP, on any device.
        final_norm: what ln_final does after an edit.
    """

    @torch.no_grad()
    def __init__(self, run: HookedRun, final_norm: FinalNorm = "live") -> None:
        self.run, self.final_norm = run, final_norm
        out = run.readout
        W = _centred(run, out.W_out)
        B = _unembed(run, W)
        B -= B.mean(-1, keepdim=True)
        self._neurons = _Neurons(
            ids=torch.arange(len(W), device=W.device), gamma=out.gamma, W=W,
            square=W.double().square().sum(-1), B=B, highest=B.amax(-1), lowest=B.amin(-1),
        )  # fmt: skip
        self._bias, self._mean_unembedding = _bias(run), out.W_U.mean(-1)
        # What W_out writes when the mid norm's mean rises by one: the centring's share of an edit.
        self._of_mean = -(out.gamma @ W) / len(W) if run.centres else torch.zeros_like(W[0])

    @torch.no_grad()
    def post(
        self,
        tokens: Int[Tensor, " t"],
        values: float | Tensor = 0.0,
        tolerance: float | None = None,
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "t neuron"]:
        """Change of loss, in nats, when one neuron's hook_post is set to `values`.

        Args:
            tokens: which tokens.
            values: what it is set to. 0 takes away all that the neuron writes; where the mid norm has
                a bias, readout.beta takes away what depends on the token and leaves the bias.
            tolerance: None evaluates every pair over the whole vocabulary. Given nats, a pair whose
                interval (`bounds`) is no wider than twice that gets its middle.
            neurons: which neurons.

        Source: science.md section 8.2.
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
        """The same for hook_mid: the norm's mean and gain follow, and with them all neurons.

        Without a mid norm, mid is post. Source: science.md section 8.5.
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
        """The same for hook_pre: in SoLU the softmax over neurons follows too.

        Any nonlinearity but SoLU must act on each neuron alone. Source: science.md section 8.6.
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
        """Change of loss when hook_post is another token's, averaged over `n_draws` of these.

        They are drawn from the tokens of all other strings, BOS left out: one for each token and draw,
        for all neurons alike. A token's draws do not depend on which others are asked for.

        Returns:
            Nats; nan without a target, and where there is no other string.

        Source: science.md section 8.7.
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
        """The first two cumulants of each pair, and an interval that holds its change of loss.

        With delta no further than `up` above and `down` below its mean under p, and the increasing
        phi(x) = (e^x - 1 - x) / x^2:

            log(1 + phi(-down) second) <= change - first <= log(1 + phi(up) second).

        The interval is widened by the rounding of the sums that it is made of, so that it holds the
        exact change in fp32 too. Its ends are infinite where an edit's parts cancel (see CANCELS).

        Source: science.md section 8.3, with the two sides of delta kept apart.
        """
        chosen = self._chosen(neurons)
        parts = []
        for block, moments, edit in self._edits(kind, tokens, values, chosen):
            bounds = _enclosure(edit, self._second(block, chosen, moments), self.run.post.dtype)
            parts.append(Bounds(*(part.where(_has_target(block), torch.nan) for part in bounds)))
        return Bounds(*(self._joined([part[i] for part in parts], chosen) for i in range(4)))

    @torch.no_grad()
    def top(self, tokens: Int[Tensor, " t"], k: int, values: float | Tensor = 0.0) -> Pairs:
        """The k pairs whose |change| under `post` is largest, each evaluated.

        After the bounds, pairs are evaluated from the highest upper bound down, until the next cannot
        reach the k-th largest found.
        """
        if k < 1:
            raise ValueError(f"top: k={k}, and 1 pair is the least to ask for")
        row, neuron, low, high = self._candidates(tokens, values, k=k)
        reach = torch.maximum(low.abs(), high.abs())
        order = reach.argsort(descending=True, stable=True)
        found = low.new_empty(0)
        for part in order.split(max(k, 256)):
            if len(found) >= k and reach[part[0]] < found.abs().topk(k).values[-1]:
                break
            found = torch.cat([found, self._at(tokens, values, row[part], neuron[part])])
        best = found.abs().argsort(descending=True, stable=True)[:k]
        chosen = order[best]
        change, error = found[best], torch.zeros_like(found[best])
        return self._pairs(tokens, row[chosen], neuron[chosen], change, error, len(found))

    @torch.no_grad()
    def above(
        self, tokens: Int[Tensor, " t"], threshold: float, values: float | Tensor = 0.0
    ) -> Pairs:
        """All pairs whose |change| under `post` is larger than `threshold`, in nats.

        Pairs whose interval leaves that open are evaluated; of the others, `change` is the middle of
        the interval and `error` half of it.
        """
        row, neuron, low, high = self._candidates(tokens, values, threshold=threshold)
        change, error = (low + high) / 2, (high - low) / 2
        is_open = (_least(low, high) <= threshold) | ~error.isfinite()
        at = is_open.nonzero().squeeze(-1)
        change[at], error[at] = self._at(tokens, values, row[at], neuron[at]), 0.0
        order = change.abs().argsort(descending=True, stable=True)
        order = order[change[order].abs() > threshold]
        return self._pairs(tokens, row[order], neuron[order], change[order], error[order], len(at))

    @torch.no_grad()
    def gradient(self, tokens: Int[Tensor, " t"]) -> Float[Tensor, "t neuron"]:
        """d loss / d hook_post, in nats per unit of post: attribution patching's first order.

        Source: science.md section 8.3 (the first cumulant, linear in the edit); tests hold it to autograd.
        """
        n, parts = self._neurons, []
        for block in self._blocks("post", tokens):
            moments = self._moments(block, n)
            slope = (moments.mean_B - moments.target_B) / block.scale
            if self.final_norm == "live":
                along = (block.V[:, 0] @ n.W.T).double() / n.W.shape[1]  # S dS / d post
                slope += along / block.scale.square() * moments.target_E
            parts.append(slope.where(_has_target(block), torch.nan))
        return self._joined(parts, n)

    @torch.no_grad()
    def entropy(
        self,
        tokens: Int[Tensor, " t"],
        values: float | Tensor = 0.0,
        neurons: Int[Tensor, " neuron"] | None = None,
    ) -> Float[Tensor, "t neuron"]:
        """Change of the output distribution's entropy, in nats, when one neuron's hook_post is set.

        Tokens without a target have it too. What an entropy neuron does through ln_final's scale
        alone is this with `final_norm` live less the same with it frozen.
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
        """Change of the target's logit, less the mean over the vocabulary's, when hook_post is set."""
        parts = []
        for block, _, edit in self._edits("post", tokens, values, self._neurons):
            mean = (edit.u @ block.E.mean(-1).double()[..., None]).squeeze(-1)  # B's is 0
            parts.append((edit.target - mean).where(_has_target(block), torch.nan))
        return self._joined(parts, self._neurons)

    # --- edits ------------------------------------------------------------------------------------

    def _blocks(self, kind: Stage, tokens: Tensor) -> Iterator[_Tokens]:
        run, out = self.run, self.run.readout
        for ids in _blocks(tokens, run, 8):
            R = _resid(run, ids, run.post)
            V = R[:, None]
            if kind != "post":
                o = _centred(run, (run.post[ids] - out.beta) @ out.W_out)
                V = torch.stack([R, o, self._of_mean.expand_as(R)], dim=1)
            scale = (R.double().square().mean(-1, keepdim=True) + out.ln_eps).sqrt()
            E = _unembed(run, V) / scale[..., None].to(R)
            logits = self._bias + E[:, 0]
            p, log_p = logits.softmax(-1), logits.log_softmax(-1)
            E -= E.mean(-1, keepdim=True)
            E -= E @ p[..., None]
            yield _Tokens(ids, run.target[ids], scale, V, E, p, log_p)

    def _moments(self, block: _Tokens, neurons: _Neurons) -> _Moments:
        target = block.target.clamp_min(0)
        target_E = block.E.gather(-1, target[:, None, None].expand(*block.E.shape[:2], 1))
        return _Moments(
            mean_B=self._sum_B(block.p, neurons, self._mean_unembedding),
            target_B=neurons.B[:, target].T.double(), target_E=target_E.squeeze(-1).double(),
            highest_E=block.E.amax(-1).double(), lowest_E=block.E.amin(-1).double(),
        )  # fmt: skip

    def _sum_B(self, weight: Tensor, neurons: _Neurons, less: Tensor | float = 0.0) -> Tensor:
        """sum_v weight_v B_jv by way of the residual stream, which has fewer dimensions. [... neuron]

        `less` is what centring B over the vocabulary takes away: the unembedding's mean where weights
        sum to one, nothing where they sum to zero.
        """
        out = self.run.readout
        return (((weight @ out.W_U.T - less) * out.ln_w) @ neurons.W.T).double()

    def _second(self, block: _Tokens, neurons: _Neurons, moments: _Moments) -> _Second:
        weighted = block.p[:, None] * block.E
        rows_at_once = max(1, NUMBERS_AT_ONCE // (8 * block.p.shape[1]))
        squares = [block.p @ rows.square().T for rows in neurons.B.split(rows_at_once)]
        return _Second(
            EE=(weighted @ block.E.transpose(1, 2)).double(),
            EB=self._sum_B(weighted, neurons).transpose(1, 2),
            BB=(torch.cat(squares, dim=1).double() - moments.mean_B.square()).clamp_min(0),
        )

    def _edits(
        self, kind: Stage, tokens: Tensor, values: float | Tensor, neurons: _Neurons
    ) -> Iterator[tuple[_Tokens, _Moments, _Edit]]:
        given = torch.as_tensor(values, device=tokens.device)
        shape = (len(tokens), len(neurons.ids))
        if given.shape not in ((), shape[1:], shape):
            raise ValueError(
                f"values have the shape {tuple(given.shape)}: give one number, one for each of the "
                f"{shape[1]} neurons, or one a pair, {shape}"
            )
        gain = self.run.gain
        if kind != "post" and self.run.eps is None and gain.max() > 1.001 * gain.min():
            raise ValueError(
                f"{kind}: the mid norm's gain varies, and the run has no epsilon to say how: edits of "
                "hook_post are exact, these need a LayerNorm, an RMSNorm or one constant"
            )
        given, done = given.expand(shape), 0
        for block in self._blocks(kind, tokens):
            some = given[done : done + len(block.ids)].double()
            done += len(block.ids)
            moments = self._moments(block, neurons)
            yield block, moments, self._edit(kind, block, neurons, moments, some)

    def _edit(
        self, kind: Stage, block: _Tokens, neurons: _Neurons, moments: _Moments, values: Tensor
    ) -> _Edit:
        """What setting each neuron to `values` adds to R: c_r of each V_r, and `own` of W_j."""
        if kind == "post":
            own = values - self.run.post[block.ids][:, neurons.ids].double()
            c = own[..., None].new_zeros(*own.shape, 1)
        else:
            factor, step = self._through_norm(kind, block.ids, neurons, values)
            own = step * neurons.gamma.double()
            c = torch.stack([torch.zeros_like(step), factor - 1, step], dim=-1)
        d_model, scale = neurons.W.shape[1], block.scale
        gram = (block.V @ block.V.transpose(1, 2)).double()
        VW = (block.V @ neurons.W.T).double().transpose(1, 2)  # [t neuron vector]
        added = (
            2 * (c @ gram[:, :, :1]).squeeze(-1)
            + ((c @ gram) * c).sum(-1)
            + 2 * own * (VW[..., 0] + (VW * c).sum(-1))
            + own.square() * neurons.square
        ) / d_model  # to |R|^2 / d_model
        square = scale.square() + added
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt()[..., None]
        parts = (c.abs() @ lengths).squeeze(-1) + own.abs() * neurons.square.sqrt()
        cancels = ~(parts.square() <= CANCELS**2 * d_model * square) & values.isfinite()
        after = square.clamp_min(self.run.readout.ln_eps).sqrt()
        if self.final_norm == "frozen":
            added, after = torch.zeros_like(added), scale.expand_as(added)
        u = c * (scale / after)[..., None]
        u[..., 0] = -added / (after * (scale + after))  # S / S' - 1
        w = own / after
        ends_E = [u * end[:, None] for end in (moments.highest_E, moments.lowest_E)]
        ends_B = [w * (end - moments.mean_B) for end in (neurons.highest, neurons.lowest)]
        return _Edit(
            kind, values, u, w, mean=w * moments.mean_B,
            target=(u * moments.target_E[:, None]).sum(-1) + w * moments.target_B,
            up=torch.maximum(*ends_E).sum(-1) + torch.maximum(*ends_B),
            down=-torch.minimum(*ends_E).sum(-1) - torch.minimum(*ends_B), cancels=cancels,
        )  # fmt: skip

    def _through_norm(
        self, kind: Stage, ids: Tensor, neurons: _Neurons, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How an edit before the mid norm reaches post: `factor` and `step`, each [t neuron].

        post'_i - beta_i = factor * (post_i - beta_i) + gamma_i * step * (1 if i is the neuron j, else
        0; less 1 / d_mlp if the norm centres). In SoLU, setting x_j to c multiplies all activations by
        k = Z / Z', and a_j is set to c e^c / Z before that.
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

    def _run_anew(
        self, block: _Tokens, neurons: _Neurons, edit: _Edit, t: Tensor, j: Tensor
    ) -> Float[Tensor, "pair d_vocab"]:
        """Log-probabilities after the edit at some pairs of the block, from the edited stage on."""
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
        R = _centred(run, run.resid_mid[ids] + edited @ out.W_out.double() + out.b_out)
        scale = block.scale[t]
        if self.final_norm == "live":
            scale = (R.square().mean(-1, keepdim=True) + out.ln_eps).sqrt()
        return (self._bias + _unembed(run, (R / scale).to(block.E))).log_softmax(-1)

    # --- the vocabulary ---------------------------------------------------------------------------

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
        block: _Tokens,
        neurons: _Neurons,
        second: _Second | None,
        edit: _Edit,
        tolerance: float | None,
    ) -> Tensor:
        where, change = _has_target(block).expand_as(edit.w), torch.full_like(edit.w, torch.nan)
        if second is not None and tolerance is not None:
            bounds = _enclosure(edit, second, block.E.dtype)
            decided = where & (bounds.high - bounds.low <= 2 * tolerance)
            change = ((bounds.low + bounds.high) / 2).where(decided, change)
            where = where & ~decided
        return self._evaluate(block, neurons, edit, where).where(where, change)

    def _evaluate(
        self,
        block: _Tokens,
        neurons: _Neurons,
        edit: _Edit,
        where: Bool[Tensor, "t neuron"],
        of: Literal["loss", "entropy"] = "loss",
    ) -> Tensor:
        """Change of loss (or entropy) over the whole vocabulary at the pairs `where`, fp64."""
        u, w, mean = (part.to(block.E) for part in (edit.u, edit.w, edit.mean))
        # Beyond this e^delta, or a probability that it multiplies, may leave the dtype's range.
        furthest = 0.5 * math.log(torch.finfo(u.dtype).max)
        anew = where & (edit.cancels | (edit.up + edit.mean.abs() > furthest))
        entropy = -(block.p * block.log_p).sum(-1, keepdim=True)
        surprise = block.log_p + entropy
        measure = _loss_sums if of == "loss" else _entropy_sums
        sums = edit.w.new_zeros(1 if of == "loss" else 3, *edit.w.shape)
        size, d_vocab = _tile_size(u), block.p.shape[1]
        space = u.new_empty(max(size, d_vocab))
        for tokens, rows, columns in _tiles(where & ~anew, d_vocab, size):
            B = neurons.B[rows, columns]
            delta = space[: B.numel()].view_as(B)
            by_pair = (
                part[tokens][:, rows].unbind() for part in (u, w[..., None], mean[..., None])
            )
            by_entry = (
                part[tokens, ..., columns].unbind() for part in (block.E, block.p, surprise)
            )
            found_sums = []
            for u_t, w_t, mean_t, E_t, p_t, surprise_t in zip(*by_pair, *by_entry, strict=True):
                torch.mm(u_t, E_t, out=delta).addcmul_(w_t, B)
                found_sums.append(measure(delta, mean_t, p_t, surprise_t))
            sums[:, tokens, rows] += torch.stack(found_sums, dim=1)
        if of == "loss":
            found = sums[0].log() - edit.target
        else:
            found = sums[0].log1p() - (sums[1] + sums[2]) / (1 + sums[0])
        for pairs in anew.nonzero().split(max(1, size // d_vocab)):
            t, j = pairs.T
            after, before = self._run_anew(block, neurons, edit, t, j), block.log_p[t]
            if of == "loss":
                change = (before - after).gather(-1, block.target[t, None]).squeeze(-1)
            else:
                change = (before.exp() * before - after.exp() * after).sum(-1)
            found[t, j] = change.double()
        return found

    # --- queries ----------------------------------------------------------------------------------

    def _candidates(
        self, tokens: Tensor, values: float | Tensor, *, k: int = 0, threshold: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, neuron, low and high of the pairs that may be among the k largest, or above a threshold."""
        floor = torch.full((k,), -torch.inf, dtype=torch.float64, device=tokens.device)
        none = tokens.new_empty(0)
        parts, done = [(none, none, floor[:0], floor[:0])], 0
        for block, moments, edit in self._edits("post", tokens, values, self._neurons):
            second = self._second(block, self._neurons, moments)
            bounds = _enclosure(edit, second, block.E.dtype)
            low, high = (part.where(_has_target(block), torch.nan) for part in bounds[2:])
            reach = torch.maximum(low.abs(), high.abs())
            if threshold is None:
                least = _least(low, high).flatten().nan_to_num(nan=-torch.inf)
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
        """Change of loss at some pairs, given by row of `tokens` and neuron; fp64."""
        rows, place = row.unique(return_inverse=True)
        given = torch.as_tensor(values)
        found = torch.empty(len(row), dtype=torch.float64, device=row.device)
        done = 0
        for block, _, edit in self._edits(
            "post", tokens[rows], given[rows] if given.dim() == 2 else given, self._neurons
        ):
            here = ((place >= done) & (place < done + len(block.ids))).nonzero().squeeze(-1)
            at = place[here] - done, neuron[here]
            where = torch.zeros_like(edit.w, dtype=torch.bool)
            where[at] = True
            found[here] = self._evaluate(block, self._neurons, edit, where)[at]
            done += len(block.ids)
        return found

    def _pairs(
        self,
        tokens: Tensor,
        row: Tensor,
        neuron: Tensor,
        change: Tensor,
        error: Tensor,
        n_evaluated: int,
    ) -> Pairs:
        n_pairs = int((self.run.target[tokens] >= 0).sum()) * len(self._neurons.ids)
        return Pairs(tokens[row], neuron, change, error, n_evaluated, n_pairs)

    def _chosen(self, neurons: Tensor | None) -> _Neurons:
        if neurons is None:
            return self._neurons
        return _Neurons(*(part[neurons] for part in self._neurons))

    def _joined(self, parts: list[Tensor], neurons: _Neurons) -> Tensor:
        """Blocks as one tensor of the run's dtype, with a column a neuron where there is no block."""
        none = self.run.post.new_empty(0, len(neurons.ids))
        return torch.cat([none, *(part.to(none.dtype) for part in parts)])


# --- functions of the above -----------------------------------------------------------------------


def _enclosure(edit: _Edit, second: _Second, dtype: torch.dtype) -> Bounds:
    variance = (
        ((edit.u @ second.EE) * edit.u).sum(-1)
        + 2 * edit.w * (edit.u * second.EB).sum(-1)
        + edit.w.square() * second.BB
    )
    width = edit.up + edit.down
    slack = ROUNDING * torch.finfo(dtype).eps * width
    first = edit.mean - edit.target
    most = (_phi(edit.up) * (variance + slack * width)).log1p().minimum(edit.up)
    least = (_phi(-edit.down) * (variance - slack * width).clamp_min(0)).log1p()
    low = (first + least - slack).masked_fill(edit.cancels, -torch.inf)
    high = (first + most + slack).masked_fill(edit.cancels, torch.inf)
    return Bounds(first, variance, low, high)


def _phi(x: Tensor) -> Tensor:
    """(e^x - 1 - x) / x^2, 1/2 at 0."""
    series = 1 / 2 + x / 6 + x.square() / 24
    return torch.where(x.abs() < 1e-4, series, (x.expm1() - x) / x.square())


def _least(low: Tensor, high: Tensor) -> Tensor:
    """The smallest absolute value in an interval."""
    return torch.maximum(low, -high).clamp_min(0)


def _tokens_of_others(run: HookedRun, n_draws: int, seed: int) -> Int[Tensor, "token draw"]:
    """For each token, tokens drawn evenly from all other strings without BOS; -1 if there are none."""
    _, owner = run.string.unique(return_inverse=True)
    content = (~run.is_bos).nonzero().squeeze(-1)
    content = content[owner[content].argsort(stable=True)]  # by string
    counts = torch.bincount(owner[content], minlength=int(owner.max()) + 1)
    own, before = counts[owner, None], (counts.cumsum(0) - counts)[owner, None]
    n_others = len(content) - own
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(owner), n_draws, dtype=torch.float64, generator=generator).to(own.device)
    place = (draws * n_others).long()
    place += own * (place >= before)  # past the token's own string
    return content[place.clamp_max(len(content) - 1)].where(n_others > 0, -1)


def _has_target(block: _Tokens) -> Bool[Tensor, "t 1"]:
    return (block.target >= 0)[:, None]


def _tiles(
    where: Bool[Tensor, "t neuron"], d_vocab: int, size: int
) -> Iterator[tuple[slice, slice | Tensor, slice]]:
    """Tokens, neurons and part of the vocabulary; of the last two no more than `size` pairs, or one row.

    Where most pairs are wanted, all are given, and rows and columns of B stay in the cache while they
    are used for all tokens. Else each token has its own neurons.
    """
    n_tokens, n_neurons = where.shape
    if where.count_nonzero() > 0.5 * where.numel():
        width = min(d_vocab, max(1, size // 64))
        height = max(1, size // width)
        for left in range(0, d_vocab, width):
            for top in range(0, n_neurons, height):
                yield slice(None), slice(top, top + height), slice(left, left + width)
    else:
        for t in range(n_tokens):
            for rows in where[t].nonzero().squeeze(-1).split(max(1, size // d_vocab)):
                if len(rows):
                    yield slice(t, t + 1), rows, slice(None)


def _loss_sums(delta: Tensor, mean: Tensor, p: Tensor, surprise: Tensor) -> Tensor:
    """Sum of p e^delta over these entries for each row; `delta` is overwritten. [1 row]"""
    return (delta.exp_() @ p)[None]


def _entropy_sums(delta: Tensor, mean: Tensor, p: Tensor, surprise: Tensor) -> Tensor:
    """Sums of p, p (log p + entropy) and p (delta - mean), each times e^(delta - mean) - 1. [3 row]"""
    delta -= mean
    growth = delta.expm1()
    return torch.stack([growth @ p, growth @ (p * surprise), (growth * delta) @ p])


def _tile_size(like: Tensor) -> int:
    return TILE.get(like.device.type, TILE["cpu"])


def _blocks(ids: Tensor, run: HookedRun, n_vectors: int) -> Iterator[Tensor]:
    """Tokens in blocks that hold `n_vectors` vectors over the vocabulary each."""
    fitting = NUMBERS_AT_ONCE // (n_vectors * run.readout.W_U.shape[1])
    yield from ids.split(max(1, min(TOKENS_AT_ONCE, fitting)))


def _resid(
    run: HookedRun, ids: Tensor, post: Float[Tensor, "token d_mlp"]
) -> Float[Tensor, "t d_model"]:
    """R of the tokens `ids`, if hook_post were `post`."""
    out = run.readout
    return _centred(run, run.resid_mid[ids] + post[ids] @ out.W_out + out.b_out)


def _centred(run: HookedRun, resid: Float[Tensor, "*place d_model"]) -> Tensor:
    return resid - resid.mean(-1, keepdim=True) if run.readout.ln_centred else resid


def _unembed(run: HookedRun, resid: Float[Tensor, "*place d_model"]) -> Tensor:
    return (resid * run.readout.ln_w) @ run.readout.W_U


def _bias(run: HookedRun) -> Float[Tensor, " d_vocab"]:
    return run.readout.ln_b @ run.readout.W_U + run.readout.b_U


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, target[..., None]).squeeze(-1)
