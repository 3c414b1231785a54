"""What an adapter file means, in dense float64, from first principles.

Shares no code with the package: its own reading of bytes, its own key grammar, its own rule of scale for every layout,
and for the correspondence of names only what was read from the real models (``fixtures/reference``).

Wide weights make dense matrices of hundreds of megabytes, so a delta is evaluated on all its rows but only some of its
columns, the same ones for the same weight: a wrong scale, factor or order of rows changes every column.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import deserialize

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FIXTURES = Path(__file__).parent / "fixtures" / "reference"
COLUMNS = 12
"""Columns of a delta that are evaluated."""

# tensors ------------------------------------------------------------------------------------------------------------------

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}


class Raw(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def f64(self) -> Array:
        """The values."""
        if self.dtype == "BF16":
            high = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return high.view("<f4").astype("f8").reshape(self.shape)
        return np.frombuffer(self.data, _DTYPES[self.dtype]).astype("f8").reshape(self.shape)

    def item(self) -> float:
        """The value of a one-element tensor."""
        return float(self.f64().reshape(-1)[0])


def raw(values: Any, dtype: str) -> Raw:
    """Values rounded to ``dtype``, ties to even."""
    array = np.asarray(values, "f8")
    if dtype == "BF16":
        bits = array.astype("<f4").view("<u4").astype("u8")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return Raw(dtype, array.shape, rounded.astype("<u2").tobytes())
    return Raw(dtype, array.shape, array.astype(_DTYPES[dtype]).tobytes())


Tensors = dict[str, Raw]


def read(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    """A safetensors file's tensors and metadata."""
    data = Path(path).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {n: Raw(i["dtype"], tuple(i["shape"]), bytes(i["data"])) for n, i in deserialize(data)}
    return tensors, header.get("__metadata__", {})


def write(path: str | Path, tensors: Mapping[str, Raw], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: header length, header, data in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(t.data for t in tensors.values()))


# models -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows start:start + count of an original weight."""

    weight: str
    start: int
    count: int


Place = tuple[Rows, ...]

REFERENCES = {
    "sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl", "sd3-medium": "sd3_medium", "sd3-3.5-medium": "sd35_medium",
    "sd3-3.5-large": "sd35_large", "flux1-dev": "flux1_dev", "flux1-schnell": "flux1_schnell", "flux2-dev": "flux2_dev",
    "flux2-klein-9b": "flux2_klein_9b", "flux2-klein-4b": "flux2_klein_4b", "chroma": "chroma", "z-image": "z_image",
    "lumina2": "lumina2", "qwen-image": "qwen_image", "wan-2.1-t2v-14b": "wan21_t2v_14b",
    "wan-2.1-t2v-1.3b": "wan21_t2v_1_3b", "wan-2.1-i2v-14b": "wan21_i2v_14b", "wan-2.2-i2v-14b": "wan22_i2v_14b",
    "wan-2.2-ti2v-5b": "wan22_ti2v_5b", "hunyuan-video": "hunyuan_video", "hunyuan-video-1.5": "hunyuan_video_15",
    "hunyuan-image": "hunyuan_image_21", "framepack": "framepack", "ltx-video-2b": "ltx_video", "ltx2": "ltx2",
    "hidream": "hidream", "kandinsky5-lite": "kandinsky5", "cosmos-predict2-2b": "cosmos_predict2_2b", "anima": "anima",
    "auraflow": "auraflow",
}  # fmt: skip
"""What the command line calls a model -> its reference."""

SAME_IN_BOTH = {"lumina2": "time_caption_embed.caption_embedder.1", "cosmos-predict2-2b": "patch_embed.proj"}
"""The one module whose shape the reference's Diffusers class had at another size."""

CLIP_L = ("clip_l", "lora_te1", "text_encoder", "text_encoders.clip_l.transformer", "lora_te1")
CLIP_G = ("clip_g", "lora_te2", "text_encoder_2", "text_encoders.clip_g.transformer", "lora_te2")
T5_THIRD = ("t5_xxl", "lora_te3", "text_encoder_3", "text_encoders.t5xxl.transformer", "lora_te3")
_ENCODERS = {
    "sd1": [("clip_l", "lora_te", "text_encoder", "text_encoders.clip_l.transformer", "lora_te")],
    "sd2": [("clip_h", "lora_te", "text_encoder", "text_encoders.clip_h.transformer", "lora_te")],
    "sdxl": [CLIP_L, CLIP_G],
    "sd3-medium": [CLIP_L, CLIP_G, T5_THIRD],
    "flux1-dev": [CLIP_L, ("t5_xxl", "lora_te3", "text_encoder_2", "text_encoders.t5xxl.transformer", "lora_te2")],
}
"""(table, sd-scripts, Diffusers, ComfyUI, OneTrainer); sources: the four programs."""


