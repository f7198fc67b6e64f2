"""P6: Scale patching, both directions

The output of a mid norm has three parts: n = g L u, with g the gain, L = |a - mean(a)| the length
and u = (a - mean(a)) / L the direction; mean(a), over neurons, was subtracted. The probe puts each part of
one prompt (the donor) into the run of the other (the receiver), at the position before the answer, and
leaves the rest of the receiver's run unchanged. Both ways are needed. Where two parts must occur together
(AND), inserting one of them (denoising) finds nothing and removing it (noising) does. Where either of two
parts is enough (OR), it is the reverse.

The 2x2 contrast is over the gain and the vector that it multiplies, c = L u, so two of its corners are the
unchanged activations of the two runs. With the length held fixed, a donor's direction would get a length
that no token produces, and the contrast would measure that.

Question:
    Does the gain carry the difference between a prompt and its corruption, alone or together with the
    direction?

Answers:
    above 0.01: The clean prompt's gain alone moves the corrupt prompt's answer towards the clean prompt's
        answer.
    -0.01 to 0.01: The clean prompt's gain alone is not enough to move the corrupt prompt's answer; noising
        shows if the gain is necessary, and where the MLP's output is far longer than the rest of the residual
        stream, this shows nothing about the mid norm.
    below -0.01: The clean prompt's gain alone moves the corrupt prompt's answer away from the clean prompt's
        answer.

Formula:
    n = g L u;
    m = logit[y+] - logit[y-] before the answer;
    denoise (m - m_cor) / (m_cl - m_cor), noise (m_cl - m) / (m_cl - m_cor);
    each is a ratio of sums over rows, with sum |m_cl - m_cor| as the denominator;
    2x2 contrast m(g', c') - m(g', c) - m(g, c') + m(g, c), c = L u

Reading:
    A per-token gain that matters (H-dyn) predicts that the gain alone moves the logit difference in at least
    one way: denoising if the gain is sufficient, noising if it is necessary, both if it is both. The sign is
    not part of the prediction: a higher gain amplifies the receiver's answer even if that answer is wrong, so
    in C1 (`smear_shared`) the shares are far below 0. The probe cannot distinguish smearing from a gain that
    matters at any code (`magnitude`: -23), or from one that gamma could replace (`disjoint`: -20 and -46). If
    the gain moves nothing either way (within .01), content and direction move the whole difference. If the gain
    moves nothing with ln_final live and something with its scale frozen, ln_final renormalises each token, and
    nothing follows about the mid norm (P4). An
    interaction above 0 means that gain and content act together. Where the gain is one constant its shares are
    exactly 0.

Pitfalls:
    Shares need not lie in [0, 1]: a gain multiplies the receiver's answer, so patching it may overshoot. A pair
    is left out if the model does not distinguish its answers (|m_clean - m_corrupt| < .5): check how many pairs
    are left. The effect depends on the corrupting word, so there are five per pair. The residual stream before
    the MLP, attention included, stays the receiver's, so even the whole content need not move the whole
    difference. L stays the receiver's too: under a true LayerNorm a patched gain changes the norm of n, which
    no prompt would do. In a tokenizer of code no name is one token, and the family "names" then swaps random
    words. Prefixes of one document count as separate pairs.

Source:
    protocol.md section 7 P6; Heimersheim 2023, comments on docstring circuits, for both directions;
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
from soluscope.probes._tokens import array, arrays

N_CORRUPTIONS = 5
LEAST_DIFFERENCE = 0.5
"""Smallest |m_clean - m_corrupt|, in logits, of a pair that is kept; a smaller difference cannot be recovered."""

WAYS = {
    "denoise": "taken from the clean run and patched into the corrupt run",
    "noise": "taken from the corrupt run and patched into the clean run",
}
COMPONENTS = {
    "gain": "gain alone",
    "direction": "direction of n alone",
    "content": "whole of hook_post",
    "mean": "mean over neurons alone (gain unchanged)",
}
INTERACTION = "interaction"
FROZEN = FINAL_NORMS["frozen"]
DIFFERENCE = "m_clean - m_corrupt"


def measure(run: HookedRun) -> Measured:
    """Return the share of the logit difference that each part moves, per corruption and over all corruptions."""
    tokens = _shares(run)
    return Measured(tokens, tuple(_estimates(run, tokens)))


def _shares(run: HookedRun) -> dict[str, Tensor]:
    """Return the share of the logit difference that each part moves, at the second-to-last token of corrupt rows.

    Args:
        run: rows of equal length in groups of 6, a clean row and then 5 corruptions. Each row ends with its
            answer: y+ in the clean row, y- in a corrupt row. m = logit[y+] - logit[y-] at the position
            before the answer.

    Returns:
        m_clean - m_corrupt in logits. For each way and part, (m - m_corrupt) / (m_clean - m_corrupt) for
        denoising and (m_clean - m) / (m_clean - m_corrupt) for noising, where m is that of the patched run,
        with ln_final's scale live and with its scale in the receiver's unpatched run. Also the contrast
        m(g', c') - m(g', c) - m(g, c') + m(g, c), c = a - mean(a) (primes mark the donor's), divided by
        m_clean - m_corrupt: above 0 where gain and content act together, below 0 where either is enough.
        nan at all other tokens, and where |m_clean - m_corrupt| < .5.

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
    """Return the index of the position before the answer, in the clean and the corrupt row of each corruption."""
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
        f"the {n_rows} rows of {run.stream!r} are not pairs of prompts: scale patching needs groups of "
        f"{1 + N_CORRUPTIONS} rows of equal length in one string, the clean row first; choose a stream that "
        "begins with 'pairs: '"
    )


