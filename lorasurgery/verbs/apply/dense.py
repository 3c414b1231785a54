"""What a module makes of a weight, from the definition, dense and in float64: what ``--verify`` compares with.

Nothing here is shared with the way weights are written: deltas are multiplied out, rotations stand in sums over indices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.dora import COMFYUI, PEFT
from lorasurgery.deltas.full import Opaque
from lorasurgery.verbs.apply.dense_multiplied import multiplied

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64
    from lorasurgery.operations.onto.plan import Placed

    Work = NDArray[Any]


def expected(placed: Placed, weight: Float64, first: int, dora: str) -> Float64:
    """Rows ``first:`` of a module's weight, (rows, columns), with the module applied; all rows where rows depend on others.

    Raises CannotError for families that have no formula here.
    """
    module, strength = placed.module, placed.strength
    rows = (first, first + len(weight))
    delta = module.delta
    if placed.bias and module.bias is not None:
        return weight + strength * module.bias.f64().reshape(-1, 1)[rows[0] : rows[1]]
    assert delta is not None  # noqa: S101  it was placed for it
    if isinstance(delta, Opaque):
        return multiplied(placed, delta, weight, rows)
    change = module.scale.value * _dense(delta, rows, module.out)
    if module.magnitude is None:
        return weight + strength * change
    return _recomposed(module, weight, change, rows, strength, dora)


def _dense(delta: Delta, rows: tuple[int, int], out: int) -> Float64:
    part = delta if rows == (0, out) else delta.rows([rows])
    return part.dense().reshape(rows[1] - rows[0], -1)


def _recomposed(
    module: Module, weight: Float64, change: Float64, rows: tuple[int, int], strength: float, dora: str
) -> Float64:  # fmt: skip
    magnitude = module.magnitude
    assert magnitude is not None  # noqa: S101  the caller has looked
    values = magnitude.tensor.f64().reshape(-1)
    changed = weight + (strength if dora == PEFT else 1.0) * change
    if magnitude.axis == "out":
        norms = np.linalg.norm(weight if dora == COMFYUI else changed, axis=1, keepdims=True)
        whole: Float64 = values[rows[0] : rows[1], None] * changed / norms
    else:
        columns = changed.reshape(len(changed), values.size, -1)
        norms = np.sqrt((columns**2).sum(axis=(0, 2), keepdims=True))
        whole = (columns * (values[None, :, None] / norms)).reshape(changed.shape)
    return whole if dora == PEFT else weight + strength * (whole - weight)
