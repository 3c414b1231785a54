"""LoRA and LoCon: delta = up @ down, with a Tucker core ``mid`` between them for some convolutions.

Shapes: up (out, rank[, 1...]), down (rank, in[, k...]); Tucker: down (rank, in, 1, 1), mid (rank, rank, k, k) and
delta[p, r, k, l] = sum_ij mid[i, j, k, l] up[p, i] down[j, r]. Source: LyCORIS ``functional/locon.py`` and ``general.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError, block_columns, power_of_two, split_factor
from lorasurgery.deltas.by_rows import flat64
from lorasurgery.deltas.effect import EXACTLY, Effect, before, behind, signs
from lorasurgery.deltas.rounding import multiplied, once, rounded, told_by_rows
from lorasurgery.io.dtypes import numpy_dtype, widest
from lorasurgery.io.tensors import Tensor, computed, same_values, stack, zeros

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import Rows
    from lorasurgery.io.tensors import Array, Float64, Ranges, Shape


@dataclass(frozen=True, slots=True)
class LowRank:
    """up @ down, or up @ mid @ down."""

    up: Tensor
    down: Tensor
    mid: Tensor | None = None

    family = "lora"

    @property
    def rank(self) -> int:
        """Rows of down; sd-scripts and ComfyUI divide alpha by it."""
        return self.down.shape[0]

    @property
    def shape(self) -> Shape:
        """(out, in[, k...])."""
        kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """``up``, ``down`` and, for Tucker, ``mid``."""
        found = {"up": self.up, "down": self.down}
        return found if self.mid is None else {**found, "mid": self.mid}

    def rows(self, ranges: Ranges) -> LowRank:
        """Slice ``up``; where it is block-diagonal, only the columns these rows use, so that a fuse is undone exactly."""
        up = self.up.rows(ranges)
        columns = None if self.mid is not None else used_columns(self.up, up)
        if columns is None:
            return replace(self, up=up)
        return LowRank(up.columns([columns]), self.down.rows([columns]))

    def scaled(self, factor: float, record: Record | None = None) -> LowRank:
        """Fold ``factor`` into ``up``; in fp16, half of its power of two goes into ``down`` to stay in range."""
        if factor == 1.0:
            return self
        remainder, exponent = split_factor(factor)
        share = exponent // 2 if self.up.dtype == "F16" else 0
        return replace(
            self,
            up=multiplied(self.up, remainder * power_of_two(exponent - share), record, lambda: self._effect("up")),
            down=multiplied(self.down, power_of_two(share), record, lambda: self._effect("down")),
        )

    def times(self, factor: float) -> LowRank:
        """The product with ``factor``, exactly: ``up`` is float64 then, for the caller to cast, but for powers of two."""
        remainder, exponent = split_factor(factor)
        if abs(remainder) == 1.0:
            return self.scaled(factor)
        whole = self.scaled(power_of_two(exponent))
        return replace(whole, up=multiplied(rounded(whole.up, "F64"), remainder))

    def _effect(self, slot: str) -> Effect:
        """What a change of one factor, flat after its first axis, does to the whole; of ``down`` only without a core."""
        if slot == "down":
            return behind(self.up.reshape(self.up.shape[0], self.up.shape[1]))
        down = self.to_low_rank().down
        return before(down.reshape(down.shape[0], down.size // down.shape[0]))

    def cast(self, dtype: str, record: Record | None = None) -> LowRank:
        """Every factor in ``dtype``; ``record`` gets the error of the product."""
        if self.mid is not None:
            return told_by_rows(self, LowRank(**{s: rounded(t, dtype) for s, t in self.tensors.items()}), 1.0, record)
        if dtype not in (self.up.dtype, self.down.dtype):
            return LowRank(self._cast_up(dtype, once(record)), rounded(self.down, dtype))
        up = rounded(self.up, dtype, record, lambda: self._effect("up"))
        return LowRank(up, rounded(self.down, dtype, record, lambda: self._effect("down")))

    def _cast_up(self, dtype: str, record: Record | None) -> Tensor:
        """``up`` in ``dtype``, and both factors' rounding measured as ||U' D' - U D||^2."""

        def values() -> Array:
            up, down = (t.array().reshape(t.shape[0], -1) for t in (self.up, self.down))
            new = up.astype(numpy_dtype(dtype))
            if record is not None:
                told(record, up, down, new, down.astype(numpy_dtype(dtype)))
            return new.reshape(self.up.shape)

        return computed(dtype, self.up.shape, values)

    def dense(self) -> Float64:
        """up @ down in float64, of shape :attr:`shape`."""
        up = self.up.f64().reshape(self.up.shape[0], -1)
        if self.mid is not None:
            return _with_core(self.mid.f64(), up, self.down.f64().reshape(self.rank, -1))
        product: Float64 = (up @ self.down.f64().reshape(self.rank, -1)).reshape(self.shape)
        return product

    def flat_factors(self, work: str, factor: float = 1.0) -> tuple[Array, Array]:
        """(out, rank) times ``factor``, and (rank, in*k*k) with a Tucker core multiplied into it; dtype ``work``.

        Products are taken in float64 and rounded once.
        """
        return (flat64(self.up) * factor).astype(work), flat64(self.to_low_rank().down).astype(work)

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """Rows of ``up @ down``: see :class:`lorasurgery.deltas.by_rows.ByRows`."""
        up, down = self.flat_factors(work, factor)
        return lambda start, stop: up[start:stop] @ down

    def to_low_rank(self) -> LowRank:
        """Itself; a Tucker core is multiplied into ``down``, which is then float64 for the caller to cast."""
        if self.mid is None:
            return self
        mid, down = self.mid, self.down

        def folded() -> Float64:
            import numpy as np

            product: Float64 = np.einsum("ij...,jr->ir...", mid.f64(), down.f64().reshape(down.shape[0], -1))
            return product

        shape = (mid.shape[0], down.shape[1], *mid.shape[2:])
        return LowRank(self.up, computed("F64", shape, folded))


