"""The nearest Kronecker product of a sum of Kronecker products of the same two shapes, from their factors alone.

Rearranged (see :mod:`lorasurgery.linalg.nearest_kronecker`), ``sum_i kron(a_i, b_i)`` is ``sum_i vec(a_i) vec(b_i)^T``: a
matrix in factors, whose leading singular pair is the answer and whose other singular values are the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import as_float64
from lorasurgery.linalg.low_rank import factored_svd, relative_error
from lorasurgery.linalg.nearest_kronecker import NearestKronecker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.linalg.factors import AnyArray, Array

Term = tuple["AnyArray", "AnyArray"]
"""(a, b); all a of one shape, and all b."""


def nearest_of_sum(terms: Sequence[Term]) -> NearestKronecker:
    """``w1`` and ``w2`` of the terms' shapes; the error is the optimum. Raises ``ValueError`` for NaN and infinity."""
    (first, second), (left, values, right) = terms[0], factored_svd(*_stacked(terms))
    root = np.sqrt(values[0])
    w1, w2 = (left[:, 0] * root).reshape(first.shape), (root * right[0]).reshape(second.shape)
    return NearestKronecker(w1, w2, None, float(np.sum(values[1:] ** 2)))


def error_of_sum(terms: Sequence[Term], w1: AnyArray, w2: AnyArray) -> float:
    """``||sum_i kron(a_i, b_i) - kron(w1, w2)||_F`` over the norm of the sum, for factors as stored."""
    return relative_error(*_stacked(terms), as_float64(w1).reshape(-1, 1), as_float64(w2).reshape(1, -1))


def norm_of_sum(terms: Sequence[Term]) -> float:
    """``||sum_i kron(a_i, b_i)||_F^2``."""
    left, right = _stacked(terms)
    return float(np.sum((left.T @ left) * (right @ right.T)))


def _stacked(terms: Sequence[Term]) -> tuple[Array, Array]:
    """(o1 i1, terms) and (terms, o2 n2)."""
    left = np.stack([as_float64(a).reshape(-1) for a, _ in terms], axis=1)
    return left, np.stack([as_float64(b).reshape(-1) for _, b in terms])
