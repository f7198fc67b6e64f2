"""Reasons for which a probe cannot be measured on a model, whatever the text."""

from __future__ import annotations

from typing import Any

from soluscope.hooked.activations import has_one_scale
from soluscope.probes import Probe


def misfit(probe: Probe, model: Any) -> str:
    """Return why a probe cannot be measured on a HookedTransformer; empty if it can."""
    n_layers = model.cfg.n_layers
    if probe.one_layer and n_layers > 1:
        return f"exact for one layer only, and the model has {n_layers}"
    if probe.one_scale and not has_one_scale(model):
        return (
            "needs one gain for each token, and the mid norm has a scale for each block or neuron"
        )
    return ""
