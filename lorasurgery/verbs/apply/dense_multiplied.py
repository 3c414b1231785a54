"""The families that multiply a weight, from their definitions: sums over indices and whole matrices in float64.

Nothing here is shared with :mod:`lorasurgery.operations.onto.multiplied`. Sources: LyCORIS 4.1 ``modules``, PEFT 0.11
to 0.21 ``tuners``, OneTrainer ``modules/module`` (2026-08), and for GLoRA's two ages ComfyUI ``weight_adapter/glora.py``.
"""

from __future__ import annotations

from math import isqrt, sqrt
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.layouts.peft_types import is_saved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from lorasurgery.deltas.full import Opaque
    from lorasurgery.io.tensors import Float64, Tensor
    from lorasurgery.operations.onto.plan import Placed
    from lorasurgery.operations.onto.rules import Rules

    Slots = Mapping[str, Tensor]
    Matrix = NDArray[Any]


def multiplied(placed: Placed, delta: Opaque, weight: Float64, rows: tuple[int, int]) -> Float64:
    """Rows ``rows`` of a weight, (rows, columns), multiplied or replaced; a bias has one column.

    Raises CannotError for families that have no formula here.
    """
    slots = delta.tensors
    formula = FORMULAS.get(next((word for word in FORMULAS if word in slots), delta.family))
    try:
        if formula is not None:
            return formula(placed, slots, weight, rows)
    except KeyError as missing:
        raise CannotError(f"it has no {missing.args[0]}") from missing
    raise CannotError(f"no formula for {delta.family} of this kind")


