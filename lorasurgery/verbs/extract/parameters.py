"""What the tables have no module for: learned tokens, modulation vectors, buffers, and parts such as a VAE.

They are compared where both files call them the same. ComfyUI adds a ``.diff`` to any parameter of its model, so its layout
takes along those that have their original names.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.adapter import Module, Scale
from lorasurgery.architectures.table import Span, row
from lorasurgery.io.dtypes import FLOATS
from lorasurgery.models.reading import Part, Reader
from lorasurgery.models.scales import MARKER
from lorasurgery.operations.cut.pick import named
from lorasurgery.site import DENOISER, Site

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.models import Model, Weight
    from lorasurgery.verbs.extract.options import ExtractOptions
    from lorasurgery.verbs.extract.pair import Pair

OTHER = "other"
COMFYUI = "diffusion_model."
PREFIXES = ("model.diffusion_model.", COMFYUI)
ORIGINAL = frozenset({"original", "unknown"})
"""Layouts whose keys without a prefix are the denoiser's own."""


class Shared(NamedTuple):
    """A parameter of both models."""

    site: Site
    name: str
    base: Reader
    tuned: Reader
    reason: str
    """Why it is left out; empty for what is extracted."""


@dataclass(slots=True)
class Parameters:
    """All of them, and the keys that only one model has."""

    shared: list[Shared] = field(default_factory=list)
    only_base: list[str] = field(default_factory=list)
    only_tuned: list[str] = field(default_factory=list)


def parameters(base: Model, tuned: Model, options: ExtractOptions) -> Parameters:
    """The parameters without a place in the tables."""
    found = Parameters()
    one, two = (_placeless(model) for model in (base, tuned))
    for key, weight in one.items():
        twin = two.pop(key, None)
        if twin is not None and twin.shape == weight.shape:
            name = _comfyui_name(key, base)
            component, own = (DENOISER, name.removeprefix(COMFYUI)) if name else (OTHER, key)
            site = Site(component, (Span(own, 0, weight.shape[0]),))
            found.shared.append(Shared(site, name or key, _whole(weight), _whole(twin), _left_out(site, name, options)))
        elif twin is None:
            found.only_base.append(key)
    found.only_tuned += list(two)
    return found


def with_parameters(arch: Architecture, pairs: Iterable[Pair]) -> Architecture:
    """The architecture with these parameters as weights of their own."""
    own = tuple(row(pair.site.spans[0].weight, pair.shape) for pair in pairs)
    return replace(arch, rows=(*arch.rows, *own)) if own else arch


def bare_module(site: Site, name: str) -> Module:
    """A module without a change, for what looks at names."""
    return Module(site, name, None, Scale(1.0, "none (1.0)"))


def excluded(site: Site, name: str, options: ExtractOptions) -> bool:
    """By a block, a component, or a pattern that is found in the name, as the target spells it or as the model does."""
    module, cut = bare_module(site, name), options.cut
    return (bool(cut.include) and not any(named(module, p) for p in cut.include)) or any(named(module, p) for p in cut.exclude)


def _placeless(model: Model) -> dict[str, Weight]:
    return {
        key: w for key, w in model.weights.items()
        if (w.place is None or not w.listed) and w.shape and w.tensor.dtype in FLOATS and key.rpartition(".")[2] != MARKER
    }  # fmt: skip


def _whole(weight: Weight) -> Reader:
    return Reader((Part(weight, 0, weight.shape[0]),), weight.shape, weight.tensor.dtype)


def _comfyui_name(key: str, model: Model) -> str:
    """What ComfyUI calls it; empty for what is not the denoiser's, or has no original name.

    A weight without ``.weight``, all else as it is. Source: ComfyUI ``comfy/lora.py`` ``model_lora_keys_unet`` (2026-05).
    """
    inner = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), None)
    if inner is None and model.layout in ORIGINAL and model.component == DENOISER:
        inner = key
    return COMFYUI + inner.removesuffix(".weight") if inner else ""


def _left_out(site: Site, name: str, options: ExtractOptions) -> str:
    if not name or options.layout.id != "comfyui":
        return "no table has a place for it"
    return "excluded" if excluded(site, name, options) else "a parameter" if options.small == "none" else ""
