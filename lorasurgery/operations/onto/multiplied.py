"""Steps of the families that multiply the base weight and of those that replace it, all but what turns it."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.by_rows import flat
from lorasurgery.deltas.gated import bat_blocks, bat_rows, glora, ia3_factors, ia3_on_input, inverse_of_a, times_a
from lorasurgery.layouts.peft_types import is_saved
from lorasurgery.operations.onto.step import GONE, Step
from lorasurgery.operations.onto.turned import boft, oft

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.full import Opaque
    from lorasurgery.operations.onto.step import Wanted

    Work = NDArray[Any]


def _glora(module: Module, delta: Opaque, wanted: Wanted) -> Step:
    of = glora(delta.tensors, wanted.out, wanted.columns)
    alpha = module.scale.alpha
    factor = wanted.strength * (1.0 if alpha is None else alpha.item() / of.rank)
    added = of.added.by_rows(wanted.work, wanted.sign * factor)
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
    return ia3(delta, wanted)


def ia3(delta: Opaque, wanted: Wanted) -> Step:
    """(IA)^3 on a weight's rows or columns; on a bias of so many rows and one column."""
    slots = delta.tensors
    if ".ia3_l" in slots:
        on_input = ia3_on_input(slots[".ia3_l"], wanted.out, wanted.channels, wanted.feedforward)
    else:
        on_input = ".on_input" in slots and bool(slots[".on_input"].item())
    factors = ia3_factors(slots, wanted.out, wanted.columns, wanted.strength, on_input=on_input)
    if wanted.undo and (factors == 0.0).any():
        raise CannotError(GONE)
    per_row = not on_input
    factors = (1.0 / factors if wanted.undo else factors).astype(wanted.work)

    def change(block: Work, start: int) -> None:
        block *= factors[start : start + len(block)] if per_row else factors

    return Step(local=True, change=change)


def _bat(module: Module, delta: Opaque, wanted: Wanted) -> Step:  # noqa: ARG001  the builders' signature
    blocks = bat_blocks(delta.tensors, wanted.out, wanted.columns)

    def change(block: Work, start: int) -> None:
        block[...] = bat_rows(block, start, blocks, wanted.strength, undo=wanted.undo)

    return Step(local=True, change=change)


def _set(module: Module, delta: Opaque, wanted: Wanted) -> Step:  # noqa: ARG001  the builders' signature
    """A replacement: the weight (strength) does not matter as long as it is not 0, as in ComfyUI.

    What PEFT saved whole, which ComfyUI does not know, goes as far from the base's values as the strength says.
    """
    if wanted.undo:
        raise CannotError("it replaced the weight, and the old one is nowhere in the file")
    (values,) = delta.tensors.values()
    strength = wanted.strength if is_saved(delta) else 1.0

    def change(block: Work, start: int) -> None:
        new = flat(values.rows([(start, start + len(block))]).array().reshape(len(block), -1), wanted.work)
        block[...] = new if strength == 1.0 else block + (new - block) * np.asarray(strength, wanted.work)

    return Step(local=True, change=change)


MULTIPLIED = MappingProxyType({"oft": oft, "boft": boft, "glora": _glora, "ia3": _ia3, "bat": _bat, "set": _set})
"""Family -> what makes its step from a module, its tensors and what is wanted."""
