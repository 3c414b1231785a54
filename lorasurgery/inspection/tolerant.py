"""The steps of reading an adapter, each going on where the file is damaged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.errors import BrokenModuleError, SurgeryError
from lorasurgery.inspection.description import Finding
from lorasurgery.inspection.modules import module_info
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.module import FACTOR, FLAGS, module_of
from lorasurgery.layouts.names import REMEMBERED
from lorasurgery.layouts.scales import header_configs
from lorasurgery.layouts.words import ALPHA, split_key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.base import Delta
    from lorasurgery.inspection.description import ModuleInfo
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig, ScaleRules

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


class Parts(NamedTuple):
    """A file's groups and what became of them, before any architecture is known."""

    raw: RawFile
    groups: Mapping[str, Group]
    deltas: Mapping[str, Delta | None]
    broken: Mapping[str, str]
    """Module -> what is wrong with it."""
    rules: ScaleRules


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


_rows: dict[Any, ModuleInfo] = {}


def parsed(
    parts: Parts, arch: Architecture, found: Mapping[str, Found | None], *, keep: bool
) -> tuple[dict[str, ModuleInfo | str], list[Module]]:
    """Module name -> its row, or what is wrong with it; and the modules themselves, all of them with ``keep``.

    Rows are remembered by everything they are made from: the files of a folder have many modules in common.
    """
    rows: dict[str, ModuleInfo | str] = {}
    modules: list[Module] = []
    rules = parts.rules
    remember = not (keep or rules.configs or rules.whole_lokr_by_shape)
    for stem, place in found.items():
        if place is None or stem in parts.broken:
            continue
        own = parts.groups[stem]
        key = (arch, rules.rslora_flag, stem, _made_from(own)) if remember else None
        row = _rows.get(key)
        if row is None:
            try:
                module = module_of(own, parts.deltas[stem], place, arch, rules, parts.raw.path)
            except SurgeryError as error:
                rows[stem] = error.message
                continue
            modules.append(module)
            row = module_info(module, own, arch, rules.configs)
            if key is not None:
                if len(_rows) >= REMEMBERED:
                    _rows.clear()
                _rows[key] = row
        rows[stem] = row
    return rows, modules


def _made_from(own: Group) -> tuple[Any, ...]:
    """What a row depends on besides the module's name: words, dtypes, shapes, and the alpha's value."""
    alpha = own.modifier(ALPHA)
    tensors = [(e.suffix, e.tensor.dtype, e.tensor.shape) for e in own.entries.values()]
    return (b"" if alpha is None or alpha.tensor.size != 1 else alpha.tensor.tobytes(), *tensors)
