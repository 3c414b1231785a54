"""From a file to an Adapter: the only place that reads keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Leftover, Magnitude, Module, Scale
from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.deltas.base import multiplied
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.errors import BrokenModuleError, UnknownArchitectureError
from lorasurgery.layouts.detect import detect, expected_shape, fits, same_results
from lorasurgery.layouts.foreign import named_modules, refuse_other_models
from lorasurgery.layouts.group import Entry, Group, build, group
from lorasurgery.layouts.names import index
from lorasurgery.layouts.scales import ScaleRules, header_configs
from lorasurgery.layouts.words import ALPHA, BIAS, EXTRA, MAGNITUDE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lorasurgery.adapter import Site
    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig

ORIGINAL_FILE = "the file as its trainer wrote it, or without this key"
LARGEST_SCALE = 1e30
"""Nothing that was trained has such a strength, and float32 could not hold alpha = scale * rank."""
FLAGS = ("use_rslora_flag", "use_dora_flag")
"""Top-level booleans of the musubi-tuner fork; they are read, and written only in sd-scripts layout."""


def parse(
    raw: RawFile,
    *,
    among: Iterable[Architecture] | None = None,
    configs: Mapping[str, PeftConfig] | None = None,
) -> Adapter:
    """Understand every key of ``raw``.

    ``among`` restricts the architectures considered (``--arch``, ``--base``); ``configs`` are a PEFT folder's
    configurations by component. Keys that no table explains become leftovers with their reason.
    Raises NotAnAdapterError, UnknownArchitectureError or BrokenModuleError.
    """
    raw = named_modules(raw)
    groups, others = group(raw)
    refuse_other_models(raw, groups)
    deltas = {stem: build(own, raw.path) for stem, own in groups.items()}
    shapes: dict[str, Shape | None] = {stem: None if d is None else d.shape for stem, d in deltas.items()}
    best, ties = detect(shapes, raw.metadata, among=among, path=raw.path)
    arch = best.architecture
    names = index(arch)
    found = {stem: names.find(stem) for stem in groups}
    rules = _scale_rules(raw, configs)
    modules: dict[Site, Module] = {}
    for stem, place in found.items():
        if place is None:
            continue
        module = _module(groups[stem], deltas[stem], place.site, rules, raw.path)
        _check_shape(module, arch, groups[stem], raw.path)
        if place.site in modules:
            _merge_or_refuse(modules, module, raw.path)
        else:
            modules[place.site] = module
    leftovers = [Leftover(key, tensor, "not part of any module") for key, tensor in others.items()]
    for stem in (s for s, place in found.items() if place is None):
        reason = _unexplained(stem, arch)
        leftovers += [Leftover(e.key, e.tensor, reason) for e in groups[stem].entries.values()]
    return Adapter(
        architecture=arch,
        modules=modules,
        metadata=dict(raw.metadata),
        layout=_layout(groups, found, arch),
        leftovers=tuple(leftovers),
        candidates=tuple((m.architecture.key, m.share) for m in (best, *ties)),
        ambiguous=_ambiguous(arch, [m.architecture for m in ties], groups),
        warnings=tuple(_warnings(raw, rules, modules)),
        path=raw.path,
    )


def _ambiguous(arch: Architecture, others: Sequence[Architecture], stems: Iterable[str]) -> tuple[str, ...]:
    """The architectures among ``others`` for which a conversion would come out differently."""
    stems = list(stems)
    kin = {other.id: other for other in others if other.id != arch.id}
    return tuple(other.key for other in kin.values() if not same_results(arch, other, stems))


def _scale_rules(raw: RawFile, configs: Mapping[str, PeftConfig] | None) -> ScaleRules:
    rslora = raw.tensors.get("use_rslora_flag")
    return ScaleRules(
        configs=header_configs(raw.metadata) if configs is None else configs,
        rslora_flag=rslora is not None and bool(rslora.item()),
        whole_lokr_by_shape="lokr_factor" in raw.tensors,
    )


def _module(own: Group, delta: Delta | None, site: Site, rules: ScaleRules, path: Path) -> Module:
    alpha = own.modifier(ALPHA)
    if alpha is not None and alpha.tensor.size != 1:
        raise BrokenModuleError(
            f"{alpha.key} has shape {list(alpha.tensor.shape)}, an alpha is one number",
            key=alpha.key,
            path=path,
            hint=ORIGINAL_FILE,
        )
    scale = Scale(1.0, "none (1.0)")
    if delta is not None:
        scale = rules.resolve(own.stem, delta, None if alpha is None else alpha.tensor)
    ignored = isinstance(delta, Kronecker) and delta.rank is None  # ai-toolkit's 1e10, inf in half precision
    if not abs(scale.value) < LARGEST_SCALE or (alpha is not None and not ignored and not isfinite(alpha.tensor.item())):
        key = own.key() if alpha is None else alpha.key
        strength = f"a scale of {scale.value}" if alpha is None else f"an alpha of {alpha.tensor.item()}"
        raise BrokenModuleError(
            f"{key} gives {strength}, which is no number to multiply by",
            key=key,
            path=path,
            hint="the original file; the strength cannot be recovered from this one",
        )
    bias, extra = own.modifier(BIAS), own.modifier(EXTRA)
    return Module(
        site,
        own.stem,
        delta,
        scale,
        _magnitude(own, delta, site, path),
        None if bias is None else _bias(bias, scale),
        {} if extra is None else {extra.key[len(own.stem) :]: extra.tensor},
    )


def _bias(entry: Entry, scale: Scale) -> Tensor:
    """What is added to the base bias. ``lora_B`` and ``lora_up`` are layers: theirs is scaled like their weight."""
    return multiplied(entry.tensor, scale.value) if entry.key.endswith(".bias") else entry.tensor


def _magnitude(own: Group, delta: Delta | None, site: Site, path: Path) -> Magnitude | None:
    """The DoRA magnitude with its axis, from its shape; PEFT's and ai-toolkit's are always per output row."""
    entry = own.modifier(MAGNITUDE)
    if entry is None:
        return None
    tensor = entry.tensor
    out = sum(span.stop - span.start for span in site.spans)
    if entry.word.dialect in ("peft", "ai-toolkit") or entry.key.endswith(".dora_layer.weight"):
        axis = "out" if tensor.size == out else ""
    elif len(tensor.shape) > 1 and tensor.shape[0] == tensor.size == out:
        axis = "out"
    elif len(tensor.shape) > 1 and tensor.shape[0] == 1:
        axis = "in"
    else:
        axis = "out" if tensor.size == out else "in"
    columns = delta.shape[1] if delta is not None and len(delta.shape) > 1 else tensor.size
    if not axis or not tensor.size or (axis == "in" and columns % tensor.size):
        raise BrokenModuleError(
            f"{entry.key} has shape {list(tensor.shape)}, which fits neither {out} rows nor {columns} columns",
            key=entry.key,
            path=path,
            hint=ORIGINAL_FILE,
        )
    return Magnitude(tensor, axis)


def _check_shape(module: Module, arch: Architecture, own: Group, path: Path) -> None:
    expected = expected_shape(arch, module.site)
    key = own.key()
    if module.delta is not None and not fits(module.delta.shape, expected):
        raise BrokenModuleError(
            f"{module.name} is {list(module.delta.shape)}, {arch.name} expects {list(expected)}",
            key=key,
            path=path,
            hint="--base MODEL if the base was changed, or --arch NAME",
        )
    if module.bias is not None and module.bias.size != expected[0]:
        raise BrokenModuleError(
            f"the bias of {module.name} has {module.bias.size} elements, {arch.name} expects {expected[0]}",
            key=key,
            path=path,
            hint="--base MODEL if the base was changed, or --arch NAME",
        )


def _merge_or_refuse(modules: dict[Site, Module], module: Module, path: Path) -> None:
    """Two spellings of one weight: a bias apart from its factors is joined, anything else is two answers to one question."""
    first = modules[module.site]
    if module.delta is None and first.bias is None:
        modules[module.site] = replace(first, bias=module.bias)
    elif first.delta is None and module.bias is None:
        modules[module.site] = replace(module, bias=first.bias)
    else:
        raise BrokenModuleError(
            f"{first.name} and {module.name} are the same weight; programs disagree on which one counts",
            key=module.name,
            path=path,
            hint="remove one of the two",
        )


def _unexplained(stem: str, arch: Architecture) -> str:
    near = get_close_matches(stem, list(index(arch).spellings()), n=1, cutoff=0.6) if len(stem) < 200 else []
    return f"{arch.name} has no such module" + (f" (nearest: {near[0]})" if near else "")


def _layout(groups: Mapping[str, Group], found: Mapping[str, Found | None], arch: Architecture) -> str:
    """The layout most denoiser modules are spelled in (text encoders only when there is nothing else)."""
    votes: Counter[str] = Counter()
    for stem, place in found.items():
        if place is None:
            continue
        layout = place.layout
        dialects = {entry.word.dialect for entry in groups[stem].entries.values()}
        if (layout == "sd-scripts" and place.naming == DIFFUSERS and arch.sd_scripts != DIFFUSERS) or (
            layout == "diffusers" and "kohya" in dialects
        ):
            layout = "onetrainer"
        elif layout == "bare" and "bfl" in dialects:
            layout = "bfl"
        elif layout == "bare" and "xlabs" in dialects:
            layout = "xlabs"
        elif layout == "bare" and "processor" in dialects:
            layout = "diffusers"
        votes[layout] += 1
    if votes["bfl"]:
        return "bfl"
    return votes.most_common(1)[0][0] if votes else "unknown"


def _warnings(raw: RawFile, rules: ScaleRules, modules: Mapping[Site, Module]) -> list[str]:
    found = []
    buffer, text = raw.tensors.get("lokr_factor"), raw.metadata.get("ss_lokr_factor")
    if buffer is not None and text is not None and str(round(buffer.item())) != text:
        found.append(f"lokr_factor is {round(buffer.item())} but ss_lokr_factor says {text}; the buffer counts")
    if rules.whole_lokr_by_shape:
        odd = [m.name for m in modules.values() if "max(w2.shape)" in m.scale.source and m.scale.value != 1.0]
        if odd:
            found.append(
                f"{len(odd)} whole LoKr modules have alpha / max(w2.shape) != 1; it is baked in so that every loader agrees"
            )
    return found


__all__ = ["FLAGS", "UnknownArchitectureError", "parse"]
