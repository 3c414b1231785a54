"""The exact sum of several files' changes of one weight.

- Modules that are alike but for one factor keep their structure: LoRA, LoHa, LoKr and MiSS are linear in each of theirs.
- Norms and full differences are added element by element, and so is everything beside a full difference.
- All else is written side by side in its exact low-rank form: up = [u_1, u_2, ...], down = [d_1; d_2; ...].
- Where that rank would exceed both sides of the weight, the sum is a full difference, or a LoRA of the smaller side's
  rank for readers without those, or the nearest LoKr of LoKr modules where that is asked for. A sum that is cut afterwards
  is whichever of the two is cut sooner.

One scale is common to all members when their ratios are powers of two: then no number changes but its exponent. Otherwise
the scales are multiplied into ``up``, once, and alpha is the rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from math import log2, prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.adapter import Module, Scale
from lorasurgery.deltas.base import CannotError, is_power_of_two
from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.miss import Miss
from lorasurgery.deltas.rounding import rounded
from lorasurgery.io.dtypes import widest
from lorasurgery.io.tensors import computed, same_values
from lorasurgery.operations.conversion.reduce import Budget, to_lora
from lorasurgery.operations.route import dense_is_cheaper, making_dense
from lorasurgery.operations.sum.adding import Adding, Term
from lorasurgery.operations.sum.lokr import nearest_lokr
from lorasurgery.operations.sum.side_by_side import Low, side_by_side

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64, Tensor

ROWS = 64
"""Of a dense change that are multiplied at a time."""
NARROW = frozenset({"F16", "BF16"})
ADDED, SHARED, SIDE_BY_SIDE, FULL, NEAREST, REDUCED, GONE = (
    "added", "added in one factor", "side by side", "added in full", "nearest LoKr", "side by side, reduced", "cancelled out",
)  # fmt: skip


class Sum(NamedTuple):
    """A module and how it was made; None where the members cancel."""

    module: Module | None
    action: str


def added(modules: Sequence[Module], how: Adding) -> Sum:
    """The sum of two or more modules of one site; the name and everything beside the change are the first one's.

    Raises CannotError for DoRA and for families that multiply the base weight.
    """
    head = modules[0]
    bias = _biases(modules)
    own = [module for module in modules if module.delta is not None and module.scale.value != 0.0]
    if len(own) < 2:
        kept = own[0] if own else head
        return Sum(replace(kept, bias=bias, name=head.name), ADDED)
    refuse_nonlinear(own)
    terms = [Term(m.delta, m.scale.value) for m in own if m.delta is not None]
    found = _shared(terms, how) or _lokr(terms, how) or _dense(terms, how) or _side_by_side(terms, how)
    if found.delta is None and bias is None:
        return Sum(None, GONE)
    scale = Scale(found.scale, "sum")
    extras = reduce(lambda first, second: {**second, **first}, (m.extras for m in own))
    return Sum(replace(head, delta=found.delta, scale=scale, magnitude=None, bias=bias, extras=extras), found.action)


def refuse_nonlinear(modules: Sequence[Module]) -> None:
    """Raises CannotError for the first module whose change is no matrix that could be scaled or added."""
    reason = next((text for text in map(nonlinear, modules) if text), None)
    if reason is not None:
        raise CannotError(reason)


def nonlinear(module: Module) -> str | None:
    """Why a module's change can be neither scaled nor added; None where it can."""
    if module.magnitude is not None:
        return "its DoRA magnitude rescales the sum of base and change, so that the change can neither be scaled nor added"
    if isinstance(module.delta, Opaque):
        return f"{module.delta.called} acts on the base weight, and can neither be scaled nor added"
    return None


class _Found(NamedTuple):
    delta: Delta | None
    scale: float
    action: str


def _shared(terms: Sequence[Term], how: Adding) -> _Found | None:
    """Members that differ in no tensor, or in one: the sum is in that one. None: they differ in more."""
    head = terms[0].delta
    slots = head.tensors
    if any(type(t.delta) is not type(head) or t.delta.tensors.keys() != slots.keys() for t in terms):
        return None
    differing = []
    for slot, tensor in slots.items():
        if not all(_same(tensor, t.delta.tensors[slot]) for t in terms[1:]):
            differing.append(slot)
            if len(differing) > 1:
                return None
    factor = sum(t.factor for t in terms)
    if not differing:
        return _Found(head if factor else None, factor, SHARED if factor else GONE)
    slot = differing[0]
    if not isinstance(head, LINEAR) or any(t.delta.tensors[slot].shape != slots[slot].shape for t in terms):
        return None
    common = 1.0 if isinstance(head, Full) else _common(terms, how.dtype)
    whole = _sum([(t.delta.tensors[slot], t.factor / common) for t in terms])
    exact = replace(head, **{_FIELDS.get(slot, slot): whole})  # type: ignore[arg-type]  # a slot is a field of its class
    return _Found(exact.cast(how.dtype, how.record), common, ADDED if isinstance(head, Full) else SHARED)


