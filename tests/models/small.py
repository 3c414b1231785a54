"""Small models of the real Diffusers classes, and their weights under the original names, through the reference lists."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests.oracle import model as reference
from tests.oracle import raw, write

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from lorasurgery.models import Model, Place

    Arrays = dict[str, NDArray[np.float32]]

FLUX = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1-dev": (
        "FluxTransformer2DModel",
        {**FLUX, "in_channels": 4, "pooled_projection_dim": 8, "axes_dims_rope": [2, 2, 4], "guidance_embeds": True},
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 48, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 20,
         "axes_dims": [4, 6, 6], "axes_lens": [32, 32, 32]},
    ),
    "sd1": (
        "UNet2DConditionModel",
        {"block_out_channels": (8, 8, 16, 16), "cross_attention_dim": 12, "attention_head_dim": 2, "norm_num_groups": 4},
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {"block_out_channels": (8, 16, 16), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1, 2),
         "attention_head_dim": (2, 2, 4), "cross_attention_dim": 20, "use_linear_projection": True, "norm_num_groups": 4,
         "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32},
    ),
    "sd3-3.5-medium": (
        "SD3Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8, "out_channels": 4,
         "pos_embed_max_size": 8, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
         "joint_attention_dim": 12, "axes_dims_rope": (2, 2, 4)},
    ),
    "wan-2.1-t2v-1.3b": (
        "WanTransformer3DModel",
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10,
         "freq_dim": 8, "ffn_dim": 20, "num_layers": 2},
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 4,
         "num_kv_heads": 2, "multiple_of": 8, "axes_dim_rope": (4, 4, 4), "axes_lens": (8, 8, 8), "cap_feat_dim": 10},
    ),
    "flux2-dev": (
        "Flux2Transformer2DModel",
        {**FLUX, "in_channels": 4, "timestep_guidance_channels": 8, "axes_dims_rope": (2, 2, 2, 2)},
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {**FLUX, "in_channels": 4, "axes_dims_rope": (2, 2, 4), "approximator_num_channels": 8, "approximator_hidden_dim": 12,
         "approximator_layers": 2},
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
         "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 10, "pooled_projection_dim": 6,
         "rope_axes_dim": (2, 2, 4)},
    ),
}  # fmt: skip
"""What the command line calls a model -> its Diffusers class and a small configuration; head sizes differ from widths."""


@cache
def built(key: str) -> Any:
    """A small model with random weights, every one of them, biases and norms included."""
    import diffusers

    name, config = CONFIGS[key]
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Diffusers' own: Chroma imports a class from where it used to be
        model = getattr(diffusers, name)(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@cache
def diffusers_arrays(key: str) -> Arrays:
    """Its parameters by Diffusers' names."""
    return {name: tensor.numpy().copy() for name, tensor in built(key).state_dict().items()}


@cache
def original_arrays(key: str) -> Arrays:
    """Matrices, convolutions and their biases by the original names."""
    return original_of(key, diffusers_arrays(key))


def original_of(key: str, own: Arrays) -> Arrays:
    """The same of any weights by Diffusers' names: parts stacked, exchanged halves put back."""
    parts: dict[str, list[tuple[int, NDArray[np.float32]]]] = {}
    for module, place in reference(key).diffusers.items():
        for suffix in (".weight", ".bias"):
            if module + suffix not in own:
                continue
            rows = np.split(own[module + suffix], len(place))
            for one, values in zip(place, rows, strict=True):
                parts.setdefault(one.weight + suffix, []).append((one.start, values))
    return {name: np.concatenate([v for _, v in sorted(found, key=lambda p: p[0])]) for name, found in parts.items()}


def place_of(model: Model, name: str) -> Place:
    """Where a tensor that has a place belongs."""
    found = model.weights[name].place
    assert found is not None, name
    return found


def save(path: Path, arrays: Mapping[str, NDArray[Any]], dtype: str = "F32", prefix: str = "") -> Path:
    """A safetensors file of these arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, {prefix + name: raw(values, dtype) for name, values in arrays.items()})
    return path


def save_gguf(
    path: Path, tensors: Mapping[str, Any], *, big_endian: bool = False, shapes: Mapping[str, Any] | None = None
) -> Path:
    """A GGUF file, by the library's own writer, of arrays or (blocks, kind); ``shapes``: what flattened tensors were."""
    import gguf

    writer = gguf.GGUFWriter(path, "any", endianess=gguf.GGUFEndian.BIG if big_endian else gguf.GGUFEndian.LITTLE)
    for name, values in tensors.items():
        data, kind = values if isinstance(values, tuple) else (values, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    for name, shape in (shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", list(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
