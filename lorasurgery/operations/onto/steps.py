"""A module at a strength as something that changes rows of a weight in place, or takes the change back.

Several adapters on one weight act one after the other, in the order given, each on what the one before left: additions
commute, DoRA, OFT, GLoRA and (IA)^3 do not. That is what ComfyUI does (``comfy/lora.py`` ``calculate_weight``, 2026-05).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.by_rows import flat
from lorasurgery.deltas.dora import COMFYUI, PEFT, column_squares, ratios, recomposed, row_squares
from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.operations.onto.multiplied import MULTIPLIED, ia3
from lorasurgery.operations.onto.step import Step, Wanted, chunks, on_columns
from lorasurgery.operations.onto.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lorasurgery.adapter import Module
    from lorasurgery.io.tensors import Float64
    from lorasurgery.operations.onto.options import ApplyOptions
    from lorasurgery.operations.onto.plan import Placed

    Work = NDArray[Any]


def is_local(placed: Placed) -> bool:
    """Whether the module's step will be local, known without reading it."""
    delta, magnitude = placed.module.delta, placed.module.magnitude
    if placed.bias or delta is None:
        return True
    if magnitude is not None:
        return magnitude.axis == "out"
    return not (isinstance(delta, Opaque) and delta.family in {"oft", "boft"} and not on_columns(delta))


def is_added(placed: Placed) -> bool:
    """Whether a module only adds to the weight, or to the bias, whatever that is."""
    if placed.bias:
        return placed.module.bias is not None
    return placed.module.magnitude is None and not isinstance(placed.module.delta, Opaque)


def wanted_for(placed: Placed, columns: int, work: str, options: ApplyOptions) -> Wanted:
    """What the step of a placed module on a weight with so many columns is made for."""
    module, source = placed.module, placed.source
    rules, name = source.rules_of(module)
    shape = expected_shape(source.adapter.architecture, module.site)
    channels = shape[1] if len(shape) > 1 else 1
    return Wanted(
        module.out, columns, channels, len(shape) > 2, work, placed.strength, options.unapply, options.dora, rules,
        rules.is_feedforward(name),
    )  # fmt: skip


def step_of(placed: Placed, columns: int, work: str, options: ApplyOptions, tools: Tools | None = None) -> Step:
    """The step of a placed module on a weight with so many columns, calculated in ``work``; its factors are read now.

    ``tools`` None are numpy's. Raises CannotError, with the reason, where it cannot be done or cannot be undone.
    """
    module = placed.module
    wanted = wanted_for(placed, columns, work, options)
    if placed.bias:
        return _bias(module, wanted)
    delta = module.delta
    assert delta is not None  # noqa: S101  it was placed for it
    if isinstance(delta, Opaque):
        if module.magnitude is not None:
            raise CannotError(f"{delta.family.upper()} with a DoRA magnitude")
        return MULTIPLIED[delta.family](module, delta, wanted) if delta.family in MULTIPLIED else _unknown(delta)
    if module.magnitude is not None:
        return _dora(module, wanted)
    factor = wanted.sign * wanted.strength * module.scale.value
    if isinstance(delta, LowRank):
        adder = (tools or Tools()).adder(*delta.flat_factors(work, factor))
        return Step(local=True, change=adder, part=adder)
    rows = delta.by_rows(work, factor)

    def add(block: Work, start: int) -> None:
        block += rows(start, start + len(block))

    return Step(local=True, change=add)


def _bias(module: Module, wanted: Wanted) -> Step:
    """What is added to a bias; or what PEFT's (IA)^3 multiplies it by, as it multiplies the layer's outputs."""
    if module.bias is not None:
        return _added_vector(flat(module.bias.array().reshape(-1, 1), wanted.work), wanted)
    assert isinstance(module.delta, Opaque)  # noqa: S101  it was placed for it
    return ia3(module.delta, wanted._replace(columns=1))


def _unknown(delta: Opaque) -> Step:
    raise CannotError(f"{delta.family} modules are not applied")


def _added_vector(values: Work, wanted: Wanted) -> Step:
    values = values * np.asarray(wanted.sign * wanted.strength, wanted.work)

    def add(block: Work, start: int) -> None:
        block += values[start : start + len(block)]

    return Step(local=True, change=add)


# DoRA ---------------------------------------------------------------------------------------------------------------------


def _dora(module: Module, wanted: Wanted) -> Step:
    magnitude, delta = module.magnitude, module.delta
    assert magnitude is not None  # noqa: S101  the caller has looked
    assert delta is not None  # noqa: S101
    if wanted.undo:
        raise CannotError("a DoRA's magnitude took the place of the weight's norms, and nothing in the file tells them")
    scale = module.scale.value * (wanted.strength if wanted.dora == PEFT else 1.0)
    rows = delta.by_rows(wanted.work, scale)
    values = magnitude.tensor.f64().reshape(-1)
    if magnitude.axis == "out":
        return _per_row(rows, values, wanted)
    return _per_column(rows, values, wanted)


def _per_row(rows: Callable[[int, int], Work], values: Float64, wanted: Wanted) -> Step:
    def change(block: Work, start: int) -> None:
        added = rows(start, start + len(block))
        squares = row_squares(block if wanted.dora == COMFYUI else block + added)
        factors = ratios(values[start : start + len(block)], squares).reshape(-1, 1).astype(wanted.work)
        recomposed(block, added, factors, wanted.strength, wanted.dora)

    return Step(local=True, change=change)


def _per_column(rows: Callable[[int, int], Work], values: Float64, wanted: Wanted) -> Step:
    """Two passes over the rows: the columns' norms, then the change."""

    def change(weight: Work, start: int) -> None:  # noqa: ARG001  all rows
        squares = np.zeros(values.size)
        for low, high in chunks(*weight.shape):
            squares += column_squares(weight[low:high] + rows(low, high), values.size)
        each = np.repeat(ratios(values, squares), wanted.columns // values.size)
        factors = each.reshape(1, -1).astype(wanted.work)
        for low, high in chunks(*weight.shape):
            recomposed(weight[low:high], rows(low, high), factors, wanted.strength, wanted.dora)

    return Step(local=False, change=change)
