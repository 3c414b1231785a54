"""LoRA factors side by side: up = [f_1 u_1, f_2 u_2, ...], down = [d_1; d_2; ...], of which every number is rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.deltas.effect import before
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import beside, once
from lorasurgery.io.tensors import computed, stack

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.io.tensors import Array, Tensor
    from lorasurgery.operations.sum.adding import Adding


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
        record, wide = once(how.record), down.reshape(rank, down.size // rank)
        up = computed(how.dtype, shape, lambda: beside(flat, how.dtype, record, lambda: before(wide)))
    return LowRank(up.reshape(how.shape[0], rank, *(1 for _ in how.shape[2:])), down)


def _beside(tensors: Sequence[Tensor]) -> Array:
    """(out, r_i) each -> (out, sum of r_i); the bits are moved, whatever they mean."""
    arrays = [tensor.array() for tensor in tensors]
    bits = np.dtype(f"uint{8 * arrays[0].dtype.itemsize}")
    joined: Array = np.concatenate([array.view(bits) for array in arrays], axis=1).view(arrays[0].dtype)
    return joined
