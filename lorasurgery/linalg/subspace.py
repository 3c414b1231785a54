"""The largest eigenpairs of a positive semidefinite operator that is only known as ``x -> G x``.

Chebyshev-filtered subspace iteration (Zhou and Saad 2007) from a seeded Gaussian start with oversampling (Halko,
Martinsson and Tropp 2011): each round multiplies the block by a polynomial in G that is at most 1 on the unwanted part
of the spectrum and grows fastest above it, then orthonormalises and solves the projected problem. Rounds go on until
the gain of the last one, continued at the rate that the filter has at the smallest wanted eigenvalue, promises less
than ``tolerance`` of what is missing, so flat spectra get more of them. Eigenvalues approach from below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.low_rank import rank_for_energy

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.linalg.factors import Array

OVERSAMPLE = 32
"""Columns beyond the rank asked for, or half of it if that is more."""
MAX_ROUNDS = 40
RATES = (0.01, 0.99)
"""The fastest and the slowest convergence that the stopping rule believes in."""
MAX_DEGREE = 8
LOG_GAIN = 20.0
"""The filter amplifies the largest eigenvector by about e^20: more only makes the block nearly dependent."""
DEPENDENT = 1e-10
"""Smallest eigenvalue of a normalised Gram matrix for which Cholesky-QR, done twice, is orthonormal to rounding."""
FIRST_RANK = 64
"""Where the search for the rank that meets an energy target begins."""


@dataclass(frozen=True, slots=True)
class Operator:
    """A symmetric positive semidefinite matrix G (size, size) that is only applied."""

    apply: Callable[[Array], Array]
    """``x: (size, l) -> G @ x``"""
    size: int
    trace: float
    """The sum of all eigenvalues, known beforehand"""
    noise: float = 1e-14
    """How accurate ``apply`` is: gains below ``noise * trace`` are rounding (the default is for float64)"""
    tolerance: float = 1e-5
    """How far from the optimum the squared residual of a projection may stay, relative to it"""


@dataclass(frozen=True, slots=True)
class EigenPairs:
    """``vectors: (size, k)`` orthonormal, ``values: (k,)`` descending, not negative."""

    values: Array
    vectors: Array


def exact_eigenpairs(gram: Array) -> EigenPairs:
    """All eigenpairs of a symmetric positive semidefinite matrix (size, size); O(size^3), error ``eps ||G||``."""
    values, vectors = np.linalg.eigh(gram)
    return EigenPairs(np.maximum(values[::-1], 0.0), vectors[:, ::-1])


def top_eigenpairs(operator: Operator, rank: int, *, seed: int, start: Array | None = None) -> EigenPairs:
    """The ``rank`` largest eigenpairs; ``start``: (size, any) columns to begin with, the rest is random from ``seed``.

    Stops when further rounds promise less than ``tolerance * (trace - sum of the values)``, so that the squared
    residual of the projection is about that near to the optimum, or less than ``noise * trace``, or after
    ``MAX_ROUNDS``.
    """
    size, trace, apply = operator.size, operator.trace, operator.apply
    columns = min(size, rank + max(OVERSAMPLE, rank // 2))
    basis = orthonormal(apply(_start_block(size, columns, seed, start)))
    captured = 0.0
    for number in range(MAX_ROUNDS):
        image = apply(basis)
        projected = basis.T @ image
        found = exact_eigenpairs((projected + projected.T) / 2)
        turned, turned_image = basis @ found.vectors, image @ found.vectors
        before, captured = captured, float(np.sum(found.values[:rank]))
        if columns == size or found.values[-1] <= 0.0:
            break
        promise = (captured - before) * _future(found.values, rank)
        if number > 0 and promise <= max(operator.tolerance * (trace - captured), operator.noise * trace):
            break
        basis = orthonormal(_chebyshev(apply, turned, turned_image, found.values))
    return EigenPairs(found.values[:rank], turned[:, :rank])


def energy_eigenpairs(operator: Operator, energy: float, *, seed: int, limit: int) -> EigenPairs | None:
    """Enough of the largest eigenpairs to hold ``energy * trace``, or None when that needs more than ``limit`` of them.

    The rank is raised until the target is met (to ``noise * trace``). Every value still to come is at most the last one
    found, so the number still needed is bounded from below by the missing energy over it: hopeless cases end after the
    first try.
    """
    rank = min(FIRST_RANK, limit)
    found: EigenPairs | None = None
    while 0 < rank <= limit:
        found = top_eigenpairs(operator, rank, seed=seed, start=None if found is None else found.vectors)
        missing = energy * operator.trace - float(np.sum(found.values))
        if missing <= operator.noise * operator.trace:
            return found
        at_least = rank + int(missing / max(float(found.values[-1]), missing / operator.size))
        rank = max(min(2 * rank, limit), at_least) if rank < limit else limit + 1
    return None


def energy_rank(values: Array, trace: float, energy: float) -> int:
    """``rank_for_energy`` where only the largest eigenvalues are known and ``trace`` is the sum of all of them."""
    rest = max(trace - float(np.sum(values)), 0.0)
    return min(rank_for_energy(np.sqrt(np.append(values, rest)), energy), len(values))


def orthonormal(block: Array) -> Array:
    """An orthonormal basis of at least the columns of ``block: (size, l)``, again l columns.

    Cholesky-QR twice, with an eigendecomposition of the (normalised) Gram matrix in place of the Cholesky factor; by
    Householder QR, 7 times slower, if the columns are nearly dependent.
    """
    for _ in range(2):
        block = block / np.maximum(np.linalg.norm(block, axis=0), 1e-150)
        values, vectors = np.linalg.eigh(block.T @ block)
        if values[0] < DEPENDENT:
            return np.linalg.qr(block)[0]
        block = block @ (vectors / np.sqrt(values))
    return block


def _start_block(size: int, columns: int, seed: int, start: Array | None) -> Array:
    known = np.zeros((size, 0)) if start is None else start
    fresh = np.random.default_rng(seed).standard_normal((size, max(columns - known.shape[1], 0)))
    return np.hstack([known, fresh])


def _degree(values: Array) -> int:
    """The degree at which the filter that damps [0, values[-1]] amplifies values[0] by about e^LOG_GAIN."""
    return int(np.clip(LOG_GAIN / _steepness(values[0], values[-1]), 1, MAX_DEGREE))


def _steepness(value: float, cut: float) -> float:
    """``arccosh(2 value / cut - 1)``: the filter of degree d amplifies ``value`` by ``cosh(d * steepness)``."""
    return float(np.arccosh(max(2 * value / cut - 1.0, 1.0 + 1e-12)))


def _future(values: Array, rank: int) -> float:
    """All gains still to come as a multiple of the last one: rate / (1 - rate), by the smallest wanted value.

    In theory a round reduces the missing part by ``cosh(degree * steepness) ** 2``; the Ritz values are not exact yet,
    and measured rates are nearer to its square root, which is used.
    """
    wanted = _degree(values) * _steepness(values[rank - 1], values[-1])
    rate = float(np.clip(1.0 / np.cosh(min(wanted, 300.0)), *RATES))
    return rate / (1.0 - rate)


def _chebyshev(apply: Callable[[Array], Array], block: Array, image: Array, values: Array) -> Array:
    """``T_d((G - c) / h) @ block`` scaled to stay finite, [0, values[-1]] being damped; ``image = G @ block``."""
    half = float(values[-1]) / 2
    scale = first_scale = half / (float(values[0]) - half)
    previous, current = block, (image - half * block) * (scale / half)
    for _ in range(_degree(values) - 1):
        next_scale = 1.0 / (2.0 / first_scale - scale)
        step = (apply(current) - half * current) * (2.0 * next_scale / half)
        previous, current = current, step - (scale * next_scale) * previous
        scale = next_scale
    return current
