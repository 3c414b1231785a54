"""One side of a pair as numbers: small factors where its family has them, rows of the dense change where not."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.io.tensors import same_values
from lorasurgery.operations.effect.products import Measured, Product, itself, measure

if TYPE_CHECKING:
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.operations.effect.pairs import Side

CHUNK = 1 << 21
"""Elements of a dense change that are looked at together."""
COMPARING, ENOUGH = 8, 10**9
"""Operations to compare two elements; and those that take well below a second, for which common directions come along."""


def measure_sides(a: Side, b: Side) -> Measured:
    """Two changes of the same rows, by the cheapest way that is exact for their families.

    Raises ValueError where their shapes differ, CannotError for families that need the base weight.
    """
    first, second = _cut(a), _cut(b)
    if _columns(first) != _columns(second):
        raise ValueError(f"{list(first.shape)} in one file, {list(second.shape)} in the other")
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return _low_rank(first, a.module.scale.value, second, b.module.scale.value)
    if isinstance(first, Kronecker) and isinstance(second, Kronecker) and first.outer == second.outer:
        return _kronecker(first, a.module.scale.value, second, b.module.scale.value)
    if a.module.scale.value == b.module.scale.value and _same(first, second):
        second = first
    if _by_factors(first, second):
        one = product_of(first, a.module.scale.value)
        return itself(one) if second is first else measure(one, product_of(second, b.module.scale.value))
    return _by_rows(first, a.module.scale.value, second, b.module.scale.value)


def norm_of(side: Side) -> float:
    """The Frobenius norm of one side's change; raises CannotError for families that need the base weight."""
    return measure_sides(side, side).norm_a


def shape_of(delta: Delta) -> tuple[int, int]:
    """(out, in*k*k); (dim, 1) for a norm's difference."""
    return delta.shape[0], _columns(delta)


def _columns(delta: Delta) -> int:
    return prod(delta.shape[1:])


def _cut(side: Side) -> Delta:
    """The delta of these rows; a LoKr whose blocks they cut becomes a LoRA of the same change."""
    delta = side.module.delta
    assert delta is not None  # noqa: S101  the caller has looked
    if side.whole:
        return delta
    try:
        return delta.rows(side.ranges)
    except CannotError:
        if not isinstance(delta, Kronecker):
            raise
        return delta.to_low_rank().rows(side.ranges)  # wide, but exact


def _same(a: Delta, b: Delta) -> bool:
    """Whether two deltas of one family hold the same bytes."""
    mine, others = a.tensors, b.tensors
    return type(a) is type(b) and mine.keys() == others.keys() and all(same_values(mine[k], others[k]) for k in mine)


def _by_factors(a: Delta, b: Delta) -> bool:
    """Whether both have small factors, and those take fewer operations than all elements (or so few that it is no matter)."""
    if isinstance(a, Full) or isinstance(b, Full):
        return False
    (out, columns), rank = shape_of(a), sum(delta.to_low_rank().rank for delta in (a, b))
    factors = 3 * (out + columns) * rank * rank
    elements = out * columns * (COMPARING + _per_element(a) + _per_element(b))
    return rank <= min(out, columns) and factors <= max(elements, ENOUGH)


def _per_element(delta: Delta) -> int:
    """Operations for an element of the dense change."""
    if isinstance(delta, Kronecker):
        return 1
    return (4 if isinstance(delta, Hadamard) else 2) * (delta.rank or 1)


def product_of(delta: Delta, scale: float) -> Product:
    """The exact low-rank form in float64."""
    low = delta.to_low_rank()
    return Product(low.up.f64().reshape(low.up.shape[0], -1), low.down.f64().reshape(low.rank, -1), scale)


def _low_rank(a: LowRank, scale_a: float, b: LowRank, scale_b: float) -> Measured:
    """Two LoRAs; each factor is read once."""
    if max(a.rank, b.rank) > min(shape_of(a)):
        return _by_rows(a, scale_a, b, scale_b)
    (up_a, down_a), (up_b, down_b) = _stored(a), _stored(b)
    one = Product(up_a.astype(np.float64), down_a.astype(np.float64), scale_a)
    if scale_a == scale_b and _equal(up_a, up_b) and _equal(down_a, down_b):
        return itself(one)
    return measure(one, Product(up_b.astype(np.float64), down_b.astype(np.float64), scale_b))


def _stored(delta: LowRank) -> tuple[AnyArray, AnyArray]:
    """(out, rank) and (rank, in*k*k) in the file's dtype; a Tucker core is multiplied into the second."""
    low = delta.to_low_rank()
    return low.up.array().reshape(low.up.shape[0], -1), low.down.array().reshape(low.rank, -1)


def _equal(a: AnyArray, b: AnyArray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def _kronecker(a: Kronecker, scale_a: float, b: Kronecker, scale_b: float) -> Measured:
    """Two LoKr cut into the same blocks: ``kron(w1, w2)``, its elements in another order, is ``vec(w1) vec(w2)^T``.

    The order changes no norm and no distance (Van Loan and Pitsianis 1993); the spaces are products of the factors' spaces.
    """
    halves = [(delta.outer_array(), delta.inner_array().reshape(delta.inner[0], -1)) for delta in (a, b)]
    one, two = (
        Product(outer.reshape(-1, 1), inner.reshape(1, -1), scale)
        for (outer, inner), scale in zip(halves, (scale_a, scale_b), strict=True)
    )
    found = itself(one) if scale_a == scale_b and _same(a, b) else measure(one, two)
    if not (np.isfinite(found.difference) and found.norm_a and found.norm_b):
        return found._replace(left=None, right=None)
    spaces = [[np.linalg.svd(factor, full_matrices=False) for factor in half] for half in halves]
    left, right = (_shared([[_basis(svd, side) for svd in half] for half in spaces]) for side in (0, 2))
    return found._replace(left=left, right=right)


def _basis(svd: tuple[Array, Array, Array], side: int) -> Array:
    """Singular vectors as columns: left ones (0) or right ones (2), without those of zero."""
    kept = int(np.sum(svd[1] > 1e-12 * svd[1][0]))
    return svd[0][:, :kept] if side == 0 else svd[2][:kept].T


def _shared(bases: list[list[Array]]) -> float:
    """Mean squared cosine between ``kron(P1, P2)`` and ``kron(Q1, Q2)``."""
    (p1, p2), (q1, q2) = bases
    total = float(np.sum((p1.T @ q1) ** 2)) * float(np.sum((p2.T @ q2) ** 2))
    angles: int = min(p1.shape[1] * p2.shape[1], q1.shape[1] * q2.shape[1])
    return min(total / angles, 1.0)


def _by_rows(a: Delta, scale_a: float, b: Delta, scale_b: float) -> Measured:
    """Element by element, some rows at a time: no two large numbers are subtracted, so nothing cancels.

    Raises CannotError for families that need the base weight.
    """
    sides = [delta.by_rows("float64", scale) for delta, scale in ((a, scale_a), (b, scale_b))]
    shape, sums = shape_of(a), np.zeros(4)
    step = max(CHUNK // max(shape[1], 1), 1)
    for start in range(0, shape[0], step):
        one, two = (side(start, min(start + step, shape[0])) for side in sides)
        gap = one - two
        sums += [np.vdot(one, one), np.vdot(two, two), np.vdot(one, two), np.vdot(gap, gap)]
    norm_a, norm_b, difference = np.sqrt(sums[[0, 1, 3]])
    return Measured(float(norm_a), float(norm_b), float(sums[2]), float(difference))
