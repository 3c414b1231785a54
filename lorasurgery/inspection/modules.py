"""One module's row: from a parsed module, or from its bare tensors when no table knows it."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache, lru_cache
from math import isfinite, prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.inspection.description import ModuleInfo
from lorasurgery.io.dtypes import BITS
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.layouts.names import PREFIXES, REMEMBERED
from lorasurgery.layouts.numbered import CLONEOFSIMO
from lorasurgery.layouts.words import ALPHA, BIAS, EXTRA, MAGNITUDE
from lorasurgery.operations.select.blocks import block_and_kind
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture, Spans
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.scales import PeftConfig, ScaleRules
    from lorasurgery.site import Site

_CORES = frozenset({"mid", "t1", "t2"})
_ENCODER = r"(lora_te\d?_|text_encoders?[._]|te\d?[._]|base_model\.model\.text_encoder)"


def module_info(module: Module, own: Group, arch: Architecture, configs: Mapping[str, PeftConfig]) -> ModuleInfo:
    """The row of a parsed module; ``own`` are its tensors."""
    place, delta, magnitude = _place(arch, module.site), module.delta, module.magnitude
    dtype, parameters, size, core = _sizes(own)
    return ModuleInfo(
        name=module.name,
        component=module.site.component,
        weight=place.weight,
        block=place.block,
        kind=place.kind,
        family=module.family,
        rank=None if delta is None else delta.rank,
        alpha=_alpha(own, module.scale.source, configs),
        scale=module.scale.value if delta is not None else None,
        scale_source=module.scale.source if delta is not None else "",
        shape=place.shape if delta is None else delta.shape or place.shape,
        kernel=place.kernel,
        tucker=core,
        dora=None if magnitude is None else magnitude.axis,
        outer=delta.outer if isinstance(delta, Kronecker) else None,
        dtype=dtype,
        parameters=parameters,
        bytes=size,
        fused=place.fused,
    )


class _Place(NamedTuple):
    """What a row says of a module because of where it is."""

    weight: str
    block: str
    kind: str
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    fused: bool | None


@lru_cache(maxsize=REMEMBERED)
def _place(arch: Architecture, site: Site) -> _Place:
    shape = expected_shape(arch, site)
    kernel = shape[2:] if prod(shape[2:]) > 1 else ()
    return _Place(site.spans[0].weight, *block_and_kind(_label(site, arch)), shape, kernel, _fused(site, arch))


def unknown_module(own: Group, delta: Delta | None, rules: ScaleRules, problem: str | None = None) -> ModuleInfo:
    """The row of a module whose base weight is not known."""
    body = next((own.stem[len(p.text) :] for p in PREFIXES if own.stem.startswith(p.text)), own.stem)
    block, kind = block_and_kind(body)
    entry = own.modifier(ALPHA)
    families = own.families()
    family = delta.family if delta is not None else families[0] if families else _alone(own)
    magnitude = own.modifier(MAGNITUDE)
    scale = None
    if delta is not None and (entry is None or entry.tensor.size == 1):
        scale = rules.resolve(own.stem, delta, None if entry is None else entry.tensor)
    shape = () if delta is None else delta.shape
    dtype, parameters, size, core = _sizes(own)
    return ModuleInfo(
        name=own.stem,
        component="text_encoder" if re.match(_ENCODER, own.stem) else "unknown",
        weight=None,
        block=block,
        kind=kind,
        family="dora" if family == "lora" and magnitude is not None else family,
        rank=None if delta is None else delta.rank,
        alpha=_alpha(own, scale.source if scale else "", rules.configs),
        scale=scale.value if scale is not None and isfinite(scale.value) else None,
        scale_source="" if scale is None else scale.source,
        shape=shape,
        kernel=shape[2:] if prod(shape[2:]) > 1 and family != "norm" else (),
        tucker=delta is not None and core,
        dora=None if magnitude is None else _axis(magnitude.tensor.shape, shape),
        outer=delta.outer if isinstance(delta, Kronecker) else None,
        dtype=dtype,
        parameters=parameters,
        bytes=size,
        problem=problem,
    )


def unknown_layout(groups: Iterable[Group]) -> str:
    """The layout by prefix alone, when no table knows the names."""
    votes: Counter[str] = Counter()
    for own in groups:
        dialects = {entry.word.dialect for entry in own.entries.values()}
        layout = next(p.layout for p in PREFIXES if own.stem.startswith(p.text))
        if CLONEOFSIMO in dialects:
            layout = CLONEOFSIMO
        elif own.stem.startswith("lora_te"):
            layout = "sd-scripts"
        elif own.stem.startswith("text_encoders."):
            layout = "comfyui"
        elif own.stem.startswith("text_encoder"):
            layout = "diffusers"
        elif layout == "bare" and dialects & {"xlabs", "bfl"}:
            layout = "xlabs" if "xlabs" in dialects else "bfl"
        elif layout == "diffusers" and "kohya" in dialects:
            layout = "onetrainer"
        votes[layout] += 1
    best = votes.most_common(1)[0][0] if votes else "unknown"
    return "unknown" if best == "bare" else best


def _alone(own: Group) -> str:
    """What a module without a change has instead: ``bias``, or ``magnitude``, ``alpha``, ``extra`` that go with nothing."""
    return next((word for word in (BIAS, MAGNITUDE, ALPHA, EXTRA) if own.modifier(word) is not None), BIAS)


def _alpha(own: Group, source: str, configs: Mapping[str, PeftConfig]) -> float | None:
    """The alpha tensor's value, or what a PEFT configuration says where the scale comes from one (``source``)."""
    entry = own.modifier(ALPHA)
    if entry is not None:
        value = entry.tensor.item() if entry.tensor.size == 1 else float("nan")
        return value if isfinite(value) else None
    for component, config in configs.items():
        if source == config.source and own.stem.startswith(component + "." if component else ""):
            return config.alpha_of(own.stem.removeprefix("base_model.model." if not component else component + "."))
    return None


