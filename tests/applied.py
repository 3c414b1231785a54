"""Small base models in every layout, and what an adapter makes of them, in dense float64 from first principles.

The values share no code with the package: names come from ``fixtures/reference``, with every size divided by :data:`SHRINK`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from safetensors import deserialize

from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, ApplyReport, apply, read_source
from tests.oracle import Raw, model, raw, write

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SHRINK = 128
FLUX = (
    "img_in", "txt_in", "vector_in.in_layer", "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj",
    "double_blocks.0.txt_attn.qkv", "double_blocks.0.img_mlp.0", "double_blocks.0.img_mod.lin", "single_blocks.0.linear1",
    "single_blocks.0.linear2", "single_blocks.0.modulation.lin", "final_layer.adaLN_modulation.1",
)  # fmt: skip
NORM = "double_blocks.0.img_attn.norm.query_norm"
DIFFUSERS_NORM = "transformer_blocks.0.attn.norm_q"
QKV, PROJ, LINEAR1 = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.proj", "single_blocks.0.linear1"
SWAPPED = "final_layer.adaLN_modulation.1"
MANTISSA = {"F32": 23, "BF16": 7, "F16": 10, "F8_E4M3": 3, "F8_E5M2": 2}
LOWEST = {"F32": -126, "BF16": -126, "F16": -14, "F8_E4M3": -6, "F8_E5M2": -14}
FP8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def shrunk(number: int) -> int:
    """A size of the small model; small ones are kept."""
    return number // SHRINK if number >= 2 * SHRINK else number


def flux_shapes() -> dict[str, tuple[int, ...]]:
    """Original weight -> shape of the small FLUX.1."""
    return {name: tuple(shrunk(n) for n in model("flux1-dev").shapes[name]) for name in FLUX}


def stored(values: Any, dtype: str) -> Raw:
    """Values rounded to ``dtype``, ties to even."""
    if dtype in FP8:
        array = np.asarray(values, np.float32)
        return Raw(dtype, array.shape, array.astype(FP8[dtype]).tobytes())
    return raw(values, dtype)


def numbers(tensor: Raw) -> Array:
    """The values of a stored tensor."""
    if tensor.dtype in FP8:
        return np.frombuffer(tensor.data, FP8[tensor.dtype]).astype(np.float64).reshape(tensor.shape)
    return tensor.f64()


def read(path: Path) -> dict[str, Raw]:
    """A file's tensors in the order of their data."""
    return {n: Raw(i["dtype"], tuple(i["shape"]), bytes(i["data"])) for n, i in deserialize(path.read_bytes())}


def spacing(values: Array, dtype: str) -> Array:
    """The distance between neighbouring numbers of a dtype."""
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0 ** LOWEST[dtype])))
    return np.exp2(exponent - MANTISSA[dtype])


def assert_nearest(tensor: Raw, exact: Array) -> None:
    """Every stored value is the nearest to the exact one, but for the rounding of the calculation: float32's, or float64's."""
    assert tensor.shape == exact.shape
    own = np.abs(exact).max() * (1e-14 if tensor.dtype in {"F32", "F64"} else 5e-7)
    steps = np.maximum(np.abs(numbers(tensor) - exact) - own, 0.0) / spacing(exact, tensor.dtype)
    assert steps.max() <= 0.5 + 1e-6, steps.max()