@cache
def fixture(name: str) -> dict[str, Any]:
    """One reference."""
    found: dict[str, Any] = json.loads(gzip.decompress((FIXTURES / f"{name}.json.gz").read_bytes()))
    return found


def _inverse(forward: Mapping[str, list[list[Any]]]) -> dict[str, Place]:
    """From "this weight is these parts stacked" to "this part is these rows of that weight"."""
    found: dict[str, Place] = {}
    for weight, parts in forward.items():
        at = 0
        for name, first, count in parts:
            assert first == 0
            assert name not in found
            found[name] = (Rows(weight, at, count),)
            at += count
    return found


def _through(forward: Mapping[str, list[list[Any]]], names: Mapping[str, Place]) -> dict[str, Place]:
    """Places in terms of other modules' names, as places in the weights those stand for.

    The reference of HunyuanImage took one embedder from HunyuanVideo 1.5; what leads to no weight of its own is left out.
    """
    found = {}
    for name, parts in forward.items():
        if any(other not in names for other, _, _ in parts):
            continue
        place: list[Rows] = []
        for other, first, count in parts:
            (inner,) = names[other]
            place.append(Rows(inner.weight, inner.start + first, count))
        found[name] = tuple(place)
    return found


@dataclass(frozen=True, eq=False)
class Model:
    """One base model as the reference has it."""

    key: str

    @cached_property
    def reference(self) -> dict[str, Any]:
        return fixture(REFERENCES[self.key])

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Original weight -> shape, matrices and convolutions."""
        shapes = self.reference["comfyui"] if self.comfyui else self.reference["diffusers"]
        return {name: tuple(shape) for name, shape in shapes.items()}

    @property
    def comfyui(self) -> bool:
        return "comfyui" in self.reference

    @property
    def component(self) -> str:
        return "unet" if self.key in ("sd1", "sd2", "sdxl") else "transformer"

    @cached_property
    def key_map(self) -> dict[str, list[Any]]:
        """What ComfyUI accepts."""
        found: dict[str, list[Any]] = fixture("comfyui_key_maps").get(REFERENCES[self.key], {})
        return found

    @cached_property
    def original(self) -> dict[str, Place]:
        return {name: (Rows(name, 0, shape[0]),) for name, shape in self.shapes.items()}

    @cached_property
    def trained(self) -> dict[str, Place]:
        """By the names of the model that sd-scripts or musubi-tuner trains."""
        names = self.reference["sd_scripts"]
        if isinstance(names, str):
            return self.original if names == "same as comfyui" else self.diffusers
        return _inverse(self.reference["comfyui_from_sd_scripts"])

    @cached_property
    def diffusers(self) -> dict[str, Place]:
        """By Diffusers' names; empty where the reference has none."""
        if not self.comfyui:
            return self.original
        if "diffusers_from_comfyui" in self.reference:
            return _through(self.reference["diffusers_from_comfyui"], self.original)
        if "diffusers_from_sd_scripts" in self.reference:
            return _through(self.reference["diffusers_from_sd_scripts"], self.trained)
        return {}

    @cached_property
    def fused(self) -> dict[str, Place]:
        """What Diffusers calls FLUX.2's q, k and v once it has fused them, as it does for a LoKr (``fuse_qkv_projections``)."""
        parts = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
        found: dict[str, Place] = {}
        for name in self.diffusers if self.key.startswith("flux2") else ():
            block, _, leaf = name.rpartition(".")
            for whole, own in parts.items():
                if leaf == own[0] and f"{block}.{own[1]}" in self.diffusers:
                    places = [self.diffusers[f"{block}.{part}"][0] for part in own]
                    count = sum(rows.count for rows in places)
                    found[f"{block}.{whole}"] = (Rows(places[0].weight, places[0].start, count),)
        return found

    @property
    def encoders(self) -> list[tuple[str, str, str, str, str]]:
        return _ENCODERS.get(self.key, [])

    def names(self, naming: str) -> dict[str, Place]:
        """``original``, ``trained`` or ``diffusers``."""
        found: dict[str, Place] = getattr(self, naming)
        return found

    def shape(self, place: Place) -> tuple[int, ...]:
        """Of the module that stands for a place."""
        return (sum(rows.count for rows in place), *self.shapes[place[0].weight][1:])


