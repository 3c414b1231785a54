"""To LoHa: exactly from a LoRA of the rank, else near it by alternating least squares."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.adapter import Scale
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import COMPUTED, rounded
from lorasurgery.io.tensors import computed, of_array
from lorasurgery.operations.conversion.refamily_made import Made, dtype_of, refuse_not_finite

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64
    from lorasurgery.linalg.hadamard_target import Approximated
    from lorasurgery.operations.conversion.job import Job

ENOUGH = 1e-4
"""Of the squared error: a sweep that gains less is the last. Later ones together gain about 1e-3 of the error."""


def to_loha(job: Job, module: Module, delta: Delta) -> Made:
    """A LoRA as a LoHa of the same rank, exactly; with a smaller rank or an energy asked for, the nearest that is found.

    Exact: ``w1_a = up``, ``w1_b = down`` (flat for a convolution), alpha / rank stays, and the second arm is all ones, its
    first column times its first row. Otherwise see :mod:`lorasurgery.linalg.nearest_hadamard`; an energy asks for the rank
    that a LoRA would need for it. A LoHa that is small enough is left alone.
    Raises BrokenModuleError for NaN and infinity, ValueRangeError for values the dtype cannot hold.
    """
    own = job.options.budget.rank
    if isinstance(delta, (Hadamard, LowRank)) and job.options.budget.energy is None and delta.rank <= (own or delta.rank):
        return _as_it_is(job, module, delta)
    of = _matrix(delta)
    rank = _rank(job, of)
    if isinstance(delta, (Hadamard, LowRank)) and delta.rank <= rank:
        return _as_it_is(job, module, delta)
    return _nearest(job, module, delta, of, rank)


def _as_it_is(job: Job, module: Module, delta: Hadamard | LowRank) -> Made:
    return Made(module if isinstance(delta, Hadamard) else module.with_delta(_exactly(job, module, delta)))


def _exactly(job: Job, module: Module, delta: LowRank) -> Hadamard:
    dtype, record = dtype_of(job, module, delta), job.recorder(module)
    left, right = (delta.up.shape[0], delta.rank), (delta.rank, prod(delta.down.shape[1:]))
    return Hadamard(
        rounded(delta.up, dtype, record).reshape(*left),
        rounded(delta.down, dtype, record).reshape(*right),
        computed(dtype, left, lambda: _ones(left, column=True)),
        computed(dtype, right, lambda: _ones(right, column=False)),
    )


def _ones(shape: tuple[int, int], *, column: bool) -> Float64:
    """Zeros but for ones in the first column, or the first row."""
    import numpy as np

    found = np.zeros(shape)
    found[(slice(None), 0) if column else 0] = 1.0
    return found


def _nearest(job: Job, module: Module, delta: Delta, of: Approximated, rank: int) -> Made:
    from lorasurgery.linalg.hadamard_sweep import Arms
    from lorasurgery.linalg.nearest_hadamard import hadamard_error, nearest_hadamard

    scale = module.scale.value
    arms = nearest_hadamard(of, rank, tolerance=ENOUGH).arms
    dtype = dtype_of(job, module, delta)
    w1_a = of_array(arms.w1_a * scale, dtype)
    w1_b, w2_a, w2_b = (of_array(arm, dtype) for arm in arms[1:])
    made = Hadamard(w1_a, w1_b, w2_a, w2_b)
    stored = Arms(w1_a.f64() / scale, w1_b.f64(), w2_a.f64(), w2_b.f64()) if scale else arms
    error = max(hadamard_error(of, stored), COMPUTED * of.norm) * scale**2
    return Made(replace(module, delta=made, scale=Scale(1.0, module.scale.source)), error, of.norm * scale**2)


def _matrix(delta: Delta) -> Approximated:
    """The change without its scale, never formed where it has factors."""
    from lorasurgery.linalg.hadamard_target import hadamard_of_dense, hadamard_of_product

    refuse_not_finite(delta)
    if isinstance(delta, Full):
        return hadamard_of_dense(delta.diff.f64().reshape(delta.shape[0], -1))
    low = delta.to_low_rank()
    return hadamard_of_product(low.up.f64().reshape(low.up.shape[0], -1), low.down.f64().reshape(low.rank, -1))


def _rank(job: Job, of: Approximated) -> int:
    """The asked rank; with an energy the one that a LoRA needs for it, if that is smaller."""
    budget = job.options.budget
    most = min(of.shape) if budget.energy is None else of.lora_rank(budget.energy)
    return min(budget.rank or most, most)
