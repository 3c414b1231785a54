"""What a file's keys say: modules, architecture and layout, as far as each can be understood.

:func:`lorasurgery.load` understands a whole file or refuses it. Here a broken module is described as one,
and a file for an unknown model still has modules, families and ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import UnknownArchitectureError
from lorasurgery.files.read import layout_of, leftovers, own_named, place, warnings_of
from lorasurgery.files.taken import Unparsed, taken_apart
from lorasurgery.inspection.description import Finding, ModuleInfo
from lorasurgery.inspection.modules import unknown_layout, unknown_module
from lorasurgery.inspection.tolerant import parsed
from lorasurgery.layouts.detect import detect
from lorasurgery.layouts.widened import as_wide
from lorasurgery.operations.conversion.settled import undecided

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.files.read import Placed
    from lorasurgery.files.taken import Taken
    from lorasurgery.inspection.trainers import Signature
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.detect import Match
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig


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
    taken = taken_apart(Unparsed(raw, configs), tolerant=True)
    findings = [Finding(code, text) for code, text in taken.findings]
    others = leftovers(taken)
    embeddings = tuple(left.key for left in others if left.state == "kept")
    lost = [(left.key, left.reason) for left in others if left.state == "unknown"]
    try:
        best, ties = detect(taken.shapes, raw.metadata, path=raw.path)
    except UnknownArchitectureError as error:
        findings += [*_broken(taken.problems), Finding("unknown-architecture", error.message)]
        modules = [
            unknown_module(own, taken.deltas.get(stem), taken.rules, taken.problems.get(stem))
            for stem, own in taken.groups.items()
        ]
        layout = unknown_layout(taken.groups.values())
        return Structure(None, error.candidates, (), 0.0, layout, tuple(modules), embeddings, tuple(lost), tuple(findings))
    return _explained(taken, (best, ties), _Rest(embeddings, lost, findings), keep=keep)


class _Rest(NamedTuple):
    """What is known of a file beside its modules."""

    embeddings: tuple[str, ...]
    unexplained: list[tuple[str, str]]
    findings: list[Finding]


def _explained(taken: Taken, matches: tuple[Match, list[Match]], rest: _Rest, *, keep: bool) -> Structure:
    """The structure of a file whose architecture is known."""
    best, ties = matches
    known, groups = as_wide((m.architecture for m in (best, *ties)), taken.groups), taken.groups
    placed = place(taken, known)
    rows, modules = parsed(taken, placed, keep=keep)
    broken = {**taken.problems, **{stem: row for stem, row in rows.items() if isinstance(row, str)}}
    findings = [*rest.findings]
    findings += [Finding("parse", warning) for warning in warnings_of(taken.raw, taken.rules, modules)]
    findings += [Finding("own-names", text) for text in own_named(placed)]
    findings += [
        *_broken(broken),
        *_two_spellings({stem: placed.found[stem] for stem, own in groups.items() if own.families()}),
    ]
    infos = [row if isinstance(row := rows.get(stem), ModuleInfo) else _odd(taken, own, placed, broken.get(stem))
             for stem, own in groups.items()]  # fmt: skip
    tied = [match.architecture for match in (best, *ties)]
    whole = {s: own for s, own in placed.found.items() if s in rows and s not in broken and s not in placed.own}
    return Structure(
        known,
        tuple((match.architecture.key, match.share) for match in (best, *ties)),
        undecided(tied, groups),
        best.share,
        layout_of(taken, whole, known),
        tuple(infos),
        rest.embeddings,
        tuple(rest.unexplained),
        tuple(findings),
        evidence=best.evidence,
        sources=tuple(modules) if keep else (),
    )


def _odd(taken: Taken, own: Group, placed: Placed, problem: str | None) -> ModuleInfo:
    """The row of a module that is broken."""
    info = unknown_module(own, taken.deltas.get(own.stem), taken.rules, problem)
    site = placed.found[own.stem].site
    return info._replace(component=site.component, weight=site.spans[0].weight)


def _broken(problems: Mapping[str, str]) -> list[Finding]:
    if not problems:
        return []
    count = "1 module is" if len(problems) == 1 else f"{len(problems)} modules are"
    return [Finding("broken-module", f"{count} broken, first: {next(iter(problems.values()))}")]


def _two_spellings(found: Mapping[str, Found]) -> list[Finding]:
    """Two names for one weight: programs disagree on which one counts."""
    first: dict[object, str] = {}
    pairs = []
    for stem, own in found.items():
        if first.setdefault(own.site, stem) != stem:
            pairs.append((first[own.site], stem))
    if not pairs:
        return []
    return [Finding("two-spellings", f"{len(pairs)} weights are spelled twice, first as {pairs[0][0]} and {pairs[0][1]}")]
