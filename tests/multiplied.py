"""The model that the adapters of ``fixtures/multiplied`` are for, and what a file of a model says of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.numpy import load_file, save_file

from tests.probes import base_weight

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]

HERE = Path(__file__).parent / "fixtures" / "multiplied"
BLOCK = "down_blocks.0.attentions.0"
SHAPES = {
    f"{BLOCK}.transformer_blocks.0.attn1.to_q": (320, 320),
    f"{BLOCK}.transformer_blocks.0.attn2.to_k": (320, 768),
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj": (2560, 320),
    f"{BLOCK}.proj_in": (320, 320, 1, 1),
    "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
    "down_blocks.1.resnets.0.conv1": (640, 320, 3, 3),
}
"""Layers of Stable Diffusion 1.5 by Diffusers' names."""
WITHOUT_BIAS = ("attn1.to_q", "attn2.to_k")
FILES = sorted(p for p in HERE.iterdir() if p.is_dir() or (p.suffix == ".safetensors" and ".truth" not in p.name))


def base() -> Arrays:
    """Weights and biases by key."""
    found: Arrays = {}
    for name, shape in SHAPES.items():
        found[f"{name}.weight"] = base_weight(f"{name}.weight", shape)
        if not name.endswith(WITHOUT_BIAS):
            found[f"{name}.bias"] = base_weight(f"{name}.bias", shape[:1])
    return found


def save(path: Path, arrays: Arrays) -> Path:
    """Write a model."""
    save_file(arrays, path)
    return path


def truth(adapter: Path) -> Arrays:
    """Key of the model -> probes of the change that the producer makes."""
    spelled = {flat.replace(".", "_"): flat for flat in SHAPES}
    found: Arrays = {}
    for key, probes in load_file(HERE / f"{adapter.name.removesuffix('.safetensors')}.truth.safetensors").items():
        stem, _, kind = key.partition("|")
        name = stem.removeprefix("base_model.model.").removeprefix("lora_unet_")
        found[f"{spelled.get(name, name)}.{kind or 'weight'}"] = probes
    return found
