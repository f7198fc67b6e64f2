"""P20: Lateral inhibition

SoLU is a_i = x_i p_i with p = softmax(x), so da_i/dx_j = p_i (d_ij (1 + x_i) - x_i p_j). What couples
neurons is off the diagonal; its absolute values add up to |x_i| p_i (1 - p_i) in row i, since p adds up
to 1: no N x N matrix is needed.

Two couplings stand in the middle of the MLP: the softmax's denominator Z, and the norm's gain g. Each is
live or one constant, which makes four models: with both constant the MLP is pointwise, x e^x times a
number. They are not independent: LN(x e^x / Z) = (q - mean q) / sqrt(var q + eps Z^2), q = x e^x, so under
a live LayerNorm without epsilon Z cancels, and how much it matters depends on eps Z^2.

Question:
    Do neurons act on each other through SoLU's softmax or through the norm, or is the MLP a
    pointwise unit?

Formula:
    sum_i |x_i| p_i (1 - p_i) / (that + sum_i p_i |1 + x_i (1 - p_i)|);
    dL of {Z_t, exp(mean log Z)} x {g_t, exp(mean log g)} against both live;
    interaction dL(both) - dL(Z) - dL(g)

Reading:
    A rise of the loss with Z const says that the softmax's denominator carries something: lateral
    inhibition. A rise with g const and none with Z const is the main effect that smearing predicts;
    it is also there where a gain for each neuron could do it (C2, `disjoint`), so whether it is
    needed is for P7 and P8. Both within .001 nats: the MLP does what x e^x times one number does.
    The interaction says how much of the one coupling rests on the other.

Pitfalls:
    Under a live LayerNorm with a tiny epsilon Z cancels, so Z const costs nothing there by
    construction: read it with r, and with the gain const. All cells but the first are off the
    training distribution. The off-diagonal share counts sensitivities, not effects: it may be large
    where Z hardly varies. The published SoLU-1L has max p below .0065 and sd log Z of .077 on
    ordinary tokens: near idle.

Source:
    science.md sections 1.5 and 7 P20
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log, nan
from typing import Any

import torch
from torch import Tensor

from soluscope.hooked.ablation import FINAL_NORMS, loss_at_post
from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Figure, Gate, Measured, Probe, Quantity

CELLS = {
    "Z const": "Z the same at all tokens and a live gain",
    "g const": "the gain the same at all tokens and a live Z",
    "Z and g const": "Z and the gain the same at all tokens: a pointwise unit",
}
INTERACTION = "Z x g interaction"


def measure(run: HookedRun) -> Measured:
    """How strongly neurons are coupled, and what each coupling is worth in nats. One value a token.

    The constants are geometric means over tokens that are not BOS, the token's own among them, as for
    the frozen gain of P4: nothing is fitted to a loss, so there is nothing that a token could leak. In
    the pointwise cell they make h = const * x e^x, const = exp(mean log(g / Z)).

    Returns:
        Off-diagonal share of sum |da/dx|, log Z and max p; nan where the nonlinearity is not SoLU.
        Change of loss in each cell of the 2x2 against both live, and their interaction: what the cell
        with both constant has beyond the sum of the other two. Cells with a constant Z exist for SoLU,
        those with a constant gain where the mid norm has an epsilon (where it has not, the gain is a
        constant already); nan otherwise, and where the token has no target.
    """
    nothing = torch.full_like(run.loss, torch.nan, dtype=torch.float64)
    columns = {"off-diagonal share": nothing, "log Z": nothing, "max p": nothing}
    if run.is_solu:
        pre = run.pre.double()
        p = pre.softmax(-1)
        columns = {
            "off-diagonal share": _off_diagonal_share(pre, p),
            "log Z": pre.logsumexp(-1),
            "max p": p.amax(-1),
        }
    posts = _posts(run, columns["log Z"])
    for final_norm, how in FINAL_NORMS.items():
        live = loss_at_post(run, run.post, final_norm).double()
        change = {
            cell: loss_at_post(run, post, final_norm).double() - live
            for cell, post in posts.items()
        }
        z, g, both = (change.get(cell, nothing) for cell in CELLS)
        change |= {INTERACTION: both - z - g}
        columns |= {f"{name}{how}": change.get(name, nothing) for name in (*CELLS, INTERACTION)}
    return Measured(columns)


def _off_diagonal_share(x: Tensor, p: Tensor) -> Tensor:
    """Share of sum_ij |da_i/dx_j| with i other than j, [token]."""
    coupled = x * p * (1 - p)  # sum of row i off the diagonal, but for signs
    off, diagonal = coupled.abs().sum(-1), (p + coupled).abs().sum(-1)
    return off / (off + diagonal)


def _posts(run: HookedRun, log_z: Tensor) -> dict[str, Tensor]:
    """hook_post in each cell that exists, [token d_mlp]."""
    mids = {"": run.mid}
    if run.is_solu:
        factor = (log_z - log_z[~run.is_bos].mean()).exp()[:, None]
        mids["Z const"] = (run.mid.double() * factor).to(run.mid)
    posts = {}
    for cell, mid in mids.items():
        scale, post = (torch.ones_like(run.scale), mid)
        if run.mlp.norm is not None:
            with torch.no_grad():
                scale, post = run.mlp.norm(mid)
        if cell:
            posts[cell] = post
        if run.eps is not None:
            beta = run.readout.beta
            again = (scale.double().log() + run.mean_log_gain).exp().to(post)[:, None]
            posts["Z and g const" if cell else "g const"] = (post - beta) * again + beta
    return posts


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Two neurons at x = (ln 3, 0) have p = (3/4, 1/4): off the diagonal 3 ln 3 / 16 and 0, on it
    3/4 + 3 ln 3 / 16 and 1/4. At x = 0 nothing is coupled. The MLP writes nothing, so no cell costs loss.
    """
    pre = torch.tensor([[log(3), 0.0], [0.0, 0.0], [log(3), 0.0]], dtype=torch.float64)
    mid = pre * pre.softmax(-1)
    share = 3 * log(3) / (16 + 6 * log(3))
    coupling = {
        "off-diagonal share": [share, 0, share],
        "log Z": [log(4), log(2), log(4)],
        "max p": [3 / 4, 1 / 2, 3 / 4],
    }
    changes = {f"{name}{how}": [0, 0, nan] for name in CELLS for how in FINAL_NORMS.values()}
    yield replace(planted(mid[None], eps=1e-3), pre=pre), coupling | changes
    static = {"Z const": [0, 0, nan], "g const": [nan] * 3, "Z and g const": [nan] * 3}
    yield replace(planted(mid[None], gain=7.0), pre=pre), coupling | static


