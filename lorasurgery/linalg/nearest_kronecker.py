"""The Kronecker product nearest to a matrix, ``min ||A - kron(w1, w2)||_F``, without forming A where it is ``up @ down``.

Van Loan and Pitsianis (1993): with A of (o1 o2) x (i1 n) rearranged to ``R[(o, m), (p, n)] = A[o o2 + p, m n_2 + n]``, of
shape (o1 i1) x (o2 n2), ``kron(w1, w2)`` becomes ``vec(w1) vec(w2)^T``, so the answer is R's leading singular pair. It is
found by Golub-Kahan bidiagonalisation with full reorthogonalisation, which needs products with R and R^T only: for a
low-rank A of rank r each costs ``o1 r n2 (o2 + i1)`` multiplications.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64
from lorasurgery.linalg.low_rank import product_norm, rank_for_energy

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_STEPS = 300
TOLERANCE = 1e-6
"""Residual of the singular pair over its value; the squared error is then within about 1e-12 of ||A||^2 of the optimum,
divided by the relative gap to the next value."""
CHUNK = 256
"""Rows of a dense rearrangement that are converted to float64 at a time."""
ALTERNATIONS = 50


@dataclass(frozen=True, slots=True)
class Rearranged:
    """The rearranged matrix R as an operator."""

    outer: tuple[int, int]
    """(o1, i1): the shape of w1"""
    inner: tuple[int, int]
    """(o2, n2): the shape of w2, a convolution's kernel within n2"""
    apply: Callable[[Array], Array]
    """``w2: (o2, n2) -> (o1, i1)``: the contraction of R with w2"""
    apply_t: Callable[[Array], Array]
    """``w1: (o1, i1) -> (o2, n2)``"""
    norm: float
    """``||A||_F^2``"""


@dataclass(frozen=True, slots=True)
class NearestKronecker:
    """``kron(w1, w2)``, or ``kron(w1, w2 @ w2_b)`` for a low-rank right factor. Both factors have the same norm."""

    w1: Array
    w2: Array
    w2_b: Array | None
    error: float
    """``||A - kron(w1, w2)||_F^2``, true to 1e-15 of ||A||_F^2"""


def rearranged_product(up: AnyArray, down: AnyArray, outer: tuple[int, int]) -> Rearranged:
    """R of ``up @ down``, ``up: (out, r)``, ``down: (r, in)``. Raises ``ValueError`` where ``outer`` does not divide them."""
    (o1, i1), rank = outer, up.shape[1]
    o2, n2 = _inner(up.shape[0], down.shape[1], outer)
    norm = product_norm(up, down) ** 2
    left = as_float64(up).reshape(o1, o2, rank)
    right = as_float64(down).reshape(rank, i1, n2)
    by_inner = np.ascontiguousarray(left.transpose(0, 2, 1)).reshape(o1 * rank, o2)
    by_outer = np.ascontiguousarray(right.transpose(1, 0, 2)).reshape(i1, rank * n2)

    def apply(w2: Array) -> Array:
        product: Array = (by_inner @ w2).reshape(o1, rank * n2) @ by_outer.T
        return product

    def apply_t(w1: Array) -> Array:
        product: Array = by_inner.T @ (w1 @ by_outer).reshape(o1 * rank, n2)
        return product

    return Rearranged(outer, (o2, n2), apply, apply_t, norm)


def rearranged_dense(matrix: AnyArray, outer: tuple[int, int]) -> Rearranged:
    """R of a dense matrix (out, in); one copy of it is made, in its own dtype. Raises ``ValueError`` as above."""
    o1, i1 = outer
    o2, n2 = _inner(matrix.shape[0], matrix.shape[1], outer)
    moved = np.ascontiguousarray(matrix.reshape(o1, o2, i1, n2).transpose(0, 2, 1, 3)).reshape(o1 * i1, o2 * n2)
    starts = range(0, len(moved), CHUNK)

    def apply(w2: Array) -> Array:
        flat = w2.reshape(-1)
        return np.concatenate([as_float64(moved[s : s + CHUNK]) @ flat for s in starts]).reshape(outer)

    def apply_t(w1: Array) -> Array:
        flat = w1.reshape(-1)
        total = np.zeros(o2 * n2)
        for s in starts:
            total += flat[s : s + CHUNK] @ as_float64(moved[s : s + CHUNK])
        return total.reshape(o2, n2)

    norm = sum(float(np.sum(as_float64(moved[s : s + CHUNK]) ** 2)) for s in starts)
    return Rearranged(outer, (o2, n2), apply, apply_t, norm)


