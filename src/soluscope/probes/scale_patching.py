"""P6: Scale patching, both directions

A mid norm's output is made of parts: n = g L u, with g the gain, L = |a - m| and u = (a - m) / L the
direction; m, the mean over neurons, is what was taken off. Each part of one prompt is put into the
run of the other, at the position before the answer, all else being the receiver's own. Both ways are
needed: where two things must hold together (AND), putting in one of them (denoising) finds nothing
and taking it away (noising) does; where either of two is enough (OR) it is the reverse.

The 2x2 contrast is over the gain and what it multiplies, the direction with its length, so that two of
its corners are the two runs' own activations. With the length held, a donor's direction would be as long
as no token makes it, and the contrast would measure that.

Question:
    Does the gain carry what tells a prompt from its corruption, on its own or together with the
    direction?

Formula:
    n = g L u;
    m = logit[y+] - logit[y-] before the answer;
    denoise (m - m_cor) / (m_cl - m_cor), noise (m_cl - m) / (m_cl - m_cor);
    each a ratio of sums over rows, sum |m_cl - m_cor| below;
    2x2 contrast m(g', c') - m(g', c) - m(g, c') + m(g, c), c = L u

Reading:
    Smearing predicts that the gain alone moves the logit difference in at least one direction:
    denoising if it is enough, noising if it is needed, both if it is both. The sign is not part of
    it: a receiver that says the opposite says it louder with a higher gain, so in C1
    (`smear_shared`) the shares are far below 0. Without smearing the gain moves nothing either way
    (within .01), and content and direction move all there is. An interaction above 0 says that gain
    and content work together. Where the gain is one constant its shares are exactly 0.

Pitfalls:
    Shares need not lie in [0, 1]: a gain multiplies whatever the receiver says, so patching it may
    overshoot. A pair whose answers the model does not tell apart (|m_clean - m_corrupt| < .5) is
    left out: see how many are left. Which word corrupts matters, so there are five. The residual
    stream before the MLP and attention stay the receiver's, and so even the whole content need not
    move all. L = |a - m| stays too: under a true LayerNorm a patched gain changes the norm of n,
    which no prompt of its own would do. In a tokenizer of code, names are whole words. Prefixes of
    one document count as pairs of their own.

Source:
    science.md section 7 P6; Heimersheim 2023, comments on docstring circuits, for both directions;
    the decomposition is ours
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from soluscope.hooked.ablation import FINAL_NORMS, FinalNorm
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Estimate, Figure, Gate, Measured, Probe, Quantity
from soluscope.probes._estimates import mean_over_strings, ratio
from soluscope.probes._tokens import arrays

N_CORRUPTIONS = 5
LEAST_DIFFERENCE = 0.5
"""Of m_clean - m_corrupt, in logits: below it there is nothing to recover."""

WAYS = {
    "denoise": "the corrupt run with the clean run's",
    "noise": "the clean run with the corrupt run's",
}
COMPONENTS = {
    "gain": "gain alone",
    "direction": "direction of n alone",
    "content": "whole of hook_post",
    "mean": "mean over neurons alone, the gain staying as it was",
}
INTERACTION = "interaction"
FROZEN = FINAL_NORMS["frozen"]
DIFFERENCE = "m_clean - m_corrupt"


def measure(run: HookedRun) -> Measured:
    """Return the share of the logit difference that each part moves, per corruption and over all."""
    tokens = _shares(run)
    return Measured(tokens, tuple(_estimates(run, tokens)))


def _shares(run: HookedRun) -> dict[str, Tensor]:
    """Return the share of the logit difference that each part moves, at each corrupt row's last position but one.

    Args:
        run: rows of equal length in groups of 6, a clean one and then 5 corruptions, each ending with
            its answer: y+ for the clean row, y- for a corrupt one. m = logit[y+] - logit[y-] at the
            position before it.

    Returns:
        m_clean - m_corrupt in logits. Of each way and part (m - m_corrupt) / (m_clean - m_corrupt) for
        denoising and (m_clean - m) / (m_clean - m_corrupt) for noising, m that of the patched run,
        with ln_final's scale live and with that of the receiver's own run; and the contrast
        m(g', c') - m(g', c) - m(g, c') + m(g, c), c = a - m, over the same, primes being the donor's: above 0
        where gain and content work together, below where either is enough. nan at all other tokens, and
        where |m_clean - m_corrupt| < .5.

    Raises:
        ValueError: if the rows are not such groups.
    """
    clean, corrupt = _places(run)
    pairs = {"denoise": (corrupt, clean), "noise": (clean, corrupt)}  # receiver, donor
    answers = run.tokens[clean + 1], run.tokens[corrupt + 1]
    by_way = {way: _Patched(run, *pair, *answers) for way, pair in pairs.items()}
    difference = by_way["noise"].m_of("nothing") - by_way["denoise"].m_of("nothing")
    kept = difference.abs() >= LEAST_DIFFERENCE
    measured = {DIFFERENCE: difference}
    for final_norm, how in FINAL_NORMS.items():
        for way, patched in by_way.items():
            sign = 1 if way == "denoise" else -1
            m = {part: patched.m_of(part, final_norm) / difference for part in patched.n}
            shares = {part: sign * (m[part] - m["nothing"]) for part in COMPONENTS}
            shares[INTERACTION] = m["content"] - m["gain"] - m["centred"] + m["nothing"]
            for part, share in shares.items():
                measured[_row(way, part, how)] = share.where(kept, torch.nan)
    columns = {}
    for name, values in measured.items():
        columns[name] = values.new_full(run.pos.shape, torch.nan)
        columns[name][corrupt] = values
    return columns


def _places(run: HookedRun) -> tuple[Tensor, Tensor]:
    """Index of the position before the answer in the clean and the corrupt row of each corruption."""
    starts = run.is_bos.nonzero().squeeze(-1)
    ends = torch.cat([starts[1:], starts.new_tensor([len(run.pos)])])
    n_rows = len(starts)
    if n_rows % (1 + N_CORRUPTIONS) == 0:
        ends = ends.view(-1, 1 + N_CORRUPTIONS)
        width = ends - starts.view_as(ends)
        string = run.string[starts].view_as(ends)
        if (width == width[:, :1]).all() and (string == string[:, :1]).all() and width.min() > 2:
            clean, corrupt = ends[:, :1].expand(-1, N_CORRUPTIONS), ends[:, 1:]
            return clean.flatten() - 2, corrupt.flatten() - 2
    raise ValueError(
        f"the {n_rows} rows of {run.stream!r} are not pairs of prompts: wanted groups of {1 + N_CORRUPTIONS} "
        "rows of one length and one string, the clean one first; use a stream that begins with 'pairs: '"
    )


class _Patched:
    """The receiver's run with parts of the donor's, row by row, in fp64."""

    def __init__(
        self, run: HookedRun, receiver: Tensor, donor: Tensor, right: Tensor, wrong: Tensor
    ) -> None:
        self.out = run.readout
        self.answers = right, wrong
        self.resid = run.resid_mid[receiver].double() + self.out.b_out
        mid, centred = run.mid.double(), run.centred
        mean = mid.mean(-1, keepdim=True) if run.centres else mid.new_zeros(len(mid), 1)
        length = centred.norm(dim=-1, keepdim=True)
        direction = F.normalize(centred, dim=-1, eps=1e-30)  # activations may be 1e-7
        gain = run.gain.double()[:, None]
        g, L, u, m = ((part[receiver], part[donor]) for part in (gain, length, direction, mean))
        self.n = {  # [row d_mlp]
            "nothing": g[0] * L[0] * u[0],
            "gain": g[1] * L[0] * u[0],
            "direction": g[0] * L[0] * u[1],
            "centred": g[0] * L[1] * u[1],
            "content": g[1] * L[1] * u[1],
            "mean": g[0] * (L[0] * u[0] + m[0] - m[1]),
        }

    def m_of(self, part: str, final_norm: FinalNorm = "live") -> Tensor:
        """logit[right] - logit[wrong] with this part of the donor's. [row]"""
        out, (right, wrong) = self.out, self.answers
        resid = self._resid(part)
        scale_of = resid if final_norm == "live" else self._resid("nothing")
        scale = (scale_of.square().mean(-1, keepdim=True) + out.ln_eps).sqrt()
        seen = resid / scale * out.ln_w + out.ln_b
        U = (out.W_U[:, right] - out.W_U[:, wrong]).double()  # [d_model row]
        return (seen * U.T).sum(-1) + out.b_U[right] - out.b_U[wrong]

    def _resid(self, part: str) -> Tensor:
        """What enters ln_final, centred where it centres. [row d_model]"""
        out = self.out
        resid = self.resid + (self.n[part] * out.gamma + out.beta) @ out.W_out.double()
        return resid - resid.mean(-1, keepdim=True) if out.ln_centred else resid


