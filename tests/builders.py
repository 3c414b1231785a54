"""Random adapter files of every family in every layout, built from the reference's names only."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

import lorasurgery
from tests.oracle import (
    LAYOUTS,
    Meaning,
    Model,
    Place,
    Raw,
    Reader,
    Tensors,
    dense_deltas,
    encoder_stem,
    fixture,
    header_configs,
    raw,
    read,
    rule,
    stem_of,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lorasurgery.report import Report

DTYPES = ("BF16", "F16", "F32")
PEFT_SUFFIXES = {"up": ".lora_B.weight", "down": ".lora_A.weight"}
KOHYA_SUFFIXES = {"up": ".lora_up.weight", "down": ".lora_down.weight", "mid": ".lora_mid.weight"}


def divisor(number: int, near: int) -> int:
    """The largest divisor of ``number`` that is at most ``near``."""
    return next(d for d in range(min(near, number), 0, -1) if number % d == 0)


@dataclass
class Made:
    """An adapter as a trainer would leave it."""

    of: Model
    layout: str
    tensors: Tensors = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write it; the file, or PEFT's folder."""
        if self.layout == "peft":
            path = folder / "source"
            path.mkdir()
            (path / "adapter_config.json").write_text(json.dumps(self.configs[""]))
            write(path / "adapter_model.safetensors", self.tensors, {"format": "pt"})
            return path
        write(folder / "source.safetensors", self.tensors, self.metadata)
        return folder / "source.safetensors"

    def meaning(self) -> Meaning:
        """What it says."""
        return meaning(self.tensors, self.metadata, self.of, self.layout, self.configs)


def meaning(
    tensors: Tensors, metadata: Mapping[str, str], of: Model, layout: str, configs: dict[str, dict[str, Any]]
) -> Meaning:
    """What a file of a layout means to the program that reads the layout."""
    if layout == "diffusers":
        configs = header_configs(metadata)
    reader = Reader(
        layout,
        configs,
        whole_lokr_by_shape="lokr_factor" in tensors,
        rslora="use_rslora_flag" in tensors and bool(tensors["use_rslora_flag"].item()),
    )
    return dense_deltas(tensors, of, reader)


