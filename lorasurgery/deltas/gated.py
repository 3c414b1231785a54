"""GLoRA, (IA)^3 and MiSS' ``bat``: changes that are a small function of the base weight's own rows.

GLoRA: ``W' = W + s (W A + B)``. New files: ``A = a1 a2``, ``B = b1 b2`` (with a Tucker core ``bm``); old ones: ``A = a2 a1``,
``B = b2 b1``. Source: LyCORIS 4.1 ``modules/glora.py``; how old and new are told apart: ComfyUI ``weight_adapter/glora.py``.
(IA)^3: LyCORIS ``W' = W (1 + s w)`` per row or, with ``on_input``, per column; PEFT ``W' = W (1 + s (l - 1))``, and where it
multiplies rows, the bias too.
``bat``: blocks B (out / r, r, r); of row ``o r + i`` each run x of r columns becomes ``x + s (x B_o + B_o[i])``.
Source: PEFT ``tuners/miss/layer.py`` 0.21 (``get_delta_weight``).
Source: LyCORIS ``modules/ia3.py``, PEFT ``tuners/ia3/layer.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Float64, Tensor

    Work = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Glora:
    """``W A + B`` with A = left right between input channels, (in, r) and (r, in)."""

    left: Float64
    right: Float64
    added: LowRank
    rank: int
    channels: bool
    """A acts on input channels (new files); False: on the flat columns of a weight with its kernel (old files)."""


def glora(slots: Mapping[str, Tensor], out: int, columns: int) -> Glora:
    """GLoRA's factors from a module's tensors by suffix; ``out`` and ``columns`` are the base weight's, kernel included.

    Raises CannotError when one is missing.
    """
    try:
        a1, a2, b1, b2 = (slots[f".{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    except KeyError as missing:
        raise CannotError(f"it has no {missing.args[0]}") from missing
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if not (old or new):
        raise CannotError(
            f"its a1 {list(a1.shape)}, a2 {list(a2.shape)}, b1 {list(b1.shape)} and b2 {list(b2.shape)} do not fit"
        )
    if old and (not new or a2.shape[0] == out == columns):
        if a2.shape[0] != columns or (b2.shape[0], b1.size // b1.shape[0]) != (out, columns):
            raise CannotError(f"its a2 {list(a2.shape)} and b2 {list(b2.shape)} are of no weight of {out} x {columns}")
        return Glora(_matrix(a2), _matrix(a1), LowRank(b2, b1), a1.shape[0], channels=False)
    return Glora(_matrix(a1), _matrix(a2), LowRank(b1, b2, slots.get(".bm.weight")), a2.shape[0], channels=True)


def _matrix(tensor: Tensor) -> Float64:
    return tensor.f64().reshape(tensor.shape[0], -1)


def times_a(weight: Work, of: Glora, left: Float64, right: Float64) -> Work:
    """``W left right`` for rows of the base weight, (rows, columns)."""
    width = left.shape[0]
    kernel = weight.shape[1] // width
    one, two = left.astype(weight.dtype), right.astype(weight.dtype)
    if not of.channels or kernel == 1:
        flat: Work = weight @ one @ two
        return flat
    swapped = weight.reshape(-1, width, kernel).swapaxes(1, 2)  # (rows, kernel, in)
    product: Work = (swapped @ one @ two).swapaxes(1, 2)
    return product.reshape(weight.shape)


def inverse_of_a(of: Glora, factor: float) -> tuple[Float64, Float64]:
    """(left, right) with ``(I + factor A)^-1 = I - left right``, by Woodbury: an r x r inverse."""
    small = np.linalg.inv(np.eye(of.rank) + factor * (of.right @ of.left))
    left: Float64 = of.left @ small * factor
    return left, of.right


def ia3_on_input(vector: Tensor, out: int, channels: int, feedforward: bool | None) -> bool:  # noqa: FBT001  one of three
    """Whether a vector of PEFT's multiplies input channels.

    Of a linear layer it is a row or a column; of a convolution always (1, n, 1...), so that with as many input as output
    channels only the configuration's ``feedforward_modules`` tell. Raises CannotError when nothing does.
    """
    if len(vector.shape) == 2 and vector.size > 1 and 1 in vector.shape:
        return vector.shape[0] == 1
    if feedforward is not None:
        return feedforward
    if vector.size == out == channels:
        raise CannotError("feedforward_modules of its adapter_config.json would tell whether it multiplies rows or columns")
    return vector.size != out


def ia3_factors(
    slots: Mapping[str, Tensor], out: int, columns: int, strength: float, *, on_input: bool
) -> Float64:  # fmt: skip
    """What rows (out, 1) or columns (1, columns) are multiplied by; raises CannotError when the sizes fit neither."""
    if ".ia3_l" in slots:
        values = 1.0 + strength * (slots[".ia3_l"].f64().reshape(-1) - 1.0)
    elif ".weight" in slots and ".on_input" in slots:
        values = 1.0 + strength * slots[".weight"].f64().reshape(-1)
    else:
        raise CannotError("it has no vector")
    if not on_input and values.size == out:
        return values.reshape(-1, 1)
    if on_input and values.size and columns % values.size == 0:
        return np.repeat(values, columns // values.size).reshape(1, -1)
    raise CannotError(f"its {values.size} factors fit neither {out} rows nor {columns} columns")


def bat_blocks(slots: Mapping[str, Tensor], out: int, columns: int) -> Float64:
    """The blocks (out / r, r, r) of a ``bat``; raises CannotError when they are of another weight."""
    (block,) = slots.values()
    count, size, width = block.shape
    if size != width or count * size != out or columns % size:
        raise CannotError(f"its blocks {list(block.shape)} are of no weight of {out} x {columns}")
    return block.f64()


def bat_rows(weight: Work, start: int, blocks: Float64, strength: float, *, undo: bool) -> Work:
    """Rows from ``start`` of a weight with a ``bat`` in it, or out of it."""
    size = blocks.shape[-1]
    own, row = np.divmod(np.arange(start, start + len(weight)), size)
    first, last = int(own[0]), int(own[-1]) + 1
    factors = np.eye(size) + strength * blocks[first:last]
    added = (strength * blocks[own, row]).astype(weight.dtype)[:, None, :]
    cells = weight.reshape(len(weight), -1, size)
    if undo:
        changed = (cells - added) @ np.linalg.inv(factors).astype(weight.dtype)[own - first]
    else:
        changed = cells @ factors.astype(weight.dtype)[own - first] + added
    found: Work = changed.reshape(weight.shape)
    return found
