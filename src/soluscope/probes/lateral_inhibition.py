"""P20: Lateral inhibition

SoLU is a_i = x_i p_i with p = softmax(x), so da_i/dx_j = p_i (d_ij (1 + x_i) - x_i p_j). The off-diagonal
entries couple neurons. In row i their absolute values sum to |x_i| p_i (1 - p_i), since p sums to 1, so
no N x N matrix is needed.

The middle of the MLP has two couplings: the softmax's denominator Z and the norm's gain g. Each is either
live or one constant, which makes four models. With both constant the MLP is pointwise: x e^x times one
number. The couplings are not independent: LN(x e^x / Z) = (q - mean q) / sqrt(var q + eps Z^2), q = x e^x.
Under a live LayerNorm without epsilon Z therefore cancels, and the effect of Z depends on eps Z^2.

Question:
    Do neurons act on each other through SoLU's softmax or through the norm, or is the MLP a
    pointwise unit?

Answers:
    above 0.001: The MLP is not a pointwise unit: the loss rises when the softmax's denominator and the gain are
        both constant.
    -0.001 to 0.001: The MLP is as good as a pointwise unit: the loss stays the same when the softmax's
        denominator and the gain are both constant; where the MLP's output is far longer than the rest of the
        residual stream, this shows nothing about the mid norm.
    below -0.001: A pointwise unit does better than this MLP: the loss falls when the softmax's denominator and
        the gain are both constant.

Formula:
    off-diagonal share = off / (off + on), off = sum_i |x_i| p_i (1 - p_i),
    on = sum_i p_i |1 + x_i (1 - p_i)|;
    dL of {Z_t, exp(mean log Z)} x {g_t, exp(mean log g)}, each cell minus the cell with both live;
    interaction dL(both) - dL(Z) - dL(g)

Reading:
    If the loss rises with a constant Z, the softmax's denominator carries information: lateral
    inhibition. If it rises with a constant gain, the per-token gain matters at inference; this probe does not
    ask at which tokens, so it cannot distinguish smearing from a gain that matters at any code (`magnitude`:
    7.3 nats). The rise also appears where other values of gamma would suffice (C2, `disjoint`). Only the cell
    with both constant decides whether the MLP is pointwise: if it is within .001 nats, the MLP is equivalent to
    x e^x times one number. Each of Z and g can cost nothing alone while the two together do, because each can
    take the other's place; the interaction measures that. If a cell is within .001 nats with ln_final live and
    above with its scale frozen, ln_final renormalises each token, and nothing follows about the mid norm (P4).

Pitfalls:
    Under a live LayerNorm with a tiny epsilon Z cancels, so a constant Z costs nothing there by
    construction: read that cell together with r, and together with the cell where the gain is also
    constant. All cells except the live one are off-distribution. The off-diagonal share counts
    sensitivities, not effects: it can be large where Z hardly varies. In the published SoLU-1L max p
    is below .0065 and sd log Z is .077 on ordinary tokens, so both couplings are nearly idle there.

Source:
    protocol.md sections 1.5 and 7 P20
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
    "Z const": "one Z for all tokens and a live gain",
    "g const": "one gain for all tokens and a live Z",
    "Z and g const": "one Z and one gain for all tokens: a pointwise unit",
}
INTERACTION = "Z x g interaction"


def measure(run: HookedRun) -> Measured:
    """Return per token how strongly neurons are coupled, and the loss in nats that each coupling changes.

    The constants are geometric means over tokens that are not BOS, the measured token included, as for
    the frozen gain of P4. They are not fitted to a loss, so including the token leaks nothing. In the
    pointwise cell they give h = const * x e^x, const = exp(mean log(g / Z)).

    Returns:
        Off-diagonal share of sum |da/dx|, log Z and max p; nan where the nonlinearity is not SoLU.
        Change of loss in each cell of the 2x2 relative to the cell with both live, and the interaction:
        the change with both constant minus the sum of the other two changes. Cells with a constant Z
        exist only for SoLU. Cells with a constant gain exist only if the mid norm has an epsilon (without
        one the gain is a constant already). nan otherwise, and where the token has no target.
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
    """Return the share of sum_ij |da_i/dx_j| that has i != j, [token]."""
    coupled = x * p * (1 - p)  # sum of row i off the diagonal, up to signs
    off, diagonal = coupled.abs().sum(-1), (p + coupled).abs().sum(-1)
    return off / (off + diagonal)


def _posts(run: HookedRun, log_z: Tensor) -> dict[str, Tensor]:
    """Return hook_post in each cell that exists, [token d_mlp]."""
    mids = {"": run.mid}
    if run.is_solu:
        factor = (log_z - log_z[~run.is_bos].mean()).exp()[:, None]
        mids["Z const"] = (run.mid.double() * factor).to(run.mid)
    posts = {}
    for cell, mid in mids.items():
        scale, post = (torch.ones_like(run.scale), mid)
        if run.mlp.norm is not None:
            with torch.no_grad():
                scale, post = run.mlp.norm(mid, run.is_bos)
        if cell:
            posts[cell] = post
        if run.eps is not None:
            beta = run.readout.beta
            again = (scale.double().log() + run.mean_log_gain).exp().to(post)[:, None]
            posts["Z and g const" if cell else "g const"] = (post - beta) * again + beta
    return posts


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield two neurons at x = (ln 3, 0), where p = (3/4, 1/4), under a norm with epsilon and a constant gain.

    Off the diagonal the Jacobian has 3 ln 3 / 16 and 0, on it 3/4 + 3 ln 3 / 16 and 1/4. At x = 0 nothing
    is coupled. The MLP writes nothing, so no cell changes a loss.
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
        Gate("disjoint", "g const", above=0.1),  # although no per-token gain is needed
        *(
            Gate(negative, f"{cell}{how}", within=0.001)
            for how in FINAL_NORMS.values()
            for negative, cell in (
                ("uniform", "Z const"),
                ("uniform", "g const"),
                ("uniform", "Z and g const"),
                ("pinned", "g const"),
                ("lateral", "g const"),
                ("smear_shared", "Z const"),  # Z cancels under a live LayerNorm
            )
        ),
    ),
    one_layer=True,
    one_scale=True,
    tested="Z and g const",
    measure=measure,
    known=known,
    quantities={
        "off-diagonal share": Quantity(
            "share",
            "share of the Jacobian's summed absolute values that lies between different neurons",
            ("median", "mean"),
        ),
        "log Z": Quantity("nats", "log of softmax's denominator", ("median", "sd")),
        "max p": Quantity("probability", "largest softmax weight over neurons", ("median", "q95")),
        **{
            f"{cell}{how}": Quantity(
                "nats",
                f"change of loss with {meaning}{how}",
            )
            for how in FINAL_NORMS.values()
            for cell, meaning in CELLS.items()
        },
        **{
            f"{INTERACTION}{how}": Quantity(
                "nats",
                f"change of loss with Z and gain constant minus the sum of the two single changes{how}",
            )
            for how in FINAL_NORMS.values()
        },
    },
    streams=("natural",),
    figures=(
        Figure("Change of loss with Z, the gain or both constant", (*CELLS, INTERACTION)),
        Figure(
            "Change of loss with Z, the gain or both constant, final norm's scale frozen",
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
