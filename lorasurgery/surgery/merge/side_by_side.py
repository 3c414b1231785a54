"""LoRA factors side by side: up = [f_1 u_1, f_2 u_2, ...], down = [d_1; d_2; ...], of which every number is rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import CHUNK, once, wide
from lorasurgery.deltas.times import times
from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.io.tensors import computed, stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.io.tensors import Array, Tensor
    from lorasurgery.surgery.merge.add import Adding


ROWS, COLUMNS = 128, 64
"""Enough of a product to measure a rounding error by."""
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
    rounds = any(wide(tensor.dtype) != result.dtype.name for tensor, _ in parts)
    for tensor, factor in parts:
        array, own, way = tensor.array(), result[:, at : at + tensor.shape[1]], times(tensor.dtype, dtype, factor)
        rows = max(CHUNK // tensor.shape[1], 1)
        for start in range(0, height, rows):
            way.into(array[start : start + rows], own[start : start + rows])
        at += tensor.shape[1]
        if record is None or not rounds:
            continue
        samples.append(way.exact(array[::step]))
        exactly = exactly and np.array_equal(samples[-1], own[::step].astype(samples[-1].dtype)) and way.is_exact(array, own)
    if exactly or record is None:
        return result
    exact = np.hstack(samples)
    off = result[::step].astype(exact.dtype) - exact
    every = max(downs[0].shape[1] // COLUMNS, 1)
    probe = np.vstack([down.array()[:, ::every] for down in downs]).astype(exact.dtype)
    error, norm = (float(np.sum((side @ probe) ** 2)) * step * every for side in (off, exact))
    record(error or EPSILON**2 * norm, norm)
    return result
