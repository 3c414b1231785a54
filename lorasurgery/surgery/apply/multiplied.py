"""Steps of the families that multiply the base weight, and of those that replace it."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.evaluate import flat, row_function
from lorasurgery.deltas.gated import glora, ia3_factors, inverse_of_a, times_a
from lorasurgery.deltas.orthogonal import butterfly_rows, column_rotations, rotations, turn_columns, turn_rows
from lorasurgery.surgery.apply.step import Step, on_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.full import Opaque
    from lorasurgery.surgery.apply.step import Wanted

    Work = NDArray[Any]


def _oft(module: Module, delta: Opaque, wanted: Wanted) -> Step:
    if on_columns(delta):
        return _peft_oft(delta, wanted)
    slots = delta.tensors
    if ".oft_blocks" not in slots:
        raise CannotError(f"{', '.join(slots)}: only OFT with oft_blocks or oft_R is applied")
    blocks = slots[".oft_blocks"].f64()
    rows = blocks.shape[-3] * blocks.shape[-1]
    if rows != wanted.out or blocks.shape[-1] != blocks.shape[-2]:
        raise CannotError(f"its oft_blocks {list(blocks.shape)} do not make {wanted.out} rows")
    alpha = 0.0 if module.scale.alpha is None else module.scale.alpha.item()
    turns = rotations(blocks, alpha * wanted.out, wanted.strength)
    rescale = slots[".rescale"].f64().reshape(-1) if ".rescale" in slots else None
    turn = turn_rows if blocks.ndim == 3 else butterfly_rows
    return Step(local=False, change=lambda weight, _: turn(weight, turns, rescale, undo=wanted.undo))


def _peft_oft(delta: Opaque, wanted: Wanted) -> Step:
    turns = column_rotations(next(iter(delta.tensors.values())).f64(), neumann=wanted.neumann)
    size = turns.shape[-1]
    if wanted.columns % size or (len(turns) != 1 and len(turns) * size != wanted.columns):
        raise CannotError(f"its {len(turns)} blocks of {size} do not make {wanted.columns} columns")
    turns = wanted.strength * turns + (1.0 - wanted.strength) * np.eye(size)

    def change(block: Work, start: int) -> None:  # noqa: ARG001  every row alike
        block[...] = turn_columns(block, turns, undo=wanted.undo)

    return Step(local=True, change=change)


def _glora(module: Module, delta: Opaque, wanted: Wanted) -> Step:
    of = glora(delta.tensors, wanted.out, wanted.columns)
    alpha = module.scale.alpha
    factor = wanted.strength * (1.0 if alpha is None else alpha.item() / of.rank)
    added = row_function(of.added, wanted.work, wanted.sign * factor)
    left, right = inverse_of_a(of, factor) if wanted.undo else (factor * of.left, of.right)

    def change(block: Work, start: int) -> None:
        own = added(start, start + len(block))
        if wanted.undo:
            block += own
            block -= times_a(block, of, left, right)
        else:
            own += times_a(block, of, left, right)
            block += own

    return Step(local=True, change=change)


def _ia3(module: Module, delta: Opaque, wanted: Wanted) -> Step:  # noqa: ARG001  the builders' signature
    factors = ia3_factors(delta.tensors, wanted.out, wanted.columns, wanted.strength)
    if wanted.undo and (factors == 0.0).any():
        raise CannotError("some of its factors are 0: what they multiplied is gone")
    per_row = factors.shape[1] == 1 and wanted.out == factors.shape[0]
    factors = (1.0 / factors if wanted.undo else factors).astype(wanted.work)

    def change(block: Work, start: int) -> None:
        block *= factors[start : start + len(block)] if per_row else factors

    return Step(local=True, change=change)


def _set(module: Module, delta: Opaque, wanted: Wanted) -> Step:  # noqa: ARG001  the builders' signature
    """A replacement: the weight (strength) does not matter as long as it is not 0, as in ComfyUI."""
    if wanted.undo:
        raise CannotError("it replaced the weight, and the old one is nowhere in the file")
    (values,) = delta.tensors.values()

    def change(block: Work, start: int) -> None:
        block[...] = flat(values.rows([(start, start + len(block))]).array().reshape(len(block), -1), wanted.work)

    return Step(local=True, change=change)


MULTIPLIED = MappingProxyType({"oft": _oft, "boft": _oft, "glora": _glora, "ia3": _ia3, "set": _set})
"""Family -> what makes its step from a module, its tensors and what is wanted."""
