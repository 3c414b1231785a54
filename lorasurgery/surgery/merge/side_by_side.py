"""LoRA factors side by side: up = [f_1 u_1, f_2 u_2, ...], down = [d_1; d_2; ...], of which every number is rounded once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.deltas.base import once, wide
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.io.tensors import BITS, computed, numpy_dtype, stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.io.tensors import Array, Tensor
    from lorasurgery.surgery.merge.add import Adding


ROWS, COLUMNS = 128, 64
"""Enough of a product to measure a rounding error by."""
SMALL, BLOCK = 16, 512
"""Bits of the dtypes that tables are made for; rows converted at a time: what that takes stays in the cache."""
EPSILON = 1e-12
"""A relative error too small for the sample to show."""


class Low(NamedTuple):
    """up: (out, r, 1...), down: (r, in, k...), and what up is still to be multiplied by."""

    up: Tensor
    down: Tensor
    factor: float


def side_by_side(members: Sequence[Low], how: Adding) -> LowRank:
    """One LoRA: the ups beside each other, each times its factor, the downs below each other, bytes that are not touched."""
    down = stack([low.down for low in members])
    rank = down.shape[0]
    flat = [(low.up.reshape(how.shape[0], low.up.shape[1]), low.factor) for low in members]
    shape = (how.shape[0], rank)
    if all(factor == 1.0 for _, factor in flat) and len({tensor.dtype for tensor, _ in flat}) == 1:
        up = computed(flat[0][0].dtype, shape, lambda: _beside([tensor for tensor, _ in flat]))
    else:
        record = once(how.record)
        downs = [low.down.reshape(low.down.shape[0], low.down.size // low.down.shape[0]) for low in members]
        up = computed(how.dtype, shape, lambda: _scaled(flat, downs, how.dtype, record))
    return LowRank(up.reshape(how.shape[0], rank, *(1 for _ in how.shape[2:])), down)


def _beside(tensors: Sequence[Tensor]) -> Array:
    """(out, r_i) each -> (out, sum of r_i); the bits are moved, whatever they mean."""
    arrays = [tensor.array() for tensor in tensors]
    bits = np.dtype(f"uint{8 * arrays[0].dtype.itemsize}")
    joined: Array = np.concatenate([array.view(bits) for array in arrays], axis=1).view(arrays[0].dtype)
    return joined


def _scaled(parts: Sequence[tuple[Tensor, float]], downs: Sequence[Tensor], dtype: str, record: Record | None) -> Array:
    """The same times a number each, calculated in float32 (or float64) and rounded once.

    What that costs the product with ``downs`` is measured on evenly spread rows and columns.
    """
    height, width = parts[0][0].shape[0], sum(tensor.shape[1] for tensor, _ in parts)
    result = np.empty((height, width), numpy_dtype(dtype))
    step, at, samples, exactly = max(height // ROWS, 1), 0, [], True
    for tensor, factor in parts:
        array, own = tensor.array(), result[:, at : at + tensor.shape[1]]
        exactly = _put(array, tensor.dtype, factor, own, dtype) and exactly
        samples.append(_times(array[::step], tensor.dtype, factor))
        at += tensor.shape[1]
    if exactly or record is None:
        return result
    exact = np.hstack(samples)
    off = result[::step].astype(exact.dtype) - exact
    every = max(downs[0].shape[1] // COLUMNS, 1)
    probe = np.vstack([down.array()[:, ::every] for down in downs]).astype(exact.dtype)
    error, norm = (float(np.sum((side @ probe) ** 2)) * step * every for side in (off, exact))
    record(error or EPSILON**2 * norm, norm)
    return result


def _times(array: Array, dtype: str, factor: float) -> Array:
    """In the dtype to calculate in."""
    exact = array.astype(wide(dtype))
    exact *= exact.dtype.type(factor)
    return exact


def _put(array: Array, source: str, factor: float, result: Array, dtype: str) -> bool:
    """Write ``array`` times ``factor`` into ``result``; whether no number had to be rounded.

    A 16-bit tensor has at most 65536 different numbers: they are multiplied once and looked up, seven times as fast as
    numpy converts fp16 to float32 and back.
    """
    table = _table(source, dtype, factor) if BITS[source] == SMALL else None
    exactly = True
    for start in range(0, len(array), BLOCK):
        block, own = array[start : start + BLOCK], result[start : start + BLOCK]
        if table is not None:
            bits = block.view(np.uint16)
            own[:] = table.values.take(bits, mode="clip")
            exactly = exactly and bool(table.exact.take(bits, mode="clip").all())
            continue
        exact = _times(block, source, factor)
        with np.errstate(over="ignore"):  # what is not finite any more is refused when it is written, with its key
            own[:] = exact
        exactly = exactly and np.array_equal(own.astype(exact.dtype), exact)
    return exactly


class _Table(NamedTuple):
    """For each of the 65536 numbers of a dtype: the product in another, and whether it is exact."""

    values: Array
    exact: Array


@lru_cache(maxsize=32)
def _table(source: str, dtype: str, factor: float) -> _Table:
    every = np.arange(1 << SMALL, dtype=np.uint32).astype(np.uint16).view(numpy_dtype(source))
    with np.errstate(all="ignore"):
        exact = _times(every, source, factor)
        values = exact.astype(numpy_dtype(dtype))
        return _Table(values, (values.astype(exact.dtype) == exact) & np.isfinite(exact))
