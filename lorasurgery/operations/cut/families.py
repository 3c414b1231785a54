"""What each family of modules is cut as: a LoRA, a LoKr with a smaller w2, a LoHa with smaller arms, or not at all."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import rounded
from lorasurgery.io.dtypes import widest
from lorasurgery.io.tensors import computed
from lorasurgery.operations.cut.hadamard import loha_subject
from lorasurgery.operations.cut.sources import NARROW, FactoredSource, Slot, dense_source, kronecker_source
from lorasurgery.operations.cut.subject import Cut, Subject, low_rank_factors
from lorasurgery.operations.route import is_dense_cheaper

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64, Shape, Tensor
    from lorasurgery.operations.cut.sources import Source

GIVEN_W1 = "the best w2 of its rank for the w1 it has, not the best LoKr"


def subject_of(
    module: Module,
    shape: Shape,
    needed: int | None,
    *,
    as_lora: bool,
    measured: FactoredSource | None = None,
    dtype: str = "keep",
) -> Subject:
    """The module as something that can be cut; ``shape``: (out, in[, k...]) of the layer.

    ``needed``: how many singular values decide, None for all; ``measured``: a plain LoRA's, if they are known;
    ``dtype``: the result's, as in :func:`dtype_of`.
    Raises ``ValueError`` for factors with NaN or infinity.
    """
    delta = module.delta
    if isinstance(delta, Kronecker) and not as_lora:
        return _lokr(module, delta, shape, needed, dtype)
    if isinstance(delta, Hadamard) and not as_lora:
        return loha_subject(module, delta, shape, needed)
    assert delta is not None  # noqa: S101  biases are sorted out before
    return _as_lora(module, delta, shape, needed, measured, dtype, as_lora=as_lora)


def dtype_of(delta: Delta, wanted: str) -> str:
    """The dtype of a result: the one asked for, or the widest of the delta's floats."""
    return wanted if wanted != "keep" else widest([tensor.dtype for tensor in delta.tensors.values()])


def _as_lora(
    module: Module, delta: Delta, shape: Shape, needed: int | None, measured: Source | None, dtype: str, *, as_lora: bool
) -> Subject:
    slot, (out, width) = Slot(), (shape[0], prod(shape[1:]))
    most, narrow = min(out, width), dtype_of(delta, dtype) in NARROW
    wanted, source = _at_most(needed, most), measured
    if isinstance(delta, Kronecker):
        source = kronecker_source(delta.outer_array, lambda: _flat(delta.inner_array()), slot)
        limit = min(len(source.values), most)
    elif isinstance(delta, Full):
        source = dense_source(lambda: _flat(delta.dense()), wanted, slot, narrow=narrow)
        limit = most if as_lora else max(min(most, (out * width - 1) // (out + width)), 1)  # beyond that a full one is smaller
    else:
        low = delta.to_low_rank()
        limit = min(low.rank, most)
        if source is None and is_dense_cheaper(delta, wanted):
            source = dense_source(lambda: _flat(delta.dense()), wanted, slot, narrow=narrow)
        source = source or FactoredSource.of(low.up, low.down, wanted, slot, narrow=narrow)

    def build(cut: Cut) -> Delta:
        ones = tuple(1 for _ in shape[2:])
        up, down = low_rank_factors(source, cut, (out, cut.rank, *ones), (cut.rank, *shape[1:]))
        return LowRank(up, down)

    note = "Tucker core folded" if isinstance(delta, LowRank) and delta.mid is not None else ""
    stays = isinstance(delta, LowRank) or (isinstance(delta, Full) and not as_lora)
    return Subject(module, source, "lora", delta.rank, limit, (out, width), build, shape, note=note, may_stay=stays)


def _lokr(module: Module, delta: Kronecker, shape: Shape, needed: int | None, dtype: str) -> Subject:
    """``||kron(w1, w2 - X)|| = ||w1|| ||w2 - X||``: the SVD of w2 alone decides."""
    slot, (out_k, in_n, *kernel) = Slot(), delta.inner
    sides = (out_k, in_n * prod(kernel))
    source: Source
    if delta.w2 is None and delta.t2 is None and delta.w2_a is not None and delta.w2_b is not None:
        narrow, wanted = dtype_of(delta, dtype) in NARROW, _at_most(needed, min(sides))
        source = FactoredSource.of(delta.w2_a, delta.w2_b, wanted, slot, narrow=narrow)
        old, limit = delta.w2_b.shape[0], min(delta.w2_b.shape[0], *sides)
    elif delta.w2 is None and delta.w2_a is not None and delta.w2_b is not None:
        source = _folded_w2(delta, delta.w2_a, slot)
        old, limit = delta.w2_b.shape[0], min(delta.w2_b.shape[0], *sides)
    else:
        source = dense_source(lambda: _flat(delta.inner_array()), None, slot)
        old, limit = None, max(min(*sides, (prod(sides) - 1) // sum(sides)), 1)
    gain = float(np.linalg.norm(delta.outer_array()))
    if not np.isfinite(gain):
        raise ValueError("its w1 holds NaN or infinity")

    def build(cut: Cut) -> Delta:
        left, right = low_rank_factors(source, cut, (out_k, cut.rank), (cut.rank, sides[1]))
        kept = {slot: tensor for slot, tensor in delta.tensors.items() if slot.startswith("w1")}
        if cut.dtype != dtype_of(delta, "keep"):
            kept = {slot: rounded(tensor, cut.dtype, cut.record) for slot, tensor in kept.items()}
        return Kronecker(**kept, w2_a=left, w2_b=right)

    return Subject(module, source, "lokr", old, limit, sides, build, shape, gain=gain, note=GIVEN_W1)


def _folded_w2(delta: Kronecker, w2_a: Tensor, slot: Slot) -> FactoredSource:
    """w2 with a Tucker core, as ``(out_k, rank) @ (rank, in_n*k*k)``."""
    core, w2_b = delta.t2, delta.w2_b
    assert core is not None  # noqa: S101  the caller has looked
    assert w2_b is not None  # noqa: S101
    width = w2_b.shape[1] * prod(core.shape[2:])

    def right() -> Float64:
        product: Float64 = np.einsum("ij...,jr->ir...", core.f64(), w2_b.f64())
        return product.reshape(core.shape[0], width)

    left = computed("F64", w2_a.shape[::-1], lambda: w2_a.f64().T)
    return FactoredSource.of(left, computed("F64", (core.shape[0], width), right), None, slot, narrow=False)


def _at_most(needed: int | None, most: int) -> int | None:
    return None if needed is None else min(needed, most)


def _flat(array: Float64) -> Float64:
    return array.reshape(array.shape[0], -1)
