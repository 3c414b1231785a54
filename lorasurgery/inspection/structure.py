"""What a file's keys say: modules, architecture and layout, as far as each can be understood.

:func:`lorasurgery.layouts.parse.parse` understands a whole file or refuses it. Here a broken module is described as one,
and a file for an unknown model still has modules, families and ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.errors import UnknownArchitectureError
from lorasurgery.inspection.description import Finding
from lorasurgery.inspection.modules import module_info, unknown_layout, unknown_module
from lorasurgery.inspection.tolerant import TOP_LEVEL, built, grouped, header_rules, parsed, scale_rules
from lorasurgery.layouts.detect import detect, same_results
from lorasurgery.layouts.foreign import named_modules, refuse_other_models
from lorasurgery.layouts.names import index

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.base import Delta
    from lorasurgery.inspection.description import ModuleInfo
    from lorasurgery.inspection.trainers import Signature
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.detect import Match
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig, ScaleRules

EMBEDDINGS = ("bundle_emb.", "emb_params", "<")
"""Beginnings of keys of learned tokens: OneTrainer, ai-toolkit, cloneofsimo/lora."""


@dataclass(frozen=True, slots=True)
class Structure:
    """The modules of an adapter file."""

    architecture: Architecture | None
    candidates: tuple[tuple[str, float], ...]
    undecided: tuple[str, ...]
    coverage: float
    layout: str
    modules: tuple[ModuleInfo, ...]
    embeddings: tuple[str, ...]
    unexplained: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]
    signs: tuple[Signature, ...] = ()
    """Signatures of programs in the keys."""
    sources: tuple[Module, ...] = ()
    """The modules that could be read, with their tensors."""


def read_structure(raw: RawFile, configs: Mapping[str, PeftConfig] | None = None) -> Structure:
    """Understand the keys of ``raw``; ``configs`` are a PEFT folder's. Raises NotAnAdapterError."""
    raw = named_modules(raw)
    findings: list[Finding] = []
    groups, others = grouped(raw, findings)
    refuse_other_models(raw, groups)
    configs = header_rules(raw, findings) if configs is None else configs
    deltas, broken = built(groups, raw)
    shapes = {stem: None if (delta := deltas.get(stem)) is None else delta.shape for stem in groups}
    embeddings = tuple(key for key in others if key.startswith(EMBEDDINGS))
    lost = [(k, "not part of any module") for k in others if k not in TOP_LEVEL and k not in embeddings]
    try:
        best, ties = detect(shapes, raw.metadata, path=raw.path)
    except UnknownArchitectureError as error:
        findings += [*_broken(broken), Finding("unknown-architecture", error.message)]
        rules = scale_rules(raw, configs)
        modules = [unknown_module(own, deltas.get(stem), rules, broken.get(stem)) for stem, own in groups.items()]
        layout = unknown_layout(groups.values())
        return Structure(None, error.candidates, (), 0.0, layout, tuple(modules), embeddings, tuple(lost), tuple(findings))
    return _explained(raw, _Parts(groups, deltas, broken, configs), (best, ties), embeddings, lost, findings)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A file's groups and what became of them."""

    groups: Mapping[str, Group]
    deltas: Mapping[str, Delta | None]
    broken: Mapping[str, str]
    configs: Mapping[str, PeftConfig]


def _explained(
    raw: RawFile,
    parts: _Parts,
    matches: tuple[Match, list[Match]],
    embeddings: tuple[str, ...],
    lost: list[tuple[str, str]],
    findings: list[Finding],
) -> Structure:
    """The structure of a file whose architecture is known."""
    best, ties = matches
    arch = best.architecture
    names = index(arch)
    found = {stem: names.find(stem) for stem in parts.groups}
    whole = {stem: own for stem, own in parts.groups.items() if found[stem] is not None and stem not in parts.broken}
    read, layout = parsed(raw, whole, arch, parts.configs, findings)
    broken = {**parts.broken, **{stem: reason for stem, reason in read.items() if isinstance(reason, str)}}
    findings += _broken(broken)
    infos = [_info(raw, parts, arch, own, found[own.stem], read.get(own.stem)) for own in parts.groups.values()]
    lost += [
        (entry.key, f"{arch.name} has no such module")
        for stem, place in found.items() if place is None for entry in parts.groups[stem].entries.values()
    ]  # fmt: skip
    findings += _two_spellings({stem: found[stem] for stem, own in parts.groups.items() if own.families()})
    kin = {other.architecture.id: other.architecture for other in ties if other.architecture.id != arch.id}
    return Structure(
        arch,
        tuple((match.architecture.key, match.share) for match in (best, *ties)),
        tuple(other.key for other in kin.values() if not same_results(arch, other, parts.groups)),
        best.share,
        layout,
        tuple(infos),
        embeddings,
        tuple(lost),
        tuple(findings),
        sources=tuple(module for module in read.values() if not isinstance(module, str)),
    )


def _info(
    raw: RawFile, parts: _Parts, arch: Architecture, own: Group, place: Found | None, read: Module | str | None
) -> ModuleInfo:
    """A module's row, whether it could be read or not (``read`` is then the reason)."""
    if read is not None and not isinstance(read, str):
        return module_info(read, own, arch, parts.configs)
    problem = parts.broken.get(own.stem, read)
    return _odd(own, parts.deltas.get(own.stem), scale_rules(raw, parts.configs), arch, place, problem)


def _odd(
    own: Group, delta: Delta | None, rules: ScaleRules, arch: Architecture, place: Found | None, problem: str | None
) -> ModuleInfo:
    """A module that is broken, or that the architecture does not have."""
    info = unknown_module(own, delta, rules, problem or f"{arch.name} has no such module")
    if place is None:
        return info
    return replace(info, component=place.site.component, weight=place.site.spans[0].weight)


def _broken(problems: Mapping[str, str]) -> list[Finding]:
    if not problems:
        return []
    count = "1 module is" if len(problems) == 1 else f"{len(problems)} modules are"
    return [Finding("broken-module", f"{count} broken, first: {next(iter(problems.values()))}")]


def _two_spellings(found: Mapping[str, Found | None]) -> list[Finding]:
    """Two names for one weight: programs disagree on which one counts."""
    first: dict[object, str] = {}
    pairs = []
    for stem, place in found.items():
        if place is not None and first.setdefault(place.site, stem) != stem:
            pairs.append((first[place.site], stem))
    if not pairs:
        return []
    return [Finding("two-spellings", f"{len(pairs)} weights are spelled twice, first as {pairs[0][0]} and {pairs[0][1]}")]
