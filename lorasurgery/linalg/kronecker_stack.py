"""A stack of Kronecker products as an operator: products with it and its Gram matrices, never the dense matrix.

Each part is orthogonalised on its own, ``kron(w1, w2) = kron(P1, P2) diag(s1 x s2) kron(Q1, Q2)`` from the two small
SVDs, so the stack is ``blockdiag(kron(P1, P2)) @ C``: singular values and errors of the stack are those of the core
``C: (inner, in)`` with ``inner = sum rank(w1) rank(w2)``, and every product is a reshape and two small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64
from lorasurgery.linalg.low_rank import factored_svd

if TYPE_CHECKING:
    from collections.abc import Sequence

NUMERICAL_ZERO = 1e-13
"""Singular values of w1 and w2 below this share of the largest are rounding and dropped."""


@dataclass(frozen=True, slots=True)
class KroneckerPart:
    """``kron(w1, w2)``: the rows of one member of a stack. Any scale is already multiplied into ``w1``."""

    w1: AnyArray
    """(o1, i1), or (o1, r) if ``w1_b`` is given"""
    w2: AnyArray
    """(o2, i2), or (o2, r) if ``w2_b`` is given"""
    w1_b: AnyArray | None = None
    """(r, i1): then the left factor is ``w1 @ w1_b``"""
    w2_b: AnyArray | None = None
    """(r, i2): then the right factor is ``w2 @ w2_b``"""


@dataclass(frozen=True, slots=True)
class ZeroRows:
    """A member of a stack that the adapter does not train: ``rows`` rows of zeros."""

    rows: int


@dataclass(frozen=True, slots=True)
class _Block:
    """One part: ``kron(*lift) @ diag(sigma) @ kron(*core)``; ``lift`` has orthonormal columns, ``core`` rows."""

    rows: slice
    inner: slice
    lift: tuple[Array, Array]
    sigma: tuple[Array, Array]
    core: tuple[Array, Array]

    @property
    def weights(self) -> Array:
        """(r1 r2, 1): the part's own singular values, in Kronecker order."""
        return np.outer(*self.sigma).reshape(-1, 1)


@dataclass(frozen=True, slots=True)
class KroneckerStack:
    """``blockdiag(lift) @ C`` of shape (out, width), with ``C: (inner, width)``."""

    blocks: tuple[_Block, ...]
    out: int
    width: int
    inner: int

    @property
    def energy(self) -> float:
        """``||stack||_F^2 = sum ||w1||_F^2 ||w2||_F^2``, exactly."""
        return sum(float(np.sum(b.sigma[0] ** 2) * np.sum(b.sigma[1] ** 2)) for b in self.blocks)

    def core(self, x: Array) -> Array:
        """``C @ x``: (width, l) -> (inner, l)."""
        result = np.empty((self.inner, x.shape[1]))
        for block in self.blocks:
            result[block.inner] = block.weights * kron_apply(*block.core, x)
        return result

    def core_t(self, y: AnyArray) -> AnyArray:
        """``C^T @ y``: (inner, l) -> (width, l), in the precision of ``y``."""
        result = np.zeros((self.width, y.shape[1]), y.dtype)
        for block in self.blocks:
            q1, q2 = (q.T.astype(y.dtype) for q in block.core)
            result += kron_apply(q1, q2, block.weights.astype(y.dtype) * y[block.inner])
        return result

    def lift(self, y: AnyArray) -> AnyArray:
        """``blockdiag(lift) @ y``: (inner, l) -> (out, l), in the precision of ``y``; an isometry."""
        result = np.zeros((self.out, y.shape[1]), y.dtype)
        for block in self.blocks:
            p1, p2 = (p.astype(y.dtype) for p in block.lift)
            result[block.rows] = kron_apply(p1, p2, y[block.inner])
        return result

    def row_gram(self) -> Array:
        """``C C^T: (inner, inner)``, from Kronecker products of tiny matrices where the factorings agree."""
        gram = np.zeros((self.inner, self.inner))
        for position, one in enumerate(self.blocks):
            for other in self.blocks[position:]:
                gram[one.inner, other.inner] = _cross_gram(one, other)
                gram[other.inner, one.inner] = gram[one.inner, other.inner].T
        return gram

    def column_gram(self) -> Array:
        """``C^T C = sum kron(w1^T w1, w2^T w2): (width, width)``."""
        gram = np.zeros((self.width, self.width))
        for block in self.blocks:
            left, right = (s[:, None] * q for s, q in zip(block.sigma, block.core, strict=True))
            gram += as_float64(np.kron(left.T @ left, right.T @ right))
        return gram


