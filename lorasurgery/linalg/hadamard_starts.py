"""Arms to begin from: LoRAs beside an arm of ones, the arms' own SVDs, LoHas in closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64
from lorasurgery.linalg.hadamard_segre import MOST, closed_form
from lorasurgery.linalg.hadamard_sweep import Arms
from lorasurgery.linalg.randomized import EXACT_SIZE, dense_svd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.linalg.hadamard_target import Approximated, Leading

SPREADS: Sequence[tuple[float, float]] = ((0.1, 0.0), (1.0, 1.0), (0.1, 0.1), (0.3, 0.3)) * 2
"""Sizes of what is random in the second arm, its columns and its rows, one start each; the first still is the LoRA."""
COUNTS = ((12, 2e7), (6, 3e8), (2, np.inf))
"""Starts, and the most operations of a sweep with which there are so many: 1280 x 1280 has 1e8 at rank 4, 2e9 at rank 16."""
GAP = 2.0
"""A singular value so many times the next one ends a LoHa's: those of noise and of trained differences decay slowly."""
ROUNDING = 1e-12
"""Of the largest singular value: smaller ones are zeros."""


def values_wanted(rank: int, shape: tuple[int, int]) -> int:
    """How many singular values tell whether a matrix looks like a LoHa of ``rank``, where they cost little."""
    smaller = min(shape)
    known = rank if smaller <= EXACT_SIZE else min(rank, MOST)
    return max(rank, min(known * known + 1, smaller))


def squared_tail(of: Approximated, leading: Leading, rank: int) -> float | None:
    """Of a matrix that looks like a LoHa of the rank, with a gap behind ``rank^2`` singular values; None of another.

    ``||A||_F^2`` outside of those singular vectors: no LoHa of the rank has a smaller squared error.
    """
    count = rank * rank
    if not 1 < count < min(values_wanted(rank, of.shape), len(leading.values) + 1):
        return None
    after = leading.values[count] if count < len(leading.values) else 0.0
    if not leading.values[count - 1] > max(GAP * after, ROUNDING * leading.values[0]):
        return None
    return max(of.norm - float(np.sum(leading.values[:count] ** 2)), 0.0)


def in_closed_form(of: Approximated, leading: Leading, rank: int, rng: np.random.Generator) -> list[Arms]:
    """Candidates of that rank; none if the matrix is too small for it, or has no such rank itself."""
    count = rank**2
    if len(leading.values) < count:
        return []
    return closed_form(of, leading.u[:, :count], leading.v[:, :count], rank, rng)


def starts_worth(shape: tuple[int, int], rank: int) -> int:
    """How many starts are tried: fewer where a sweep costs more."""
    cost = 4 * shape[0] * shape[1] * rank**2 + sum(shape) * rank**4
    return next(count for count, most in COUNTS if cost <= most)


def beside_ones(leading: Leading, rank: int, rng: np.random.Generator, spread: tuple[float, float]) -> Arms:
    """The LoRA: its factors beside an arm of ones, whose other columns and rows are random."""
    root = np.sqrt(leading.values[:rank])
    first, second = _wide(leading.u[:, :rank] * root, rank, 1), _wide((leading.v[:, :rank] * root).T, rank, 0)
    left, right = spread[0] * rng.standard_normal(first.shape), spread[1] * rng.standard_normal(second.shape)
    left[:, 0], right[0] = 1.0, 1.0
    return Arms(first, second, left, right)


def split(whole: Array, rank: int) -> Arms:
    """The truncated SVDs of ``sign(A) |A|^(1/2)`` and ``|A|^(1/2)``, which multiply to A at full rank."""
    root = np.sqrt(np.abs(whole))
    arms = [dense_svd(arm, rank=rank, dtype=np.float64) for arm in (np.sign(whole) * root, root)]
    return Arms(*(_wide(side, rank, axis) for arm in arms for axis, side in ((1, arm.up), (0, arm.down))))


def with_room(arms: Arms, rank: int, rng: np.random.Generator) -> Arms:
    """The same product at a higher rank: random columns beside rows of zeros, which the sweeps may fill."""
    missing = rank - arms.w1_a.shape[1]
    left = []
    for arm in (arms.w1_a, arms.w2_a):
        size = float(np.sqrt(np.mean(arm**2)))
        left.append(np.hstack([arm, size * rng.standard_normal((len(arm), missing))]))
    return Arms(left[0], _wide(arms.w1_b, rank, 0), left[1], _wide(arms.w2_b, rank, 0))


def _wide(side: AnyArray, rank: int, axis: int) -> Array:
    """With zeros where the matrix had fewer than ``rank`` singular values."""
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - side.shape[axis])
    return np.pad(as_float64(side), missing)