LINEAR = (LowRank, Hadamard, Kronecker, Full, Miss)
"""Kinds whose change is linear in each of their tensors."""
_FIELDS = {"w_norm": "diff", "miss_block": "block"}


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values; most differ in their first row."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.shape and first.compute is None and second.compute is None:
        start = [(0, 1)]
        if not same_values(first.rows(start), second.rows(start)):
            return False
    return same_values(first, second)


def _sum(terms: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The weighted sum in float64, computed when it is asked for."""

    def values() -> Float64:
        total: Float64 = np.zeros(terms[0][0].shape)
        for tensor, factor in terms:
            total += tensor.f64() * factor
        return total

    return computed("F64", terms[0][0].shape, values)


def _lokr(terms: Sequence[Term], how: Adding) -> _Found | None:
    """The nearest LoKr, where that is asked for and there is one of the members' shapes."""
    delta = nearest_lokr(terms, how) if how.lokr else None
    return None if delta is None else _Found(delta, 1.0, NEAREST)


def _dense(terms: Sequence[Term], how: Adding) -> _Found | None:
    """Element by element, where one of them is a full difference or that is the shorter way; else None."""
    full = any(isinstance(t.delta, Full) for t in terms)
    if not full and not _better_dense(terms, how):
        return None

    def values() -> Float64:
        total: Float64 = np.zeros(how.shape)
        for delta, factor in terms:
            own = delta.dense().reshape(how.shape)
            for start in range(0, len(own), ROWS):  # a second matrix of that size would take longer than the sum
                total[start : start + ROWS] += own[start : start + ROWS] * factor
        return total

    norm = all(t.delta.family == "norm" for t in terms)
    whole = computed("F64", how.shape, values)
    diff = whole if how.cut is not None and not norm else rounded(whole, how.dtype, how.record)
    return _Found(Full(diff, "norm" if norm else "full"), 1.0, ADDED if full else FULL)


def _better_dense(terms: Sequence[Term], how: Adding) -> bool:
    """Whether the rank is beyond both sides; of what is cut afterwards, whether that is sooner done with the dense sum."""
    sides, rank = (how.shape[0], prod(how.shape[1:])), sum(t.delta.to_low_rank().rank for t in terms)
    if how.cut is None:
        return how.full and rank > min(sides)
    return dense_is_cheaper(sides, rank, how.cut.needed, making_dense(t.delta for t in terms))


def _side_by_side(terms: Sequence[Term], how: Adding) -> _Found:
    common = _common(terms, how.dtype)
    low = [_low_rank(t, t.factor / common, how) for t in terms]
    if all(_is_written(one, how) for one in low):
        joined = side_by_side(low, how)
    else:  # in float64 on the way, and rounded once, both factors together
        wide = [Low(one.up.cast("F64"), one.down.cast("F64"), one.factor) for one in low]
        joined = side_by_side(wide, replace(how, dtype="F64")).cast(how.dtype, how.record)
    if joined.rank <= min(how.shape[0], prod(how.shape[1:])) or how.cut is not None:
        return _Found(joined, common, SIDE_BY_SIDE)
    cut = to_lora([(joined, common, how.shape[0])], Budget(), how.dtype, how.record)
    how.record(cut.error, cut.norm)
    return _Found(cut.delta, 1.0, REDUCED)


def _common(terms: Sequence[Term], dtype: str) -> float:
    """The scale that stays outside of the factors: see the module's first words.

    In fp16 it is the power of two next to the largest, so that nothing leaves that dtype's small range.
    """
    factors = [t.factor for t in terms]
    if all(is_power_of_two(f / factors[0]) for f in factors):
        return abs(factors[0])
    largest = max(abs(f) for f in factors)
    return float(2.0 ** round(log2(largest))) if dtype == "F16" else 1.0


def _low_rank(term: Term, factor: float, how: Adding) -> Low:
    """A member's factors, with as many axes as the layer."""
    low = term.delta.to_low_rank()
    ones = tuple(1 for _ in how.shape[2:])
    return Low(low.up.reshape(how.shape[0], low.rank, *ones), low.down.reshape(low.rank, *how.shape[1:]), factor)


def _is_written(low: Low, how: Adding) -> bool:
    """Whether a member's ``down`` may stay as it is beside others of the result's dtype."""
    own = widest([low.up.dtype, low.down.dtype])
    return own == how.dtype or (how.cut is not None and own in NARROW)


def _biases(modules: Sequence[Module]) -> Tensor | None:
    """Their sum in float64; weights are in the biases already."""
    present = [module.bias for module in modules if module.bias is not None]
    return _sum([(tensor, 1.0) for tensor in present]) if len(present) > 1 else present[0] if present else None
