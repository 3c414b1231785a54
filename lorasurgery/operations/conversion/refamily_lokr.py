"""To LoKr: the nearest Kronecker product, with LyCORIS' factors of both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Scale
from lorasurgery.deltas.factorization import factorization
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.io.tensors import of_array
from lorasurgery.operations.conversion.refamily_made import INVISIBLE, Made, dtype_of, refuse_not_finite, rounding_of, shape_of

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.linalg.nearest_kronecker import Rearranged
    from lorasurgery.operations.conversion.job import Job


def to_lokr(job: Job, module: Module, delta: Delta) -> Made:
    """The nearest ``kron(w1, w2)``; a LoKr of these factors is left alone.

    Raises BrokenModuleError for NaN and infinity, ValueRangeError for values the dtype cannot hold.
    """
    from lorasurgery.linalg.nearest_kronecker import kronecker_error, nearest_kronecker

    how, scale = job.options, module.scale.value
    out, inputs, *kernel = shape_of(job, module, delta)
    outer = tuple(factorization(size, -1 if how.factor is None else how.factor)[0] for size in (out, inputs))
    if isinstance(delta, Kronecker) and (how.factor is None or delta.outer == outer):
        return Made(module)
    of = _rearranged(delta, (outer[0], outer[1]))
    found = nearest_kronecker(of, rank=how.rank, energy=how.energy)
    dtype = dtype_of(job, module, delta)
    w1 = of_array(found.w1 * scale, dtype)
    rounding = rounding_of((w1, found.w1 * scale))
    if found.w2_b is None:
        w2 = of_array(found.w2.reshape(out // outer[0], inputs // outer[1], *kernel), dtype)
        made, right = Kronecker(w1=w1, w2=w2), w2.f64().reshape(of.inner)
        rounding += rounding_of((w2, found.w2))
    else:
        w2_a, w2_b = of_array(found.w2, dtype), of_array(found.w2_b, dtype)
        made, right = Kronecker(w1=w1, w2_a=w2_a, w2_b=w2_b), w2_a.f64() @ w2_b.f64()
        rounding += rounding_of((w2_a, found.w2), (w2_b, found.w2_b))
    error = kronecker_error(of, w1.f64() / scale, right) if scale else 0.0
    error = max(error, min(rounding, INVISIBLE) * of.norm) * scale**2  # a small one is lost in the difference of large norms
    return Made(replace(module, delta=made, scale=Scale(1.0, module.scale.source)), error, of.norm * scale**2)


def _rearranged(delta: Delta, outer: tuple[int, int]) -> Rearranged:
    from lorasurgery.linalg.nearest_kronecker import rearranged_dense, rearranged_product

    refuse_not_finite(delta)
    if isinstance(delta, Full):
        return rearranged_dense(delta.diff.array().reshape(delta.shape[0], -1), outer)
    low = delta.to_low_rank()
    return rearranged_product(low.up.f64().reshape(low.up.shape[0], -1), low.down.f64().reshape(low.rank, -1), outer)
