"""Parts of an adapter: by component, block, kind of module or family. Every module stays as it is, byte for byte."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.errors import RequestError
from lorasurgery.metadata import FACTOR, FACTOR_KEY
from lorasurgery.operations.select.blocks import block_and_kind
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.site import Site

COMPONENT, BLOCK, KIND, FAMILY = "component", "block", "kind", "family"
WAYS = (COMPONENT, BLOCK, KIND, FAMILY)
REST = "rest"
"""Modules outside of all blocks, and keys that belong to no module where they need a name."""
_FIRST, _INNER = re.compile(r"^\d+[._]"), re.compile(r"(?<=[._])\d+(?=[._])")


def split(adapter: Adapter, by: str) -> dict[str, Adapter]:
    """Part -> adapter with its modules, in the order of the file; together they are the adapter.

    Keys that no table explains go with the first part. Merging the parts gives the adapter back. Raises RequestError for a
    way that is none.
    """
    if by not in WAYS:
        raise RequestError(f"--by is {', '.join(WAYS[:-1])} or {WAYS[-1]}, not {by}")
    groups: dict[str, dict[Site, Module]] = {}
    for site, module in adapter:
        groups.setdefault(part_of(module, adapter.architecture, by), {})[site] = module
    parts = {name: subset(adapter, modules, f"split by {by}: {name}") for name, modules in groups.items()}
    for name in list(parts)[1:]:
        known = tuple(left for left in parts[name].leftovers if left.key in _top_level())
        parts[name] = replace(parts[name], leftovers=known)
    return parts


def part_of(module: Module, arch: Architecture, by: str) -> str:
    """The name of the part that a module belongs to."""
    component = component_name(module.site.component, arch)
    if by == COMPONENT:
        return component
    if by == FAMILY:
        return module.family
    block, kind = block_and_kind(module.site.spans[0].weight)
    prefix = "" if module.site.component == DENOISER else f"{component}."
    return prefix + ((block or REST) if by == BLOCK else _INNER.sub("x", _FIRST.sub("", kind)))


def component_name(component: str, arch: Architecture) -> str:
    """What selections call it: ``unet`` or ``transformer``, ``transformer_2``, ``te1``, ``te2``."""
    if component in (DENOISER, SECOND_DENOISER):
        return arch.denoiser if component == DENOISER else f"{arch.denoiser}_2"
    names = {encoder.table: encoder.sd_scripts.removeprefix("lora_") for encoder in arch.encoders}
    return names.get(component, component)


def subset(adapter: Adapter, modules: Mapping[Site, Module], operation: str) -> Adapter:
    """The adapter with these modules; what it says of a LoKr factor goes where no LoKr is left."""
    if any(isinstance(module.delta, Kronecker) for module in modules.values()):
        return replace(adapter, modules=modules, operation=operation)
    metadata = {key: value for key, value in adapter.metadata.items() if key != FACTOR_KEY}
    leftovers = tuple(left for left in adapter.leftovers if left.key != FACTOR)
    return replace(adapter, modules=modules, metadata=metadata, leftovers=leftovers, operation=operation)


def file_name(part: str) -> str:
    """A part's name as a piece of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", part).strip("_") or REST


def _top_level() -> Iterable[str]:
    from lorasurgery.layouts.module import TOP_LEVEL

    return TOP_LEVEL