def nearest_kronecker(
    of: Rearranged, *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> NearestKronecker:
    """The nearest Kronecker product; with ``rank`` or ``energy`` (of w2's squared norm) its right factor is low-rank.

    Without them the error is the optimum (see TOLERANCE). A low-rank right factor and w1 are improved in turn, each the best
    for the other, from the solution without the limit. A right factor of full rank stays whole.
    """
    if of.norm == 0.0:
        return NearestKronecker(np.zeros(of.outer), np.zeros(of.inner), None, 0.0)
    w1 = _leading(of, seed)
    w2 = of.apply_t(w1)
    kept = _right_rank(w2, rank, energy)
    if kept is None:
        root = float(np.sqrt(np.linalg.norm(w2)))
        return NearestKronecker(w1 * root, w2 / root, None, max(of.norm - root**4, 0.0))
    a, b = _cut(w2, kept)
    held = float(np.sum(b**2))
    for _ in range(ALTERNATIONS):
        moved = of.apply(a @ b)
        w1 = moved / np.linalg.norm(moved)
        a, b = _cut(of.apply_t(w1), kept)
        before, held = held, float(np.sum(b**2))
        if held <= before * (1 + 1e-10):
            break
    root = held**0.25
    return NearestKronecker(w1 * root, a, b / root, max(of.norm - held, 0.0))


def kronecker_error(of: Rearranged, w1: AnyArray, w2: AnyArray) -> float:
    """``||A - kron(w1, w2)||_F^2`` for factors as stored; differences below 1e-15 of ||A||_F^2 are rounding."""
    left, right = as_float64(w1), as_float64(w2)
    overlap = float(np.sum(left * of.apply(right)))
    return max(of.norm - 2 * overlap + float(np.sum(left**2) * np.sum(right**2)), 0.0)


def _inner(out: int, columns: int, outer: tuple[int, int]) -> tuple[int, int]:
    if out % outer[0] or columns % outer[1]:
        raise ValueError(f"w1 of {outer} does not divide a matrix of {(out, columns)}")
    return out // outer[0], columns // outer[1]


def _right_rank(w2: Array, rank: int | None, energy: float | None) -> int | None:
    """The rank to cut w2 to; None where it stays whole."""
    kept = min(w2.shape)
    if energy is not None:
        kept = min(kept, max(rank_for_energy(np.linalg.svd(w2, compute_uv=False), energy), 1))
    kept = min(kept, rank or kept)
    return kept if kept < min(w2.shape) else None


def _cut(w2: Array, rank: int) -> tuple[Array, Array]:
    """The best ``a @ b`` of a rank; ``a`` has orthonormal columns."""
    left, values, right = np.linalg.svd(w2, full_matrices=False)
    return left[:, :rank], values[:rank, None] * right[:rank]


def _leading(of: Rearranged, seed: int) -> Array:
    """The leading left singular vector of R as w1 of norm 1."""
    start = np.random.default_rng(seed).standard_normal(of.inner)
    rights = [(start / np.linalg.norm(start)).reshape(-1)]
    lefts: list[Array] = []
    diagonal: list[float] = []
    above: list[float] = []
    steps = min(MAX_STEPS, of.outer[0] * of.outer[1], of.inner[0] * of.inner[1])
    vector = np.ones(1)
    for step in range(steps):
        left, size = _orthogonal(of.apply(rights[-1].reshape(of.inner)).reshape(-1), lefts)
        lefts.append(left)
        diagonal.append(size)
        right, rest = _orthogonal(of.apply_t(left.reshape(of.outer)).reshape(-1), rights)
        if step < 20 or step % 10 == 0 or step == steps - 1 or rest == 0.0:
            small = np.diag([*diagonal, 0.0])[:-1] + np.diag([*above, rest], 1)[:-1]  # (steps, steps + 1)
            turned, values, _ = np.linalg.svd(small)
            vector = turned[:, 0]
            if rest * abs(vector[-1]) <= TOLERANCE * values[0]:
                break
        rights.append(right)
        above.append(rest)
    found: Array = np.stack(lefts[: len(vector)], axis=1) @ vector
    return found.reshape(of.outer)


def _orthogonal(vector: Array, basis: list[Array]) -> tuple[Array, float]:
    """``vector`` without its part in the basis, of norm 1, and the norm that was left; zeros and 0 if that is rounding."""
    before = float(np.linalg.norm(vector))
    if basis:
        known = np.stack(basis)
        for _ in range(2):
            vector = vector - known.T @ (known @ vector)
    size = float(np.linalg.norm(vector))
    if size <= 1e-14 * before or size == 0.0:
        return np.zeros_like(vector), 0.0
    return vector / size, size
