"""Where the singular vectors of a module come from: its factors, two Kronecker factors, or a dense matrix.

Every source has the singular values of the unscaled change when the ranks are chosen, and yields ``U[:, kept] * weights``
and ``weights * Vt[kept]`` when the result is written. Nothing between the two is larger than one module.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lorasurgery.linalg.factors import as_float64
from lorasurgery.linalg.low_rank import factored_svd
from lorasurgery.linalg.randomized import dense_svd
from lorasurgery.operations.cut.core import Core, matrix, measure, wide

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array, Factors
    from lorasurgery.linalg.policies.budget import Indices

    Triple = tuple[AnyArray, Array, AnyArray]
    """(U: (out, k), S: (k,), Vt: (k, in))."""


NARROW = frozenset({"F16", "BF16"})
"""Dtypes whose results lose nothing by small matrices in float32."""
NEGLIGIBLE = 1e-13
"""Of the largest: products of singular values below it are rounding."""


class Source(Protocol):
    """A matrix with its singular values, and its singular vectors on demand."""

    @property
    def values(self) -> Array:
        """Descending; all of them, or as many as were asked for."""
        ...

    @property
    def residual(self) -> float:
        """Squared norm beyond ``values``."""
        ...

    def left(self, kept: Indices, weights: Array) -> AnyArray:
        """``U[:, kept] * weights: (out, k)``."""
        ...

    def right(self, kept: Indices, weights: Array) -> AnyArray:
        """``weights * Vt[kept]: (k, in)``."""
        ...


@dataclass(slots=True)
class FactoredSource:
    """``up @ down``; ``up: (out, r, 1...)``, ``down: (r, in, k...)`` as tensors."""

    up: Tensor
    down: Tensor
    values: Array
    core: Core | None
    slot: Slot
    narrow: bool
    accurate: bool = True
    """Whether the Gram route is; ``core`` may then be given up for its memory and computed again."""
    residual: float = 0.0
    fresh: tuple[AnyArray, AnyArray] | None = None
    """The factors just measured, for whoever makes the result at once; to be given up then."""
    multiply: Callable[[AnyArray, AnyArray], AnyArray] = np.matmul
    """Of a factor and a small matrix, both of one dtype."""

    @classmethod
    def of(cls, up: Tensor, down: Tensor, needed: int | None, slot: Slot, *, narrow: bool) -> FactoredSource:
        """Measure it now; raises ``ValueError`` for NaN and infinity."""
        left, right = as_float64(matrix(up)), as_float64(matrix(down))
        values, core = measure(left, right, needed, narrow=narrow)
        return cls(up, down, values, core, slot, narrow, accurate=core is not None, fresh=(left, right))

    @property
    def at_hand(self) -> bool:
        """Whether the factors are."""
        return self.fresh is not None and self.core is not None

    def forget(self) -> None:
        """Give the factors up."""
        self.fresh = None

    def prepare(self, kept: Indices) -> None:
        """Make sure of the small matrices for these singular values."""
        needed = int(kept[-1]) + 1 if kept.size else 0
        if self.accurate and needed and (self.core is None or self.core.left.shape[1] < needed):
            self.core = measure(matrix(self.up), matrix(self.down), needed, narrow=self.narrow).core

    def left(self, kept: Indices, weights: Array) -> AnyArray:
        """One product with ``up``."""
        self.prepare(kept)
        if self.core is None:
            return self._exact()[0][:, kept] * weights
        small = self.core.left[:, kept]
        factor = wide(self.up) if self.fresh is None else self.fresh[0]
        return self.multiply(factor.astype(small.dtype, copy=False), small * weights.astype(small.dtype))

    def right(self, kept: Indices, weights: Array) -> AnyArray:
        """One product with ``down``."""
        self.prepare(kept)
        if self.core is None:
            return weights[:, None] * self._exact()[2][kept]
        small = self.core.right[kept]
        factor = wide(self.down) if self.fresh is None else self.fresh[1]
        return self.multiply(small * weights.astype(small.dtype)[:, None], factor.astype(small.dtype, copy=False))

    def _exact(self) -> Triple:
        return self.slot.get(len(self.values), lambda: factored_svd(wide(self.up), wide(self.down)))


@dataclass(slots=True)
class ComputedSource:
    """Anything whose SVD is computed twice: once for the values, once when it is written."""

    decompose: Callable[[int], Triple]
    """At least that many singular triples."""
    values: Array
    residual: float
    slot: Slot
    fresh: Triple | None = None
    """Those just computed, where they serve for the result too."""

    @property
    def at_hand(self) -> bool:
        """Whether the vectors are."""
        return self.fresh is not None

    def forget(self) -> None:
        """Give the vectors up."""
        self.fresh = None

    def left(self, kept: Indices, weights: Array) -> AnyArray:
        """Columns of U."""
        columns: AnyArray = _columns(self._triple(kept)[0], kept) * weights
        return columns

    def right(self, kept: Indices, weights: Array) -> AnyArray:
        """Rows of Vt."""
        rows: AnyArray = weights[:, None] * _columns(self._triple(kept)[2].T, kept).T
        return rows

    def _triple(self, kept: Indices) -> Triple:
        needed = int(kept[-1]) + 1
        if self.fresh is not None:
            return self.fresh
        return self.slot.get(needed, lambda: self.decompose(needed))


def _columns(matrix: AnyArray, kept: Indices) -> AnyArray:
    """These columns, zeros for those that a decomposition has not found to differ from zero."""
    found = matrix[:, kept[kept < matrix.shape[1]]]
    return np.pad(found, ((0, 0), (0, len(kept) - found.shape[1])))


class Slot:
    """Room for one decomposition until both factors of its module are written."""

    def __init__(self) -> None:
        self._triple: Triple | None = None
        self._count = self._uses = 0
        self._lock = Lock()

    def get(self, count: int, compute: Callable[[], Triple]) -> Triple:
        """The first ``count`` singular triples: computed the first time, given up after the second."""
        with self._lock:
            held = self._triple
            if held is None or self._count < count:
                self._triple = held = compute()
                self._count, self._uses = count, 0
            self._uses += 1
            if self._uses == 2:
                self._triple = None
            return held


def dense_source(whole: Callable[[], AnyArray], needed: int | None, slot: Slot, *, narrow: bool = False) -> ComputedSource:
    """A matrix (out, in) that ``whole`` yields; ``needed`` None asks for every singular value.

    ``narrow``: the vectors of a result of 16 bits may be float32.
    """
    kind = np.float32 if narrow else np.float64
    factors = dense_svd(matrix := whole(), rank=needed, dtype=kind)
    found = factors.singular_values
    squares, error = found**2, min(factors.relative_error, 1.0 - 1e-12)
    residual = 0.0 if needed is None else float(np.sum(squares)) * error**2 / (1.0 - error**2)
    values = np.zeros(max(len(found), needed or min(matrix.shape)))
    values[: len(found)] = found

    def decompose(count: int) -> Triple:
        return _vectors(dense_svd(whole(), rank=count, dtype=kind))

    return ComputedSource(decompose, values, residual, slot, None if needed is None else _vectors(factors))


def _vectors(factors: Factors) -> Triple:
    """Of balanced factors."""
    root = np.sqrt(factors.singular_values)
    root[root == 0.0] = 1.0
    own = root.astype(factors.up.dtype)
    return factors.up / own, factors.singular_values, factors.down / own[:, None]


def kronecker_source(w1: Callable[[], Array], w2: Callable[[], Array], slot: Slot) -> ComputedSource:
    """``kron(w1, w2)``: singular values are the products of those of ``w1: (a, b)`` and ``w2: (c, d)``, vectors likewise."""
    first, second = (np.linalg.svd(_finite(part()), compute_uv=False) for part in (w1, w2))
    values = np.sort(np.outer(first, second), axis=None)[::-1].copy()
    values[values <= NEGLIGIBLE * values[0]] = 0.0

    def decompose(count: int) -> Triple:
        u1, s1, v1 = np.linalg.svd(w1(), full_matrices=False)
        u2, s2, v2 = np.linalg.svd(w2(), full_matrices=False)
        products = np.outer(s1, s2).ravel()
        order = np.argsort(-products, kind="stable")[:count]
        i, j = np.divmod(order, len(s2))
        up = (u1[:, None, i] * u2[None, :, j]).reshape(-1, len(order))
        down = (v1[i][:, :, None] * v2[j][:, None, :]).reshape(len(order), -1)
        return up, products[order], down

    return ComputedSource(decompose, values, 0.0, slot)


def _finite(array: Array) -> Array:
    if not np.isfinite(array).all():
        raise ValueError("its factors hold NaN or infinity")
    return array
