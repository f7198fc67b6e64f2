"""The search for the least loss on a surface of settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from soluscope.errors import UserError
from soluscope.launching.surface import Axis, Place, next_places

RATE = Axis("train.lr", (0.001, 0.004), least=1e-4, most=0.064)
ALPHA = Axis("model.mlp_out_scale", (0.0625, 1.0), least=2**-8, most=4.0, coarse=4.0)


def search(
    axes: list[Axis], loss: Callable[[Place], float]
) -> tuple[dict[Place, float], list[int]]:
    losses: dict[Place, float] = {}
    rounds = []
    while places := next_places(axes, losses):
        assert len(set(places)) == len(places)
        assert not losses.keys() & set(places)
        rounds.append(len(places))
        losses |= {place: loss(place) for place in places}
    return losses, rounds


def bowl(*at: float, skew: float = 0.0) -> Callable[[Place], float]:
    """Return a convex function of the logarithms with its least value at `at`."""

    def loss(place: Place) -> float:
        off = [math.log(value / best) for value, best in zip(place, at, strict=True)]
        return sum(each**2 for each in off) + skew * math.prod(off)

    return loss


@pytest.mark.parametrize("rate", [0.0005, 0.002, 0.004, 0.032])
def test_the_best_point_is_found_and_has_a_worse_one_on_either_side(rate: float) -> None:
    losses, _ = search([RATE], bowl(rate))
    best = min(losses, key=losses.__getitem__)
    assert best == (rate,)
    assert {(rate / 2,), (rate * 2,)} <= losses.keys()


def test_a_best_point_at_the_edge_of_the_grid_makes_the_grid_grow() -> None:
    losses, rounds = search([RATE], bowl(0.06))
    assert min(losses, key=losses.__getitem__) == (0.064,)  # the end of the axis
    assert max(losses) == (0.064,)
    assert rounds == [2, 1, 1, 1]  # the grid, 0.016, 0.064, then 0.032 at the fine distance


def test_two_axes_are_searched_together() -> None:
    losses, _ = search([RATE, ALPHA], bowl(0.008, 0.125, skew=0.8))
    best = min(losses, key=losses.__getitem__)
    whole = itertools.product([0.001 * 2**i for i in range(-3, 7)], [2.0**i for i in range(-8, 3)])
    loss = bowl(0.008, 0.125, skew=0.8)
    assert losses[best] == pytest.approx(min(map(loss, whole)), abs=1e-12)
    assert len(losses) < 40  # of 110


def test_the_search_continues_from_what_is_there_in_any_order() -> None:
    loss = bowl(0.016, 0.5)
    at_once, _ = search([RATE, ALPHA], loss)
    one_by_one: dict[Place, float] = {}
    while places := next_places([RATE, ALPHA], one_by_one):
        one_by_one[places[-1]] = loss(places[-1])
    assert min(one_by_one, key=one_by_one.__getitem__) == min(at_once, key=at_once.__getitem__)


def test_a_diverged_point_is_the_worst() -> None:
    losses, _ = search([RATE], lambda place: math.inf if place[0] > 0.003 else -place[0])
    assert min(losses, key=losses.__getitem__) == (0.002,)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"start": (1e-5,)}, "outside"),
        ({"start": (0.004, 0.001)}, "ascending"),
        ({"fine": 1.0}, "1 < fine <= coarse"),
        ({"fine": 8.0}, "1 < fine <= coarse"),
    ],
)
def test_a_bad_axis_is_refused(values: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Axis(**({"key": "train.lr", "start": (0.001,), "least": 1e-4, "most": 0.1} | values))