@cache
def model(key: str) -> Model:
    """The model the command line calls ``key``."""
    return Model(key)


# layouts ------------------------------------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """How a layout spells a denoiser's modules: prefix, flat?, naming, which of an encoder's prefixes, dialect."""

    prefix: str
    flat: bool
    naming: str
    encoder: int
    dialect: str


def rule(layout: str, of: Model) -> Rule:
    """The rule of a layout for a model."""
    if layout == "onetrainer" and of.key in ("z-image", "qwen-image", "flux2-dev", "flux2-klein-4b", "flux2-klein-9b"):
        return Rule("transformer.", False, "diffusers", 4, "kohya")
    return {
        "sd-scripts": Rule("lora_unet_", True, "trained", 1, "kohya"),
        "comfyui": Rule("diffusion_model.", False, "original", 3, "kohya"),
        "diffusers": Rule(of.component + ".", False, "diffusers", 2, "peft"),
        "other": Rule("diffusion_model.", False, "trained", 3, "peft"),
        "peft": Rule("base_model.model.", False, "diffusers", 2, "peft"),
        "lycoris": Rule("lycoris_", True, "diffusers", 1, "kohya"),
        "onetrainer": Rule(f"lora_{of.component}_", True, "diffusers", 4, "kohya"),
    }[layout]


LAYOUTS = ("sd-scripts", "comfyui", "diffusers", "other", "peft", "lycoris", "onetrainer")


def flat(name: str) -> str:
    """Dots to underscores."""
    return re.sub(r"\.", "_", name)


def stem_of(of: Model, layout: str, name: str) -> str:
    """A denoiser module's key without its suffix."""
    spelling = rule(layout, of)
    return spelling.prefix + (flat(name) if spelling.flat else name)


def encoder_stem(of: Model, layout: str, table: str, name: str) -> str:
    """A text encoder module's key without its suffix."""
    encoder = next(e for e in of.encoders if e[0] == table)
    prefix = encoder[rule(layout, of).encoder]
    return f"{prefix}_{flat(name)}" if prefix.startswith("lora_te") else f"{prefix}.{name}"


@cache
def _index(of: Model, layout: str) -> dict[str, tuple[str, Place]]:
    spelling = rule(layout, of)
    names = of.names(spelling.naming) | (of.fused if layout == "diffusers" else {})
    found = {stem_of(of, layout, n): ("", place) for n, place in names.items()}
    for table, *_ in of.encoders:
        for name, shape in fixture("text_encoders")[table].items():
            weight = f"{table}/{name}"
            found[encoder_stem(of, layout, table, name)] = (table, (Rows(weight, 0, shape[0]),))
    return found


