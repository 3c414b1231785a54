"""GLoRA and (IA)^3: changes that are a small function of the base weight's own rows.

GLoRA: ``W' = W + s (W A + B)``. New files: ``A = a1 a2``, ``B = b1 b2`` (with a Tucker core ``bm``); old ones: ``A = a2 a1``,
``B = b2 b1``. Source: LyCORIS 4.1 ``modules/glora.py``; how old and new are told apart: ComfyUI ``weight_adapter/glora.py``.
(IA)^3: LyCORIS ``W' = W (1 + s w)`` per row or, with ``on_input``, per column; PEFT ``W' = W (1 + s (l - 1))``.
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


def ia3_factors(slots: Mapping[str, Tensor], out: int, columns: int, strength: float) -> Float64:
    """What rows (out, 1) or columns (1, columns) are multiplied by; raises CannotError when the sizes fit neither."""
    if ".ia3_l" in slots:
        vector = slots[".ia3_l"]
        on_input = (len(vector.shape) > 1 and vector.shape[0] == 1 and vector.size != out) or vector.size != out
        values = 1.0 + strength * (vector.f64().reshape(-1) - 1.0)
    elif ".weight" in slots and ".on_input" in slots:
        vector = slots[".weight"]
        on_input = bool(slots[".on_input"].item())
        values = 1.0 + strength * vector.f64().reshape(-1)
    else:
        raise CannotError("it has no vector")
    if not on_input and values.size == out:
        return values.reshape(-1, 1)
    if on_input and columns % values.size == 0:
        return np.repeat(values, columns // values.size).reshape(1, -1)
    raise CannotError(f"its {values.size} factors fit neither {out} rows nor {columns} columns")
