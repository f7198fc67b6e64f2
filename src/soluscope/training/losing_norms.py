"""The schedule by which further training removes the per-token scales of a model, one norm after the other.

The order is that of Baroni et al.: the ln2 of each block, attention's ln1, ln_final; then EOS loses its constants,
and at last BOS. Mid norms with a per-token scale follow ln2, since both belong to the MLP. The removals are evenly
spaced over the first half of the training, so that the weights have the second half to adapt.

Source: Baroni et al. 2025, "Transformers Don't Need LayerNorm at Inference Time"; protocol.md section 7, P7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from soluscope.config import Config
from soluscope.constant_norm import ConstantNorm, Stage, constant_norms
from soluscope.data.cache import TokenCache
from soluscope.errors import UserError
from soluscope.model import LanguageModel

if TYPE_CHECKING:  # needed by annotations only
    from jaxtyping import Int

ORDER = (".ln2", ".mlp.ln", ".ln1", "ln_final")
"""Ends of the names of the norms, in the order of their removal."""


class LosingNorms:
    """The removals of a training, and the masks of EOS and BOS that the norms need until the last one."""

    def __init__(self, model: LanguageModel, steps: int, bos: int, eos: int) -> None:
        """Set the steps of the removals, and let all norms begin with their per-token scales.

        Raises:
            UserError: if there are fewer steps than two for each removal.
        """
        self.bos, self.eos = bos, eos
        by_name = constant_norms(model)
        self.norms = [norm for end in ORDER for name, norm in by_name.items() if name.endswith(end)]
        removals = [([norm], Stage.APART) for norm in self.norms]
        removals += [(self.norms, stage) for stage in (Stage.EOS, Stage.ALL)]
        half, n = steps // 2, len(removals)
        if half < n:
            raise UserError(
                f"{n} removals of per-token scales need {2 * n} optimizer steps, and there are {steps}: set "
                "fine_tune_tokens= of 'soluscope remove' (train.steps=) higher"
            )
        self.removals: list[tuple[int, Sequence[ConstantNorm], Stage]] = [
            (place * half // n, *removal) for place, removal in enumerate(removals, 1)
        ]
        """The step before which each removal happens, its norms, and their new stage."""
        for norm in self.norms:
            norm.stage = Stage.LIVE
        model.on_tokens = self._mark

    @classmethod
    def of(cls, model: LanguageModel, config: Config, cache: TokenCache) -> LosingNorms | None:
        """Return the schedule of a run, or None for a run that keeps its norms."""
        if not model.is_constant:
            return None
        return cls(model, config.train.steps, cache.meta["bos"], cache.meta["eos"])

    def advance(self, step: int) -> None:
        """Make the removals that happen before an optimizer step, counted from 0."""
        for at, norms, stage in self.removals:
            for norm in norms if step >= at else ():
                if norm.stage < stage:
                    norm.advance(stage)

    def _mark(self, tokens: Int[Tensor, "batch pos"]) -> None:
        marks = (tokens == self.eos)[..., None], (tokens == self.bos)[..., None]
        for norm in self.norms:
            norm.marks = marks