@dataclass
class Base:
    """A small FLUX.1: the weights by original name, and the files of it."""

    dtype: str
    weights: dict[str, Array]
    biases: dict[str, Array]
    extra: dict[str, Raw] = field(default_factory=dict)

    @classmethod
    def make(cls, dtype: str = "BF16", seed: int = 0, size: float = 0.5) -> Base:
        """Random weights that the dtype holds exactly."""
        rng = np.random.default_rng(seed)

        def values(*shape: int) -> Array:
            return numbers(stored(rng.standard_normal(shape) * size, dtype))

        weights = {name: values(*shape) for name, shape in flux_shapes().items()}
        weights[NORM] = values(128)
        return cls(dtype, weights, {name: values(w.shape[0]) for name, w in weights.items() if w.ndim > 1})

    def tensors(self, layout: str) -> dict[str, Raw]:
        """Keys and tensors of a layout: ``original``, ``comfyui``, ``all-in-one`` or ``diffusers``."""
        prefix = {"original": "", "comfyui": "diffusion_model.", "all-in-one": "model.diffusion_model."}.get(layout)
        found: dict[str, Raw] = {}
        if prefix is not None:
            for name, weight in self.weights.items():
                found[prefix + name + (".scale" if name == NORM else ".weight")] = stored(weight, self.dtype)
                if name in self.biases:
                    found[f"{prefix}{name}.bias"] = stored(self.biases[name], self.dtype)
            if layout == "all-in-one":
                found["first_stage_model.decoder.conv_in.weight"] = stored(np.full((2, 2), 0.25), self.dtype)
            return found
        for name, spans in diffusers_places().items():
            found[f"{name}.weight"] = stored(gathered(self.weights, spans), self.dtype)
            found[f"{name}.bias"] = stored(gathered(self.biases, spans), self.dtype)
        found[f"{DIFFUSERS_NORM}.weight"] = stored(self.weights[NORM], self.dtype)
        return found

    def save(self, path: Path, layout: str = "original", metadata: Mapping[str, str] | None = None) -> Path:
        """Write it, in an order that no serialiser would choose."""
        tensors = {**self.tensors(layout), **self.extra}
        order = sorted(tensors, key=lambda key: key[::-1])
        write(path, {key: tensors[key] for key in order}, metadata or {"format": "pt", "kept": "as it is"})
        return path

    def result(self, path: Path, layout: str) -> tuple[dict[str, Raw], dict[str, Raw]]:
        """What a file of a layout holds, as (weights, biases) by original name; rows of parts are put back in place."""
        tensors = read(path)
        if layout != "diffusers":
            prefix = {"comfyui": "diffusion_model.", "all-in-one": "model.diffusion_model."}.get(layout, "")
            return (
                {n: tensors[prefix + n + (".scale" if n == NORM else ".weight")] for n in self.weights},
                {n: tensors[f"{prefix}{n}.bias"] for n in self.biases},
            )
        weights, biases = ({n: np.zeros(a.shape) for n, a in of.items()} for of in (self.weights, self.biases))
        for name, spans in diffusers_places().items():
            for whole, suffix in ((weights, "weight"), (biases, "bias")):
                values, at = numbers(tensors[f"{name}.{suffix}"]), 0
                for weight, start, stop in spans:
                    whole[weight][start:stop] = values[at : at + stop - start]
                    at += stop - start
        weights[NORM] = numbers(tensors[f"{DIFFUSERS_NORM}.weight"])
        return tuple({n: stored(a, self.dtype) for n, a in of.items()} for of in (weights, biases))  # type: ignore[return-value]


def diffusers_places() -> dict[str, list[tuple[str, int, int]]]:
    """Diffusers' module -> (original weight, start, stop) in its row order, for the small model."""
    shapes = flux_shapes()
    found = {}
    for name, place in model("flux1-dev").diffusers.items():
        if all(rows.weight in shapes for rows in place):
            whole = model("flux1-dev").shapes[place[0].weight][0]
            factor = whole // shapes[place[0].weight][0]
            found[name] = [(r.weight, r.start // factor, (r.start + r.count) // factor) for r in place]
    found["norm_out.linear"] = [(SWAPPED, 24, 48), (SWAPPED, 0, 24)]
    return found


def gathered(arrays: Mapping[str, Array], spans: list[tuple[str, int, int]]) -> Array:
    """Rows in the order of the spans."""
    return np.concatenate([arrays[weight][start:stop] for weight, start, stop in spans])


def stem(name: str) -> str:
    """sd-scripts' name of a denoiser module."""
    return "lora_unet_" + name.replace(".", "_")


@dataclass
class Added:
    """An adapter file's tensors."""

    dtype: str = "F32"
    seed: int = 1
    size: float = 0.3
    tensors: dict[str, Raw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def put(self, key: str, *shape: int, at: float = 0.0) -> Array:
        """A random tensor around ``at``; its values as they are stored."""
        self.tensors[key] = stored(at + self.rng.standard_normal(shape) * self.size, self.dtype)
        return numbers(self.tensors[key])

    def number(self, key: str, value: float) -> float:
        """A scalar."""
        self.tensors[key] = raw(value, "F32")
        return self.tensors[key].item()

    def lora(self, module: str, shape: tuple[int, ...], rank: int, alpha: float | None, words: str = "kohya") -> Array:
        """A LoRA of a flat shape; the change at weight 1."""
        down, up = ("lora_A", "lora_B") if words == "peft" else ("lora_down", "lora_up")
        out, columns = shape[0], int(np.prod(shape[1:]))
        ones = [1] * (len(shape) - 2)
        a = self.put(f"{module}.{down}.weight", rank, *shape[1:])
        b = self.put(f"{module}.{up}.weight", out, rank, *ones)
        scale = 1.0 if alpha is None else self.number(f"{module}.alpha", alpha) / rank
        return (scale * b.reshape(out, rank) @ a.reshape(rank, columns)).reshape(shape)

    def save(self, path: Path) -> Path:
        """Write it."""
        write(path, self.tensors)
        return path


def applied(folder: Path, base: Path, *sources: tuple[Added, float], **how: object) -> tuple[Path, ApplyReport]:
    """Apply adapters at their weights."""
    opened = open_model(base)
    given = [
        read_source(own.save(folder / f"a{i}.safetensors"), opened.architecture, weight)
        for i, (own, weight) in enumerate(sources)
    ]
    out = folder / "out.safetensors"
    report = apply(opened, given, out, ApplyOptions(**how), force=True)  # type: ignore[arg-type]
    return out, report
