"""One module that can be cut: what is known of it before its rank is chosen, and how its result is made afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.rounding import rounded
from lorasurgery.io.dtypes import BITS, all_finite, cast_array
from lorasurgery.io.tensors import computed

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Magnitude, Module
    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Shape, Tensor
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.linalg.policies.budget import Indices
    from lorasurgery.operations.cut.sources import Source

LINEAR, CONV, POINTWISE = "linear", "conv", "1x1"


def kind_of(shape: Shape) -> str:
    """``linear``, ``conv``, or ``1x1`` for a layer (out, in[, k...])."""
    kernel = shape[2:]
    return LINEAR if not kernel else POINTWISE if prod(kernel) == 1 else CONV


@dataclass(frozen=True, slots=True)
class Cut:
    """How a module is to be cut: which singular values stay, the rank it is padded to, and the factors' weights."""

    kept: Indices
    rank: int
    factor: float
    """What the product is multiplied by, because the scale changes by its inverse."""
    all_in_up: bool
    dtype: str
    record: Record


@dataclass(slots=True)
class Subject:
    """A module whose rank can be changed."""

    module: Module
    source: Source
    form: str
    """Family of the result."""
    old_rank: int | None
    """None: it had none (a full difference, a LoKr with a whole w2)."""
    limit: int
    """The largest rank that makes sense: up to the old one and both sides; where a whole matrix is cut, what is smaller."""
    sides: tuple[int, int]
    """(out, in*k*k) of the matrix that is cut."""
    build: Callable[[Cut], Delta]
    shape: Shape
    """(out, in[, k...]) of the layer."""
    gain: float = 1.0
    """What multiplies the singular values of ``source`` to give those of the change, without the scale."""
    note: str = ""
    """What the result is the best of, where that is not every LoRA of its rank."""
    may_stay: bool = True
    """Whether the module may stay as it is where nothing is cut; not when its family is to change."""
    reported: Callable[[Cut], float] | None = None
    """The relative error where the singular values do not give it."""
    effect: Callable[[], float] | None = None
    """The squared norm of what errors are against, where that is not the scaled change: a DoRA's effect on its base model."""
    magnitude: Callable[[Cut], Magnitude | None] | None = None
    """The DoRA magnitude that goes with the result; None: the module has none."""
    ready: Delta | None = None
    """The result, where it was made at once and is held in memory."""
    values: Array = field(init=False)
    """Singular values of the scaled change."""

    def __post_init__(self) -> None:
        self.values = np.asarray(self.source.values) * abs(self.module.scale.value * self.gain)

    @property
    def kind(self) -> str:
        """``linear``, ``conv``, or ``1x1``."""
        return kind_of(self.shape)

    @property
    def length(self) -> int:
        """The number of singular values of the dense matrix."""
        return min(self.sides)

    @property
    def per_rank(self) -> int:
        """Parameters of one rank."""
        return sum(self.sides)

    @property
    def squared_norm(self) -> float:
        """Of the scaled change."""
        scale = self.module.scale.value * self.gain
        return float(np.sum(self.values**2)) + self.source.residual * scale**2

    def bytes_per_rank(self, dtype: str) -> int:
        """In the file."""
        return self.per_rank * BITS[dtype] // 8

    def squared_error(self, kept: Indices) -> float:
        """Of the scaled change when only these singular values stay; summed, not subtracted, so that small ones count."""
        gone = np.ones(len(self.values), bool)
        gone[kept] = False
        scale = self.module.scale.value * self.gain
        return float(np.sum(self.values[gone] ** 2)) + self.source.residual * scale**2


def low_rank_factors(source: Source, cut: Cut, up: Shape, down: Shape) -> tuple[Tensor, Tensor]:
    """The two factors as tensors computed when they are written, zero-padded to the rank; shapes as in the file."""
    values = source.values[cut.kept] if cut.kept.size else np.zeros(0)
    root = np.sqrt(values * abs(cut.factor))
    sign = -1.0 if cut.factor < 0 else 1.0
    on_left = sign * (root**2 if cut.all_in_up else root)
    on_right = np.where(values > 0.0, 1.0, 0.0) if cut.all_in_up else root

    def left() -> AnyArray:
        found = source.left(cut.kept, on_left) if cut.kept.size else np.zeros((up[0], 0))
        return _finished(_padded(found, cut.rank, 1), up, cut)

    def right() -> AnyArray:
        found = source.right(cut.kept, on_right) if cut.kept.size else np.zeros((0, prod(down[1:])))
        return _finished(_padded(found, cut.rank, 0), down, cut)

    return computed(cut.dtype, up, left), computed(cut.dtype, down, right)


def _padded(array: AnyArray, rank: int, axis: int) -> AnyArray:
    missing = rank - array.shape[axis]
    if missing == 0:
        return array
    return np.pad(array, ((0, 0), (0, missing)) if axis else ((0, missing), (0, 0)))


def _finished(array: AnyArray, shape: Shape, cut: Cut) -> AnyArray:
    """In the file's shape and dtype; what rounding costs is recorded, as the factor's own relative error."""
    exact = computed("F64" if array.dtype == np.float64 else "F32", array.shape, lambda: array)
    result = rounded(exact, cut.dtype, cut.record).array()
    if not all_finite(cut.dtype, np.ascontiguousarray(result).reshape(-1).view(np.uint8).data):
        result = cast_array(array, cut.dtype)  # raises, unless the numbers were so before
    return result.reshape(shape)