@dataclass
class Builder:
    """Adds modules to a file, random but for what it is told."""

    made: Made
    dtype: str
    rng: np.random.Generator
    explicit_alpha: bool = True
    """Whether alpha tensors are written; the layouts of Diffusers and PEFT have none."""

    @classmethod
    def start(cls, of: Model, layout: str, dtype: str = "BF16", seed: int = 0) -> Builder:
        """An empty file."""
        own = cls(Made(of, layout), dtype, np.random.default_rng(seed))
        own.explicit_alpha = layout not in ("diffusers", "peft")
        return own

    def random(self, *shape: int) -> Raw:
        """Normal values of about the size of trained ones."""
        return raw(self.rng.standard_normal(shape) * 0.1, self.dtype)

    def stem(self, name: str) -> str:
        """The key of a denoiser module without its suffix."""
        return stem_of(self.made.of, self.made.layout, name)

    def add(self, name: str, family: str, *, rank: int = 4, alpha: float | None = None, **how: Any) -> str:
        """A denoiser module by its name in the layout's naming; returns its stem."""
        place = self.made.of.names(rule(self.made.layout, self.made.of).naming)[name]
        stem = self.stem(name)
        self.put(stem, self.made.of.shape(place), family, rank=rank, alpha=alpha, **how)
        return stem

    def add_encoder(self, table: str, name: str, family: str, *, rank: int = 4, alpha: float | None = None) -> str:
        """A text encoder's module."""
        stem = encoder_stem(self.made.of, self.made.layout, table, name)
        self.put(stem, tuple(fixture("text_encoders")[table][name]), family, rank=rank, alpha=alpha)
        return stem

    def put(
        self,
        stem: str,
        shape: tuple[int, ...],
        family: str,
        *,
        rank: int,
        alpha: float | None,
        **how: Any,
    ) -> None:
        """The tensors of one module."""
        words = PEFT_SUFFIXES if rule(self.made.layout, self.made.of).dialect == "peft" else KOHYA_SUFFIXES
        tensors = self.made.tensors
        if family in ("lora", "dora", "dora in"):
            for slot, tensor in self.low_rank(shape, rank, tucker=how.get("tucker", False)).items():
                tensors[stem + words[slot]] = tensor
            if family != "lora":
                self.magnitude(stem, shape, per_row=family == "dora")
        elif family == "loha":
            for slot, tensor in self.hadamard(shape, rank, tucker=how.get("tucker", False)).items():
                tensors[f"{stem}.hada_{slot}"] = tensor
        elif family == "lokr":
            for slot, tensor in self.kronecker(shape, rank, **how).items():
                tensors[f"{stem}.lokr_{slot}"] = tensor
        elif family == "full":
            tensors[f"{stem}.diff"] = self.random(*shape)
        if alpha is not None and family != "full":
            self.strength(stem, rank, alpha)

    def strength(self, stem: str, rank: int, alpha: float) -> None:
        """An alpha tensor, or an entry of PEFT's configuration."""
        if self.explicit_alpha:
            self.made.tensors[f"{stem}.alpha"] = raw(alpha, "F32" if self.dtype == "F32" else self.dtype)
        elif self.made.layout == "peft":
            config = self.made.configs.setdefault(
                "", {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}
            )
            name = stem.removeprefix("base_model.model.")
            config["rank_pattern"]["^" + re.escape(name)] = rank
            config["alpha_pattern"]["^" + re.escape(name)] = alpha

    def low_rank(self, shape: tuple[int, ...], rank: int, *, tucker: bool = False) -> Tensors:
        """up and down, with a core where asked."""
        out, inside, *kernel = shape
        ones = [1] * len(kernel)
        up = self.random(out, rank, *ones)
        if tucker:
            return {"up": up, "down": self.random(rank, inside, *ones), "mid": self.random(rank, rank, *kernel)}
        return {"up": up, "down": self.random(rank, inside, *kernel)}

    def magnitude(self, stem: str, shape: tuple[int, ...], *, per_row: bool) -> None:
        """A DoRA magnitude as the layout spells it."""
        out, inside, *kernel = shape
        ones = [1] * len(kernel)
        if self.made.layout in ("diffusers", "peft"):
            assert per_row
            size = (1, out, *ones) if kernel else (out,)
            self.made.tensors[f"{stem}.lora_magnitude_vector"] = self.random(*size)
            return
        self.made.tensors[f"{stem}.dora_scale"] = self.random(*((out, 1, *ones) if per_row else (1, inside, *ones)))

    def hadamard(self, shape: tuple[int, ...], rank: int, *, tucker: bool = False) -> Tensors:
        """LyCORIS' four factors, flat or Tucker."""
        out, inside, *kernel = shape
        if tucker:
            a, b = (rank, out), (rank, inside)
            cores = {f"t{n}": self.random(rank, rank, *kernel) for n in (1, 2)}
        else:
            a, b, cores = (out, rank), (rank, inside * math.prod(kernel)), {}
        arms = {f"w{n}_{side}": self.random(*size) for n in (1, 2) for side, size in (("a", a), ("b", b))}
        return arms | cores

    def kronecker(
        self, shape: tuple[int, ...], rank: int, *, blocks: int | None = None, whole1: bool = True,
        whole2: bool = False, tucker: bool = False,
    ) -> Tensors:  # fmt: skip
        """LoKr's factors; ``blocks`` is the number of rows of w1."""
        out, inside, *kernel = shape
        blocks = divisor(out, 8) if blocks is None else blocks
        across = divisor(inside, 8) if not whole2 else divisor(inside, 64)
        assert out % blocks == 0
        one = {"w1": (blocks, across)} if whole1 else {"w1_a": (blocks, rank), "w1_b": (rank, across)}
        ok, n = out // blocks, inside // across
        two: dict[str, tuple[int, ...]]
        if whole2:
            two = {"w2": (ok, n, *kernel)}
        elif tucker:
            two = {"w2_a": (rank, ok), "w2_b": (rank, n), "t2": (rank, rank, *kernel)}
        else:
            two = {"w2_a": (ok, rank), "w2_b": (rank, n * math.prod(kernel))}
        return {slot: self.random(*size) for slot, size in {**one, **two}.items()}


# what a model's modules are like -----------------------------------------------------------------------------------------


