"""The one engine: a file, a program's table, a verdict for every module."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.adapter import DENOISER, Site
from lorasurgery.architectures.table import Span, flat
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.checking.advice import mend, notes
from lorasurgery.checking.effect import effect
from lorasurgery.checking.result import IGNORED, LOADS, REJECTED, Finding, Result
from lorasurgery.layouts.names import PREFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorasurgery.architectures.table import Architecture, Spans
    from lorasurgery.checking.rules import Consumer, EncoderSpelling, Has, Route, Spelling
    from lorasurgery.checking.subject import Item, Subject
    from lorasurgery.layouts.group import Entry

HARMLESS = frozenset({"lokr_factor", "use_rslora_flag", "use_dora_flag"})
"""Top-level tensors that change nothing when they are not read."""


def check(subject: Subject, consumer: Consumer) -> Result:
    """What ``consumer`` makes of a file: the first route whose conditions its keys meet reads all of it."""
    arch = subject.architecture
    routes = consumer.models.get(arch.id, consumer.default)
    if not routes:
        return _no_model(subject, consumer)
    if consumer.folder and not subject.layout_folder:
        return _result(subject, consumer, [], [f"{consumer.name} reads a folder with adapter_config.json, not a file"], None)
    route = next((r for r in routes if _applies(r, subject)), None)
    if route is None:
        return _result(subject, consumer, [], [f"{consumer.name} has no way to read these keys"], None)
    known = names_of(arch, route)
    refusals: list[str] = []
    job = Job(arch, consumer, route, known, {}, refusals)
    findings = [_judge(item, job) for item in subject.items]
    unread = [key for key in subject.others if not re.search(route.deletes, key)]
    bad = [key for key in unread if not re.search(route.ignores_words, key)]
    bad += [key for key in subject.keys if re.search(route.refuses, key)]
    if bad:
        refusals.append(f"{route.error} for keys it does not know, first {bad[0]}")
    refusals += _missing(subject, route, known)
    return _result(subject, consumer, findings, refusals, route, unread)


def _applies(route: Route, subject: Subject) -> bool:
    keys = [key for key in subject.keys if not re.search(route.deletes, key)]
    return all(_holds(condition, keys) for condition in route.when)


def _holds(condition: Has, keys: list[str]) -> bool:
    hits = (re.search(condition.pattern, key) is not None for key in keys)
    return all(hits) if condition.how == "all" else any(hits) == (condition.how == "any")


def _no_model(subject: Subject, consumer: Consumer) -> Result:
    arch = subject.architecture.name
    refusals = () if consumer.unknown else (f"{consumer.name} {consumer.version} has no loader for {arch}",)
    status = IGNORED if consumer.unknown else REJECTED
    findings = tuple(Finding(i.stem, status, "file", f"{consumer.name} has no loader for it") for i in subject.items)
    known = not consumer.unknown
    return Result(
        str(subject.path), consumer, subject.architecture.key, subject.candidates, findings, refusals,
        notes=consumer.facts, known=known, counts=Counter(f.status for f in findings),
    )  # fmt: skip


def _result(
    subject: Subject,
    consumer: Consumer,
    findings: list[Finding],
    refusals: list[str],
    route: Route | None,
    unread: list[str] | None = None,
) -> Result:
    if refusals:
        own = {f.module: f for f in findings}
        rejected = Finding("", REJECTED, "file", refusals[0])
        findings = [rejected._replace(module=i.stem, **_kept(own.get(i.stem))) for i in subject.items]
    counts = Counter(f.status for f in findings)
    result = Result(
        str(subject.path), consumer, subject.architecture.key, subject.candidates, tuple(findings),
        tuple(dict.fromkeys(refusals)), tuple(k for k in unread or () if k not in HARMLESS), counts=counts,
    )  # fmt: skip
    return replace(result, notes=notes(subject, consumer, route, result), mend=mend(subject, consumer, result))


def _kept(finding: Finding | None) -> dict[str, str]:
    """The reason a module has of its own, in a file that is refused as a whole."""
    return {"reason": finding.reason, "text": finding.text} if finding is not None and finding.status != LOADS else {}


# one module -------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What a check has at hand while it goes through the modules."""

    architecture: Architecture
    consumer: Consumer
    route: Route
    known: Known
    taken: dict[Site, str]
    """The first name found for each site."""
    refusals: list[str]


def _judge(item: Item, job: Job) -> Finding:
    """The verdict of one module; what makes the loader refuse the file goes to ``refusals``."""
    route = job.route
    entries = [e for e in item.group.entries.values() if not re.search(route.deletes, e.key)]
    unread = [e for e in entries if _suffix(item, e) not in route.reads]
    strange = [e.key for e in unread if not re.search(route.ignores_words, e.key)]
    job.refusals.extend(f"{route.error} for keys it does not read, first {key}" for key in strange)
    site = job.known.sites.get(item.stem)
    if site is None and re.search(route.also, item.stem) is None:
        strange = [e.key for e in entries if not re.search(route.ignores_names, e.key)]
        job.refusals.extend(f"{route.error} for keys it does not know, first {key}" for key in strange)
        return Finding(item.stem, IGNORED, *_unknown_name(item, job))
    if item.problem:
        return _broken(item, job)
    return _misplaced(item, site, job) or effect(item, site, job.architecture, job.consumer, route, unread)


