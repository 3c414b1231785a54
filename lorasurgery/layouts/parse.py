"""From a file to an Adapter: the only place that reads keys."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Leftover
from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.errors import BrokenModuleError, UnknownArchitectureError
from lorasurgery.layouts.detect import detect, same_results
from lorasurgery.layouts.foreign import named_modules, refuse_other_models
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.module import FACTOR, FLAGS, module_of, scale_rules
from lorasurgery.layouts.names import index
from lorasurgery.layouts.peft_keys import reason_of
from lorasurgery.layouts.scales import header_configs, unknown_scales

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lorasurgery.adapter import Module, Site
    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig, ScaleRules


def parse(
    raw: RawFile,
    *,
    among: Iterable[Architecture] | None = None,
    configs: Mapping[str, PeftConfig] | None = None,
    alpha: float | None = None,
) -> Adapter:
    """Understand every key of ``raw``.

    ``among`` restricts the architectures considered (``--arch``, ``--base``); ``configs`` are a PEFT folder's
    configurations by component, ``alpha`` is what a file that does not say it was trained at. Keys that no table explains
    become leftovers with their reason.
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
    rules = scale_rules(raw, header_configs(raw.metadata) if configs is None else configs, alpha)
    modules: dict[Site, Module] = {}
    for stem, place in found.items():
        if place is None:
            continue
        module = module_of(groups[stem], deltas[stem], place, arch, rules, raw.path)
        if place.site in modules:
            _merge_or_refuse(modules, module, raw.path)
        else:
            modules[place.site] = module
    leftovers = [Leftover(key, tensor, reason_of(key)) for key, tensor in others.items()]
    for stem in (s for s, place in found.items() if place is None):
        reason = _unexplained(stem, arch)
        leftovers += [Leftover(e.key, e.tensor, reason) for e in groups[stem].entries.values()]
    return Adapter(
        architecture=arch,
        modules=modules,
        metadata=dict(raw.metadata),
        layout=layout_of(groups, found, arch),
        leftovers=tuple(leftovers),
        candidates=tuple((m.architecture.key, m.share) for m in (best, *ties)),
        ambiguous=_ambiguous(arch, [m.architecture for m in ties], groups),
        warnings=tuple(warnings_of(raw, rules, modules.values())),
        path=raw.path,
        configs={component: config.fields for component, config in rules.configs.items()},
    )


def _ambiguous(arch: Architecture, others: Sequence[Architecture], stems: Iterable[str]) -> tuple[str, ...]:
    """The architectures among ``others`` for which a conversion would come out differently."""
    stems = list(stems)
    kin = {other.id: other for other in others if other.id != arch.id}
    return tuple(other.key for other in kin.values() if not same_results(arch, other, stems))


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


def layout_of(groups: Mapping[str, Group], found: Mapping[str, Found | None], arch: Architecture) -> str:
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


def warnings_of(raw: RawFile, rules: ScaleRules, modules: Iterable[Module]) -> list[str]:
    """What is odd about a file although it can be read: its LoKr factor and the scales that hang on it."""
    modules = list(modules)
    found = unknown_scales(modules)
    buffer, text = raw.tensors.get(FACTOR), raw.metadata.get("ss_lokr_factor")
    if buffer is not None and text is not None and str(round(buffer.item())) != text:
        found.append(f"lokr_factor is {round(buffer.item())} but ss_lokr_factor says {text}; the buffer counts")
    if rules.whole_lokr_by_shape:
        odd = [m.name for m in modules if "max(w2.shape)" in m.scale.source and m.scale.value != 1.0]
        if odd:
            found.append(
                f"{len(odd)} whole LoKr modules have alpha / max(w2.shape) != 1; it is baked in so that every loader agrees"
            )
    return found


__all__ = ["FLAGS", "UnknownArchitectureError", "layout_of", "parse", "warnings_of"]
