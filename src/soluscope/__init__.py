"""soluscope: tools to study LayerNorm in SoLU language models.

    config = soluscope.load_config(["variant=solu_ln", "size=tiny", "train.steps=200"])
    run_dir = soluscope.train(config)
    model = soluscope.load(run_dir)                      # a HookedTransformer, with .facts
    table, figures = soluscope.probe(model, "some text")
    tokens = soluscope.tokens(model, "report")           # held-out tokens of the model's study
    soluscope.top_examples(model, neuron=5)              # text at which a neuron is most active
    soluscope.neuron(model, 5, "some text")              # a neuron's card
    soluscope.logit_effect(model, neuron=5)              # tokens that the neuron raises and lowers
    soluscope.quantities()                               # everything that the probes measure
    soluscope.study("runs/demo")                         # a study's results: tables and figures

Each function is imported at its first use, so that reading a configuration does not import PyTorch. `dir` and the
completion of names show these functions only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soluscope.config import Config as Config
    from soluscope.config import load_config as load_config
    from soluscope.errors import UserError as UserError
    from soluscope.evaluation.api import probe as probe
    from soluscope.hooked.convert import load as load
    from soluscope.notebook.examples import top_examples as top_examples
    from soluscope.notebook.logits import logit_effect as logit_effect
    from soluscope.notebook.neuron import neuron as neuron
    from soluscope.notebook.quantities import quantities as quantities
    from soluscope.notebook.study import study as study
    from soluscope.notebook.tokens import tokens as tokens
    from soluscope.training.run import train as train

_WHERE = {
    "Config": "config",
    "load_config": "config",
    "UserError": "errors",
    "train": "training.run",
    "load": "hooked.convert",
    "probe": "evaluation.api",
    "tokens": "notebook.tokens",
    "top_examples": "notebook.examples",
    "logit_effect": "notebook.logits",
    "neuron": "notebook.neuron",
    "quantities": "notebook.quantities",
    "study": "notebook.study",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'soluscope' has no attribute {name!r}")
    return getattr(import_module(f"soluscope.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
