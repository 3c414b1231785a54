"""Steps of OFT and BOFT in all their forms: whose tensors they are, what they turn, and how far.

By suffix: ``oft_blocks`` LyCORIS and sd-scripts, rows; ``oft_blocks.0`` and so on sd-scripts for FLUX, parts of the rows;
``oft_R`` PEFT from 0.16 on and OneTrainer, columns; ``oft_r`` with ``oft_s`` PEFT 0.14 and 0.15, columns; ``oft_r`` alone PEFT
before that, rows; ``boft_R`` with ``boft_s`` PEFT, columns.
"""

from __future__ import annotations

from math import ceil, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.orthogonal import (
    butterfly_columns,
    butterfly_rows,
    cayley,
    clamped_rotations,
    column_rotations,
    rotations,
    shortened,
    triangle_size,
    turn_columns,
    turn_parts,
    turn_rows,
)
from lorasurgery.operations.onto.step import GONE, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.full import Opaque
    from lorasurgery.io.tensors import Float64, Tensor
    from lorasurgery.operations.onto.step import Wanted

    Work = NDArray[Any]

PARTS = ".oft_blocks."
SCALED = ".oft_R.scaled_oft"
"""OneTrainer's mark of a scaled OFT."""


def oft(module: Module, delta: Opaque, wanted: Wanted) -> Step:
    """OFT, whoever wrote it; raises CannotError for tensors that do not fit or that nothing is known about."""
    slots = delta.tensors
    if ".oft_blocks" in slots:
        return _rows(module, slots[".oft_blocks"], slots.get(".rescale"), wanted)
    if PARTS + "0" in slots:
        return _parts(module, delta, wanted)
    if ".oft_r" in slots:
        return _early(slots[".oft_r"].f64(), slots.get(".oft_s"), wanted)
    if not any(suffix.startswith(".oft_R") for suffix in slots):
        raise CannotError(f"{', '.join(slots)}: only OFT with oft_blocks, oft_R or oft_r is applied")
    return _triangles(delta, wanted)


def boft(module: Module, delta: Opaque, wanted: Wanted) -> Step:
    """BOFT of LyCORIS or of PEFT; raises CannotError for tensors that do not fit."""
    slots = delta.tensors
    if ".oft_blocks" in slots:
        return _rows(module, slots[".oft_blocks"], slots.get(".rescale"), wanted)
    if ".boft_R" not in slots or ".boft_s" not in slots:
        raise CannotError(f"it has only {', '.join(slots)}, of boft_R and boft_s")
    matrices = slots[".boft_R"].f64()
    if matrices.ndim != 4 or matrices.shape[1] * matrices.shape[3] != wanted.columns:
        raise CannotError(f"its boft_R {list(matrices.shape)} does not make {wanted.columns} columns")
    sets, _, size, _ = matrices.shape
    if matrices.shape[2] != matrices.shape[3] or (sets > 1 and (size % 2 or wanted.columns % (size * 2 ** (sets - 1)))):
        raise CannotError(f"its boft_R {list(matrices.shape)} is no butterfly of {wanted.columns} columns")
    return _columns_and_rows(cayley(matrices), slots[".boft_s"], wanted)


def _rows(module: Module, tensor: Tensor, scale: Tensor | None, wanted: Wanted) -> Step:
    """LyCORIS: blocks (n, b, b), or (m, n, b, b) of a butterfly."""
    blocks = tensor.f64()
    rows = blocks.shape[-3] * blocks.shape[-1]
    if rows != wanted.out or blocks.shape[-1] != blocks.shape[-2]:
        raise CannotError(f"its oft_blocks {list(blocks.shape)} do not make {wanted.out} rows")
    alpha = 0.0 if module.scale.alpha is None else module.scale.alpha.item()
    turns = rotations(blocks, alpha * wanted.out, wanted.strength)
    rescale = None if scale is None else scale.f64().reshape(-1)
    turn = turn_rows if blocks.ndim == 3 else butterfly_rows
    return Step(local=False, change=lambda weight, _: turn(weight, turns, rescale, undo=wanted.undo))