def _set(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:
    (values,) = slots.values()
    new = values.f64().reshape(placed.module.out, -1)[rows[0] : rows[1]].reshape(weight.shape)
    return weight + (new - weight) * placed.strength if is_saved(placed.module.delta) else new


def _glora(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:
    """New: ``W + s (W a1 a2 + b1 b2)`` along input channels; old: ``W + s (W a2 a1 + b2 b1)`` on flat columns."""
    module = placed.module
    a1, a2, b1, b2 = (slots[f".{name}.weight"].f64() for name in ("a1", "a2", "b1", "b2"))
    columns = weight.shape[1]
    new = a1.shape[1] == a2.shape[0] == b1.shape[1] and b1.shape[0] == module.out and columns % len(a1) == 0
    old = a2.shape[1] == a1.shape[0] == b1.shape[0] and len(b2) == module.out and len(a2) == columns
    if new and module.out != columns:
        old = False
    rank = len(a1) if old else len(a2)
    alpha = module.scale.alpha
    scale = placed.strength * (1.0 if alpha is None else alpha.item() / rank)
    flat = {name: own.reshape(len(own), -1) for name, own in (("a1", a1), ("a2", a2), ("b1", b1), ("b2", b2))}
    if old:
        added = flat["b2"][rows[0] : rows[1]] @ flat["b1"]
        return weight + scale * (weight @ flat["a2"] @ flat["a1"] + added)
    cells = weight.reshape(len(weight), len(a1), -1)
    inner = np.einsum("oik,ir,rj->ojk", cells, flat["a1"], flat["a2"]).reshape(weight.shape)
    if ".bm.weight" in slots:
        core = slots[".bm.weight"].f64()
        added = np.einsum("or,rsk,sj->ojk", flat["b1"], core.reshape(*core.shape[:2], -1), flat["b2"]).reshape(module.out, -1)
    else:
        added = flat["b1"] @ flat["b2"]
    whole: Float64 = weight + scale * (inner + added[rows[0] : rows[1]])
    return whole


def _scaled(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:
    """(IA)^3: LyCORIS' vector is what is added to 1, PEFT's what the layer's inputs or outputs are multiplied by."""
    module = placed.module
    if ".ia3_l" in slots:
        tensor = slots[".ia3_l"]
        vector, on_input = tensor.f64().reshape(-1) - 1.0, _on_input(placed, tensor)
    else:
        vector, on_input = slots[".weight"].f64().reshape(-1), bool(slots[".on_input"].item())
    factors = 1.0 + placed.strength * vector
    if on_input:
        return (weight.reshape(len(weight), factors.size, -1) * factors[None, :, None]).reshape(weight.shape)
    if factors.size != module.out:
        raise CannotError("no formula for (IA)^3 of this size")
    return weight * factors[rows[0] : rows[1], None]


def _on_input(placed: Placed, vector: Tensor) -> bool:
    """PEFT: (1, in) or (out, 1) of a linear layer, (1, n, 1...) of a convolution, where sizes or the configuration tell."""
    if len(vector.shape) == 2:
        return vector.shape == (1, vector.size)
    rules, name = placed.source.rules_of(placed.module)
    told = rules.is_feedforward(name)
    return vector.size != placed.module.out if told is None else told


def _turned_rows(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:  # noqa: ARG001  all rows
    """OFT and BOFT as sums over indices, as LyCORIS writes them."""
    module, strength = placed.module, placed.strength
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


def _turned_parts(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:  # noqa: ARG001  all rows
    """sd-scripts' OFT of fused layers: each block of each part by itself (``networks/oft_flux.py``)."""
    alpha = placed.module.scale.alpha
    result: Float64 = weight.copy()
    start = 0
    for i in range(len(slots)):
        blocks = slots[f".oft_blocks.{i}"].f64()
        skews = [block - block.T for block in blocks]
        norm = sqrt(sum(float(np.linalg.norm(skew)) ** 2 for skew in skews))
        limit = 0.0 if alpha is None else alpha.item() * blocks.shape[0] * blocks.shape[1]
        for skew in skews:
            size = len(skew)
            own = skew * ((min(norm, limit) + 1e-8) / (norm + 1e-8))
            eye = np.eye(size)
            turn = np.linalg.solve((eye - own).T, (eye + own).T).T
            before = weight[start : start + size]
            result[start : start + size] = before + placed.strength * (turn.T @ before - before)
            start += size
    return result


def _turned_columns(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:  # noqa: ARG001  alike
    """``W R^T`` for each block of columns, ``W R`` on OneTrainer's convolutions."""
    rules, _ = placed.source.rules_of(placed.module)
    triangles = next(tensor for suffix, tensor in slots.items() if not suffix.endswith("scaled_oft")).f64()
    size = (1 + isqrt(1 + 8 * triangles.shape[1])) // 2
    mark = slots.get(".oft_R.scaled_oft")
    if mark is not None and mark.item() != 0.0:
        triangles = triangles / (2.0 * np.sqrt(size - 1))
    shape = expected_shape(placed.source.adapter.architecture, placed.module.site)
    backwards = rules.backwards and len(shape) > 2
    result: Float64 = weight.copy()
    for k in range(weight.shape[1] // size):
        turn = _turn(triangles[k % len(triangles)], size, len(triangles), rules)
        own = weight[:, k * size : (k + 1) * size]
        turned = own @ (turn if backwards else turn.T)
        result[:, k * size : (k + 1) * size] = own + placed.strength * (turned - own)
    return result


def _turn(triangle: Matrix, size: int, blocks: int, rules: Rules) -> Matrix:
    """A Cayley transform, or as many terms of its series as the configuration says (``oft/layer.py``)."""
    skew = np.zeros((size, size))
    skew[np.triu_indices(size, 1)] = triangle
    skew = skew - skew.T
    if rules.longest is not None:
        limit, norm = rules.longest / np.sqrt(blocks), np.linalg.norm(skew)
        skew = skew * (limit / norm) if norm > limit else skew
    eye = np.eye(size)
    if rules.terms is None:
        cayley: Matrix = np.linalg.solve((eye + skew).T, (eye - skew).T).T
        return cayley
    if rules.terms < 3:  # PEFT's first two counts
        short: Matrix = eye + 2.0 * skew * (rules.terms == 2)
        return short
    powers = [eye]
    while len(powers) < max(rules.terms, 4):
        powers.append(powers[-1] @ skew)
    found: Matrix = 2.0 * sum(powers[1:-1]) + powers[0] + powers[-1]
    return found


def _turned_early(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:
    """PEFT's OFT before 0.16: ``s (W R^T)``, R of blocks of columns, with a factor for each row; without, ``R^T W``."""
    matrices, scale = slots[".oft_r"].f64(), slots.get(".oft_s")
    rules, _ = placed.source.rules_of(placed.module)
    size, side = matrices.shape[-1], placed.module.out if scale is None else weight.shape[1]
    whole = np.zeros((side, side))
    for k in range(side // size):
        own = matrices[k % len(matrices)]
        limit = np.inf if rules.longest is None else rules.longest * np.ceil(placed.module.out / (side // size)) ** 2
        own = own * min(1.0, limit / np.sqrt(len(matrices)) / max(float(np.linalg.norm(own)), 1e-300))
        skew = (own - own.T) / 2.0
        turn = np.linalg.solve((np.eye(size) + skew).T, (np.eye(size) - skew).T).T
        whole[k * size : (k + 1) * size, k * size : (k + 1) * size] = turn
    mixed = placed.strength * whole + (1.0 - placed.strength) * np.eye(side)
    if scale is None:
        turned: Float64 = mixed.T @ weight
    else:
        turned = weight @ mixed.T * (1.0 + placed.strength * (scale.f64().reshape(-1, 1)[rows[0] : rows[1]] - 1.0))
    return turned


def _butterfly_columns(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:
    """``s (W B^T)``, B the product of ``P blockdiag(R) P^T``; P written as PEFT's sorting of segments, by index."""
    strength = placed.strength
    matrices, vector = slots[".boft_R"].f64(), slots[".boft_s"].f64().reshape(-1)
    sets, blocks, size, _ = matrices.shape
    eye, done = np.eye(size), weight
    for i in range(sets):
        order = np.arange(weight.shape[1])
        if sets > 1:
            segments = [2 * k + parity for parity in (0, 1) for k in range(2**i)]
            half, width = size // 2, size * 2**i
            one = np.concatenate([np.arange(half) + half * segment for segment in segments])
            order = np.concatenate([one + start for start in range(0, weight.shape[1], width)])
        turned = np.empty_like(done)
        turned[:, order] = done  # P^T
        for k in range(blocks):
            skew = (matrices[i, k] - matrices[i, k].T) / 2.0
            turn = strength * np.linalg.solve((eye + skew).T, (eye - skew).T).T + (1.0 - strength) * eye
            turned[:, k * size : (k + 1) * size] = turned[:, k * size : (k + 1) * size] @ turn.T
        done = turned[:, order]  # P
    return done * (1.0 + strength * (vector[rows[0] : rows[1], None] - 1.0))


def _bat(placed: Placed, slots: Slots, weight: Float64, rows: tuple[int, int]) -> Float64:
    """``W + s (W B + B)`` for each r x r cell of the weight, B that of its rows."""
    blocks = next(iter(slots.values())).f64()
    size = blocks.shape[-1]
    result: Float64 = weight.copy()
    for at, row in enumerate(range(*rows)):
        own = blocks[row // size]
        for start in range(0, weight.shape[1], size):
            cell = weight[at, start : start + size]
            result[at, start : start + size] = cell + placed.strength * (cell @ own + own[row % size])
    return result


FORMULAS: Mapping[str, Callable[[Placed, Slots, Float64, tuple[int, int]], Float64]] = MappingProxyType(
    {
        "set": _set,
        "ia3": _scaled,
        "glora": _glora,
        "bat": _bat,
        ".oft_blocks": _turned_rows,
        ".oft_blocks.0": _turned_parts,
        ".oft_R": _turned_columns,
        ".oft_R.weight": _turned_columns,
        ".oft_r": _turned_early,
        ".boft_R": _butterfly_columns,
    }
)
"""Family, or the tensor by which its kind is known -> its formula."""
