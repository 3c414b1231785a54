"""Quantised models that cannot be read as the numbers they stand for, told apart by their keys and refused by name."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from lorasurgery.errors import FileFormatError
from lorasurgery.io.dtypes import FLOATS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor

FORMATS = (
    ("bitsandbytes 4 bit (nf4 or fp4)", r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.bitsandbytes__"),
    ("bitsandbytes 8 bit", r"\.(SCB|weight_format)$"),
    ("SVDQuant (nunchaku)", r"\.(smooth(_factor)?(_orig)?|wscales|wtscale|wcscales|proj_down)$"),
    ("GPTQ", r"\.g_idx$"),
    ("AWQ or GPTQ", r"\.qzeros$"),
    ("torchao", r"(\.weight:|\._?weight_)(_data|qdata|tensor_impl|layout_tensor)|\.weight\.tensor_impl"),
    ("optimum-quanto", r"\.weight\._(data|scale)(\._data)?$"),
    ("HQQ", r"\.W_q$"),
    ("block-wise fp8 (DeepSeek)", r"\.weight_scale_inv$"),
    ("NVFP4", r"\.weight_scale_2$"),
    ("packed integers", r"\.(qweight|weight_packed)$"),
)  # fmt: skip
"""(name, a pattern that only keys of this format have); the first that fits counts. Sources: bitsandbytes
``functional.py``, nunchaku ``linear.py``, AutoGPTQ ``qlinear``, torchao ``prototype/safetensors``, optimum-quanto ``qbits.py``,
ComfyUI ``QUANTIZATION.md`` and ``quant_ops.py`` (2026-05)."""
KEYED = ("SVDQuant (nunchaku)",)
"""Formats whose keys other files may have too: only with ``.qweight`` beside them."""
COMFY, PLAIN = ".comfy_quant", ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise", "float8_e5m2_rowwise")
"""ComfyUI's description of one layer, JSON as bytes, and the formats that are one scale times the stored values."""
METADATA = "_quantization_metadata"
HINT = "the bf16 or fp16 version of the model; a GGUF or scaled fp8 version can be read too"


def refuse_quantised(raw: RawFile) -> None:
    """Raises FileFormatError for a format whose values this program does not restore; scaled fp8 is none of them."""
    packed = any(key.endswith(".qweight") for key in raw.tensors)
    for name, pattern in FORMATS:
        if name in KEYED and not packed:
            continue
        key = next((key for key in raw.tensors if re.search(pattern, key)), None)
        if key is not None:
            raise _refused(raw.path, name, key)
    for layer, kind in _described(raw):
        if kind not in PLAIN:
            raise _refused(raw.path, f"ComfyUI's {kind}", layer)
    for key, tensor in raw.tensors.items():
        if tensor.dtype == "F8_E8M0":
            raise _refused(raw.path, "MXFP8", key)
        if key.endswith(".weight") and tensor.dtype not in FLOATS and len(tensor.shape) > 1:
            raise _refused(raw.path, f"stored as {tensor.dtype}", key)


def _refused(path: Path, name: str, key: str) -> FileFormatError:
    return FileFormatError(f"the model is quantised: {name} ({key}); its weights cannot be read", path=path, hint=HINT)


def _described(raw: RawFile) -> Iterator[tuple[str, str]]:
    """(layer, format) of every layer whose quantisation the file describes; raises FileFormatError for what is no JSON."""
    for key, tensor in raw.tensors.items():
        if key.endswith(COMFY):
            yield key, _format(_parsed(raw.path, key, _text(tensor)))
    if METADATA in raw.metadata:
        content = _parsed(raw.path, METADATA, raw.metadata[METADATA])
        layers = content.get("layers") if isinstance(content, dict) else None
        for layer, own in layers.items() if isinstance(layers, dict) else ():
            yield layer, _format(own)


def _text(tensor: Tensor) -> str:
    return tensor.tobytes().decode("utf-8", "replace")


def _parsed(path: Path, key: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{key} is not JSON ({error})", path=path, hint=HINT) from error


def _format(own: object) -> str:
    """A layer's format, with ConvRot's rotation, which changes the values, beside it."""
    if not isinstance(own, dict):
        return str(own)
    kind = str(own.get("format"))
    return f"{kind} with a rotation" if own.get("convrot") else kind
