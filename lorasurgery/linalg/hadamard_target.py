"""The matrix that a LoHa is to come near, as an operator: a product of two factors, or a dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64
from lorasurgery.linalg.low_rank import factored_svd, product_norm, rank_for_energy
from lorasurgery.linalg.randomized import dense_svd

if TYPE_CHECKING:
    from collections.abc import Callable


class Product(Protocol):
    """The product of A, or of its transpose, with a matrix."""

    def __call__(self, x: Array, *, fast: bool) -> Array:
        """``fast``: in float32 where A is dense."""


class Leading(NamedTuple):
    """The largest singular values with their vectors."""

    u: Array
    """(out, k)"""
    values: Array
    """(k,), descending"""
    v: Array
    """(in, k)"""


@dataclass(frozen=True, slots=True)
class Approximated:
    """The matrix A as an operator."""

    apply: Product
    """``X: (in, l) -> A @ X``"""
    apply_t: Product
    """``Y: (out, l) -> A^T @ Y``"""
    rows: Callable[[slice], Array]
    """A few rows of A itself"""
    shape: tuple[int, int]
    """(out, in)"""
    norm: float
    """``||A||_F^2``"""
    lora_rank: Callable[[float], int]
    """The rank, at least 1, of the smallest LoRA that keeps this share of the squared norm"""
    leading: Callable[[int], Leading]
    """At most so many; fewer where the others are zero"""
    dense: Array | None = None
    """A itself where it is at hand"""


def hadamard_of_product(up: AnyArray, down: AnyArray) -> Approximated:
    """``A = up @ down``, ``up: (out, R)``, ``down: (R, in)``. Raises ``ValueError`` as ``factored_svd`` does."""
    left, right = as_float64(up), as_float64(down)
    u, values, vt = factored_svd(left, right)
    return Approximated(
        apply=lambda x, *, fast: left @ (right @ x),  # noqa: ARG005  float64 costs little here
        apply_t=lambda x, *, fast: right.T @ (left.T @ x),  # noqa: ARG005
        rows=lambda part: left[part] @ right,
        shape=(len(left), right.shape[1]),
        norm=product_norm(left, right) ** 2,
        lora_rank=lambda energy: max(rank_for_energy(values, energy), 1),
        leading=lambda count: Leading(u[:, :count], values[:count], vt[:count].T),
    )


def hadamard_of_dense(matrix: AnyArray) -> Approximated:
    """A dense A (out, in); a float64 and a float32 copy are made. Raises ``ValueError`` for NaN and infinity."""
    whole = as_float64(matrix)
    if not np.isfinite(whole).all():
        raise ValueError("the matrix holds NaN or infinity")
    size = _largest(whole)
    narrow = (whole / size).astype(np.float32)

    def leading(count: int) -> Leading:
        found = dense_svd(whole, rank=count, dtype=np.float64)
        root = np.sqrt(np.where(found.singular_values > 0.0, found.singular_values, 1.0))
        return Leading(as_float64(found.up) / root, found.singular_values, as_float64(found.down).T / root)

    return Approximated(
        apply=_Times(whole, narrow, size),
        apply_t=_Times(whole.T, narrow.T, size),
        rows=lambda part: whole[part],
        shape=(len(whole), whole.shape[1]),
        norm=float(np.sum(whole**2)),
        lora_rank=lambda energy: dense_svd(whole, energy=energy).rank,
        leading=leading,
        dense=whole,
    )


@dataclass(frozen=True, slots=True)
class _Times:
    """Products with a dense matrix in float64, or in float32 after scaling to 1, which keeps them in range."""

    whole: Array
    narrow: AnyArray
    """``whole / size`` in float32"""
    size: float

    def __call__(self, x: Array, *, fast: bool) -> Array:
        if not fast:
            return self.whole @ x
        size = _largest(x)
        return as_float64(self.narrow @ (x / size).astype(np.float32)) * (size * self.size)


def _largest(matrix: Array) -> float:
    return max(float(np.max(matrix, initial=0.0)), -float(np.min(matrix, initial=0.0))) or 1.0
