"""The examples of a study's stored neurons, as the plan of a rating reads them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from soluscope.errors import UserError
from soluscope.neurons import stored
from soluscope.neurons.schema import SIDES, Stage
from soluscope.rating.settings import FULL
from soluscope.rating.shown import Example, Neuron

N_CACHED = 64
"""Neurons whose examples stay in memory; the plan reads one neuron at several stages."""


class Stored:
    """The neurons of a study's runs and of their initialisations, from the run folders."""

    def __init__(self, study_dir: Path) -> None:
        """Open the stored neurons.

        Raises:
            UserError: if no run has any, or some are not as they were written.
        """
        self.study = study_dir.resolve().name
        self._parts: dict[tuple[str, bool], stored.Neurons] = {}
        digests = []
        for run_dir in sorted(each for each in study_dir.glob("*") if each.is_dir()):
            for part in stored.parts_of(run_dir):
                neurons = stored.read(run_dir, part)
                self._parts[neurons.about.run, part == "trained"] = neurons
                digests.append(f"{run_dir.name} {part} {neurons.about.made_with}")
        if not any(trained for _, trained in self._parts):
            raise UserError(
                f"{study_dir} has no stored neurons: compute them with 'soluscope neurons {study_dir}'"
            )
        self.identity = hashlib.sha256("\n".join(digests).encode()).hexdigest()
        self._read = lru_cache(N_CACHED)(self._all)

    def neurons(self) -> list[Neuron]:
        """Return all neurons, by run, trained ones first."""
        return [
            Neuron(part.about.arm, run, index, trained)
            for (run, trained), part in self._parts.items()
            for index in range(part.about.n_neurons)
        ]

    def stages(self, arm: str) -> list[str]:
        """Return `mid` and `post`, or `post` for an arm without a mid norm."""
        has_norm = any(
            part.about.has_mid_norm for part in self._parts.values() if part.about.arm == arm
        )
        return list(SIDES) if has_norm else ["post"]

    def examples(self, neuron: Neuron, stage: str, mode: str) -> list[Example]:
        """Return the neuron's examples with positive activations, the largest activation first."""
        wanted: Stage = "mid" if stage == "mid" else "post"
        found = [
            each
            for each in self._read(neuron)
            if each.stage == wanted
            and (each.range is not None) == (mode == FULL)
            and each.activation > 0
        ]
        found.sort(key=lambda each: -each.activation)
        return [Example(each.tokens, each.activations[wanted], each.peak) for each in found]

    def _all(self, neuron: Neuron) -> list[stored.Example]:
        return self._parts[neuron.run, neuron.trained].examples(neuron.index)
