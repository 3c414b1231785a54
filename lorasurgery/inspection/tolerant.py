"""The steps of reading an adapter, each going on where the file is damaged."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.errors import BrokenModuleError, SurgeryError
from lorasurgery.inspection.description import Finding
from lorasurgery.inspection.lokr import FACTOR
from lorasurgery.io.header import RawFile
from lorasurgery.layouts.detect import expected_shape, fits
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.names import index
from lorasurgery.layouts.parse import FLAGS, parse
from lorasurgery.layouts.scales import ScaleRules, header_configs
from lorasurgery.layouts.words import split_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.scales import PeftConfig

TOP_LEVEL = (FACTOR, *FLAGS)
"""Tensors that belong to no module and are understood."""


def grouped(raw: RawFile, findings: list[Finding]) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """Modules and the rest; of two keys for one place the first counts."""
    try:
        return group(raw)
    except BrokenModuleError as error:
        findings.append(Finding("duplicate", error.message))
    seen: set[tuple[str, str, str]] = set()
    kept = {}
    for key, tensor in raw.tensors.items():
        split = split_key(key)
        place = (key, "", "") if split is None else (split.stem, split.word.family, split.word.slot)
        if place not in seen:
            kept[key] = tensor
        seen.add(place)
    return group(replace(raw, tensors=kept))


def header_rules(raw: RawFile, findings: list[Finding]) -> Mapping[str, PeftConfig]:
    """``lora_adapter_metadata``, or nothing when it is damaged."""
    try:
        return header_configs(raw.metadata)
    except SurgeryError as error:
        findings.append(Finding("bad-config", error.message))
        return {}


def built(groups: Mapping[str, Group], raw: RawFile) -> tuple[dict[str, Delta | None], dict[str, str]]:
    """Module -> delta, and module -> what is wrong with it."""
    deltas: dict[str, Delta | None] = {}
    broken: dict[str, str] = {}
    for stem, own in groups.items():
        delta = _build(own, raw)
        if isinstance(delta, str):
            broken[stem] = delta
        else:
            deltas[stem] = delta
    return deltas, broken


def _build(own: Group, raw: RawFile) -> Delta | str | None:
    """The delta, or what is wrong."""
    try:
        return build(own, raw.path)
    except BrokenModuleError as error:
        return error.message


def scale_rules(raw: RawFile, configs: Mapping[str, PeftConfig]) -> ScaleRules:
    """Where scales come from when no table knows the modules."""
    flag = raw.tensors.get(FLAGS[0])
    return ScaleRules(configs, rslora_flag=flag is not None and bool(flag.item()), whole_lokr_by_shape=FACTOR in raw.tensors)


def parsed(
    raw: RawFile, groups: Mapping[str, Group], arch: Architecture, configs: Mapping[str, PeftConfig], findings: list[Finding]
) -> tuple[dict[str, Module | str], str]:
    """Module name -> the module, or what is wrong with it; and the layout. All at once, or one by one if that fails."""
    try:
        adapter = parse(_part(raw, groups.values()), among=(arch,), configs=configs)
    except SurgeryError:
        pass
    else:
        findings += [Finding("parse", warning) for warning in adapter.warnings]
        read: dict[str, Module | str] = {module.name: module for module in adapter.modules.values()}
        if len(read) == len(groups):
            return read, adapter.layout
    read = {}
    layouts: Counter[str] = Counter()
    for stem, own in groups.items():
        read[stem], layout = _parsed_alone(raw, own, arch, configs)
        layouts[layout] += 1
    layouts.pop("", None)
    return read, layouts.most_common(1)[0][0] if layouts else "unknown"


def _parsed_alone(raw: RawFile, own: Group, arch: Architecture, configs: Mapping[str, PeftConfig]) -> tuple[Module | str, str]:
    """One module, or what is wrong with it; and its layout."""
    try:
        adapter = parse(_part(raw, [own]), among=(arch,), configs=configs)
    except SurgeryError as error:
        return _misfit(own, arch, raw) or error.message, ""
    return next(iter(adapter.modules.values())), adapter.layout


def _misfit(own: Group, arch: Architecture, raw: RawFile) -> str | None:
    """The sentence for a module whose shape is not its base weight's."""
    delta, place = build(own, raw.path), index(arch).find(own.stem)
    if delta is None or place is None or fits(delta.shape, expected := expected_shape(arch, place.site)):
        return None
    return f"{own.stem} is {list(delta.shape)}, {arch.name} expects {list(expected)}"


def _part(raw: RawFile, groups: Iterable[Group]) -> RawFile:
    """The file with these modules only, and its top-level tensors."""
    tensors = {entry.key: entry.tensor for own in groups for entry in own.entries.values()}
    return RawFile(raw.path, tensors | {k: raw.tensors[k] for k in TOP_LEVEL if k in raw.tensors}, raw.metadata)
