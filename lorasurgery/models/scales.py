"""The scales of fp8 weights: where they stand, and how they are multiplied in.

The true weight is the stored one times its scale. Source: ComfyUI ``QUANTIZATION.md`` and ``comfy/ops.py`` (2026-05):
``scale_weight`` (old) and ``weight_scale``, scalars; kohya's musubi-tuner ``fp8_optimization_utils.py``: ``scale_weight`` also
per row, (out, 1), or per block of columns, (out, blocks, 1). ``scale_input`` and ``input_scale`` belong to activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError
from lorasurgery.models.floats import FP8

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Shape, Tensor

SCALES = (".scale_weight", ".weight_scale")
MARKER = "scaled_fp8"
"""A tensor without values that only says that a file has scales."""
OTHERS = (*SCALES, ".scale_input", ".input_scale", ".comfy_quant")
"""Ends of keys that say how the weight beside them is stored or used."""


def is_number_of_another(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is no parameter, but about the weight beside it, or about the file; ``.scale`` alone is a norm's."""
    if key.rpartition(".")[2] == MARKER:
        return True
    end = next((end for end in (*OTHERS, ".scale") if key.endswith(end)), None)
    return end is not None and (end != ".scale" or key.removesuffix(end) + ".weight" in tensors)


def scale_of(key: str, tensors: Mapping[str, Tensor], path: Path) -> Tensor | None:
    """The scale of a weight, None when it has none.

    Raises FileFormatError for a scale whose meaning its shape and dtype do not tell.
    """
    stem = key.removesuffix(".weight")
    name = next((stem + suffix for suffix in SCALES if stem + suffix in tensors), None)
    if name is None or stem == key:
        return None
    scale, weight = tensors[name], tensors[key]
    if weight.dtype not in FP8 or scale.dtype not in {"F32", "BF16", "F16", "F64"} or not _fits(scale.shape, weight.shape):
        raise FileFormatError(
            f"{name} is {scale.dtype} {list(scale.shape)} for a {weight.dtype} weight of {list(weight.shape)}; "
            "known are one number, one per row and one per block of columns, for fp8 weights",
            path=path, hint="the bf16 or fp16 version of the model",
        )  # fmt: skip
    return scale


def _fits(scale: Shape, weight: Shape) -> bool:
    if all(n == 1 for n in scale):
        return True
    if not weight or scale[0] != weight[0]:
        return False
    blocks = len(scale) == 3 and scale[2] == 1 and len(weight) == 2 and weight[1] % max(scale[1], 1) == 0
    return blocks or all(n == 1 for n in scale[1:])


def scaled(values: NDArray[Any], scale: Tensor, start: int, stop: int) -> NDArray[Any]:
    """``values``, rows ``start:stop`` of a stored weight as (rows, columns), times their scale."""
    if scale.size == 1:
        whole: NDArray[Any] = values * values.dtype.type(scale.item())
        return whole
    factors = scale.rows([(start, stop)]).f32().reshape(stop - start, -1, 1)
    blocks: NDArray[Any] = values.reshape(stop - start, factors.shape[1], -1) * factors.astype(values.dtype)
    return blocks.reshape(values.shape)
