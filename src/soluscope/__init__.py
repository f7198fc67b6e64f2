"""soluscope: tools to study LayerNorm in SoLU language models.

    config = soluscope.load_config(["variant=solu_ln", "size=tiny", "train.steps=200"])
    run_dir = soluscope.train(config)
    model = soluscope.load(run_dir)                      # a HookedTransformer, with .facts
    table, figures = soluscope.probe(model, "some text")

Each function is imported at its first use, so that reading a configuration does not import PyTorch.
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
    from soluscope.training.run import train as train

_WHERE = {
    "Config": "config",
    "load_config": "config",
    "UserError": "errors",
    "train": "training.run",
    "load": "hooked.convert",
    "probe": "evaluation.api",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'soluscope' has no attribute {name!r}")
    return getattr(import_module(f"soluscope.{_WHERE[name]}"), name)