def _sizes(own: Group) -> tuple[str, int, int, bool]:
    """dtype of the weights (joined with + when mixed), parameters, bytes, and whether there is a Tucker core."""
    dtypes: list[str] = []
    parameters = size = 0
    core = False
    for (family, slot), entry in own.entries.items():
        dtype, count = entry.tensor.dtype, entry.tensor.size
        size += count * BITS[dtype] // 8
        core = core or slot in _CORES
        if family not in (ALPHA, EXTRA):
            parameters += count
            if dtype not in dtypes:
                dtypes.append(dtype)
    return "+".join(sorted(dtypes)), parameters, size, core


def _axis(magnitude: tuple[int, ...], shape: tuple[int, ...]) -> str:
    if len(magnitude) > 1:
        return "in" if magnitude[0] == 1 and magnitude[1:2] != shape[:1] else "out"
    return "out" if not shape or magnitude[:1] == shape[:1] else "in"


@cache
def _parts(arch: Architecture) -> tuple[Mapping[Spans, str], frozenset[str]]:
    """Diffusers' name of every span, and the weights it has as several modules."""
    names = {spans: name for name, spans in arch.namings[DIFFUSERS].items()}
    count = Counter(spans[0].weight for spans in names if len(spans) == 1)
    return names, frozenset(weight for weight, times in count.items() if times > 1)


def _fused(site: Site, arch: Architecture) -> bool | None:
    weight = site.spans[0].weight
    if site.component != DENOISER or weight not in _parts(arch)[1]:
        return None
    return sum(span.stop - span.start for span in site.spans) == arch.shapes[weight][0]


def _label(site: Site, arch: Architecture) -> str:
    """The original weight's name, or Diffusers' when the module is a part of a fused one."""
    weight = site.spans[0].weight
    if _fused(site, arch) is False:
        return _parts(arch)[0].get(site.spans, weight)
    return weight
