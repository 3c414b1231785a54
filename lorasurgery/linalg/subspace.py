"""The largest eigenpairs of a positive semidefinite operator that is only known as ``x -> G x``.

Chebyshev-filtered subspace iteration (Zhou and Saad 2007) from a seeded Gaussian start with oversampling (Halko,
Martinsson and Tropp 2011): each round multiplies the block by a polynomial in G that is at most 1 on the unwanted part
of the spectrum and grows fastest above it, then orthonormalises and solves the projected problem. Rounds go on until the
gains of the last two, continued as a geometric series, promise less than ``tolerance`` of what is missing, so flat
spectra get more of them. Eigenvalues approach from below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from lorasurgery.linalg.factors import Array
from lorasurgery.linalg.low_rank import rank_for_energy

Operator: TypeAlias = Callable[[Array], Array]

OVERSAMPLE = 32
TOLERANCE = 2e-6
MAX_ROUNDS = 40
SLOWEST = 0.99
"""The rate of convergence that is assumed where two gains are not known yet."""
MAX_DEGREE = 12
LOG_GAIN = 16.0
"""The filter amplifies the largest eigenvector by at most e^16 / 2: more would hide the others in rounding."""
FIRST_RANK = 64
"""Where the search for the rank that meets an energy target begins."""


@dataclass(frozen=True, slots=True)
class EigenPairs:
    """``vectors: (size, k)`` orthonormal, ``values: (k,)`` descending, not negative."""

    values: Array
    vectors: Array


def exact_eigenpairs(gram: Array) -> EigenPairs:
    """All eigenpairs of a symmetric positive semidefinite matrix (size, size); O(size^3), error ``eps ||G||``."""
    values, vectors = np.linalg.eigh(gram)
    return EigenPairs(np.maximum(values[::-1], 0.0), vectors[:, ::-1])


def top_eigenpairs(
    apply: Operator, size: int, rank: int, *, trace: float, seed: int, tolerance: float = TOLERANCE, start: Array | None = None
) -> EigenPairs:
    """The ``rank`` largest eigenpairs of G (size, size), or fewer if G has a smaller numerical rank.

    ``apply``: (size, l) -> (size, l), ``trace``: trace of G, ``start``: (size, any) columns to begin with. Stops when
    further rounds promise less than ``tolerance * (trace - sum of the values)``, so that the squared residual of the
    projection is within about that relative distance of the optimum, or after ``MAX_ROUNDS``. Same seed, same result.
    """
    columns = min(size, rank + max(OVERSAMPLE, rank // 2))
    basis = orthonormal(apply(_start_block(size, columns, seed, start)))
    captured = gain = 0.0
    for number in range(MAX_ROUNDS):
        image = apply(basis)
        projected = basis.T @ image
        found = exact_eigenpairs((projected + projected.T) / 2)
        turned, turned_image = basis @ found.vectors, image @ found.vectors
        total = float(np.sum(found.values[:rank]))
        captured, before, gain = total, gain, total - captured
        rate = min(gain / before, SLOWEST) if number > 1 and before > gain else SLOWEST
        missing = max(trace - captured, 1e-15 * trace)
        if columns == size or gain * rate / (1 - rate) <= tolerance * missing or found.values[-1] <= 0.0:
            break
        basis = orthonormal(_chebyshev(apply, turned, turned_image, found.values))
    return EigenPairs(found.values[:rank], turned[:, :rank])


def energy_eigenpairs(
    apply: Operator, size: int, energy: float, *, trace: float, seed: int, limit: int
) -> EigenPairs | None:
    """Enough of the largest eigenpairs to hold ``energy * trace``, or None when that needs more than ``limit`` of them.

    The rank is raised until the target is met. Every value still to come is at most the last one found, so the number
    still needed is bounded from below by the missing energy over it: hopeless cases end after the first try.
    """
    rank = min(FIRST_RANK, size)
    found: EigenPairs | None = None
    while rank <= limit:
        start = None if found is None else found.vectors
        found = top_eigenpairs(apply, size, rank, trace=trace, seed=seed, start=start)
        missing = energy * trace - float(np.sum(found.values))
        if missing <= 0.0 or len(found.values) < rank:
            return found
        rank = max(2 * rank, rank + int(missing / max(float(found.values[-1]), missing / size)))
    return None


def energy_rank(values: Array, trace: float, energy: float) -> int:
    """``rank_for_energy`` where only the largest eigenvalues are known and ``trace`` is the sum of all of them."""
    rest = max(trace - float(np.sum(values)), 0.0)
    return min(rank_for_energy(np.sqrt(np.append(values, rest)), energy), len(values))


def orthonormal(block: Array) -> Array:
    """An orthonormal basis of the columns of ``block: (size, l)``; columns that depend on others are dropped.

    Cholesky-QR twice, with an eigendecomposition of the (normalised) Gram matrix in place of the Cholesky factor.
    """
    for _ in range(2):
        norms = np.linalg.norm(block, axis=0)
        kept = norms > 1e-150
        block = block[:, kept] / norms[kept]
        values, vectors = np.linalg.eigh(block.T @ block)
        good = values > 1e-14 * len(values)
        block = block @ (vectors[:, good] / np.sqrt(values[good]))
    return block


def _start_block(size: int, columns: int, seed: int, start: Array | None) -> Array:
    known = np.zeros((size, 0)) if start is None else start
    fresh = np.random.default_rng(seed).standard_normal((size, max(columns - known.shape[1], 0)))
    return np.hstack([known, fresh])


def _chebyshev(apply: Operator, block: Array, image: Array, values: Array) -> Array:
    """``T_d((G - c) / h) @ block`` scaled to stay finite, [0, values[-1]] being damped; ``image = G @ block``."""
    half = float(values[-1]) / 2
    steepness = np.arccosh(max(float(values[0]) / half - 1.0, 1.0 + 1e-12))
    degree = int(np.clip(LOG_GAIN / steepness, 1, MAX_DEGREE))
    scale = first_scale = half / (float(values[0]) - half)
    previous, current = block, (image - half * block) * (scale / half)
    for _ in range(degree - 1):
        next_scale = 1.0 / (2.0 / first_scale - scale)
        step = (apply(current) - half * current) * (2.0 * next_scale / half)
        previous, current = current, step - (scale * next_scale) * previous
        scale = next_scale
    return current