def granularity(of: Model, naming: str) -> dict[str, list[str]]:
    """Original weight -> the names of a naming that hold rows of it, in row order."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name, place in of.names(naming).items():
        found.setdefault(place[0].weight, []).append((place[0].start, name))
    return {weight: [n for _, n in sorted(own)] for weight, own in found.items()}


def fused_weights(of: Model) -> list[str]:
    """Weights that Diffusers has as several modules."""
    return [weight for weight, own in granularity(of, "diffusers").items() if len(own) > 1]


def swapped_weights(of: Model) -> list[str]:
    """Weights whose halves Diffusers holds the other way round."""
    return [place[0].weight for place in of.diffusers.values() if len(place) > 1]


def convolutions(of: Model) -> list[str]:
    """Weights with a kernel."""
    return [weight for weight, shape in of.shapes.items() if len(shape) > 2]


def plain_weights(of: Model) -> list[str]:
    """Matrices that are one module in every naming the model has, the narrowest first."""
    odd = {*fused_weights(of), *swapped_weights(of)}
    known = granularity(of, "diffusers") or of.shapes
    found = [w for w, shape in of.shapes.items() if len(shape) == 2 and w not in odd and w in known]
    return sorted(found, key=lambda w: math.prod(of.shapes[w]))


def modules_of(of: Model, layout: str, weight: str) -> list[str]:
    """The layout's names for a weight, in row order."""
    return granularity(of, rule(layout, of).naming)[weight]


def can(of: Model, layout: str) -> bool:
    """Whether a layout exists for a model."""
    naming = rule(layout, of).naming
    return bool(of.names(naming)) and (layout != "comfyui" or of.comfyui)


def layouts_of(of: Model) -> list[str]:
    """The layouts a model has."""
    return [layout for layout in LAYOUTS if can(of, layout)]


def place_of(of: Model, layout: str, name: str) -> Place:
    """Where a name of the layout's naming stands."""
    return of.names(rule(layout, of).naming)[name]


# converting ---------------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    """What a conversion wrote."""

    path: Path
    of: Model
    layout: str
    tensors: Tensors
    metadata: dict[str, str]
    configs: dict[str, dict[str, Any]]
    report: Report

    def meaning(self) -> Meaning:
        """What it says."""
        return meaning(self.tensors, self.metadata, self.of, self.layout, self.configs)

    def as_made(self) -> Made:
        """The output as an input."""
        return Made(self.of, self.layout, dict(self.tensors), dict(self.metadata), dict(self.configs))


def read_output(path: Path) -> tuple[Tensors, dict[str, str], dict[str, dict[str, Any]]]:
    """Tensors, metadata and PEFT configurations of a file or folder."""
    if path.is_file():
        return (*read(path), {})
    if (path / "adapter_config.json").is_file():
        tensors, metadata = read(path / "adapter_model.safetensors")
        return tensors, metadata, {"": json.loads((path / "adapter_config.json").read_text())}
    tensors, configs = {}, {}
    for child in sorted(path.iterdir()):
        own, _ = read(child / "adapter_model.safetensors")
        configs[child.name] = json.loads((child / "adapter_config.json").read_text())
        tensors |= {k.replace("base_model.model.", f"{child.name}.", 1): t for k, t in own.items()}
    return tensors, {}, configs


SAVING = ("alpha", "lokr_factor", "strict")


def convert_path(source: Path, of: Model, target: str, out: Path, **how: Any) -> Output:
    """Convert a file; ``how`` are options of convert and save."""
    saving = lorasurgery.SaveOptions(**{k: v for k, v in how.items() if k in SAVING})
    options = lorasurgery.Options(**{k: v for k, v in how.items() if k not in SAVING})
    adapter = lorasurgery.load(source, arch=of.key)
    result, report = lorasurgery.convert(adapter, target, options)
    lorasurgery.save(result, out, options=saving, report=report)
    return Output(out, of, target, *read_output(out), report)


def convert(made: Made, target: str, folder: Path, **how: Any) -> Output:
    """Write a made file and convert it."""
    home = folder / f"{len(list(folder.iterdir()))}"
    home.mkdir()
    return convert_path(made.save(home), made.of, target, home / ("out" if target == "peft" else "out.safetensors"), **how)


def factors(tensors: Mapping[str, Raw]) -> dict[str, Raw]:
    """Without alphas and top-level tensors."""
    return {k: t for k, t in tensors.items() if "." in k and not k.endswith(".alpha")}


def subset(names: Iterable[str], rng: np.random.Generator) -> list[str]:
    """At least one of the names, in order."""
    names = list(names)
    kept = [n for n in names if rng.random() < 0.75]
    return kept or names[:1]
