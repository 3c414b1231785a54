"""LoHa: delta = (w1_a @ w1_b) * (w2_a @ w2_b), element by element.

Shapes: w*_a (out, rank), w*_b (rank, in) or, for a flat convolution, (rank, in*k*k). Tucker: w*_a (rank, out),
w*_b (rank, in), t* (rank, rank, k, k) and each arm is sum_ij t[i, j, k, l] w_b[j, r] w_a[i, p].
Source: LyCORIS ``functional/loha.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError, block_columns
from lorasurgery.deltas.by_rows import flat64
from lorasurgery.deltas.low_rank import LowRank, used_columns
from lorasurgery.deltas.rounding import multiplied, rounded, told_by_rows
from lorasurgery.io.dtypes import widest
from lorasurgery.io.tensors import Tensor, computed, same_values, stack, zeros

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import Rows
    from lorasurgery.io.tensors import Array, Float64, Ranges, Shape


@dataclass(frozen=True, slots=True)
class Hadamard:
    """The element-wise product of two low-rank arms."""

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None

    family = "loha"

    @property
    def rank(self) -> int:
        """Rows of w1_b."""
        return self.w1_b.shape[0]

    @property
    def shape(self) -> Shape:
        """(out, in[, k...]); (out, in*k*k) for a flat convolution."""
        if self.t1 is None:
            return (self.w1_a.shape[0], *self.w1_b.shape[1:])
        return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The factors by LyCORIS' names without ``hada_``."""
        found = {"w1_a": self.w1_a, "w1_b": self.w1_b, "w2_a": self.w2_a, "w2_b": self.w2_b}
        return found if self.t1 is None or self.t2 is None else {**found, "t1": self.t1, "t2": self.t2}

    def rows(self, ranges: Ranges) -> Hadamard:
        """Slice the output side of both arms; a fuse of several members is undone exactly."""
        if self.t1 is not None:
            return replace(self, w1_a=self.w1_a.columns(ranges), w2_a=self.w2_a.columns(ranges))
        first, second = self.w1_a.rows(ranges), self.w2_a.rows(ranges)
        columns = used_columns(self.w1_a, first)
        if columns is None or columns != used_columns(self.w2_a, second):
            return replace(self, w1_a=first, w2_a=second)
        own = [columns]
        return Hadamard(first.columns(own), self.w1_b.rows(own), second.columns(own), self.w2_b.rows(own))

    def scaled(self, factor: float, record: Record | None = None) -> Hadamard:
        """Fold ``factor`` into w1_a."""
        if factor == 1.0:
            return self
        return told_by_rows(self, replace(self, w1_a=multiplied(self.w1_a, factor)), factor, record)

    def cast(self, dtype: str, record: Record | None = None) -> Hadamard:
        """Every factor in ``dtype``."""
        cast = Hadamard(**{slot: rounded(tensor, dtype) for slot, tensor in self.tensors.items()})
        return told_by_rows(self, cast, 1.0, record)

    def dense(self) -> Float64:
        """The product in float64, of shape :attr:`shape`."""
        product: Float64 = _arm(self.w1_a, self.w1_b, self.t1) * _arm(self.w2_a, self.w2_b, self.t2)
        return product

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """Both arms' rows, multiplied; a Tucker core is multiplied into ``w*_b`` first."""
        arms = []
        for a, b, core in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)):
            left, right = (a.f64(), flat64(b)) if core is None else (a.f64().T, _cored(core, b).reshape(core.shape[0], -1))
            arms.append((left, right.astype(work)))
        (one, first), (two, second) = arms
        one, two = (one * factor).astype(work), two.astype(work)

        def rows(start: int, stop: int) -> Array:
            product: Array = one[start:stop] @ first
            product *= two[start:stop] @ second
            return product

        return rows

    def to_low_rank(self) -> LowRank:
        """Exact rank1 * rank2 factors (Khatri-Rao): up[:, ij] = w1_a[:, i] w2_a[:, j], down[ij] = w1_b[i] w2_b[j]."""
        if self.t1 is not None and self.t2 is not None:
            return self._tucker_to_low_rank(self.t1, self.t2)
        first, second = self.w1_b.shape[0], self.w2_b.shape[0]
        up = computed("F64", (self.w1_a.shape[0], first * second), lambda: _columnwise(self.w1_a.f64(), self.w2_a.f64()))
        down = computed("F64", (first * second, *self.w1_b.shape[1:]), lambda: _rowwise(self.w1_b.f64(), self.w2_b.f64()))
        return LowRank(up, down)

    def _tucker_to_low_rank(self, t1: Tensor, t2: Tensor) -> LowRank:
        """The same with each core multiplied into its w*_b; w*_a are (rank, out)."""
        rank, kernel = t1.shape[0] * t2.shape[0], t1.shape[2:]
        up = computed(
            "F64",
            (self.w1_a.shape[1], rank, *(1 for _ in kernel)),
            lambda: _columnwise(self.w1_a.f64().T, self.w2_a.f64().T),
        )
        down = computed(
            "F64", (rank, self.w1_b.shape[1], *kernel), lambda: _rowwise(_cored(t1, self.w1_b), _cored(t2, self.w2_b))
        )
        return LowRank(up, down)


