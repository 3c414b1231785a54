"""Low-rank approximation of a dense matrix (a ``.diff`` weight) to a rank or an energy, with its exact error.

Small ranks go through subspace iteration on ``M^T M`` (or ``M M^T``, the smaller one) with products in the matrix's own
precision; the last product is float64, so that ``||M||^2 - ||M V||^2`` is the true squared residual. High ranks and
small matrices go through the float64 Gram matrix and its full eigendecomposition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, Factors, as_float64, check_request, zero_factors
from lorasurgery.linalg.low_rank import rank_for_energy, tail_error
from lorasurgery.linalg.subspace import (
    EigenPairs,
    Operator,
    energy_eigenpairs,
    energy_rank,
    exact_eigenpairs,
    top_eigenpairs,
)

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

EXACT_SIZE = 400
"""Up to this smaller side a dense SVD is used."""
SMALL_SHARE = 8
"""Above it, subspace iteration serves ranks up to the smaller side / SMALL_SHARE, and the Gram matrix the rest."""
CHUNK = 1024
"""Rows converted to float64 at a time."""
TOLERANCE = 2e-4
"""Of the squared residual: how far from the optimum subspace iteration may stop (a pass over M costs more here)."""
FLOAT32_NOISE = 5e-7
"""What float32 products may hide, as a share of the squared norm; a smaller residual is looked for in float64."""


def dense_svd(
    matrix: AnyArray,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    dtype: DTypeLike = np.float32,
) -> Factors:
    """The truncated SVD of a dense matrix (out, in), as balanced factors of ``dtype``.

    ``rank``: at most so many; ``energy`` in (0, 1]: the smallest rank that keeps this share of the squared Frobenius
    norm; both: whichever is smaller; neither: the numerical rank. Exact for a smaller side up to 400 or a rank above an
    eighth of it (beyond 400 by the Gram matrix: values below 1e-6 of the largest count as zero); otherwise within 1e-4
    relative of the optimal error, and for an energy the rank may be one too high. ``relative_error`` is true to 1e-7
    of the whole norm in all cases. Raises ``ValueError`` for a rank or energy out of range, or a matrix that is not
    two-dimensional or holds NaN or infinity.
    """
    check_request(rank, energy)
    if matrix.ndim != 2 or not np.isfinite(matrix).all():
        raise ValueError(f"not a finite matrix: shape {matrix.shape}")
    if not matrix.any():
        return zero_factors(matrix.shape[0], matrix.shape[1], dtype)
    if min(matrix.shape) <= EXACT_SIZE:
        return _by_svd(matrix, rank, energy, dtype)
    if matrix.shape[0] < matrix.shape[1]:
        turned = _by_columns(matrix.T, rank, energy, seed, dtype)
        return Factors(turned.down.T, turned.up.T, turned.singular_values, turned.relative_error)
    return _by_columns(matrix, rank, energy, seed, dtype)


def _by_svd(matrix: AnyArray, rank: int | None, energy: float | None, dtype: DTypeLike) -> Factors:
    u, s, vt = np.linalg.svd(as_float64(matrix), full_matrices=False)
    kept = int(np.sum(s > 1e-14 * s[0]))
    kept = min(kept, rank or kept, kept if energy is None else rank_for_energy(s, energy))
    root = np.sqrt(s[:kept])
    up, down = u[:, :kept] * root, root[:, None] * vt[:kept]
    return Factors(up.astype(dtype), down.astype(dtype), s[:kept], tail_error(s, kept))


def _by_columns(tall: AnyArray, rank: int | None, energy: float | None, seed: int, dtype: DTypeLike) -> Factors:
    """``tall``: (out, in) with out >= in. Finds right singular vectors V, then ``tall V`` in float64."""
    total = sum(float(np.sum(as_float64(rows) ** 2)) for rows in _chunks(tall))
    for work_type in (np.float32, np.float64):
        right = _right_vectors(tall.astype(work_type, copy=False), rank, energy, seed, total)
        image = _times(tall, right)
        pairs = exact_eigenpairs(image.T @ image)
        if right is None or total - float(np.sum(pairs.values)) > 100 * FLOAT32_NOISE * total:
            break
    kept = int(np.sum(pairs.values > 1e-12 * pairs.values[0]))
    kept = min(kept, rank or kept, kept if energy is None else max(energy_rank(pairs.values, total, energy), 1))
    squares, turn = pairs.values[:kept], pairs.vectors[:, :kept]
    root = squares**0.25
    down = turn * root if right is None else right @ (turn * root)
    error = float(np.sqrt(max(total - float(np.sum(squares)), 0.0) / total))
    return Factors((image @ (turn / root)).astype(dtype), down.T.astype(dtype), np.sqrt(squares), error)


def _right_vectors(work: AnyArray, rank: int | None, energy: float | None, seed: int, total: float) -> Array | None:
    """Orthonormal ``V: (in, k)`` that hold the request, or None where the full decomposition is due."""
    noise = 1e-14 if work.dtype == np.float64 else FLOAT32_NOISE

    def normal(x: Array) -> Array:
        return as_float64(work.T @ (work @ x.astype(work.dtype)))

    operator = Operator(normal, work.shape[1], total, noise, TOLERANCE)
    limit = operator.size // SMALL_SHARE
    found: EigenPairs | None = None
    if rank is not None and rank <= limit:
        found = top_eigenpairs(operator, rank, seed=seed)
    elif energy is not None:
        found = energy_eigenpairs(operator, min(energy + 2 * noise, 1.0), seed=seed, limit=limit)
    return None if found is None else found.vectors


def _times(tall: AnyArray, right: Array | None) -> Array:
    """``tall @ right`` in float64, by rows so that no float64 copy of ``tall`` is made; ``tall`` itself for None."""
    if right is None:
        return as_float64(tall)
    return np.vstack([as_float64(rows) @ right for rows in _chunks(tall)])


def _chunks(matrix: AnyArray) -> list[AnyArray]:
    return [matrix[start : start + CHUNK] for start in range(0, len(matrix), CHUNK)]