def told(record: Record, up: Array, down: Array, new_up: Array, new_down: Array) -> None:
    """Tell ``record`` of ||U' D' - U D||^2 and ||U D||^2, of matrices, where a number changed that the product depends on.

    By Gram matrices up to rank 16, above it, where they would cost more than all else, with random vectors.
    """
    import numpy as np

    up, down, new_up, new_down = (side.astype(np.float64) for side in (up, down, new_up, new_down))
    off_up, off_down = new_up - up, new_down - down
    if not ((off_up.any(axis=0) & new_down.any(axis=1)) | (up.any(axis=0) & off_down.any(axis=1))).any():
        return
    if len(down) > EXACTLY:
        vectors = signs(down.shape[1], "float64")
        off, whole = off_up @ (new_down @ vectors) + up @ (off_down @ vectors), up @ (down @ vectors)
        error, norm = float(np.vdot(off, off)), float(np.vdot(whole, whole))
    else:
        error = _inner(off_up, new_down, off_up, new_down) + _inner(up, off_down, up, off_down)
        error, norm = error + 2.0 * _inner(off_up, new_down, up, off_down), _inner(up, down, up, down)
    if error <= 0.0:  # it cancels, as far as these numbers tell: what it is where the parts do not hang together
        error = _apart(off_up, new_down) + _apart(up, off_down)
    record(error, norm)


def _apart(up: Array, down: Array) -> float:
    """The squared norms of columns times those of rows, added up."""
    return float(((up * up).sum(axis=0) * (down * down).sum(axis=1)).sum())


def _inner(up: Array, down: Array, other_up: Array, other_down: Array) -> float:
    """<up @ down, other_up @ other_down>, without forming either product."""
    return float(((up.T @ other_up) * (down @ other_down.T)).sum())


def _with_core(mid: Float64, up: Float64, down: Float64) -> Float64:
    import numpy as np

    product: Float64 = np.einsum("ij...,pi,jr->pr...", mid, up, down)
    return product


def used_columns(up: Tensor, part: Tensor) -> tuple[int, int] | None:
    """The columns of ``up`` that only the rows ``part`` use, when ``up`` is block-diagonal there; otherwise None.

    ``up``: (out, rank); ``part``: some of its rows. The columns must be one run, ``part`` zero outside of it and the
    other rows zero inside: then the module is a fuse of several and the run is this member's own rank.
    """
    import numpy as np

    if up.shape[0] == part.shape[0]:
        return None
    whole = _nonzero(up)
    inside = _nonzero(part)
    columns = np.flatnonzero(inside.any(axis=0))
    if columns.size == 0:
        return None
    first, last = int(columns[0]), int(columns[-1]) + 1
    uses = whole[:, first:last].sum()
    if uses != inside.sum() or (first, last) == (0, up.shape[1]):
        return None
    return first, last


def _nonzero(tensor: Tensor) -> Float64:
    import numpy as np

    values: Float64 = np.asarray(tensor.array().reshape(tensor.shape[0], -1) != 0)
    return values


def block_rows(ups: Sequence[Tensor], down: Tensor) -> LowRank:
    """Rows stacked: ``ups[i]`` (rows_i, r_i) times the next r_i rows of ``down``. Exact: a block-diagonal ``up``.

    Source: LongCat-Video ``modules/lora_utils.py`` (``LoRAUPParallel``). Raises CannotError when the ranks do not add up.
    """
    if sum(up.shape[1] for up in ups) != down.shape[0]:
        ranks = " + ".join(str(up.shape[1]) for up in ups)
        raise CannotError(f"its up factors have rank {ranks}, its down factor {down.shape[0]}")
    return LowRank(block_columns([(up, up.shape[0], up.shape[1]) for up in ups], widest([up.dtype for up in ups])), down)


def stack_low_rank(parts: Sequence[tuple[LowRank | None, int]]) -> LowRank:
    """Members one below the other: (delta, rows), None for a missing member (zero rows). Exact.

    Where every member has the same ``down``, up is stacked and the rank stays; otherwise up becomes block-diagonal and
    the ranks add up. The members' scales must be equal or folded. Raises CannotError for Tucker cores.
    """
    present = [delta for delta, _ in parts if delta is not None]
    if any(delta.mid is not None for delta in present):
        raise CannotError("Tucker convolutions cannot be stacked")
    dtype = widest([delta.up.dtype for delta in present])
    if all(same_values(delta.down, present[0].down) for delta in present):
        rest = present[0].up.shape[1:]
        ups = [zeros(dtype, (rows, *rest)) if delta is None else delta.up for delta, rows in parts]
        return LowRank(stack(ups), present[0].down)
    blocks = [(None, rows, 0) if delta is None else (delta.up, rows, delta.rank) for delta, rows in parts]
    up = block_columns(blocks, dtype)
    return LowRank(up.reshape(*up.shape, *present[0].up.shape[2:]), stack([delta.down for delta in present]))
