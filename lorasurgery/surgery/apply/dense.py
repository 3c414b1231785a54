"""What a module makes of a weight, from the definition, dense and in float64: what ``--verify`` compares with.

Nothing here is shared with the way weights are written: deltas are multiplied out, rotations stand in sums over indices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.dora import COMFYUI, PEFT
from lorasurgery.deltas.full import Opaque

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.tensors import Float64, Tensor
    from lorasurgery.surgery.apply.match import Placed

    Work = NDArray[Any]


def expected(placed: Placed, weight: Float64, first: int, dora: str) -> Float64:
    """Rows ``first:`` of a module's weight, (rows, columns), with the module applied; all rows where rows depend on others.

    Raises CannotError for families that have no formula here.
    """
    module, strength = placed.module, placed.strength
    rows = (first, first + len(weight))
    if placed.bias:
        assert module.bias is not None  # noqa: S101  it was placed for it
        return weight + strength * module.bias.f64().reshape(-1, 1)[rows[0] : rows[1]]
    delta = module.delta
    assert delta is not None  # noqa: S101  it was placed for it
    if isinstance(delta, Opaque):
        if any(suffix.startswith(".oft_R") for suffix in delta.tensors):
            return _turned_columns(delta, weight, strength, neumann=placed.source.neumann)
        return _multiplied(module, delta, weight, rows, strength)
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


def _multiplied(module: Module, delta: Opaque, weight: Float64, rows: tuple[int, int], strength: float) -> Float64:
    slots = delta.tensors
    if delta.family == "set":
        return next(iter(slots.values())).f64().reshape(module.out, -1)[rows[0] : rows[1]]
    if delta.family == "ia3":
        return _scaled(module, slots, weight, rows, strength)
    if delta.family in {"oft", "boft"} and ".oft_blocks" in slots:
        return _turned(module, slots, weight, strength)
    if delta.family == "glora" and weight.shape[1] == slots[".a1.weight"].shape[0] != slots[".a1.weight"].shape[1]:
        a1, a2, b1, b2 = (slots[f".{name}.weight"].f64() for name in ("a1", "a2", "b1", "b2"))
        alpha = module.scale.alpha
        scale = strength * (1.0 if alpha is None else alpha.item() / a2.shape[0])
        return weight + scale * (weight @ (a1 @ a2) + (b1 @ b2)[rows[0] : rows[1]])
    raise CannotError(f"no formula for {delta.family} of this kind")


def _scaled(
    module: Module, slots: Mapping[str, Tensor], weight: Float64, rows: tuple[int, int], strength: float
) -> Float64:  # fmt: skip
    """(IA)^3: LyCORIS' vector is what is added to 1, PEFT's what the weight is multiplied by."""
    if ".ia3_l" in slots:
        vector = slots[".ia3_l"].f64() - 1.0
        on_input = vector.size != module.out or vector.shape[0] == 1
    elif ".on_input" in slots:
        vector, on_input = slots[".weight"].f64(), bool(slots[".on_input"].item())
    else:
        raise CannotError("no formula for (IA)^3 of this kind")
    factors = 1.0 + strength * vector.reshape(-1)
    if on_input:
        return (weight.reshape(len(weight), factors.size, -1) * factors[None, :, None]).reshape(weight.shape)
    return weight * factors[rows[0] : rows[1], None]


def _turned(module: Module, slots: Mapping[str, Tensor], weight: Float64, strength: float) -> Float64:
    """OFT and BOFT as sums over indices, as LyCORIS writes them."""
    blocks = slots[".oft_blocks"].f64()
    skew = blocks - np.moveaxis(blocks, -1, -2)
    alpha = module.scale.alpha
    limit = 0.0 if alpha is None else alpha.item() * module.out
    norm = np.linalg.norm(skew.reshape(-1)) + 1e-8
    if 0.0 < limit < norm:
        skew = skew * limit / norm
    eye, size = np.eye(blocks.shape[-1]), blocks.shape[-1]
    turns = strength * np.linalg.solve((eye - skew).swapaxes(-1, -2), (eye + skew).swapaxes(-1, -2)).swapaxes(-1, -2)
    turns = turns + (1.0 - strength) * eye
    columns = weight.shape[1]
    if blocks.ndim == 3:
        done = np.einsum("knm,knc->kmc", turns, weight.reshape(-1, size, columns)).reshape(weight.shape)
    else:
        done = weight
        for i, own in enumerate(turns):
            order = np.arange(len(weight)).reshape(-1, 2, 2**i * (size // 2)).swapaxes(1, 2).reshape(-1)
            mixed = np.einsum("bij,bjc->bic", own, done[order].reshape(-1, size, columns)).reshape(weight.shape)
            done = np.empty_like(mixed)
            done[order] = mixed
    if ".rescale" in slots:
        done = done * slots[".rescale"].f64().reshape(-1, 1)
    result: Float64 = done
    return result


def _turned_columns(delta: Opaque, weight: Float64, strength: float, *, neumann: bool) -> Float64:
    """PEFT's OFT: ``W R^T`` for each block of columns, R a Cayley transform or five terms of its series (``layer.py``)."""
    triangles = next(iter(delta.tensors.values())).f64()
    size = int((1 + (1 + 8 * triangles.shape[1]) ** 0.5) / 2 + 0.5)
    result: Float64 = weight.copy()
    eye = np.eye(size)
    for k in range(weight.shape[1] // size):
        skew = np.zeros((size, size))
        skew[np.triu_indices(size, 1)] = triangles[k % len(triangles)]
        skew = skew - skew.T
        square = skew @ skew
        turn = eye + 2 * skew + 2 * square + 2 * square @ skew + square @ square
        if not neumann:
            turn = np.linalg.solve((eye + skew).T, (eye - skew).T).T
        own = weight[:, k * size : (k + 1) * size]
        result[:, k * size : (k + 1) * size] = own + strength * (own @ turn.T - own)
    return result
