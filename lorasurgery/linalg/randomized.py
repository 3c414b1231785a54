"""Low-rank approximation of a dense matrix (a ``.diff`` weight) to a rank or an energy, with its exact error.

Small ranks go through subspace iteration on ``M^T M`` (or ``M M^T``, the smaller one) with products in the matrix's own
precision; the last product is float64, so that ``||M||^2 - ||M V||^2`` is the true squared residual. High ranks and
small matrices go through the float64 Gram matrix and its full eigendecomposition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from lorasurgery.linalg.factors import AnyArray, Array, Factors, as_float64, check_request, zero_factors
from lorasurgery.linalg.low_rank import rank_for_energy, tail_error
from lorasurgery.linalg.subspace import EigenPairs, energy_eigenpairs, energy_rank, top_eigenpairs

EXACT_SIZE = 400
"""Up to this smaller side a dense SVD is used."""
SMALL_SHARE = 8
"""Above it, subspace iteration serves ranks up to the smaller side / SMALL_SHARE, and the Gram matrix the rest."""
CHUNK = 1024
"""Rows converted to float64 at a time."""


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
        return zero_factors(*matrix.shape, dtype)
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
    pairs = _right_vectors(tall, rank, energy, seed, total)
    image = np.vstack([as_float64(rows) @ pairs.vectors for rows in _chunks(tall)])
    squares, turn = np.linalg.eigh(image.T @ image)
    squares, turn = np.maximum(squares[::-1], 0.0), turn[:, ::-1]
    kept = int(np.sum(squares > 1e-12 * squares[0]))
    kept = max(min(kept, rank or kept, kept if energy is None else energy_rank(squares, total, energy)), 1)
    root = squares[:kept] ** 0.25
    turn = turn[:, :kept]
    up, down = image @ (turn / root), (pairs.vectors @ (turn * root)).T
    error = float(np.sqrt(max(total - float(np.sum(squares[:kept])), 0.0) / total))
    return Factors(up.astype(dtype), down.astype(dtype), np.sqrt(squares[:kept]), error)


def _right_vectors(tall: AnyArray, rank: int | None, energy: float | None, seed: int, total: float) -> EigenPairs:
    size = tall.shape[1]
    limit = size // SMALL_SHARE
    work = tall if tall.dtype in (np.float32, np.float64) else tall.astype(np.float32)

    def normal(x: Array) -> Array:
        return as_float64(work.T @ (work @ x.astype(work.dtype)))

    found: EigenPairs | None = None
    if rank is not None and rank <= limit:
        found = top_eigenpairs(normal, size, rank, trace=total, seed=seed, tolerance=DENSE_TOLERANCE)
    elif energy is not None:
        found = energy_eigenpairs(normal, size, energy, trace=total, seed=seed, limit=limit)
    return found or EigenPairs(np.zeros(size), np.eye(size))


def _chunks(matrix: AnyArray) -> list[AnyArray]:
    return [matrix[start : start + CHUNK] for start in range(0, len(matrix), CHUNK)]
