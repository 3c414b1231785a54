"""LoKr: delta = kron(w1, w2); w1 (out_l, in_m) is the outer factor, w2 (out_k, in_n[, k...]) the inner one.

Either may be a product: w1 = w1_a @ w1_b, w2 = w2_a @ w2_b; with a Tucker core t2 (rank, rank, k, k),
w2_a (rank, out_k) and w2_b (rank, in_n). A flat convolution has w2_b (rank, in_n*k*k).
Row o*out_k + p of the delta is block row o of w1 and row p of w2. Source: LyCORIS ``functional/lokr.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.effect import Effect, before
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import multiplied, rounded, watched
from lorasurgery.io.tensors import Tensor, computed, same_values, stack, zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import Rows
    from lorasurgery.io.tensors import Array, Float64, Ranges, Shape


@dataclass(frozen=True, slots=True)
class Kronecker:
    """kron(w1, w2), each factor whole or a product."""

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    family = "lokr"

    @property
    def rank(self) -> int | None:
        """What alpha is divided by: rows of w2_b, else of w1_b; None when both factors are whole (ComfyUI's rule)."""
        if self.w2_b is not None:
            return self.w2_b.shape[0]
        return None if self.w1_b is None else self.w1_b.shape[0]

    @property
    def blocks(self) -> int:
        """Block rows: rows of w1."""
        return _first(self.w1, self.w1_a).shape[0]

    @property
    def inner(self) -> Shape:
        """Shape of w2: (out_k, in_n[, k...])."""
        if self.w2 is not None:
            return self.w2.shape
        a, b = _first(self.w2_a), _first(self.w2_b)
        if self.t2 is not None:
            return (a.shape[1], b.shape[1], *self.t2.shape[2:])
        return (a.shape[0], *b.shape[1:])

    @property
    def outer(self) -> tuple[int, int]:
        """Shape of w1: (out_l, in_m)."""
        return self.blocks, _first(self.w1, self.w1_b).shape[1]

    @property
    def shape(self) -> Shape:
        """(out, in[, k...]); a flat convolution gives (out, in*k*k), the same order within a row."""
        (out_l, in_m), (out_k, in_n, *kernel) = self.outer, self.inner
        return (out_l * out_k, in_m * in_n, *kernel)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The factors by LyCORIS' names without ``lokr_``."""
        slots = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
        return {slot: tensor for slot in slots if (tensor := getattr(self, slot)) is not None}

    def rows(self, ranges: Ranges) -> Kronecker:
        """Exact where every cut falls between blocks (rows of w1), or all rows lie inside one block (rows of w2)."""
        size = self.inner[0]
        if all(start % size == 0 and stop % size == 0 for start, stop in ranges):
            return self._outer_rows([(start // size, stop // size) for start, stop in ranges])
        block = ranges[0][0] // size
        if any(start // size != block or (stop - 1) // size != block for start, stop in ranges):
            cuts = ", ".join(f"{start}:{stop}" for start, stop in ranges)
            raise CannotError(f"rows {cuts} cut through the {self.blocks} blocks of {size} rows of a LoKr")
        inside = [(start - block * size, stop - block * size) for start, stop in ranges]
        return self._outer_rows([(block, block + 1)]).rows_inside(inside)

    def _outer_rows(self, ranges: Ranges) -> Kronecker:
        if self.w1 is not None:
            return replace(self, w1=self.w1.rows(ranges))
        return replace(self, w1_a=_first(self.w1_a).rows(ranges))

    def rows_inside(self, ranges: Ranges) -> Kronecker:
        """Rows of w2: every block keeps the same ones."""
        if self.w2 is not None:
            return replace(self, w2=self.w2.rows(ranges))
        a = _first(self.w2_a)
        return replace(self, w2_a=a.rows(ranges) if self.t2 is None else a.columns(ranges))

    def scaled(self, factor: float, record: Record | None = None) -> Kronecker:
        """Fold ``factor`` into one factor: its relative rounding error is that of the delta.

        That is w1 or w1_a; w2 or w2_a where w1 has one row, which modules that are stacked then may still share.
        """
        if factor == 1.0:
            return self
        names = ("w2", "w2_a") if self.blocks == 1 and self.t2 is None else ("w1", "w1_a")
        slot, tensor = next((name, found) for name in names if (found := getattr(self, name)) is not None)
        return replace(self, **{slot: multiplied(tensor, factor, record, partial(self._effect, slot))})

    def cast(self, dtype: str, record: Record | None = None) -> Kronecker:
        """Every factor in ``dtype``."""
        cast = Kronecker(**{slot: rounded(tensor, dtype) for slot, tensor in self.tensors.items()})
        return watched(self, cast, lambda new: _tell(record, self, new)) if record is not None else cast

    def _effect(self, slot: str) -> Effect:
        """What a change of the factor that a scale is folded into does to the whole: the other side multiplies its norm."""
        gain = float(((self.inner_array() if slot.startswith("w1") else self.outer_array()) ** 2).sum())
        b = {"w1_a": self.w1_b, "w2_a": self.w2_b}.get(slot)
        return Effect(gain) if b is None else before(b.reshape(b.shape[0], b.size // b.shape[0]), gain)

    def outer_array(self) -> Float64:
        """w1 in float64, (out_l, in_m)."""
        if self.w1 is not None:
            return self.w1.f64()
        product: Float64 = _first(self.w1_a).f64() @ _first(self.w1_b).f64()
        return product

    def inner_array(self) -> Float64:
        """w2 in float64, (out_k, in_n[, k...])."""
        import numpy as np

        if self.w2 is not None:
            return self.w2.f64()
        a, b = _first(self.w2_a).f64(), _first(self.w2_b).f64()
        product: Float64
        if self.t2 is not None:
            product = np.einsum("ij...,ip,jr->pr...", self.t2.f64(), a, b)
        else:
            product = (a @ b.reshape(b.shape[0], -1)).reshape(self.inner)
        return product

    def dense(self) -> Float64:
        """kron(w1, w2) in float64, of shape :attr:`shape`."""
        import numpy as np

        product = np.einsum("om,pn...->opmn...", self.outer_array(), self.inner_array())
        whole: Float64 = product.reshape(self.shape)
        return whole

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """Row ``o * out_k + p`` is ``kron(w1[o], w2[p])``."""
        import numpy as np

        outer = (self.outer_array() * factor).astype(work)
        inner = self.inner_array()
        inner = inner.reshape(inner.shape[0], -1).astype(work)

        def rows(start: int, stop: int) -> Array:
            block, row = np.divmod(np.arange(start, stop), inner.shape[0])
            product: Array = outer[block][:, :, None] * inner[row][:, None, :]
            return product.reshape(stop - start, -1)

        return rows

    def to_low_rank(self) -> LowRank:
        """kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2), exactly, of rank rank(w1) * rank(w2)."""
        left1, right1 = self._outer_factors()
        left2, right2 = self._inner_factors()
        rank = left1[1] * left2[1]
        (_, in_m), (_, in_n, *kernel) = self.outer, self.inner
        up = computed("F64", (left1[0] * left2[0], rank), lambda: _kron(left1[2](), left2[2]()))
        down = computed("F64", (rank, in_m * in_n, *kernel), lambda: _kron(right1[2](), right2[2]()))
        return LowRank(up, down)

    def _outer_factors(self) -> tuple[_Factor, _Factor]:
        if self.w1 is None:
            return _factor(_first(self.w1_a)), _factor(_first(self.w1_b))
        return _whole(self.w1)

    def _inner_factors(self) -> tuple[_Factor, _Factor]:
        if self.w2 is not None:
            return _whole(self.w2)
        a, b = _first(self.w2_a), _first(self.w2_b)
        if self.t2 is None:
            return _factor(a), _factor(b)
        core = self.t2

        def right() -> Float64:
            import numpy as np

            product: Float64 = np.einsum("ij...,jr->ir...", core.f64(), b.f64())
            return product

        return (a.shape[1], a.shape[0], lambda: a.f64().T), (core.shape[0], b.shape[1], right)


def _tell(record: Record, old: Kronecker, new: Kronecker) -> None:
    """Of ``kron(W1', W2') - kron(W1, W2) = kron(D1, W2') + kron(W1, D2)``, where that is not 0."""
    import numpy as np

    (w1, w2), (new_1, new_2) = ((delta.outer_array().ravel(), delta.inner_array().ravel()) for delta in (old, new))
    off_1, off_2 = new_1 - w1, new_2 - w2
    size_1, size_2 = float(np.vdot(w1, w1)), float(np.vdot(new_2, new_2))
    apart = float(np.vdot(off_1, off_1)) * size_2 + size_1 * float(np.vdot(off_2, off_2))
    if apart > 0.0:
        error = apart + 2.0 * float(np.vdot(off_1, w1)) * float(np.vdot(off_2, new_2))
        record(error if error > 0.0 else apart, size_1 * float(np.vdot(w2, w2)))


_Factor = tuple[int, int, "Callable[[], Float64]"]
"""(rows, columns, values)."""


def _factor(tensor: Tensor) -> _Factor:
    return tensor.shape[0], tensor.shape[1], tensor.f64


def _identity(size: int) -> _Factor:
    def values() -> Float64:
        import numpy as np

        return np.eye(size)

    return size, size, values


def _whole(tensor: Tensor) -> tuple[_Factor, _Factor]:
    """A whole matrix as left @ right with the identity on its shorter side; a kernel stays with the right factor."""
    rows, columns = tensor.shape[:2]
    if rows <= prod(tensor.shape[1:]) or len(tensor.shape) > 2:
        return _identity(rows), _factor(tensor)
    return _factor(tensor), _identity(columns)


def _kron(first: Float64, second: Float64) -> Float64:
    import numpy as np

    product = np.einsum("ab,cd...->acbd...", first, second)
    whole: Float64 = product.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *second.shape[2:])
    return whole


def _first(*candidates: Tensor | None) -> Tensor:
    """The first factor that is there; the parser has made sure that one is."""
    return next(t for t in candidates if t is not None)


def stack_kronecker(parts: Sequence[tuple[Kronecker | None, int]]) -> Kronecker:
    """Members one below the other, where that is a Kronecker product again: exact.

    It is when all share w2 and block size (stack w1: this undoes a split), or share a w1 of one row (stack w2).
    Raises CannotError otherwise: a stack of Kronecker products is none in general.
    """
    present = [delta for delta, _ in parts if delta is not None]
    head = present[0]
    size = head.inner[0]
    if all(rows % size == 0 for _, rows in parts) and _share(present, ("w2", "w2_a", "w2_b", "t2", "w1_b")):
        slot = "w1" if head.w1 is not None else "w1_a"
        like = _first(head.w1, head.w1_a)
        return replace(
            head,
            **{
                slot: stack(
                    [
                        zeros(like.dtype, (rows // size, like.shape[1])) if d is None else _first(d.w1, d.w1_a)
                        for d, rows in parts
                    ]
                )
            },
        )
    if head.blocks == 1 and head.t2 is None and _share(present, ("w1", "w1_a", "w1_b", "w2_b")):
        slot = "w2" if head.w2 is not None else "w2_a"
        like = _first(head.w2, head.w2_a)
        return replace(
            head,
            **{
                slot: stack(
                    [zeros(like.dtype, (rows, *like.shape[1:])) if d is None else _first(d.w2, d.w2_a) for d, rows in parts]
                )
            },
        )
    raise CannotError("the members share neither factor, and a stack of different Kronecker products is not one")


def _share(deltas: Sequence[Kronecker], slots: Sequence[str]) -> bool:
    """Whether all have the same values, or all nothing, in every slot."""
    head = deltas[0]
    for delta in deltas[1:]:
        for slot in slots:
            mine, other = getattr(head, slot), getattr(delta, slot)
            if (mine is None) != (other is None) or (mine is not None and not same_values(mine, other)):
                return False
    return True
