"""What a file's keys say: modules, architecture and layout, as far as each can be understood.

:func:`lorasurgery.layouts.parse.parse` understands a whole file or refuses it. Here a broken module is described as one,
and a file for an unknown model still has modules, families and ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import UnknownArchitectureError
from lorasurgery.inspection.description import Finding, ModuleInfo
from lorasurgery.inspection.modules import unknown_layout, unknown_module
from lorasurgery.inspection.tolerant import TOP_LEVEL, Parts, built, grouped, header_rules, parsed
from lorasurgery.layouts.detect import detect
from lorasurgery.layouts.foreign import named_modules, refuse_other_models
from lorasurgery.layouts.module import scale_rules
from lorasurgery.layouts.names import index
from lorasurgery.layouts.parse import layout_of, warnings_of
from lorasurgery.surgery.settled import undecided

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.inspection.trainers import Signature
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.detect import Match
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig

EMBEDDINGS = ("bundle_emb.", "emb_params", "<")
"""Beginnings of keys of learned tokens: OneTrainer, ai-toolkit, cloneofsimo/lora."""


class Structure(NamedTuple):
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
    evidence: tuple[str, ...] = ()
    """Why it is for this architecture."""
    sources: tuple[Module, ...] = ()
    """The modules that could be read, with their tensors."""


def read_structure(raw: RawFile, configs: Mapping[str, PeftConfig] | None = None, *, keep: bool = False) -> Structure:
    """Understand the keys of ``raw``; ``configs`` are a PEFT folder's, ``keep`` fills ``sources``. Raises NotAnAdapterError."""
    raw = named_modules(raw)
    findings: list[Finding] = []
    groups, others = grouped(raw, findings)
    refuse_other_models(raw, groups)
    rules = scale_rules(raw, header_rules(raw, findings) if configs is None else configs)
    parts = Parts(raw, groups, *built(groups, raw), rules)
    shapes = {stem: None if (delta := parts.deltas.get(stem)) is None else delta.shape for stem in groups}
    embeddings = tuple(key for key in others if key.startswith(EMBEDDINGS))
    lost = [(k, "not part of any module") for k in others if k not in TOP_LEVEL and k not in embeddings]
    try:
        best, ties = detect(shapes, raw.metadata, path=raw.path)
    except UnknownArchitectureError as error:
        findings += [*_broken(parts.broken), Finding("unknown-architecture", error.message)]
        modules = [unknown_module(own, parts.deltas.get(stem), rules, parts.broken.get(stem)) for stem, own in groups.items()]
        layout = unknown_layout(groups.values())
        return Structure(None, error.candidates, (), 0.0, layout, tuple(modules), embeddings, tuple(lost), tuple(findings))
    return _explained(parts, (best, ties), _Rest(embeddings, lost, findings), keep=keep)


class _Rest(NamedTuple):
    """What is known of a file beside its modules."""

    embeddings: tuple[str, ...]
    unexplained: list[tuple[str, str]]
    findings: list[Finding]


def _explained(parts: Parts, matches: tuple[Match, list[Match]], rest: _Rest, *, keep: bool) -> Structure:
    """The structure of a file whose architecture is known."""
    best, ties = matches
    arch, groups = best.architecture, parts.groups
    names = index(arch)
    found = {stem: names.find(stem) for stem in groups}
    rows, modules = parsed(parts, arch, found, keep=keep)
    broken = {**parts.broken, **{stem: row for stem, row in rows.items() if isinstance(row, str)}}
    findings = [*rest.findings]
    findings += [Finding("parse", warning) for warning in warnings_of(parts.raw, parts.rules, modules)]
    findings += [*_broken(broken), *_two_spellings({stem: found[stem] for stem, own in groups.items() if own.families()})]
    nowhere = f"{arch.name} has no such module"
    infos = [row if isinstance(row := rows.get(stem), ModuleInfo) else _odd(parts, own, found[stem], broken.get(stem, nowhere))
             for stem, own in groups.items()]  # fmt: skip
    lost = [(e.key, nowhere) for stem, place in found.items() if place is None for e in groups[stem].entries.values()]
    tied = [match.architecture for match in (best, *ties)]
    whole = {stem: place for stem, place in found.items() if stem in rows and stem not in broken}
    return Structure(
        arch,
        tuple((match.architecture.key, match.share) for match in (best, *ties)),
        undecided(tied, groups),
        best.share,
        layout_of(groups, whole, arch),
        tuple(infos),
        rest.embeddings,
        (*rest.unexplained, *lost),
        tuple(findings),
        evidence=best.evidence,
        sources=tuple(modules) if keep else (),
    )


def _odd(parts: Parts, own: Group, place: Found | None, problem: str) -> ModuleInfo:
    """The row of a module that is broken, or that the architecture does not have."""
    info = unknown_module(own, parts.deltas.get(own.stem), parts.rules, problem)
    if place is None:
        return info
    return info._replace(component=place.site.component, weight=place.site.spans[0].weight)


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
