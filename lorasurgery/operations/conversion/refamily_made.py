"""What the ways to another family share: the result with its error, the dtype and shape to write it in."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.deltas.rounding import COMPUTED
from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.finite import is_finite
from lorasurgery.layouts.detect import expected_shape

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64, Shape, Tensor
    from lorasurgery.operations.conversion.job import Job


class Made(NamedTuple):
    """A module with its squared error and squared norm (0, 0: exact, or not known before it is written)."""

    module: Module
    error: float = 0.0
    norm: float = 0.0


def dtype_of(job: Job, module: Module, delta: Delta) -> str:
    """The asked dtype, else the file's own for this module (a delta on its way may be float64)."""
    own = next((m.delta for m in job.adapter.modules.values() if m.name == module.name and m.delta is not None), delta)
    return job.options.dtype_for(own.tensors.values())


def shape_of(job: Job, module: Module, delta: Delta) -> Shape:
    """The weight's shape where the delta, which may be flat, has its size; else the delta's own."""
    shape = expected_shape(job.arch, module.site)
    return shape if prod(shape) == prod(delta.shape) else delta.shape


INVISIBLE = 1e-13
"""A squared relative error below which differences of squared norms in float64 do not show it."""


def rounding_of(*pairs: tuple[Tensor, Float64]) -> float:
    """Squared relative errors of tensors that were computed anew and rounded, added up; never less than float64's own."""
    total = COMPUTED
    for tensor, exact in pairs:
        norm = float((exact**2).sum())
        total += float(((tensor.f64() - exact.reshape(tensor.shape)) ** 2).sum()) / norm if norm else 0.0
    return total


def refuse_not_finite(delta: Delta) -> None:
    """A decomposition of NaN does not end well: raises BrokenModuleError for stored values that are none."""
    for slot, tensor in delta.tensors.items():
        if tensor.compute is None and not is_finite(tensor):
            raise BrokenModuleError(f"its {slot} holds NaN or infinity", key=slot)