class _Patched:
    """Runs of the receiver with parts of the donor, row by row, in fp64."""

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
        """Return logit[right] - logit[wrong] with this part taken from the donor, [row]."""
        out, (right, wrong) = self.out, self.answers
        resid = self._resid(part)
        scale_of = resid if final_norm == "live" else self._resid("nothing")
        scale = (scale_of.square().mean(-1, keepdim=True) + out.ln_eps).sqrt()
        seen = resid / scale * out.ln_w + out.ln_b
        U = (out.W_U[:, right] - out.W_U[:, wrong]).double()  # [d_model row]
        return (seen * U.T).sum(-1) + out.b_U[right] - out.b_U[wrong]

    def _resid(self, part: str) -> Tensor:
        """Return the input of ln_final, centred if ln_final centres, [row d_model]."""
        out = self.out
        resid = self.resid + (self.n[part] * out.gamma + out.beta) @ out.W_out.double()
        return resid - resid.mean(-1, keepdim=True) if out.ln_centred else resid


def _row(way: str, part: str, how: str) -> str:
    return f"by row, {way}: {part}{how}"


def _estimates(run: HookedRun, tokens: dict[str, Tensor]) -> Iterator[Estimate]:
    """Yield each share over all corruptions, and the share of pairs that have a corruption left.

    A share is the sum of the moved parts of the logit differences divided by the sum of the differences.
    Each row is weighted by |m_clean - m_corrupt|, so that no ratio blows up and the sign of a row's
    difference does not matter. A trimmed mean would also prevent the former, but its interval would depend
    on which rows are cut.
    """
    string, columns = array(run.string), arrays(tokens)
    size = np.abs(columns[DIFFERENCE])
    for way, part, how in _MEANINGS:
        share = columns[_row(way, part, how)]
        if not np.isnan(share).all():
            yield ratio(f"{way}: {part}{how}", share * size, size, string)
    _, pair = np.unique(string, return_inverse=True)
    left = np.bincount(pair, weights=size >= LEAST_DIFFERENCE) > 0
    yield mean_over_strings("pairs left", left, note=f"{left.sum()} of {len(left)} pairs")


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield a clean row and its corruptions on two neurons: clean a = (2, -2), corrupt a = (-1, 1).

    post is (1, -1) and (-1, 1), gains are 1/2 and 1, and m reads the first neuron: 1 and -1. Denoising: the
    clean gain halves the corrupt post, so m = -1/2, a share of a quarter; the clean direction reverses it,
    so m = 1, a share of 1. Noising: the corrupt gain doubles the clean post, so m = 2, a share of -1/2; the
    corrupt direction reverses it. The contrast is over a - mean(a) with either gain:
    (1 - (-1/2) - 2 + (-1)) / 2 = -3/4 for denoising, and the same four numbers for noising.
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
            part: f"share of m_clean - m_corrupt moved by the {meaning}, {source}"
            for part, meaning in COMPONENTS.items()
        },
        INTERACTION: f"2x2 contrast of gain and a - mean(a) over m_clean - m_corrupt, {source}",
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
        # With ln_final's scale frozen the logits follow g: 5 u / S, where u is 400 instead of .4 when denoising
        # and 20.4 instead of 420 when noising.
        Gate("or_gate", f"denoise: gain{FROZEN}", above=10, truth=20.38, stream="pairs"),
        Gate("or_gate", f"noise: gain{FROZEN}", above=0.5, truth=0.9708, stream="pairs"),
        Gate("and_gate", f"noise: gain{FROZEN}", above=0.5, truth=0.98767, stream="pairs"),
        Gate("and_gate", f"denoise: gain{FROZEN}", within=0.01, stream="pairs"),
        # In C1 m is linear in g: A's m at B's gain is 81.13 m_A, and B's m at A's gain is m_B / 81.13. Half of
        # the pairs have a clean A. The truths are computed from the model's table of logits, with each pair
        # weighted by |m_clean - m_corrupt|.
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
    one_scale=True,
    tested="denoise: gain",
    measure=measure,
    known=known,
    quantities={
        DIFFERENCE: Quantity(
            "logits", "logit difference to be moved, per corruption", ("mean", "sd")
        ),
        **{
            _row(*key): Quantity("share", f"{meaning}, per corruption", ("median",))
            for key, meaning in _MEANINGS.items()
        },
    },
    estimates={
        **{
            f"{way}: {part}{how}": Quantity("share", meaning)
            for (way, part, how), meaning in _MEANINGS.items()
        },
        "pairs left": Quantity(
            "share", "share of pairs with a corruption at |m_clean - m_corrupt| of .5 or more"
        ),
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
        Figure("Share of pairs that are kept", ("pairs left",)),
    ),
)