def find(of: Model, layout: str, stem: str) -> Place | None:
    """Where a module stands; in ComfyUI's layout by ComfyUI's own map."""
    found = _index(of, layout).get(stem)
    if found is not None and (layout != "comfyui" or found[0]):
        return found[1]
    target = of.key_map.get(stem)
    if target is None:
        return None
    path, part, function = [*target, None, None][:3]
    weight = path.removeprefix("diffusion_model.").removesuffix(".weight")
    if weight not in of.shapes:
        return (Rows(weight, 0, 0),)
    rows = of.shapes[weight][0]
    if function is not None:
        return (Rows(weight, rows // 2, rows - rows // 2), Rows(weight, 0, rows // 2))
    return (Rows(weight, 0, rows),) if part is None else (Rows(weight, part[1], part[2]),)


# keys ---------------------------------------------------------------------------------------------------------------------

_LORA = {
    "lora_up.weight": "up", "lora_down.weight": "down", "lora_mid.weight": "mid", "lora_B.weight": "up",
    "lora_A.weight": "down", "lora.up.weight": "up", "lora.down.weight": "down",
}  # fmt: skip
_ENDINGS = {
    **{ending: ("lora", slot) for ending, slot in _LORA.items()},
    **{f"hada_{s}": ("loha", s) for s in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{s}": ("lokr", s) for s in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    "diff": ("full", "diff"), "w_norm": ("norm", "diff"), "alpha": ("", "alpha"), "dora_scale": ("", "dora_scale"),
    "lora_magnitude_vector": ("", "lora_magnitude_vector"), "diff_b": ("", "bias"), "b_norm": ("", "bias"),
    "lora_B.bias": ("", "scaled bias"), "reshape_weight": ("", "reshape_weight"), "set_weight": ("set", "value"),
    "oft_blocks": ("oft", "blocks"),
}  # fmt: skip


@dataclass
class Parts:
    """One module's tensors."""

    stem: str
    family: str = ""
    slots: dict[str, Raw] = field(default_factory=dict)


def modules(tensors: Mapping[str, Raw]) -> tuple[dict[str, Parts], list[str]]:
    """A file's modules by stem, and the keys that belong to none."""
    found: dict[str, Parts] = {}
    others = []
    for key, tensor in tensors.items():
        pieces = key.split(".")
        for count in (3, 2, 1):
            ending = ".".join(pieces[-count:])
            if ending in _ENDINGS and len(pieces) > count:
                family, slot = _ENDINGS[ending]
                stem = ".".join(pieces[:-count])
                own = found.setdefault(stem, Parts(stem))
                assert slot not in own.slots, key
                assert not family or own.family in ("", family), key
                own.family, own.slots[slot] = family or own.family, tensor
                break
        else:
            others.append(key)
    return found, others


# scales -------------------------------------------------------------------------------------------------------------------


def _peft_value(patterns: Mapping[str, Any], name: str, default: float) -> float:
    """PEFT ``get_pattern_key``."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(value)
    return default


def _peft_scale(config: Mapping[str, Any], name: str, parts: Parts) -> float:
    alpha = float(config.get("lora_alpha", config.get("alpha", 8)))
    alpha = _peft_value(config.get("alpha_pattern") or {}, name, alpha)
    rank = _peft_value(config.get("rank_pattern") or {}, name, config["r"])
    if parts.family == "lora":
        assert rank == parts.slots["down"].shape[0], f"{name}: PEFT would build rank {rank}"
    root = config.get("use_rslora") and parts.family == "lora"
    return alpha / (math.sqrt(rank) if root else rank)


def rank_of(parts: Parts) -> int | None:
    """What alpha is divided by; None where alpha means nothing."""
    slots = parts.slots
    if parts.family == "lora":
        return slots["down"].shape[0]
    if parts.family == "loha":
        return slots["w1_b"].shape[0]
    if parts.family == "lokr":
        named = next((slots[s] for s in ("w2_b", "w1_b") if s in slots), None)
        return None if named is None else named.shape[0]
    return None


@dataclass(frozen=True)
class Reader:
    """A program that reads a layout: where it takes a module's strength from."""

    layout: str
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """PEFT's configuration by component ("" for a folder)."""
    whole_lokr_by_shape: bool = False
    """The musubi-tuner fork: a LoKr with both factors whole has alpha / max(w2.shape)."""
    rslora: bool = False
    """The same fork's flag."""

    def scale(self, parts: Parts) -> float:
        """The number a module's delta is multiplied by."""
        alpha = parts.slots.get("alpha")
        if alpha is not None:
            assert self.layout not in ("diffusers", "peft"), f"{parts.stem}: {self.layout} rejects alpha tensors"
            assert math.prod(alpha.shape) == 1
        rank = rank_of(parts)
        for component, config in self.configs.items():
            prefix = component + "." if component else "base_model.model."
            if parts.stem.startswith(prefix) and parts.family in ("lora", "loha", "lokr"):
                return _peft_scale(config, parts.stem.removeprefix(prefix), parts)
        if parts.family == "lokr" and rank is None and alpha is not None and self.whole_lokr_by_shape:
            return alpha.item() / max(parts.slots["w2"].shape)
        if alpha is None or rank is None:
            return 1.0
        return alpha.item() / (math.sqrt(rank) if self.rslora and parts.family == "lora" else rank)


def header_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Diffusers' ``lora_adapter_metadata`` by component."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(metadata.get("lora_adapter_metadata", "{}")).items():
        component, _, name = key.rpartition(".")
        found.setdefault(component, {})[name] = value
    return found


# deltas -------------------------------------------------------------------------------------------------------------------


def columns_of(weight: str, total: int) -> NDArray[np.int64]:
    """The columns of a weight that are looked at: always the same ones, the first and last among them."""
    if total <= COLUMNS:
        return np.arange(total)
    rng = np.random.default_rng(zlib.crc32(weight.encode()))
    return np.unique(np.concatenate([[0, total - 1], rng.choice(total, COLUMNS - 2, replace=False)]))


def _tucker(core: Array, left: Array, right: Array, at: NDArray[np.int64]) -> Array:
    """sum_ij core[i, j, k] left[i, p] right[j, c] at columns c * K + k, as (p, columns)."""
    kernel = math.prod(core.shape[2:])
    core = core.reshape(*core.shape[:2], kernel)
    column, k = np.divmod(at, kernel)
    inner = np.stack([core[:, :, b] @ right[:, a] for a, b in zip(column, k, strict=True)], axis=1)
    return left.T @ inner


def _kron(parts: dict[str, Array], at: NDArray[np.int64]) -> Array:
    outer = parts["w1"] if "w1" in parts else parts["w1_a"] @ parts["w1_b"]
    if "t2" in parts:
        total = parts["w2_b"].shape[1] * math.prod(parts["t2"].shape[2:])
        m, n = np.divmod(at, total)
        inner = _tucker(parts["t2"], parts["w2_a"], parts["w2_b"], n)
    else:
        whole = parts["w2"] if "w2" in parts else parts["w2_a"] @ parts["w2_b"].reshape(parts["w2_b"].shape[0], -1)
        whole = whole.reshape(whole.shape[0], -1)
        m, n = np.divmod(at, whole.shape[1])
        inner = whole[:, n]
    return np.stack([np.kron(outer[:, a], inner[:, i]) for i, a in enumerate(m)], axis=1)


def delta(parts: Parts, at: NDArray[np.int64]) -> Array:
    """Columns ``at`` of a module's change without its scale: (out, columns). A kernel's cells are columns."""
    slots = {slot: tensor.f64() for slot, tensor in parts.slots.items() if slot != "alpha"}
    if parts.family == "lora":
        up = slots["up"].reshape(slots["up"].shape[0], -1)
        down = slots["down"].reshape(slots["down"].shape[0], -1)
        return up @ down[:, at] if "mid" not in slots else _tucker(slots["mid"], up.T, down, at)
    if parts.family == "loha":
        if "t1" in slots:
            return _tucker(slots["t1"], slots["w1_a"], slots["w1_b"], at) * _tucker(
                slots["t2"], slots["w2_a"], slots["w2_b"], at
            )
        product: Array = (slots["w1_a"] @ slots["w1_b"][:, at]) * (slots["w2_a"] @ slots["w2_b"][:, at])
        return product
    if parts.family == "lokr":
        return _kron(slots, at)
    if parts.family in ("full", "norm"):
        return slots["diff"].reshape(slots["diff"].shape[0], -1)[:, at]
    raise AssertionError(f"{parts.stem}: {parts.family} is no change of the oracle's")


def _put(found: dict[str, Array], name: str, rows: int, place: Place, values: Array, empty: float) -> None:
    """Rows of ``values`` one after another to the places they stand for; no row may be set twice."""
    whole = found.setdefault(name, np.full((rows, *values.shape[1:]), empty))
    at = 0
    for rows_there in place:
        start, count = rows_there.start, rows_there.count
        taken = whole[start : start + count]
        assert np.all(np.isnan(taken) if np.isnan(empty) else taken == 0), f"{name} is set twice"
        whole[start : start + count] = values[at : at + count]
        at += count
    assert at == values.shape[0], f"{name}: {values.shape[0]} rows for {at}"


@dataclass
class Meaning:
    """Everything a file changes."""

    deltas: dict[str, Array]
    """Original weight -> its change at :func:`columns_of`, zero rows where nothing acts."""
    magnitudes: dict[str, Array]
    """Original weight -> magnitude per row, NaN where there is none; ``weight [in] rows`` for one per column."""
    biases: dict[str, Array]
    unknown: list[str]
    """Keys and stems that no reference explains."""


def dense_deltas(tensors: Mapping[str, Raw], of: Model, reader: Reader) -> Meaning:
    """What a file's tensors mean to a reader."""
    found, others = modules(tensors)
    result = Meaning({}, {}, {}, list(others))
    for stem, parts in found.items():
        place = find(of, reader.layout, stem)
        if place is None:
            result.unknown.append(stem)
            continue
        weight = place[0].weight
        encoder, _, name = weight.rpartition("/")
        shape = tuple(fixture("text_encoders")[encoder][name]) if encoder else of.shapes.get(weight)
        if shape is None:  # a norm: whole
            shape = parts.slots["diff" if "diff" in parts.slots else "bias"].shape
            place = (Rows(weight, 0, shape[0]),)
        _one(result, parts, place, shape, reader)
    return result


def _one(result: Meaning, parts: Parts, place: Place, shape: tuple[int, ...], reader: Reader) -> None:
    weight = place[0].weight
    slots = parts.slots
    if parts.family:
        at = columns_of(weight, math.prod(shape[1:]))
        scale = reader.scale(parts)
        _put(result.deltas, weight, shape[0], place, delta(parts, at) * scale, 0.0)
    if "scaled bias" in slots:  # PEFT multiplies it by the scale as well
        _put(result.biases, weight, shape[0], place, slots["scaled bias"].f64() * reader.scale(parts), 0.0)
    if "bias" in slots:
        _put(result.biases, weight, shape[0], place, slots["bias"].f64(), 0.0)
    if "lora_magnitude_vector" in slots:
        vector = slots["lora_magnitude_vector"]
        out = sum(r.count for r in place)
        assert vector.shape in ((out,), (1, out, *(1 for _ in shape[2:])))
        _put(result.magnitudes, weight, shape[0], place, vector.f64().reshape(-1), np.nan)
    if "dora_scale" in slots:
        vector = slots["dora_scale"]
        if vector.shape[0] == 1:
            rows = sorted(i for r in place for i in (r.start, r.start + r.count))
            edges = [i for i in rows if rows.count(i) == 1]  # two halves that touch are one range
            result.magnitudes[f"{weight} [in] {edges}"] = vector.f64().reshape(-1)
        else:
            _put(result.magnitudes, weight, shape[0], place, vector.f64().reshape(-1), np.nan)


# comparison ---------------------------------------------------------------------------------------------------------------


def relative_errors(first: Meaning, second: Meaning) -> dict[str, float]:
    """Weight -> Frobenius error of the looked-at columns, relative to the first's norm."""
    found = {}
    for weight in {**first.deltas, **second.deltas}:
        one, two = first.deltas.get(weight), second.deltas.get(weight)
        if one is None or two is None:
            present = two if one is None else one
            found[weight] = math.inf if present is not None and np.any(present) else 0.0
            continue
        norm = float(np.linalg.norm(one))
        error = float(np.linalg.norm(one - two))
        found[weight] = error / norm if norm else (0.0 if error == 0.0 else math.inf)
    return found


def same_rows(first: Mapping[str, Array], second: Mapping[str, Array], tolerance: float) -> bool:
    """Whether two sets of vectors are the same, missing ones counting as nothing."""
    for name in {**first, **second}:
        one, two = first.get(name), second.get(name)
        if one is None or two is None:
            present = two if one is None else one
            if present is not None and np.any(np.nan_to_num(present)):
                return False
        elif one.shape != two.shape or not np.allclose(one, two, rtol=tolerance, atol=0.0, equal_nan=True):
            return False
    return True


def assert_same(first: Meaning, second: Meaning, tolerance: float = 1e-12) -> None:
    """Every delta, magnitude and bias must be the same."""
    errors = relative_errors(first, second)
    wrong: Iterable[tuple[str, float]] = [(w, e) for w, e in errors.items() if not e <= tolerance]
    assert not wrong, sorted(wrong, key=lambda item: -item[1])[:3]
    assert same_rows(first.magnitudes, second.magnitudes, tolerance)
    assert same_rows(first.biases, second.biases, max(tolerance, 1e-6))
