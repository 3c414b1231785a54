"""Low-rank factors of Kronecker products (LoKr) and of stacks of them (a fused q, k, v), without the dense matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, Factors, as_float64, check_request, zero_factors
from lorasurgery.linalg.kronecker_stack import KroneckerPart, KroneckerStack, ZeroRows, kronecker_stack
from lorasurgery.linalg.subspace import (
    EigenPairs,
    Operator,
    energy_eigenpairs,
    energy_rank,
    exact_eigenpairs,
    top_eigenpairs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike

__all__ = ["KroneckerPart", "ZeroRows", "stacked_kronecker_svd", "to_low_rank"]

EXACT_SIZE = 1000
"""Up to this size the Gram matrix is always decomposed in full (0.2 s)."""
SMALL_SHARE = 8
"""Above it, subspace iteration is used for ranks up to size / SMALL_SHARE, where it is the faster of the two."""
ZERO_SHARE = 3e-13
"""Eigenvalues (squared singular values) below this share of the largest are rounding and never kept."""


def to_low_rank(
    w1_left: AnyArray, w1_right: AnyArray | None, w2_left: AnyArray, w2_right: AnyArray | None
) -> tuple[Array, Array]:
    """Exact factors ``up = kron(w1_left, w2_left)``, ``down = kron(w1_right, w2_right)`` of a Kronecker product.

    ``w1_left: (o1, r1)``, ``w1_right: (r1, i1)``, ``w2_left: (o2, r2)``, ``w2_right: (r2, i2, ...)`` -> ``up: (o1 o2,
    r1 r2)``, ``down: (r1 r2, i1 i2, ...)``, float64 (exact for float32 input); the trailing axes are a convolution
    kernel. A right factor of None means that the left one is the full matrix, (o1, i1) or (o2, i2, ...): it is paired
    with the identity on its smaller side. Raises ``ValueError`` if the shapes do not fit together.
    """
    left1, right1 = _pair(w1_left, w1_right)
    left2, right2 = _pair(w2_left, w2_right)
    if right1.ndim != 2:
        raise ValueError(f"w1 is a matrix, not of shape {right1.shape}")
    down = right1[:, None, :, None].reshape(len(right1), 1, -1, 1, *(1,) * (right2.ndim - 2)) * right2[None, :, None]
    kernel = right2.shape[2:]
    rank, width = len(right1) * len(right2), right1.shape[1] * right2.shape[1]
    return as_float64(np.kron(left1, left2)), down.reshape(rank, width, *kernel)


def stacked_kronecker_svd(
    parts: Sequence[KroneckerPart | ZeroRows],
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    dtype: DTypeLike = np.float32,
) -> Factors:
    """The truncated SVD of ``[kron(w1_1, w2_1); kron(w1_2, w2_2); ...]``: one LoRA for a fused weight.

    ``rank``: at most so many; ``energy`` in (0, 1]: the smallest rank that keeps this share of the squared Frobenius
    norm; both: whichever is smaller; neither: the exact numerical rank. With ``size = min(in, sum rank(w1) rank(w2))``:

    - size up to 1000: eigendecomposition of the Gram matrix in float64, itself made from tiny Kronecker products.
      Optimal to rounding.
    - larger, rank up to size / 8: subspace iteration on the implicit operator. The error is within 1e-5 relative of
      the optimum; ``singular_values`` are approached from below.
    - larger, energy: the same with a growing rank (it may end one above the smallest possible), and the full
      eigendecomposition where more than size / 8 is needed: exact, O(size^3), about 10 s for 3840.

    Squared errors are differences from ``sum ||w1||^2 ||w2||^2``, known exactly: ``relative_error`` is true to 1e-7 of
    the whole norm. The factors are balanced, of ``dtype``. All-zero parts give rank 1, error 0. Raises ``ValueError``
    for a rank or energy out of range and as ``kronecker_stack`` does.
    """
    check_request(rank, energy)
    stack = kronecker_stack(parts)
    total = stack.energy
    if total == 0.0:
        return zero_factors(stack.out, stack.width, dtype)
    found = _eigenpairs(stack, rank, energy, seed)
    kept = _kept(found.values, total, rank, energy)
    values, vectors = found.values[:kept], found.vectors[:, :kept]
    up, down = _balanced(stack, EigenPairs(values, vectors), np.result_type(dtype, np.float32))
    missing = max(total - float(np.sum(values)), float(np.sum(found.values[kept:])), 0.0)
    error = float(np.sqrt(missing / total))
    return Factors(up.astype(dtype, copy=False), down.astype(dtype, copy=False), np.sqrt(values), error)


def _pair(left: AnyArray, right: AnyArray | None) -> tuple[Array, Array]:
    """(left, right) in float64; a full matrix is paired with the identity on its smaller side."""
    if right is None:
        full = as_float64(left)
        rows, columns = full.shape[0], full.shape[1]
        if full.ndim > 2 or rows <= columns:
            return np.eye(rows), full
        return full, np.eye(columns)
    if left.ndim != 2 or right.ndim < 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"{left.shape} and {right.shape} are not (out, rank) and (rank, in, ...)")
    return as_float64(left), as_float64(right)


def _eigenpairs(stack: KroneckerStack, rank: int | None, energy: float | None, seed: int) -> EigenPairs:
    """Eigenpairs of ``C C^T`` or ``C^T C``, whichever is smaller: enough of them for the request."""
    by_rows = stack.inner <= stack.width
    size = min(stack.inner, stack.width)

    def implicit(x: Array) -> Array:
        return stack.core(stack.core_t(x)) if by_rows else stack.core_t(stack.core(x))

    operator = Operator(implicit, size, stack.energy)
    limit = size // SMALL_SHARE if size > EXACT_SIZE else 0
    found: EigenPairs | None = None
    if rank is not None and rank <= limit:
        found = top_eigenpairs(operator, rank, seed=seed)
    elif energy is not None:
        found = energy_eigenpairs(operator, energy, seed=seed, limit=limit)
    if found is None:
        found = exact_eigenpairs(stack.row_gram() if by_rows else stack.column_gram())
    return found


def _balanced(stack: KroneckerStack, pairs: EigenPairs, dtype: DTypeLike) -> tuple[AnyArray, AnyArray]:
    """``U sqrt(S)`` and ``sqrt(S) V^T`` from the eigenpairs of the smaller Gram matrix; large products in ``dtype``."""
    root = pairs.values**0.25
    grown, shrunk = pairs.vectors * root, pairs.vectors / root
    if stack.inner <= stack.width:
        return stack.lift(grown.astype(dtype)), stack.core_t(shrunk.astype(dtype)).T
    return stack.lift(stack.core(shrunk).astype(dtype)), grown.T


def _kept(values: Array, total: float, rank: int | None, energy: float | None) -> int:
    """How many of the eigenvalues the request keeps: at least 1, none that are rounding."""
    kept = int(np.sum(values > ZERO_SHARE * values[0]))
    if rank is not None:
        kept = min(kept, rank)
    if energy is not None:
        kept = min(kept, energy_rank(values, total, energy))
    return max(kept, 1)
