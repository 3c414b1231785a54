"""The Tucker product nearest to a convolution: ``delta[p, r, k] = sum_ij up[p, i] mid[i, j, k] down[j, r]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import as_float64

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import AnyArray, Array

ROUNDS, ENOUGH = 50, 1e-10
"""At most so many rounds; one that adds less than this share of the kept squared norm is the last."""


@dataclass(frozen=True, slots=True)
class NearestTucker:
    """``up: (out, r)``, ``mid: (r, r, kernel)``, ``down: (r, in)``, all of the same norm."""

    up: Array
    mid: Array
    down: Array
    error: float
    """``||delta - product||_F^2``"""


def nearest_tucker(delta: AnyArray, rank: int) -> NearestTucker:
    """Of ``delta: (out, in, kernel)``, both ranks ``min(rank, out, in)``.

    Higher-order orthogonal iteration (De Lathauwer 2000) from the higher-order SVD, whose squared error is at most twice
    the best one; every round lowers it. Raises ``ValueError`` for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    whole = as_float64(delta)
    size = min(rank, *whole.shape[:2])
    total, kept = float(np.sum(whole**2)), -1.0
    right = _leading(whole.swapaxes(0, 1), size)
    left = right
    small = np.zeros((size, size, whole.shape[2]))
    for _ in range(ROUNDS):
        left = _leading(np.einsum("pck,cj->pjk", whole, right, optimize=True), size)
        by_left = np.einsum("pck,pi->cik", whole, left, optimize=True)
        right = _leading(by_left, size)
        small = np.einsum("cik,cj->ijk", by_left, right, optimize=True)
        before, kept = kept, float(np.sum(small**2))
        if kept <= before * (1 + ENOUGH):
            break
    share = max(kept, 0.0) ** (1 / 6) or 1.0
    return NearestTucker(left * share, small / share**2, right.T * share, max(total - kept, 0.0))


def _leading(block: Array, count: int) -> Array:
    """The leading left singular vectors of the first unfolding, (n, count), by its Gram matrix."""
    flat = block.reshape(block.shape[0], -1)
    found: Array = np.linalg.eigh(flat @ flat.T)[1][:, ::-1][:, :count]
    return found
