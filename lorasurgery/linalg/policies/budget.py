"""One budget for all modules: the best singular values of the whole file, best first, until the budget is spent.

Each singular value has a score and a cost (of one rank of its module, in bytes or parameters). Taking them by score is
one global threshold on the score. With the score ``S^2 / cost`` that is the greedy solution of the knapsack that minimises
the squared error of the file, ``sum of S^2 left out``, and it is at most one singular value away from the optimum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lorasurgery.linalg.factors import AnyArray, Array

    Indices = NDArray[np.intp]


def per_cost(values: AnyArray, cost: float) -> Array:
    """``S^2 / cost``: squared error that one unit of the budget saves."""
    squares: Array = np.asarray(values, np.float64) ** 2 / cost
    return squares


def within(scores: Sequence[AnyArray], threshold: float) -> list[Indices]:
    """For each module, the positions whose score is above ``threshold``, in order; not a prefix if scores are not sorted."""
    return [np.flatnonzero(np.asarray(own) > threshold) for own in scores]


def fill(
    scores: Sequence[AnyArray], costs: Sequence[float], budget: float, floors: Sequence[int]
) -> tuple[list[Indices], float]:
    """The positions each module keeps so that ``sum_m costs[m] * kept_m <= budget``, and the threshold that decided.

    First each module's ``floors[m]`` best. Then by score, until one no longer fits (the threshold is the last score
    taken); then whatever still fits, best first, so that less than the cheapest rank left is unspent. Equal scores are
    taken in order. Raises ``ValueError`` when the floors alone exceed the budget.
    """
    taken = [np.zeros(len(own), bool) for own in scores]
    for own, mask, floor in zip(scores, taken, floors, strict=True):
        mask[np.argsort(-np.asarray(own, np.float64), kind="stable")[:floor]] = True
    left = budget - sum(cost * int(mask.sum()) for cost, mask in zip(costs, taken, strict=True))
    if left < 0:
        raise ValueError(f"the smallest ranks need {budget - left:.0f}, the budget is {budget:.0f}")
    flat = np.concatenate([np.asarray(own, np.float64)[~mask] for own, mask in zip(scores, taken, strict=True)])
    modules = np.repeat(np.arange(len(taken)), [int((~mask).sum()) for mask in taken])
    places = np.concatenate([np.flatnonzero(~mask) for mask in taken])
    order = np.argsort(-flat, kind="stable")
    order = order[flat[order] > -np.inf]
    spent = np.cumsum(np.asarray(costs, np.float64)[modules[order]])
    first = int(np.searchsorted(spent, left, side="right"))
    for at in order[:first]:
        taken[modules[at]][places[at]] = True
    left -= float(spent[first - 1]) if first else 0.0
    cheapest = min(costs, default=0.0)
    for at in order[first:]:
        if left < cheapest:
            break
        if costs[modules[at]] <= left:
            taken[modules[at]][places[at]] = True
            left -= costs[modules[at]]
    threshold = float(flat[order[first - 1]]) if first else float("inf")
    return [np.flatnonzero(mask) for mask in taken], threshold