def _parts(module: Module, delta: Opaque, wanted: Wanted) -> Step:
    """sd-scripts' OFT of FLUX's fused layers: blocks (n, b, b) for each part of the rows."""
    alpha = 0.0 if module.scale.alpha is None else module.scale.alpha.item()
    turns, rows = [], 0
    for i in range(len(delta.tensors)):
        tensor = delta.tensors.get(f"{PARTS}{i}")
        if tensor is None or len(tensor.shape) != 3 or tensor.shape[1] != tensor.shape[2]:
            raise CannotError(f"its {', '.join(delta.tensors)} are no list of rotations")
        own = tensor.shape[0] * tensor.shape[1]
        turns.append(clamped_rotations(tensor.f64(), alpha * own, wanted.strength))
        rows += own
    if rows != wanted.out:
        raise CannotError(f"its rotations make {rows} rows, the layer has {wanted.out}")
    return Step(local=False, change=lambda weight, _: turn_parts(weight, turns, undo=wanted.undo))


def _triangles(delta: Opaque, wanted: Wanted) -> Step:
    """PEFT and OneTrainer, whose mark says that the triangles are divided by ``2 sqrt(b - 1)``."""
    slots = delta.tensors
    triangles = next(tensor for suffix, tensor in slots.items() if suffix != SCALED).f64()
    if triangles.ndim != 2:
        raise CannotError(f"its oft_R is {list(triangles.shape)}, expected the upper triangles of the blocks")
    mark = slots.get(SCALED)
    if mark is not None and mark.item():
        triangles = triangles / (2.0 * sqrt(triangle_size(triangles.shape[1]) - 1.0))
    turns = column_rotations(triangles, terms=wanted.rules.terms, longest=wanted.rules.longest)
    if not _fill(turns, wanted.columns):
        raise CannotError(f"its {len(turns)} blocks of {turns.shape[-1]} do not make {wanted.columns} columns")
    if wanted.rules.backwards and wanted.convolution:
        turns = np.swapaxes(turns, 1, 2)
    mixed = _towards(turns, wanted.strength)
    own = (np.linalg.inv(mixed) if wanted.undo else mixed).astype(wanted.work)

    def change(block: Work, start: int) -> None:  # noqa: ARG001  every row alike
        block[...] = turn_columns(block, own)

    return Step(local=True, change=change)


def _early(matrices: Float64, scale: Tensor | None, wanted: Wanted) -> Step:
    """PEFT before 0.16: whole matrices (n, b, b), COFT's ``eps`` times a square of a size."""
    side = wanted.out if scale is None else wanted.columns
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or not _fill(matrices, side):
        what = "rows" if scale is None else "columns"
        raise CannotError(f"its oft_r {list(matrices.shape)} does not make {side} {what}")
    if wanted.rules.longest is not None:
        matrices = shortened(matrices, wanted.rules.longest * ceil(wanted.out * matrices.shape[1] / side) ** 2)
    turns = cayley(matrices)
    if scale is not None:
        return _columns_and_rows(turns[None], scale, wanted)
    whole = np.broadcast_to(_towards(turns, wanted.strength), (side // matrices.shape[1], *matrices.shape[1:]))
    return Step(local=False, change=lambda weight, _: turn_rows(weight, whole, None, undo=wanted.undo))


def _columns_and_rows(turns: Float64, vector: Tensor, wanted: Wanted) -> Step:
    """Columns turned, then rows multiplied; a strength, which PEFT has none of, takes each towards doing nothing."""
    mixed = _towards(turns, wanted.strength)
    scale = 1.0 + wanted.strength * (vector.f64().reshape(-1) - 1.0)
    if scale.size != wanted.out:
        raise CannotError(f"it has {scale.size} factors for {wanted.out} rows")
    if wanted.undo and (scale == 0.0).any():
        raise CannotError(GONE)
    own = (np.linalg.inv(mixed) if wanted.undo else mixed).astype(wanted.work)

    def change(block: Work, start: int) -> None:
        block[...] = butterfly_columns(block, own, scale[start : start + len(block)], undo=wanted.undo)

    return Step(local=True, change=change)


def _towards(turns: Float64, strength: float) -> Float64:
    """``s R + (1 - s) I``."""
    mixed: Float64 = strength * turns + (1.0 - strength) * np.eye(turns.shape[-1])
    return mixed


def _fill(turns: Float64, side: int) -> bool:
    """Whether blocks (n, b, b), or one that all share, make so many rows or columns."""
    count, size = turns.shape[:2]
    return side == count * size or (count == 1 and not side % max(size, 1))