def _cored(core: Tensor, b: Tensor) -> Float64:
    """core (i, j, k...) and b (j, in) -> (i, in, k...)."""
    import numpy as np

    product: Float64 = np.einsum("ij...,jr->ir...", core.f64(), b.f64())
    return product


def _arm(a: Tensor, b: Tensor, core: Tensor | None) -> Float64:
    import numpy as np

    if core is None:
        flat: Float64 = (a.f64() @ b.f64().reshape(b.shape[0], -1)).reshape(a.shape[0], *b.shape[1:])
        return flat
    product: Float64 = np.einsum("ij...,jr,ip->pr...", core.f64(), b.f64(), a.f64())
    return product


def _columnwise(first: Float64, second: Float64) -> Float64:
    product: Float64 = (first[:, :, None] * second[:, None, :]).reshape(first.shape[0], -1)
    return product


def _rowwise(first: Float64, second: Float64) -> Float64:
    product: Float64 = (first[:, None] * second[None, :]).reshape(-1, *first.shape[1:])
    return product


def stack_hadamard(parts: Sequence[tuple[Hadamard | None, int]]) -> Hadamard:
    """Members one below the other, exactly: block-diagonal w*_a, stacked w*_b (or shared w*_b and stacked w*_a).

    Raises CannotError for Tucker cores.
    """
    present = [delta for delta, _ in parts if delta is not None]
    if any(delta.t1 is not None for delta in present):
        raise CannotError("Tucker convolutions cannot be stacked")
    dtype = widest([delta.w1_a.dtype for delta in present])
    head = present[0]
    if all(same_values(d.w1_b, head.w1_b) and same_values(d.w2_b, head.w2_b) for d in present):
        ones, twos = zip(*((d.w1_a, d.w2_a) if d else _missing(dtype, rows, head) for d, rows in parts), strict=True)
        return Hadamard(stack(ones), head.w1_b, stack(twos), head.w2_b)
    first = [(None, rows, 0) if d is None else (d.w1_a, rows, d.w1_a.shape[1]) for d, rows in parts]
    second = [(None, rows, 0) if d is None else (d.w2_a, rows, d.w2_a.shape[1]) for d, rows in parts]
    return Hadamard(
        block_columns(first, dtype),
        stack([d.w1_b for d in present]),
        block_columns(second, dtype),
        stack([d.w2_b for d in present]),
    )


def _missing(dtype: str, rows: int, like: Hadamard) -> tuple[Tensor, Tensor]:
    return zeros(dtype, (rows, like.w1_a.shape[1])), zeros(dtype, (rows, like.w2_a.shape[1]))
