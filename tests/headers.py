"""Full-size safetensors files that take no room: a true header over a hole, with the scalars filled in."""

from __future__ import annotations

import gzip
import json
import struct
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent / "fixtures"
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
CODES = {"F32": "<f", "F16": "<e", "I64": "<q"}


@cache
def fixture(folder: str, name: str) -> dict[str, Any]:
    """A list of names and shapes."""
    found: dict[str, Any] = json.loads(gzip.decompress((HERE / folder / f"{name}.json.gz").read_bytes()))
    return found


def hollow(
    path: Path, shapes: Mapping[str, list[int]], metadata: Mapping[str, str] | None = None,
    *, dtype: str = "F16", scalars: Mapping[str, float] | None = None,
) -> Path:  # fmt: skip
    """Write a file of these shapes; a scalar has the value given for its key, else 4; everything else is zero."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for key, shape in shapes.items():
        size = prod(shape) * BYTES[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for key, shape in shapes.items():
            if prod(shape) == 1 and key.endswith((".alpha", "lokr_factor")):
                file.seek(8 + len(text) + header[key]["data_offsets"][0])
                file.write(struct.pack(CODES[dtype], (scalars or {}).get(key, 4)))
    return path


def lora(stems: Mapping[str, list[int]], rank: int = 8, *, alpha: bool = True, words: str = "kohya") -> dict[str, list[int]]:
    """The shapes of a plain LoRA over modules of these shapes (out, in)."""
    down, up = ("lora_down", "lora_up") if words == "kohya" else ("lora_A", "lora_B")
    found: dict[str, list[int]] = {}
    for stem, (out, columns) in stems.items():
        found[f"{stem}.{down}.weight"] = [rank, columns]
        found[f"{stem}.{up}.weight"] = [out, rank]
        if alpha:
            found[f"{stem}.alpha"] = []
    return found


FLUX = {
    "lora_unet_img_in": [3072, 64],
    "lora_unet_double_blocks_0_img_attn_qkv": [9216, 3072],
    "lora_unet_double_blocks_0_img_mod_lin": [18432, 3072],
    "lora_unet_double_blocks_18_img_mlp_0": [12288, 3072],
    "lora_unet_single_blocks_0_linear1": [21504, 3072],
    "lora_unet_single_blocks_37_linear2": [3072, 15360],
}
"""Modules by which FLUX.1 is known (Chroma has no ``img_mod``, HunyuanVideo no ``img_in``), in sd-scripts' names."""