PROBE = Probe(
    __doc__,
    gates=(
        *(Gate("lateral", f"Z const{how}", above=0.1) for how in FINAL_NORMS.values()),
        Gate("smear_shared", "g const", above=0.1),
        Gate("disjoint", "g const", above=0.1),  # though no gain by token is needed
        *(
            Gate(negative, f"{cell}{how}", within=0.001)
            for how in FINAL_NORMS.values()
            for negative, cell in (
                ("uniform", "Z const"),
                ("uniform", "g const"),
                ("uniform", "Z and g const"),
                ("pinned", "g const"),
                ("lateral", "g const"),
                ("smear_shared", "Z const"),  # it cancels under a live LayerNorm
            )
        ),
    ),
    one_layer=True,
    tested="Z const",
    measure=measure,
    known=known,
    quantities={
        "off-diagonal share": Quantity(
            "share",
            "of the Jacobian's absolute values, how much is between neurons",
            ("median", "mean"),
        ),
        "log Z": Quantity("nats", "log of softmax's denominator", ("median", "sd")),
        "max p": Quantity("probability", "largest softmax weight over neurons", ("median", "q95")),
        **{
            f"{cell}{how}": Quantity(
                "nats",
                f"change of loss with {meaning}{how}",
                more_smeared_when="higher" if cell == "g const" else "neither",
            )
            for how in FINAL_NORMS.values()
            for cell, meaning in CELLS.items()
        },
        **{
            f"{INTERACTION}{how}": Quantity(
                "nats", f"change with both constant beyond the sum of the two changes{how}"
            )
            for how in FINAL_NORMS.values()
        },
    },
    streams=("natural",),
    figures=(
        Figure("Change of loss where Z, the gain or both are one constant", (*CELLS, INTERACTION)),
        Figure(
            "The same with the final norm's scale frozen",
            tuple(f"{name}, final norm frozen" for name in (*CELLS, INTERACTION)),
        ),
        Figure(
            "Off-diagonal share of the Jacobian, median token",
            ("off-diagonal share",),
            statistic="median",
        ),
        Figure("Spread of log Z", ("log Z",), statistic="sd"),
    ),
)
