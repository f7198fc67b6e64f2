"""Settings in which the arms of a study differ: the settings that the arms are for, and all others.

An arm claims an effect of its variant and of the variant's parameters; some settings are tuned for each arm. If two
arms of one size also differ in another setting, such as the weight decay, that may have caused their difference.

Source: protocol.md section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from soluscope.config import Config, determining

CLAIMED = ("variant", "mid", "train.lr", "model.mlp_out_scale")
"""Settings and sections that an arm is for, or that are tuned for each arm."""
NOT_OF_ARMS = ("seed", "size")
"""Settings that do not distinguish arms: the seed, and the name of a preset whose settings are compared."""
SIZE = ("model.d_model", "model.d_mlp", "model.n_layers", "model.n_heads", "model.ctx", "train.steps",
        "train.batch_size")  # fmt: skip
"""Settings of a size. Arms of different sizes are never compared."""


@dataclass(frozen=True)
class Apart:
    """Names of the settings in which arms of one size differ, sorted."""

    claimed: tuple[str, ...]
    unclaimed: tuple[str, ...]


def apart(configs: Iterable[Config]) -> Apart:
    """Return the settings in which the arms of a study differ.

    A setting that only some variants have, such as mid.gain, differs between arms with it and without it.
    """
    by_size: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for config in configs:
        settings = determining(config)
        size = tuple(settings.get(key) for key in SIZE)
        by_size.setdefault(size, []).append(settings)
    differing = {
        key
        for of_one in by_size.values()
        for key in {key for settings in of_one for key in settings}
        if len({repr(settings.get(key)) for settings in of_one}) > 1
    }
    names = sorted(differing - set(NOT_OF_ARMS))
    claimed = [each for each in names if each in CLAIMED or each.partition(".")[0] in CLAIMED]
    return Apart(tuple(claimed), tuple(each for each in names if each not in claimed))
