"""Diffusers' own loaders and PEFT's own layers, run on a model that has the names and rows of one of ours and one column.

What a file really does is read from the layers afterwards: which rows of which weight change, and by how much. Whatever is
left without numbers (on the meta device, as Diffusers loads) makes every forward pass fail, so such a file loads nothing.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import diffusers.loaders.lora_pipeline as pipelines
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer

from lorasurgery.architectures.table import DIFFUSERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.architectures.table import Architecture, Spans

diffusers_logging.set_verbosity(logging.CRITICAL)

FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}  # fmt: skip
"""What FLUX.2 fuses for a LoKr."""
FAILURES = (
    ValueError, KeyError, AssertionError, RuntimeError, NotImplementedError, IndexError, TypeError, AttributeError,
    UnboundLocalError,
)  # fmt: skip
SD_GRID = ("down_blocks.1.", "mid_block.", "add_embedding", "time_embedding", "class_embedding")


class Effect(NamedTuple):
    """What arrives at the rows of a weight: the delta's one column, and the bias's change; nan where nothing does."""

    delta: torch.Tensor
    bias: torch.Tensor
    magnitude: bool
    """Whether a DoRA magnitude came with it."""


class Loaded(NamedTuple):
    """What a pipeline did with a file."""

    error: str
    """Empty: it loaded."""
    effects: Mapping[str, Effect]
    """By original weight."""


def rows_of(spans: Spans) -> torch.Tensor:
    """A number for each row of the original weight a module's rows stand for."""
    return torch.cat([torch.arange(s.start, s.stop, dtype=torch.float32) for s in spans]) + 1


class Component(torch.nn.Module, PeftAdapterMixin):  # type: ignore[misc]
    """A model that knows how to load an adapter, and nothing else."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_dim=None, layers_per_block=2, in_channels=64)
        self.spans: dict[str, tuple[Spans, ...]] = {}
        self.unused: set[str] = set()

    def add(self, name: str, parts: tuple[Spans, ...], *, norm: bool = False) -> None:
        """A module of the given name, with the rows that ``parts`` stand for."""
        out, path = sum(len(rows_of(spans)) for spans in parts), name.split(".")
        inner: torch.nn.Module = self
        for part in path[:-1]:
            if part not in dict(inner.named_children()):
                inner.add_module(part, torch.nn.Module())
            inner = inner.get_submodule(part)
        made = torch.nn.LayerNorm(out) if norm else torch.nn.Linear(1, out, bias=True)
        with torch.no_grad():
            made.weight.fill_(1.0)
        inner.add_module(path[-1], made)
        self.spans[name] = parts

    def fuse_qkv_projections(self) -> None:
        """FLUX.2's, for a LoKr of fused names."""
        for name in list(self.spans):
            block, _, leaf = name.rpartition(".")
            for fused, parts in FUSED.items():
                if leaf == parts[0] and all(f"{block}.{p}" in self.spans for p in parts):
                    self.unused.update(f"{block}.{p}" for p in parts)
                    self.add(f"{block}.{fused}", tuple(self.spans[f"{block}.{p}"][0] for p in parts))


def first_blocks(arch: Architecture, naming: str, blocks: int = 1) -> dict[str, Spans]:
    """The modules of the first blocks of each stack and of what is around them."""
    found = {}
    for name, spans in arch.namings[naming].items():
        numbers = [int(p) for p in spans[0].weight.split(".") if p.isdigit()]
        stacked = any(w in spans[0].weight.split(".")[0] for w in ("block", "layers", "refiner", "stream"))
        if arch.denoiser == "unet":
            parts = spans[0].weight.split(".")
            deeper = "transformer_blocks" in parts and parts[parts.index("transformer_blocks") + 1] != "0"
            if spans[0].weight.startswith(("input_blocks.4.", "middle_block.1.", "time_embed", "label_emb")) and not deeper:
                found[name] = spans
        elif not stacked or not numbers or numbers[0] < blocks:
            found[name] = spans
    return found


