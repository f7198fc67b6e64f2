"""Exact closed forms of the loss under an edit of the MLP, without another forward pass.

An edit of a token's hidden layer in the last MLP changes that token's residual stream and nothing else,
so each (token, neuron) pair can be solved separately. In a one-layer model this is the edit's whole
effect. In a deeper model it is the whole effect of an edit of the last MLP, and a HookedRun holds no
other MLP. Edits of earlier layers need hooks.

R is the residual stream that enters ln_final, centred if ln_final centres, and S is its scale. With
U = diag(ln_final.w) W_U the logits are l = b + R U / S. An edit adds to R a multiple of each of a few
per-token vectors V_r and of the neuron's row W_j of W_out, so that S becomes S' and

    delta_v = l'_v - l_v = sum_r u_r E_rv + w B_jv,   E_r = V_r U / S (V_0 = R),   B_j = W_j U,

and the loss changes by log E_p[e^delta] - delta_target, where p is the output distribution before the
edit. Edits differ only in the numbers u and w, so one kernel evaluates all edits and one enclosure bounds
them. Softmax ignores a constant added to all logits, so the mean over the vocabulary is subtracted from
B, and the mean under p from E.

Per-pair scalars are fp64; vocabulary-length tensors keep the run's dtype. In fp32 the rounding of
exponentials gives an evaluated change an error of about 1e-7 nats, whatever its size. For small changes
the intervals are narrower than that, so a tolerance makes them both faster and more accurate.

Source: protocol.md section 8.
"""

from soluscope.hooked.ablation.best_gain import best_gain, log_best_gain_on_others
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
    "best_gain",
    "disjoint_mean",
    "log_best_gain_on_others",
    "loss_at_gain",
    "loss_at_post",
]