def _misplaced(item: Item, site: Site | None, job: Job) -> Finding | None:
    """A module that is known by name and still finds no place."""
    if job.route.needs_alpha and item.alpha is None and item.delta is not None:
        job.refusals.append(f"KeyError: {item.stem} has no alpha")
    if item.misfit:
        if job.consumer.misfit == REJECTED:
            job.refusals.append(f"size mismatch: {item.stem}: {item.misfit}")
        return Finding(item.stem, IGNORED, "shape", item.misfit)
    if site is not None and item.delta is not None:
        first = job.taken.setdefault(site, item.stem)
        if first != item.stem:
            return Finding(item.stem, IGNORED, "twice", "one of two names for the same weight is lost")
    return None


def _suffix(item: Item, entry: Entry) -> str:
    return entry.key[len(item.stem) :]


def _broken(item: Item, job: Job) -> Finding:
    """Factors that do not go together. An up factor alone stops a loader that looks up its partner."""
    if any(slot == "up" for _, slot in item.group.entries):
        job.refusals.append(f"{job.route.error}: {item.problem}")
    return Finding(item.stem, IGNORED, "broken", item.problem)


def _unknown_name(item: Item, job: Job) -> tuple[str, str]:
    """(reason, sentence) for a name the loader does not look up."""
    consumer, known = job.consumer, job.known
    for note in job.route.because:
        if re.search(note.pattern, item.stem):
            return "name", note.text
    prefix = next((p for p in known.prefixes if p and item.stem.startswith(p)), None)
    if item.site is None:
        return "name", f"no table has these names for {known.architecture}"
    if prefix is None:
        own = _prefix(item.stem)
        what = f"the prefix {own}" if own else "names without a prefix"
        return "prefix", f"{consumer.name} does not read {what} for {known.architecture}"
    return "name", f"{consumer.name} does not know these names after {prefix}"


def _prefix(stem: str) -> str:
    """The prefix of a name, or nothing when it has none that is known."""
    encoder = re.match(r"lora_te\d?_|text_encoder(s\.\w+|_\d)?\.", stem)
    return encoder[0] if encoder else next((p.text for p in PREFIXES if p.text and stem.startswith(p.text)), "")


# names ------------------------------------------------------------------------------------------------------------------


class Known(NamedTuple):
    """Every stem a route understands and what it stands for, and the prefixes among them."""

    sites: Mapping[str, Site]
    prefixes: tuple[str, ...]
    """Longest first."""
    architecture: str


@cache
def names_of(arch: Architecture, route: Route) -> Known:
    """The names a route looks up for one architecture."""
    sites: dict[str, Site] = {}
    for spelling in route.names:
        prefix = spelling.prefix.format(denoiser=arch.denoiser)
        roots = arch.diffusers_roots if spelling.prefix == "{denoiser}." else ()
        for name, spans in spelled(arch, spelling):
            root = next(((r, component) for r, component in roots if name.startswith(r)), None)
            stem = prefix + name if root is None else f"{root[1]}.{name[len(root[0]) :]}"
            sites.setdefault(stem, Site(DENOISER, spans))
    prefixes = {s.prefix.format(denoiser=arch.denoiser) for s in route.names}
    for encoder in route.encoders:
        for prefix, own in _encoder_names(arch, encoder):
            prefixes.add(prefix)
            sites.update(own)
    return Known(sites, tuple(sorted(prefixes, key=lambda p: -len(p))), arch.name)


def spelled(arch: Architecture, spelling: Spelling) -> Iterator[tuple[str, Spans]]:
    """(name without its prefix, rows) of one spelling."""
    names = arch.alias_names if spelling.naming == "alias" else arch.namings[spelling.naming]
    for name, spans in names.items():
        if not re.search(spelling.only, name) or re.search(spelling.without, name):
            continue
        dotted = name + "."
        for old, new in spelling.replace:
            dotted = dotted.replace(old, new)
        yield flat(dotted[:-1]) if spelling.flat else dotted[:-1], spans


def _encoder_names(arch: Architecture, spelling: EncoderSpelling) -> Iterator[tuple[str, dict[str, Site]]]:
    """(prefix, stem -> site) for each of the architecture's encoders that a spelling is for."""
    for own in arch.encoders:
        loaded = own.diffusers is not None and own.diffusers in arch.diffusers_encoders
        if (spelling.tables and own.table not in spelling.tables) or ("{diffusers}" in spelling.prefix and not loaded):
            continue
        prefix = spelling.prefix.format(
            sd_scripts=own.sd_scripts, comfyui=own.comfyui, diffusers=own.diffusers, onetrainer=own.onetrainer or own.sd_scripts
        )
        yield (
            prefix,
            {
                prefix + (flat(spelt) if spelling.flat else spelt): Site(own.table, (Span(weight, 0, shape[0]),))
                for weight, shape in TEXT_ENCODERS[own.table].shapes.items()
                if re.search(spelling.only, weight)
                for spelt in {weight, weight.removeprefix(spelling.optional)}
            },
        )


# files that must be complete --------------------------------------------------------------------------------------------


def _missing(subject: Subject, route: Route, known: Known) -> list[str]:
    """The names of ``complete`` that a block of the file lacks."""
    stems = {item.stem for item in subject.items}
    for template in route.complete:
        head, _, tail = template.partition("{i}")
        pattern = re.compile(re.escape(head) + r"(\d+)")
        places = known.sites if route.every_block else stems
        count = len({m[1] for stem in places if (m := pattern.match(stem))})
        lacking = [f"{head}{i}{tail}" for i in range(count) if f"{head}{i}{tail}" not in stems]
        if lacking:
            return [f"KeyError: it needs every module of every block, {lacking[0]} is missing"]
    return []
