"""What a low-rank approximation returns, and the array types of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

AnyArray: TypeAlias = NDArray[Any]
"""An array of any real dtype as a file holds it (float16, bfloat16, float32, ...)."""

Array: TypeAlias = NDArray[np.float64]
"""A float64 array: what this package computes in."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A low-rank approximation ``up @ down`` of a matrix, with its error.

    The factors are balanced: ``up = U sqrt(S)`` and ``down = sqrt(S) V^T``, so both have the same column (row) norms.
    """

    up: AnyArray
    """(out, rank)"""
    down: AnyArray
    """(rank, in)"""
    singular_values: Array
    """(rank,), descending: those kept"""
    relative_error: float
    """``||matrix - up @ down||_F / ||matrix||_F`` before the factors are rounded to their dtype; 0 for a zero matrix"""

    @property
    def rank(self) -> int:
        """The number of columns of ``up``; at least 1."""
        return int(self.up.shape[1])


def zero_factors(rows: int, columns: int, dtype: DTypeLike) -> Factors:
    """Rank-1 factors of a zero matrix (rows, columns): a file cannot hold rank 0."""
    return Factors(np.zeros((rows, 1), dtype), np.zeros((1, columns), dtype), np.zeros(1), 0.0)


def as_float64(array: AnyArray) -> Array:
    """The same values in float64 (exact for every dtype an adapter is stored in); no copy if they are already."""
    return np.asarray(array, dtype=np.float64)


def check_request(rank: int | None, energy: float | None) -> None:
    """Raise ``ValueError`` unless ``rank`` is None or at least 1 and ``energy`` is None or in (0, 1]."""
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ValueError(f"energy must be above 0 and at most 1, not {energy}")
