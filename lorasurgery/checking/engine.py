"""The one engine: a file, a program's table, a verdict for every module."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.checking.advice import notes
from lorasurgery.checking.effect import effect
from lorasurgery.checking.mending import mend
from lorasurgery.checking.names import names_of
from lorasurgery.checking.result import IGNORED, LOADS, REJECTED, UNKNOWN, Finding, Result
from lorasurgery.layouts.names import PREFIXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Site
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.checking.names import Known
    from lorasurgery.checking.rules import Consumer, Has, Route
    from lorasurgery.checking.subject import Item, Subject

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
    if subject.numbered:
        text = f"the modules are numbered, not named; {consumer.name} does not read that"
        return _result(subject, consumer, [Finding(i.stem, IGNORED, "name", text) for i in subject.items], [], None)
    route = next((r for r in routes if _applies(r, subject)), None)
    if route is None:
        return _result(subject, consumer, [], [f"{consumer.name} has no way to read these keys"], None)
    job = Job(arch, consumer, route, names_of(arch, route), {}, {}, [])
    findings = [_judge(item, job) for item in subject.items]
    unread = [key for key in subject.others if not re.search(route.deletes, key)]
    bad = [key for key in unread if not re.search(route.ignores_words, key)]
    bad += [key for key in subject.keys if re.search(route.refuses, key)]
    for key in bad:
        job.refuse(f"{route.error} for keys it does not know", key)
    passed = [*unread, *job.unread]
    if route.tolerates is not None and len(passed) > route.tolerates:
        job.refuse(f"it passes over a file with more than {route.tolerates} keys it does not know", *passed)
    refusals = [_refusal(reason, keys) for reason, keys in job.refusals.items()]
    return _result(subject, consumer, findings, [*refusals, *_missing(subject, route, job.known)], route, unread)


def _refusal(reason: str, keys: Sequence[str]) -> str:
    """A reason with the first key it is about and the number of the others."""
    first = f", first {keys[0]}" if keys else ""
    return f"{reason}{first}" + (f" ({len(keys)} keys)" if len(keys) > 1 else "")


def _applies(route: Route, subject: Subject) -> bool:
    keys = [key for key in subject.keys if not re.search(route.deletes, key)]
    return all(_holds(condition, keys) for condition in route.when)


def _holds(condition: Has, keys: list[str]) -> bool:
    hits = (re.search(condition.pattern, key) is not None for key in keys)
    return all(hits) if condition.how == "all" else any(hits) == (condition.how == "any")


def _no_model(subject: Subject, consumer: Consumer) -> Result:
    arch = subject.architecture.name
    known = not consumer.unknown or subject.architecture.id in consumer.models
    refusals = () if not known else (f"{consumer.name} {consumer.version} has no loader for {arch}",)
    status, text = (REJECTED, f"{consumer.name} has no loader for it") if known else (UNKNOWN, "nothing is recorded about it")
    findings = tuple(Finding(i.stem, status, "file", text) for i in subject.items)
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
    return replace(result, notes=notes(subject, consumer, route, result), mend=mend(subject, consumer, route, result))


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
    refusals: dict[str, list[str]]
    """Why the loader refuses the file, and the keys that make it do so."""
    unread: list[str]
    """Keys of modules that it passes over."""

    def refuse(self, reason: str, *keys: str) -> None:
        """Note something that makes the loader refuse the file."""
        self.refusals.setdefault(reason, []).extend(keys)


def _judge(item: Item, job: Job) -> Finding:
    """The verdict of one module; what makes the loader refuse the file goes to ``refusals``."""
    route = job.route
    entries = [e for e in item.group.entries.values() if not re.search(route.deletes, e.key)]
    unread = [e for e in entries if e.suffix not in route.reads]
    for strange in (e.key for e in unread if not re.search(route.ignores_words, e.key)):
        job.refuse(f"{route.error} for keys it does not read", strange)
    site = job.known.sites.get(item.stem)
    if site is None and re.search(route.also, item.stem) is None:
        job.unread.extend(e.key for e in entries)
        for strange in (e.key for e in entries if not re.search(route.ignores_names, e.key)):
            job.refuse(f"{route.error} for keys it does not know", strange)
        return Finding(item.stem, IGNORED, *_unknown_name(item, job))
    job.unread.extend(e.key for e in unread)
    if item.problem:
        return _broken(item, job)
    return _misplaced(item, site, job) or effect(item, site, job.architecture, job.consumer, route, unread)


def _misplaced(item: Item, site: Site | None, job: Job) -> Finding | None:
    """A module that is known by name and still finds no place."""
    if job.route.needs_alpha and item.alpha is None and item.delta is not None:
        job.refuse("KeyError for modules without alpha", item.stem)
    if item.misfit:
        if job.consumer.misfit == REJECTED:
            job.refuse("size mismatch", f"{item.stem}: {item.misfit}")
        return Finding(item.stem, IGNORED, "shape", item.misfit)
    if site is not None and item.delta is not None:
        first = job.taken.setdefault(site, item.stem)
        if first != item.stem:
            return Finding(item.stem, IGNORED, "twice", "one of two names for the same weight is lost")
    return None


def _broken(item: Item, job: Job) -> Finding:
    """Factors that do not go together. An up factor alone stops a loader that looks up its partner."""
    if any(slot == "up" for _, slot in item.group.entries):
        job.refuse(f"{job.route.error}: {item.problem}")
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
