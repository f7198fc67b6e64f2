"""Settings of `soluscope rate`: the items of the plan, and the port of the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from soluscope.config import check
from soluscope.plugins import check_name

TOP, FULL = "top", "full"
MODES = [TOP, FULL]
"""Examples at the largest activations (Elhage et al. 2022, section 6.1), or from the whole range of positive
activations (section 6.4)."""
STAGES = ["mid", "post"]
"""Activations before and after the mid norm."""
MOST_ITEMS = 20_000
"""Most items of a plan; rating them all would take one person a working year."""


@dataclass(frozen=True)
class PlanConfig:
    n_neurons: int = 60
    """Neurons of each arm, drawn evenly from its runs. Elhage et al. rated 60 for each model."""
    modes: list[str] = field(default_factory=lambda: [TOP])
    """Examples to show: top (the largest activations), full (the whole range), or both as [top,full]."""
    stages: list[str] = field(default_factory=lambda: ["post"])
    """Activations to show: post (after the mid norm), mid (before it), or both as [mid,post]."""
    arms: list[str] = field(default_factory=list)
    """Arms to rate. []: all arms of the study."""
    n_examples: int = 20
    """Examples of each neuron. A neuron that fires in fewer documents is not rated."""
    repeated: float = 0.1
    """Share of the neurons that each person rates a second time."""
    planted: float = 0.1
    """Neurons of known answer and neurons of untrained models, as a share of the study's neurons."""
    seed: int = 0
    """Seed with which the plan is drawn."""

    def __post_init__(self) -> None:
        check(
            1 <= self.n_neurons <= MOST_ITEMS,
            f"n_neurons={self.n_neurons} must be from 1 to {MOST_ITEMS}",
        )
        check(10 <= self.n_examples <= 50, f"n_examples={self.n_examples} must be from 10 to 50")
        check(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        for name in ("repeated", "planted"):
            value = getattr(self, name)
            check(0 <= value <= 0.5, f"{name}={value} must be from 0 to 0.5")
        for name, known in (("modes", MODES), ("stages", STAGES)):
            given = getattr(self, name)
            check(
                bool(given), f"{name}=[] names none: give {name}={known[0]} or [{','.join(known)}]"
            )
            check(len({*given}) == len(given), f"{name}={given} names one of them twice")
            for each in given:
                check_name(name.removesuffix("s"), each, known)

    def of_plan(self) -> dict[str, Any]:
        """Return the settings on which the plan depends."""
        return {each: asdict(self)[each] for each in PlanConfig.__dataclass_fields__}


@dataclass(frozen=True)
class RatingConfig(PlanConfig):
    port: int = 0
    """Port of the page on this machine. 0: a free port."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.port <= 65535, f"port={self.port} must be from 0 to 65535")


@dataclass(frozen=True)
class ProxyConfig:
    """Settings of `soluscope proxy`."""

    n_neurons: int = 60
    """Neurons of each run and of its initialisation, drawn at random. Neurons that people have rated are added."""
    stages: list[str] = field(default_factory=lambda: [*STAGES])
    """Activations: mid (before the mid norm), post (after it), or both as [mid,post]."""
    lm_url: str = ""
    """Address of a language model with OpenAI's chat API, such as http://127.0.0.1:8080/v1. It receives texts of
    the study. The environment variable SOLUSCOPE_LM_KEY may hold its key. "": no language model is asked."""
    lm_model: str = ""
    """Name of the language model, as its server knows it."""
    seed: int = 0
    """Seed with which the neurons are drawn."""

    def __post_init__(self) -> None:
        check(self.n_neurons >= 1, f"n_neurons={self.n_neurons} must be 1 or more")
        check(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        check(bool(self.stages), "stages=[] names none: give stages=post or [mid,post]")
        for each in self.stages:
            check_name("stage", each, STAGES)
        check(
            bool(self.lm_url) == bool(self.lm_model),
            "lm_url= and lm_model= name a language model together: give both or neither",
        )