def kron_apply(left: AnyArray, right: AnyArray, x: AnyArray) -> AnyArray:
    """``kron(left, right) @ x`` without forming it: left (a, b), right (c, d), x (b d, l) -> (a c, l)."""
    (a, b), (c, d), columns = left.shape, right.shape, x.shape[1]
    inner = right @ x.reshape(b, d, columns)
    product: AnyArray = left @ inner.reshape(b, c * columns)
    return product.reshape(a * c, columns)


def kronecker_stack(parts: Sequence[KroneckerPart | ZeroRows]) -> KroneckerStack:
    """The operator for ``parts`` stacked by rows, in order.

    Parts may differ in ranks, rows and in how they factor the same width. Raises ``ValueError`` if no part is a
    Kronecker product, the widths differ, the factors of a part do not fit together, or a value is NaN or infinite.
    """
    blocks: list[_Block] = []
    row = inner = 0
    widths: set[int] = set()
    for part in parts:
        if isinstance(part, ZeroRows):
            row += part.rows
            continue
        block = _orthogonal_block(part, row, inner)
        row, inner = block.rows.stop, block.inner.stop
        blocks.append(block)
        widths.add(block.core[0].shape[1] * block.core[1].shape[1])
    if len(widths) != 1:
        raise ValueError(f"a stack needs Kronecker products of one width, not of {sorted(widths) or 'none'}")
    return KroneckerStack(tuple(blocks), row, widths.pop(), inner)


def _orthogonal_block(part: KroneckerPart, row: int, inner: int) -> _Block:
    left, right = _numerical_svd(part.w1, part.w1_b), _numerical_svd(part.w2, part.w2_b)
    rows = left[0].shape[0] * right[0].shape[0]
    return _Block(
        rows=slice(row, row + rows),
        inner=slice(inner, inner + len(left[1]) * len(right[1])),
        lift=(left[0], right[0]),
        sigma=(left[1], right[1]),
        core=(left[2], right[2]),
    )


def _numerical_svd(matrix: AnyArray, right: AnyArray | None) -> tuple[Array, Array, Array]:
    """Thin SVD of ``matrix`` or of ``matrix @ right`` without its numerically zero part (at least one value stays)."""
    if right is not None:
        u, s, vt = factored_svd(matrix, right)
    else:
        if matrix.ndim != 2 or not np.isfinite(matrix).all():
            raise ValueError(f"not a finite matrix: shape {matrix.shape}")
        u, s, vt = np.linalg.svd(as_float64(matrix), full_matrices=False)
    kept = max(int(np.sum(s > NUMERICAL_ZERO * s[0])), 1)
    return u[:, :kept], s[:kept], vt[:kept]


def _cross_gram(one: _Block, other: _Block) -> Array:
    """``C_one C_other^T: (inner of one, inner of other)``."""
    if one.core[0].shape[1] == other.core[0].shape[1]:
        overlap = as_float64(np.kron(one.core[0] @ other.core[0].T, one.core[1] @ other.core[1].T))
    else:
        overlap = kron_apply(*one.core, as_float64(np.kron(*other.core)).T)
    overlap *= one.weights
    overlap *= other.weights.T
    return overlap
