"""The models of a study's stored neurons, loaded when they are first needed."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock

from soluscope.evaluation.one_run import n_threads, threads
from soluscope.evaluation.pretrained_run import load_again, read_origin
from soluscope.hooked.convert import SoluscopeTransformer, load_run
from soluscope.neurons.stored import Neurons
from soluscope.notebook.on_text import OnText, on_text
from soluscope.runs.folder import Run

N_KEPT = 4
"""Number of models that stay in memory."""


class Models:
    """Models that answer one question at a time."""

    def __init__(self, found: list[Neurons], device: str) -> None:
        self.found = found
        self.device = device
        self._lock = Lock()  # a server answers in several threads
        self._model = lru_cache(N_KEPT)(self._load)

    def see(self, number: int, neuron: int, *texts: str) -> list[OnText]:
        """Return a neuron of model `number` on each text.

        Raises:
            UserError: if a text is empty or too long, or the run cannot be read any more.
        """
        with self._lock, threads(n_threads()):
            model = self._model(number)
            return [on_text(model, neuron, text) for text in texts]

    def decode(self, number: int, tokens: list[int]) -> str:
        """Return the text of some tokens of model `number`."""
        with self._lock:
            text: str = self._model(number).tokenizer.decode(
                tokens, clean_up_tokenization_spaces=False
            )
            return text

    def _load(self, number: int) -> SoluscopeTransformer:
        neurons = self.found[number]
        run = Run(neurons.folder.parent.parent)
        if origin := read_origin(run.dir):
            return load_again(run, origin, self.device)
        return load_run(run, self.device, step=None if neurons.about.part == "trained" else 0)
