"""A study of neurons with made-up text, for tests of the rating page and its statistics."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from soluscope.rating.shown import Example, Neuron

WORDS = (
    " the", " of", " is", " and", "(", ")", ",", ".", " =", '"', ":", "_", "\n", " 12", " 7", " House", " River",
    " self", " return", " if", " not", " apple", " walk", "ing", "s", " blue", " x", " tree",
)  # fmt: skip
ARMS = ("zzplain", "zznormed")
HOSTILE = (
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    '" onfocus="window.ran = 1',
)


@dataclass
class MadeUp:
    """Neurons of two arms with two runs each, and of their untrained twins."""

    study: str = "first"
    identity: str = "a" * 64
    n_neurons: int = 40
    n_silent: int = 3
    """Neurons of each run that fire in too few documents."""
    words: tuple[str, ...] = WORDS
    without_norm: tuple[str, ...] = ("zzplain",)
    untrained: bool = True
    scale: dict[str, float] = field(default_factory=lambda: {"mid": 1e-3, "post": 3.0})

    def neurons(self) -> list[Neuron]:
        kinds = (True, False) if self.untrained else (True,)
        return [
            Neuron(arm, f"{arm}-s{seed}", index, trained)
            for arm in ARMS
            for seed in (0, 1)
            for trained in kinds
            for index in range(1000, 1000 + self.n_neurons)
        ]

    def stages(self, arm: str) -> list[str]:
        return ["post"] if arm in self.without_norm else ["mid", "post"]

    def examples(self, neuron: Neuron, stage: str, mode: str) -> list[Example]:
        n = 5 if neuron.index < 1000 + self.n_silent else 20 if mode == "top" else 50
        least = 0.5 if mode == "top" else 0.02
        return _examples(f"{neuron} {stage} {mode}", n, self.scale[stage], least, self.words)


@cache
def _examples(
    key: str, n: int, scale: float, least: float, words: tuple[str, ...]
) -> list[Example]:
    """Return examples of random words; the marked token fires from `scale` down to `least` times that."""
    rng = np.random.default_rng([len(key), *key.encode()])
    tokens = rng.integers(len(words), size=(n, 41)).tolist()
    largest = scale * np.linspace(1, least, n)
    activations = rng.uniform(-0.2, 0.4, (n, 41)) * largest[:, None]
    activations[:, 20] = largest
    return [
        Example(tuple(words[i] for i in of_text), tuple(values), 20)
        for of_text, values in zip(tokens, activations.tolist(), strict=True)
    ]
