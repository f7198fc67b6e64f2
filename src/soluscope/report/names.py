"""Names of arms for people, such as `SoLU + LN, kappa 41.9`, the order of the arms on the page, and names of files.

The names follow from the stored labels and settings of the arms. An arm without a label keeps its identifier.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from typing import Any

from soluscope.report.findings import at_best_rate, settings
from soluscope.results import (
    ChoicePoint,
    Comparison,
    Located,
    Multiplier,
    NoChoice,
    OfRemoval,
    Record,
    Records,
    ScalingCurve,
    Setting,
    Step,
)
from soluscope.text import brief_number

KINDS = {"static": ", static gain"}
"""Kinds of gain by role, as they follow a label."""
ORDER = ("plain", "static", "per_token", "other", "baseline")
"""Roles in the order of their arms on the page: the steps from plain SoLU to LayerNorm, others, the baselines."""
_SETTING = re.compile(r"\b[a-z]+\.([a-z_]+)=")
LONGEST = 80
"""Largest number of characters of a file's name."""


def arms(records: Sequence[Record]) -> dict[str, str]:
    """Return the name of each arm by its identifier, in the order of the arms on the page.

    The learning rate follows the name of an arm whose rate was not chosen. If two arms would have the same name,
    the identifier follows in parentheses.
    """
    known = settings(records)
    compared = settings(at_best_rate(records)).keys()
    names = {
        arm: _name(known[arm], list(known.values())) for arm in sorted(known, key=_rank(known))
    }
    for arm, name in names.items():
        if arm not in compared and name != arm and "lr" in known[arm].values:
            names[arm] = f"{name}, rate {brief_number(known[arm].values['lr'])}"
    uses = Counter(names.values())
    uses_here = Counter(name for arm, name in names.items() if arm in compared)

    def is_alone(arm: str) -> bool:
        return (uses_here if arm in compared else uses)[names[arm]] == 1

    return {
        arm: name if name == arm or is_alone(arm) else f"{name} ({arm})"
        for arm, name in names.items()
    }


def named(records: Sequence[Record]) -> list[Record]:
    """Return the records with names in place of identifiers, in the order of the arms on the page.

    Notes and texts on choices name the arms too. Run folders keep their names.
    """
    of_arm = arms(records)
    # An arm with an entropy penalty has the role "other"; the other arms of its variant come later and name it.
    by_role = sorted(settings(records).values(), key=lambda each: each.role != "other")
    of_variant = {
        each.variant: each.label + KINDS.get(each.role, "") for each in by_role if each.label
    }
    if len(set(of_variant.values())) < len(of_variant):
        of_variant = {}
    places = {name: place for place, name in enumerate(of_arm.values())}
    in_text = _in_text(of_arm)
    result = [_named(record, of_arm, of_variant, in_text) for record in records]
    return Records(sorted(result, key=lambda record: places.get(record.arm, len(places))))


def _in_text(of_arm: Mapping[str, str]) -> Callable[[str], str]:
    """Return a function that puts arms' names in place of their identifiers in a text.

    A setting such as `mid.kappa=4e-5` becomes `kappa 4e-5`.
    """
    known = "|".join(map(re.escape, sorted(of_arm, key=len, reverse=True)))
    arm = re.compile(rf"(?<![\w.-])(?:{known or '(?!)'})(?![\w-]|\.\w)")

    def replaced(text: str) -> str:
        return _SETTING.sub(r"\1 ", arm.sub(lambda found: of_arm[found[0]], text))

    return replaced


def _named(
    record: Record,
    of_arm: Mapping[str, str],
    of_variant: Mapping[str, str],
    in_text: Callable[[str], str],
) -> Record:
    def arm(name: str) -> str:
        return of_arm.get(name, name)

    def variant(name: str) -> str:
        return of_variant.get(name, name)

    changed: dict[str, Any] = {"arm": arm(record.arm), "variant": variant(record.variant)}
    if isinstance(record, Comparison):
        changed["against"], changed["tuned_arm"] = arm(record.against), arm(record.tuned_arm)
        changed["step"] = tuple(map(variant, record.step))
        changed["note"], changed["choice"] = in_text(record.note), in_text(record.choice)
    elif isinstance(record, ScalingCurve):
        changed["arms"] = tuple(map(arm, record.arms))
    elif isinstance(record, Located | OfRemoval | Multiplier):
        changed["against"] = arm(record.against)
    elif isinstance(record, ChoicePoint):
        changed["chosen_arm"], changed["note"] = arm(record.chosen_arm), in_text(record.note)
    elif isinstance(record, NoChoice):
        changed["arms"], changed["note"] = tuple(map(arm, record.arms)), in_text(record.note)
    elif isinstance(record, Setting):
        changed["twin"], changed["rate"] = variant(record.twin), in_text(record.rate)
        changed["after"] = arm(record.after)
        changed["chain"] = tuple(Step(variant(step.variant), step.adds) for step in record.chain)
    if all(getattr(record, name) == value for name, value in changed.items()):
        return record
    return replace(record, **changed)


def _name(of: Setting, known: Sequence[Setting]) -> str:
    if not of.label:
        return of.arm
    alike = [each for each in known if (each.variant, each.size) == (of.variant, of.size)]

    def differs(setting: str) -> bool:
        return setting in of.values and len({each.values.get(setting) for each in alike}) > 1

    def is_named(setting: str) -> bool:
        # kappa decides whether the gain follows the token or is pinned, so a reader needs it even if there is one
        return differs(setting) or (setting == "kappa" and setting in of.values)

    penalty = of.values.get("entropy_penalty")
    setting = {"static": "gain", "per_token": "kappa"}.get(of.role, "")
    if penalty:
        setting = next((name for name in ("gain", "kappa") if name in of.values), "")
    name = of.label
    if is_named(setting):
        name += f", {'static gain' if setting == 'gain' else setting} {brief_number(of.values[setting])}"
    else:
        name += KINDS.get(of.role, "")
    if penalty:
        name += f", entropy penalty {brief_number(penalty)}"
    if differs("mlp_out_scale"):
        name += f", alpha {brief_number(of.values['mlp_out_scale'])}"
    return name


def _rank(known: Mapping[str, Setting]) -> Callable[[str], tuple[Any, ...]]:
    """Return the sort key of an arm: its size in the order of the records, its role, and its settings."""
    sizes = [*dict.fromkeys(each.size for each in known.values())]

    def key(arm: str) -> tuple[Any, ...]:
        of = known[arm]
        role = ORDER.index(of.role) if of.role in ORDER else len(ORDER)
        names = ("kappa", "gain", "mlp_out_scale", "entropy_penalty", "lr")
        values = (of.values.get(name, 0.0) for name in names)
        return sizes.index(of.size), role, len(of.chain), of.variant, *values, arm

    return key


def file_name(text: str, taken: Collection[str] = ()) -> str:
    """Return a file's name made of the words of `text`, in letters that every system allows, without an ending.

    Args:
        text: words, which may come from data.
        taken: names that other files have; upper and lower case do not distinguish names.
    """
    plain = re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[:LONGEST].rstrip("-.") or "unnamed"
    lower = {each.lower() for each in taken}
    numbered = chain([plain], (f"{plain}-{n}" for n in count(2)))
    return next(name for name in numbered if name.lower() not in lower)
