"""DoRA with the base model: ``W' = m (W + s D) / ||W + s D||``, the norm per output row or per input column.

*fold*: ``W' - W`` is an ordinary change, cut like one; the result is a plain LoRA. *recompute*: what is inside (a LoRA, a
LoHa or a LoKr) is cut to ``D'`` as it would be alone, and each magnitude becomes the one that brings its row (or column)
nearest to the old one, ``m' = <W', v>`` with ``v = (W + s D') / ||W + s D'||``. The reference of every error is ``W' - W``,
what the adapter does to this base model.
The norm is over all other axes, as PEFT and LyCORIS take it (per input column: over rows and kernel).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod, sqrt
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import Magnitude
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import rounded
from lorasurgery.io.tensors import of_array
from lorasurgery.operations.cut.families import subject_of
from lorasurgery.operations.cut.sources import Slot, dense_source
from lorasurgery.operations.cut.subject import Cut, Subject, low_rank_factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64, Shape
    from lorasurgery.linalg.factors import AnyArray, Array

TINY = 1e-12


def folded_subject(module: Module, shape: Shape, needed: int | None, base: Callable[[], AnyArray]) -> Subject:
    """What the DoRA module adds to the base weight, as something that can be cut; ``base`` yields it as (out, in*k*k)."""
    sides = (shape[0], prod(shape[1:]))
    scale = module.scale.value or 1.0

    def change() -> Float64:
        return (_changed(module, shape, base) - base()) / scale

    source = dense_source(change, None if needed is None else min(needed, *sides), Slot())

    def build(cut: Cut) -> Delta:
        ones = tuple(1 for _ in shape[2:])
        return LowRank(*low_rank_factors(source, cut, (shape[0], cut.rank, *ones), (cut.rank, *shape[1:])))

    rank = None if module.delta is None else module.delta.rank
    return Subject(
        module, source, "lora", rank, min(sides), sides, build, shape, note="folded with the base model's weight",
        may_stay=False, magnitude=lambda _: None,
    )  # fmt: skip


def recomputed_subject(
    module: Module, shape: Shape, needed: int | None, base: Callable[[], AnyArray], *, as_lora: bool
) -> Subject:
    """The change inside the DoRA module as something that can be cut, with the magnitude that is best beside the result."""
    assert module.magnitude is not None  # noqa: S101  it is a DoRA
    subject = subject_of(module, shape, needed, as_lora=as_lora)
    magnitude, build = module.magnitude, subject.build

    def after(cut: Cut) -> tuple[Float64, Array]:
        """(W + s D' normalised, the new magnitudes)."""
        old = _changed(module, shape, base)
        inside = build(_exactly(cut)).dense().reshape(shape[0], -1)
        new = base() + module.scale.value * inside
        unit = new / _norms(new, magnitude, shape)
        return unit, _sums(old * unit, magnitude, shape)

    def renewed(cut: Cut) -> Magnitude:
        values = after(cut)[1].reshape(magnitude.tensor.shape)
        return Magnitude(rounded(of_array(values, "F64"), magnitude.tensor.dtype, cut.record), magnitude.axis)

    @cache
    def effect() -> float:
        return float(np.sum((_changed(module, shape, base) - base()) ** 2))

    def error(cut: Cut) -> float:
        unit, values = after(cut)
        new = unit * _spread(values, magnitude, shape)
        norm = sqrt(effect())
        return float(np.linalg.norm(_changed(module, shape, base) - new)) / norm if norm else 0.0

    subject.magnitude, subject.reported, subject.effect = renewed, error, effect
    inside = f"cut inside ({subject.note})" if subject.note else "cut inside"
    subject.form = "dora" if subject.form == "lora" else subject.form
    subject.note = f"{inside}; the magnitude is the best one for it"
    return subject


def _changed(module: Module, shape: Shape, base: Callable[[], AnyArray]) -> Float64:
    """``W'`` as (out, in*k*k) in float64."""
    magnitude = module.magnitude
    assert magnitude is not None  # noqa: S101  the caller has looked
    assert module.delta is not None  # noqa: S101
    new = base() + module.scale.value * module.delta.dense().reshape(shape[0], -1)
    result: Float64 = new / _norms(new, magnitude, shape) * _spread(magnitude.tensor.f64().ravel(), magnitude, shape)
    return result


def _norms(weight: Float64, magnitude: Magnitude, shape: Shape) -> Array:
    """The norms that a magnitude replaces, broadcast against (out, in*k*k)."""
    return np.maximum(np.sqrt(_spread(_sums(weight**2, magnitude, shape), magnitude, shape)), TINY)


def _sums(values: Float64, magnitude: Magnitude, shape: Shape) -> Array:
    """Sums per output row, or per input column over rows and kernel."""
    whole = values.reshape(shape[0], shape[1], -1)
    sums: Array = whole.sum(axis=(1, 2)) if magnitude.axis == "out" else whole.sum(axis=(0, 2))
    return sums


def _spread(values: Array, magnitude: Magnitude, shape: Shape) -> Array:
    """One number per row or per column, in a shape that broadcasts against (out, in*k*k)."""
    if magnitude.axis == "out":
        return values.reshape(-1, 1)
    return np.repeat(values, prod(shape[1:]) // len(values)).reshape(1, -1)


def _exactly(cut: Cut) -> Cut:
    """The same cut in float64 with the scale left out."""
    return replace(cut, factor=1.0, dtype="F64", record=lambda _error, _norm: None)
