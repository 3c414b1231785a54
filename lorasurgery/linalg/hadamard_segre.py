"""Arms in closed form for a matrix that is a LoHa of small rank, or one beside noise.

A LoHa of rank r has matrix rank r^2: ``A = T X`` with rows ``T_i = R_i x P_i``, outer products, as points of the Segre variety
of r x r matrices of rank 1. An SVD gives ``U = T G`` for an unknown invertible G: points of a linear image of that variety. To
find G (*Segre variety*: e.g. Harris, Algebraic Geometry, lectures 2 and 9):

1. The variety's quadrics are its 2 x 2 minors, ``c = (r (r - 1) / 2)^2`` of them; on the image they are the null space of
   ``[u_a u_b]``, a row for each point, which has rank ``(r (r + 1) / 2)^2`` if there are at least so many points.
2. The tangent space at a point ``R x P`` is ``{R x y + x x P}``, dimension 2 r - 1: the null space of the quadrics' gradients.
3. Those at points i and j meet in the plane of ``R_i x P_j`` and ``R_j x P_i``, where the quadrics vanish on these two lines
   only: a quadratic equation. Which is which: the sum of ``R_i x P_j`` and ``R_i x P_k`` is on the variety too, so that the
   quadrics' bilinear forms vanish on the pair.
4. r points give all ``R_i x P_j``, a basis; the coordinates of one more point are a product ``a_i b_j``, and rescale it.

No step iterates, so there are no local minima; noise enters by the null space and by the choice of points: several are tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import Array, as_float64
from lorasurgery.linalg.hadamard_sweep import Arms

if TYPE_CHECKING:
    from lorasurgery.linalg.hadamard_target import Approximated

MOST = 6
"""The largest rank: 666 products of coordinates then, 1225 for the next one; sweeps find a LoHa of that size anyway."""
TRIES, KEPT, SAMPLE = 8, 2, 256
"""Choices of points for a side; how many of the bases go on; how many rows judge them."""
SMALL = 1e-12
"""Of the largest row, and of the largest eigenvalue in the least squares for the other side: smaller ones are left out."""


def points_needed(rank: int) -> int:
    """Rows, or columns, that a matrix must have for this."""
    return (rank * (rank + 1) // 2) ** 2


def may_be_solved(shape: tuple[int, int], rank: int) -> bool:
    """Whether a matrix is large enough on one side."""
    return rank <= MOST and max(shape) >= points_needed(rank)


def closed_form(of: Approximated, u: Array, v: Array, rank: int, rng: np.random.Generator) -> list[Arms]:
    """Up to four candidates, from rows and from columns, where there are enough of them and the rank is at most MOST.

    ``u: (out, r^2)``, ``v: (in, r^2)``: the leading singular vectors of A. Exact up to rounding for a LoHa in general position.
    """
    found = []
    for points, apply, turned in ((u, of.apply_t, False), (v, of.apply, True)):
        for first, second in _sides(points, rank, rng):
            kron = (second[:, :, None] * first[:, None]).reshape(len(first), -1)
            a, b = _nearest_rank_one(_least_squares(kron, apply(kron, fast=False)), rank)
            left, right = ((a, b), (first, second)) if turned else ((first, second), (a, b))
            found.append(Arms(*_apart(left[0], right[0].T), *_apart(left[1], right[1].T)))
    return found


def _sides(points: Array, rank: int, rng: np.random.Generator) -> list[tuple[Array, Array]]:
    """P and R, ``(rows, r)``, by the best bases that are found; none of too few points."""
    norms = np.linalg.norm(points, axis=1)
    kept = norms > SMALL * np.max(norms, initial=0.0)  # the others are rounding
    unit, likely = points[kept] / norms[kept, None], norms[kept] ** 2
    if rank > MOST or len(unit) < points_needed(rank):
        return []
    quadrics = _quadrics(unit, rank)
    sample = unit if len(unit) <= SAMPLE else unit[rng.choice(len(unit), SAMPLE, replace=False)]
    tried: list[tuple[float, int, Array]] = []
    for turn in range(TRIES):
        chosen = unit[rng.choice(len(unit), rank + 1, replace=False, p=likely / np.sum(likely))]
        with np.errstate(all="ignore"):
            try:
                back = np.linalg.inv(_basis(quadrics, chosen, rank))
                tried.append((_loss(sample @ back.T, rank), turn, as_float64(back)))
            except np.linalg.LinAlgError:  # points that are no basis, for this matrix
                continue
    return [_nearest_rank_one(points @ back.T, rank) for _, _, back in sorted(tried, key=lambda own: own[:2])[:KEPT]]


def _quadrics(unit: Array, rank: int) -> Array:
    """``(c, r^2, r^2)`` symmetric, orthonormal: the quadratic forms that are least on the points, ``(rows, r^2)``."""
    one, other = np.triu_indices(rank * rank)
    half = np.where(one == other, 1.0, np.sqrt(0.5))
    monomials = unit[:, one] * unit[:, other] / half  # scaled so that the forms' inner product is that of their matrices
    _, vectors = np.linalg.eigh(monomials.T @ monomials)
    count = (rank * (rank - 1) // 2) ** 2
    found = np.zeros((count, rank * rank, rank * rank))
    found[:, one, other] = found[:, other, one] = vectors[:, :count].T * half
    return found


def _basis(quadrics: Array, points: Array, rank: int) -> Array:
    """``(r^2, r^2)``, columns ``R_k x P_l`` in the order k, l, from r + 1 points."""
    spaces = [np.linalg.svd(quadrics @ point)[2][1 - 2 * rank :] for point in points[:rank]]
    grid = np.zeros((rank, rank, rank * rank))
    for i in range(rank):
        grid[i, i] = points[i]
        for j in range(i):
            one, other = _crossing(quadrics, spaces[i], spaces[j])
            if i > 1:  # which of two is the rows' arm is free once, and then settled
                near, far = (grid[1, 0], grid[0, 1]) if j == 0 else (grid[i, 0], grid[0, i])
                straight = _off(quadrics, one, near) + _off(quadrics, other, far)
                if straight > _off(quadrics, other, near) + _off(quadrics, one, far):
                    one, other = other, one
            grid[i, j], grid[j, i] = one, other
    basis = grid.reshape(rank * rank, -1).T
    found: Array = basis * np.linalg.solve(basis, points[rank])
    return found


def _crossing(quadrics: Array, one: Array, other: Array) -> tuple[Array, Array]:
    """The two points of the variety, up to their lengths, in the plane where two tangent spaces (orthonormal rows) meet."""
    left, _, right = np.linalg.svd(one @ other.T)
    x, y = left[:, :2].T @ one + right[:2] @ other
    squares = np.stack([quadrics @ x @ x, 2.0 * (quadrics @ x @ y), quadrics @ y @ y], axis=1)
    a, b, c = np.linalg.svd(squares, full_matrices=False)[2][0]  # they agree up to a factor: the one all are nearest to
    root = -0.5 * (b + np.copysign(np.sqrt(max(b * b - 4.0 * a * c, 0.0)), b))
    points = np.array([root * x + a * y, c * x + root * y])
    first, second = points / np.linalg.norm(points, axis=1, keepdims=True)
    return first, second


def _off(quadrics: Array, one: Array, other: Array) -> float:
    """How far the line through two points of the variety leaves it."""
    return float(np.sum((quadrics @ one @ other) ** 2))


def _loss(rows: Array, rank: int) -> float:
    """The mean share of rows ``(rows, r^2)`` that is not an outer product."""
    values = np.linalg.svd(rows.reshape(-1, rank, rank), compute_uv=False) ** 2
    return float(1.0 - np.mean(values[:, 0] / np.sum(values, axis=1)))


def _nearest_rank_one(rows: Array, rank: int) -> tuple[Array, Array]:
    """P and R with ``R_i x P_i`` nearest to each row, ``(rows, r^2)``."""
    u, values, vt = np.linalg.svd(rows.reshape(-1, rank, rank))
    root = np.sqrt(values[:, :1])
    return vt[:, 0] * root, u[:, :, 0] * root


def _apart(left: Array, right: Array) -> tuple[Array, Array]:
    """The same product of well-conditioned factors: the basis of a few points is none, and errors would cancel."""
    basis, rest = np.linalg.qr(left)
    return basis, rest @ right


def _least_squares(kron: Array, moments: Array) -> Array:
    """``X^T: (columns, r^2)`` of the least ``||A - T X||``, given T ``(rows, r^2)`` and ``A^T T``."""
    values, vectors = np.linalg.eigh(kron.T @ kron)
    kept = values > SMALL * values[-1]
    found: Array = ((moments @ vectors[:, kept]) / values[kept]) @ vectors[:, kept].T
    return found
