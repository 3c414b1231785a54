"""A small model that no table knows, and adapters for it as several trainers spell them, with their dense meaning."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import nn

from tests.oracle import Raw, raw, read, write

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Dense = dict[str, NDArray[np.float64]]


class Warbler(nn.Module):
    """One block, with names that nobody else has."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_in, self.mix_out = nn.Linear(12, 16), nn.Linear(16, 12)
        self.spatial, self.calm = nn.Conv2d(12, 10, 3), nn.LayerNorm(12)


class Aviary(nn.Module):
    """The model."""

    def __init__(self) -> None:
        super().__init__()
        self.hatch = nn.Conv2d(3, 12, 1)
        self.warblers = nn.ModuleList([Warbler() for _ in range(2)])
        self.head = nn.Linear(12, 5)


SHAPES = {
    name.removesuffix(".weight"): tuple(own.shape)
    for name, own in Aviary().state_dict().items()
    if name.endswith(".weight") and own.ndim > 1
}
"""Module -> (out, in[, k, k])."""


def save_model(path: Path, names: Collection[str] = tuple(SHAPES)) -> Path:
    """The model's weights and biases, or those of some modules."""
    state = Aviary().state_dict()
    kept = {key: own for key, own in state.items() if key.rpartition(".")[0] in names}
    write(path, {key: raw(own.numpy(), "F32") for key, own in kept.items()})
    return path


class Spelling(NamedTuple):
    """How a trainer writes: prefix, underscores for dots, the factors' words, whether there is an alpha."""

    prefix: str
    flat: bool
    down: str
    up: str
    alpha: bool

    def stem(self, name: str) -> str:
        """A module's name in the file."""
        return self.prefix + (name.replace(".", "_") if self.flat else name)


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
SPELLINGS = {
    "peft": Spelling("base_model.model.", False, *PEFT, False),
    "kohya": Spelling("lora_unet_", True, *KOHYA, True),
    "dotted": Spelling("", False, *PEFT, True),
    "comfyui": Spelling("diffusion_model.", False, *PEFT, False),
    "old": Spelling("unet.", False, "lora.down.weight", "lora.up.weight", False),
    "mochi": Spelling("transformer.", False, "lora_A", "lora_B", False),
    "own": Spelling("lora_aviary_", True, *KOHYA, True),
}


def make(
    path: Path, how: str, *, rank: int = 3, alpha: float = 1.5, dtype: str = "F32", without: Collection[str] = (), seed: int = 0
) -> Dense:
    """Write an adapter, and give what it does to each weight, in float64."""
    rng, own = np.random.default_rng(seed), SPELLINGS[how]
    tensors: dict[str, Raw] = {}
    for name, (out, inside, *kernel) in SHAPES.items():
        if name not in without:
            ones = [1] * len(kernel)
            tensors[f"{own.stem(name)}.{own.down}"] = raw(rng.standard_normal((rank, inside, *kernel)), dtype)
            tensors[f"{own.stem(name)}.{own.up}"] = raw(rng.standard_normal((out, rank, *ones)), dtype)
            if own.alpha:
                tensors[f"{own.stem(name)}.alpha"] = raw(alpha, "F32")
    write(path, tensors)
    return meaning(path, how)


def meaning(path: Path, how: str) -> Dense:
    """What a file does, by the words of its spelling alone; every key must be one of its own."""
    return dense(read(path)[0], SPELLINGS[how])


def dense(tensors: Mapping[str, Raw], own: Spelling, scales: Mapping[str, float] | None = None) -> Dense:
    """``scale * up @ down`` of every module; without an alpha tensor or ``scales`` the scale is 1."""
    stems = {own.stem(name): name for name in SHAPES}
    found: Dense = {}
    used = set()
    for stem, name in stems.items():
        keys = [f"{stem}.{word}" for word in (own.down, own.up)]
        if keys[0] in tensors:
            down, up = (tensors[key].f64() for key in keys)
            rank = len(down)
            alpha = tensors.get(f"{stem}.alpha")
            scale = alpha.item() / rank if alpha is not None else 1.0 if scales is None else scales[name]
            used |= {*keys, *([f"{stem}.alpha"] if alpha is not None else [])}
            found[name] = (scale * up.reshape(-1, rank) @ down.reshape(rank, -1)).reshape(SHAPES[name])
        if f"{stem}.diff" in tensors:
            used.add(f"{stem}.diff")
            found[name] = tensors[f"{stem}.diff"].f64()
    assert set(tensors) == used
    return found


def total(parts: Collection[tuple[Dense, float]]) -> Dense:
    """The weighted sum, a missing module being zero."""
    names = [name for name in SHAPES if any(name in own for own, _ in parts)]
    return {name: sum((own[name] * weight for own, weight in parts if name in own), np.zeros(SHAPES[name])) for name in names}


def assert_close(found: Dense, wanted: Dense, tolerance: float = 1e-6) -> None:
    """Module by module, relative to the module's norm."""
    assert found.keys() == wanted.keys()
    for name, own in wanted.items():
        assert np.linalg.norm(found[name] - own) <= tolerance * np.linalg.norm(own), name


def make_peft_folder(path: Path, *, rank: int = 4, alpha: float = 6.0, seed: int = 0) -> Dense:
    """PEFT's folder, whose configuration has the scale, and what it does."""
    path.mkdir()
    weights = path / "adapter_model.safetensors"
    make(weights, "peft", rank=rank, seed=seed)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": sorted(SHAPES)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return folder_meaning(path)


def folder_meaning(path: Path) -> Dense:
    """What a folder does by its configuration, patterns included (they are plain names here)."""
    config = json.loads((path / "adapter_config.json").read_text())
    alphas = {key.replace("\\", "").removeprefix("^"): own for key, own in config.get("alpha_pattern", {}).items()}
    tensors = read(path / "adapter_model.safetensors")[0]
    scales = {}
    for name in SHAPES:
        down = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if down is not None:
            scales[name] = next((a for key, a in alphas.items() if name.endswith(key)), config["lora_alpha"]) / down.shape[0]
    return dense(tensors, SPELLINGS["peft"], scales)
