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

from soluscope.hooked.ablation.bounds import Bounds
from soluscope.hooked.ablation.changes import Ablation, Changes
from soluscope.hooked.ablation.readout import FINAL_NORMS, FinalNorm, Stage
from soluscope.hooked.ablation.whole import disjoint_mean, loss_at_gain, loss_at_post

__all__ = [
    "FINAL_NORMS",
    "Ablation",
    "Bounds",
    "Changes",
    "FinalNorm",
    "Stage",
    "disjoint_mean",
    "loss_at_gain",
    "loss_at_post",
]