def _row(way: str, part: str, how: str) -> str:
    return f"by row, {way}: {part}{how}"


def _estimates(run: HookedRun, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Each share over all corruptions: the sum of what was moved over the sum of what there was to move.

    Each row counts by |m_clean - m_corrupt|, so that no ratio blows up, and the sign of a row's
    difference does not matter; a trimmed mean would do the first at the price of an interval that hangs
    on which rows are cut. And the share of pairs of which a corruption is left.
    """
    string, columns = run.string.numpy(), arrays(tokens)
    size = np.abs(columns[DIFFERENCE])
    for way, part, how in _MEANINGS:
        share = columns[_row(way, part, how)]
        if not np.isnan(share).all():
            yield ratio(f"{way}: {part}{how}", share * size, size, string)
    _, pair = np.unique(string, return_inverse=True)
    left = np.bincount(pair, weights=size >= LEAST_DIFFERENCE) > 0
    yield mean_over_strings("pairs left", left, note=f"{left.sum()} of {len(left)} pairs")


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Clean a = (2, -2), corrupt a = (-1, 1): post is (1, -1) and (-1, 1), gains are 1/2 and 1, and m reads
    the first neuron: 1 and -1.

    Denoising: the clean gain halves the corrupt post, m = -1/2, a quarter of the way; the clean direction
    turns it round, m = 1, all of it. Noising: the corrupt gain doubles the clean post, m = 2, half
    of the way back; the corrupt direction turns it round. The contrast is over a - m with either gain:
    (1 - (-1/2) - 2 + (-1)) / 2 = -3/4 denoising, and the same four numbers noising.
    """
    clean, corrupt = [[2.0, -2.0]] * 3, [[-1.0, 1.0]] * 3
    run = planted(torch.tensor([clean] + [corrupt] * N_CORRUPTIONS), eps=1e-14)
    # ln_final's epsilon makes its scale the constant 1e6; right answers are token 0, wrong ones 1.
    unembed = 1e6 / 2 * torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    readout = replace(run.readout, W_out=torch.eye(2).double(), ln_eps=1e12, W_U=unembed)
    run = replace(
        run, readout=readout, resid_mid=torch.zeros_like(run.resid_mid),
        string=torch.zeros_like(run.string), tokens=(torch.arange(18) >= 3).long(),
    )  # fmt: skip
    shares = {"denoise": (0.25, 1, 1, 0, -0.75), "noise": (-0.5, 1, 1, 0, -0.75)}
    answers = {
        _row(way, part, how): value
        for how in FINAL_NORMS.values()
        for way, values in shares.items()
        for part, value in zip((*COMPONENTS, INTERACTION), values, strict=True)
    }
    answers[DIFFERENCE] = 2
    yield run, {name: [nan] * 3 + [nan, x, nan] * N_CORRUPTIONS for name, x in answers.items()}


_MEANINGS = {
    (way, part, how): f"{what}{how}"
    for how in FINAL_NORMS.values()
    for way, source in WAYS.items()
    for part, what in {
        **{
            part: f"share of m_clean - m_corrupt that moves when {source} {meaning} is put in"
            for part, meaning in COMPONENTS.items()
        },
        INTERACTION: f"2x2 contrast of gain and a - m, {source}, over m_clean - m_corrupt",
    }.items()
}

PROBE = Probe(
    __doc__,
    gates=(
        Gate("and_gate", "noise: gain", above=0.5, truth=0.98767, stream="pairs"),
        Gate("and_gate", "denoise: gain", within=0.01, stream="pairs"),
        *(
            Gate("and_gate", f"{way}: interaction", above=0.5, truth=0.98767, stream="pairs")
            for way in WAYS
        ),
        Gate("or_gate", "denoise: gain", above=0.5, truth=0.999, stream="pairs"),
        Gate("or_gate", "noise: gain", within=0.01, stream="pairs"),
        # With ln_final's scale held the logits follow g: 5 u / S with u of 400 for .4, and 20.4 for 420.
        Gate("or_gate", f"denoise: gain{FROZEN}", above=10, truth=20.38, stream="pairs"),
        Gate("or_gate", f"noise: gain{FROZEN}", above=0.5, truth=0.9708, stream="pairs"),
        Gate("and_gate", f"noise: gain{FROZEN}", above=0.5, truth=0.98767, stream="pairs"),
        Gate("and_gate", f"denoise: gain{FROZEN}", within=0.01, stream="pairs"),
        # m is linear in g there: A's at B's gain is 81.13 m_A, B's at A's gain m_B / 81.13. Half of the
        # pairs have a clean A; over all, by |m_clean - m_corrupt|, from the table of the model's logits:
        *(
            Gate("smear_shared", f"{way}: gain{how}", below=-1, truth=truth, stream="pairs")
            for way, truth in (("denoise", -13.229), ("noise", -26.788))
            for how in FINAL_NORMS.values()
        ),
        *(
            Gate(negative, f"{way}: {part}{how}", within=0.01, stream="pairs")
            for negative in ("uniform", "pinned")
            for part in ("gain", INTERACTION)
            for way in WAYS
            for how in FINAL_NORMS.values()
        ),
    ),
    one_layer=True,
    tested="denoise: gain",
    confirmatory=True,
    measure=measure,
    known=known,
    quantities={
        DIFFERENCE: Quantity("logits", "what there is to move, at each corruption", ("mean", "sd")),
        **{
            _row(*place): Quantity("share", f"{meaning}, one corruption at a time", ("median",))
            for place, meaning in _MEANINGS.items()
        },
    },
    estimates={
        **{
            f"{way}: {part}{how}": Quantity("share", meaning)
            for (way, part, how), meaning in _MEANINGS.items()
        },
        "pairs left": Quantity("share", "pairs with |m_clean - m_corrupt| of .5 or more"),
    },
    streams=("pairs: name swap", "pairs: subject swap", "pairs: prefix", "pairs: induction"),
    figures=(
        *(
            Figure(
                f"{way.capitalize()}: share of the logit difference that each part moves",
                tuple(f"{way}: {part}" for part in (*COMPONENTS, INTERACTION)),
            )
            for way in WAYS
        ),
        Figure(
            "The gain alone, with the final norm's scale frozen",
            tuple(f"{way}: gain, final norm frozen" for way in WAYS),
        ),
        Figure("Pairs left", ("pairs left",)),
    ),
)
