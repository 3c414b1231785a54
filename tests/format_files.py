"""Small tensors under real names, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.io.header import RawFile
from lorasurgery.io.tensors import of_array
from lorasurgery.layouts.emit import emit
from lorasurgery.layouts.targets import layout
from lorasurgery.operations.conversion.convert import Options, convert

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.io.tensors import Tensor

RNG = np.random.default_rng(7)


def some(*shape: int, dtype: str = "F32") -> Tensor:
    return of_array(RNG.standard_normal(shape) * 0.1, dtype)


def lora(stem: str, out: int, columns: int, rank: int = 4, words: tuple[str, str] = ("lora_A", "lora_B")) -> dict[str, Tensor]:
    down, up = words
    return {f"{stem}.{down}.weight": some(rank, columns), f"{stem}.{up}.weight": some(out, rank)}


KOHYA = ("lora_down", "lora_up")


def file(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> RawFile:
    return RawFile(Path("some.safetensors"), tensors, metadata or {})


def written(adapter: Adapter, target: str, **options: Any) -> dict[str, Tensor]:
    converted, report = convert(adapter, target, Options(**options))
    return emit(converted, layout(target), report).tensors


def xlabs() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in (0, 37):
        stem = f"single_blocks.{i}.processor"
        tensors |= {f"{stem}.qkv_lora.down.weight": some(4, 3072), f"{stem}.qkv_lora.up.weight": some(9216, 4)}
        tensors |= {f"{stem}.proj_lora.down.weight": some(4, 15360), f"{stem}.proj_lora.up.weight": some(3072, 4)}
    return tensors


def control() -> dict[str, Tensor]:
    source: dict[str, Tensor] = {}
    for block in ("transformer_blocks.0", "single_transformer_blocks.0"):
        for part in "qkv":
            source |= lora(f"transformer.{block}.attn.to_{part}", 3072, 3072)
        for part in "qk":
            source[f"transformer.{block}.attn.norm_{part}.weight"] = some(128)
    source["transformer.transformer_blocks.0.attn.norm_added_q.weight"] = some(128)
    return source | lora("transformer.x_embedder", 3072, 128)


def wan_control() -> dict[str, Tensor]:
    stem = "diffusion_model.patch_embedding"
    source = {f"{stem}.lora_A.weight": some(8, 32, 1, 2, 2), f"{stem}.lora_B.weight": some(1536, 8, 1, 1, 1)}
    source[f"{stem}.reshape_weight"] = of_array(np.array([1536, 32, 1, 2, 2]), "I64")
    for i in range(2):
        source |= lora(f"diffusion_model.blocks.{i}.self_attn.q", 1536, 1536, 8)
    return source