def components(arch: Architecture, blocks: int) -> dict[str, Component]:
    """The pipeline's models, cut to their first blocks."""
    made: dict[str, Component] = {arch.denoiser: Component(), **{c: Component() for _, c in arch.diffusers_roots}}
    for name, spans in first_blocks(arch, DIFFUSERS, blocks).items():
        shape = arch.shapes[spans[0].weight]
        root, component = next(((r, c) for r, c in arch.diffusers_roots if name.startswith(r)), ("", arch.denoiser))
        if len(shape) <= 2 and not any(s.weight.startswith("pos_embed") for s in spans):
            made[component].add(name[len(root) :], (spans,), norm=len(shape) == 1)
    return made


def load(arch: Architecture, mixin: str, tensors: Mapping[str, torch.Tensor], blocks: int = 1) -> Loaded:
    """What the pipeline makes of a file's tensors."""
    parts = components(arch, blocks)

    class Pipeline(getattr(pipelines, mixin)):  # type: ignore[misc]
        transformer_name, text_conditioner_name, connectors_name = "transformer", "text_conditioner", "connectors"
        text_encoder = text_encoder_2 = text_encoder_3 = None
        hf_device_map, lora_scale = None, 1.0
        components: ClassVar[dict[str, Any]] = {}
        load_lora_into_text_encoder = staticmethod(lambda *_, **__: None)
        _maybe_expand_transformer_param_shape_or_error_ = staticmethod(lambda *_: False)
        _maybe_expand_lora_state_dict = staticmethod(lambda transformer, lora_state_dict: lora_state_dict)

    for name in ("transformer", "unet", "text_conditioner", "connectors"):
        setattr(Pipeline, name, parts.get(name, Component()))
    try:
        Pipeline().load_lora_weights(dict(tensors))
    except FAILURES as error:
        return Loaded(f"{type(error).__name__}: {error}"[:200], {})
    return read(parts)


def read(parts: Mapping[str, Component]) -> Loaded:
    """The effects in the models after loading."""
    effects: dict[str, Effect] = {}
    for part in parts.values():
        for name, module in part.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            hollow = [n for n, p in module.named_parameters() if p.is_meta]
            if hollow:
                return Loaded(f"forward: {name}.{hollow[0]} has no numbers", {})
            if name not in part.unused:
                put(effects, part.spans[name], *changes(module))
    return Loaded("", effects)


def changes(module: Any) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """(delta's column, bias or None, whether there is a magnitude) of a PEFT layer."""
    adapter = next(iter(module.active_adapters))
    if adapter not in module.scaling:
        return torch.full((module.base_layer.weight.shape[0],), torch.nan), None, False
    if hasattr(module, "lokr_w1"):
        return module.get_delta_weight(adapter)[:, 0].detach(), None, False
    up = module.lora_B[adapter]
    delta = (up.weight @ module.lora_A[adapter].weight)[:, 0].detach() * module.scaling[adapter]
    bias = None if up.bias is None else up.bias.detach() * module.scaling[adapter]
    return delta, bias, adapter in module.lora_magnitude_vector


def put(
    effects: dict[str, Effect], spans: tuple[Spans, ...], delta: torch.Tensor, bias: torch.Tensor | None, magnitude: bool
) -> None:  # fmt: skip
    at = torch.cat([rows_of(s) for s in spans]).long() - 1
    weight = spans[0][0].weight
    old = effects.get(weight)
    size = max(int(at.max()) + 1, 0 if old is None else len(old.delta))
    new = [torch.full((size,), torch.nan) for _ in range(2)]
    if old is not None:
        new[0][: len(old.delta)], new[1][: len(old.bias)] = old.delta, old.bias
    new[0][at] = delta
    if bias is not None:
        new[1][at] = bias
    effects[weight] = Effect(new[0], new[1], magnitude)
