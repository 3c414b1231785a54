"""The one engine: a file, a program's table, a verdict for every module."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.checking.advice import notes
from lorasurgery.checking.effect import effect
from lorasurgery.checking.job import Job
from lorasurgery.checking.layers import without_numbers
from lorasurgery.checking.mending import mend
from lorasurgery.checking.names import names_of
from lorasurgery.checking.result import CHANGED, IGNORED, LOADS, REJECTED, UNKNOWN, Finding, Result
from lorasurgery.deltas.full import Opaque
from lorasurgery.files.read import said_of
from lorasurgery.layouts.names import PREFIXES
from lorasurgery.layouts.sd_scripts_oft import listed, unfit
from lorasurgery.layouts.words import ALPHA, BIAS, EXTRA, LORA, MAGNITUDE, SPARSE
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.checking.names import Known
    from lorasurgery.checking.rules import Consumer, Has, Route
    from lorasurgery.checking.subject import Item, Subject
    from lorasurgery.layouts.entry import Entry
    from lorasurgery.site import Site

HARMLESS = "harmless"
IA3, VECTOR = "ia3", ".on_input"
"""LyCORIS calls the vector of an (IA)^3 plain ``weight``, beside this word."""


def check(subject: Subject, consumer: Consumer) -> Result:
    """What ``consumer`` makes of a file, and the command that mends it."""
    result, route = verdict_of(subject, consumer)
    if not result.known:
        return result
    found = mend(subject, consumer, route, result, lambda other: verdict_of(other, consumer)[0])
    said = (*notes(subject, consumer, route, result), *([found.note] if found.note else []))
    return replace(result, notes=said, mend=found.command)


def verdict_of(subject: Subject, consumer: Consumer) -> tuple[Result, Route | None]:
    """The first route whose conditions the keys meet reads all of the file."""
    routes = consumer.models.get(subject.architecture.id, consumer.default)
    if not routes:
        return _no_model(subject, consumer), None
    if consumer.folder and not subject.layout_folder:
        return _result(subject, consumer, [], [f"{consumer.name} reads a folder with adapter_config.json, not a file"]), None
    if subject.numbered:
        text = f"cloneofsimo/lora's keys number the modules instead of naming them; {consumer.name} does not read that"
        return _result(subject, consumer, [Finding(i.stem, IGNORED, "name", text) for i in subject.items], []), None
    route = next((r for r in routes if _applies(r, subject)), None)
    if route is None:
        return _result(subject, consumer, [], [f"{consumer.name} has no way to read these keys"]), None
    return _read(subject, consumer, route), route


def _read(subject: Subject, consumer: Consumer, route: Route) -> Result:
    arch = subject.architecture
    absent = tuple(own for own in route.together if not any(re.search(own.key, key) for key in subject.keys))
    job = Job(arch, consumer, route, names_of(arch, route), absent, _shared_alpha(subject, route), {}, {}, [], set(), {})
    findings = [_judge(item, job) for item in subject.items]
    failures = without_numbers(job, subject) if route.layers else []
    unread = [key for key in subject.others if not re.search(f"{route.deletes}|{route.reads_keys}", key)]
    bad = [key for key in unread if not re.search(route.ignores_words, key)]
    bad += [key for key in subject.keys if re.search(route.refuses, key)]
    for key in bad:
        job.refuse(f"{route.error} for keys it does not know", key)
    passed = [*unread, *job.unread]
    if route.tolerates is not None and len(passed) > route.tolerates:
        job.refuse(f"it passes over a file with more than {route.tolerates} keys it does not know", *passed)
    if route.alike:
        _refuse_unlike(job, subject)
    refusals = [_refusal(reason, keys) for reason, keys in job.refusals.items()]
    return _result(subject, consumer, findings, [*refusals, *_missing(subject, route, job.known)], unread, failures)


def _refuse_unlike(job: Job, subject: Subject) -> None:
    """Note why sd-scripts' OFT network does not take the modules."""
    known = {item.stem: item for item in subject.items if item.stem in job.known.sites}
    alphas = {stem: None if (own := item.alpha) is None else own.item() for stem, item in known.items()}
    model = job.architecture.id
    found = {
        stem: (listed(model, item.delta) if isinstance(item.delta, Opaque) else item.delta, alphas[stem])
        for stem, item in known.items()
    }
    problem = unfit(model, found)
    if problem:
        job.refuse(problem)


def _shared_alpha(subject: Subject, route: Route) -> float | None:
    """What a module without alpha gets: the most frequent of the file's, where the loader fills it in."""
    alphas = [i.alpha.item() for i in subject.items if i.alpha is not None and i.alpha.size == 1] if route.shares_alpha else []
    return Counter(alphas).most_common(1)[0][0] if alphas else None


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
    unread: Sequence[str] = (),
    failures: Sequence[str] = (),
) -> Result:
    if refusals:
        own = {f.module: f for f in findings}
        rejected = Finding("", REJECTED, "file", refusals[0])
        findings = [rejected._replace(module=i.stem, **_kept(own.get(i.stem))) for i in subject.items]
    return Result(
        str(subject.path), consumer, subject.architecture.key, subject.candidates, tuple(findings),
        tuple(dict.fromkeys(refusals)), failures=tuple(failures), counts=Counter(f.status for f in findings),
        unread_keys=tuple(key for key in unread if said_of(key)[1] != HARMLESS),
    )  # fmt: skip


def _kept(finding: Finding | None) -> dict[str, str]:
    """The reason a module has of its own, in a file that is refused as a whole."""
    return {"reason": finding.reason, "text": finding.text} if finding is not None and finding.status != LOADS else {}


# one module -------------------------------------------------------------------------------------------------------------


def _judge(item: Item, job: Job) -> Finding:
    """The verdict of one module; what makes the loader refuse the file goes to ``refusals``."""
    route = job.route
    entries = [e for e in item.group.entries.values() if not re.search(route.deletes, e.key)]
    reads = next((words for names, words in route.words if re.search(names, item.stem)), route.reads)
    unread = [e for e in entries if e.suffix not in reads and not (e.word.family == IA3 and VECTOR in reads)]
    without = next((own for own in job.absent if re.search(own.names, item.stem)), None)
    if without is not None:
        job.leave(item, [e for e in entries if not re.search(without.passed, e.key)], route.ignores_names)
        return Finding(
            item.stem, IGNORED, "name", f"{job.consumer.name} reads these names only beside keys that fit {without.key}"
        )
    for strange in (e.key for e in unread if not re.search(route.ignores_words, e.key)):
        job.refuse(f"{route.error} for keys it does not read", strange)
    unread += _lonely(item, entries, unread, job)
    site = job.known.sites.get(item.stem)
    if site is None and re.search(route.also, item.stem) is None:
        job.layer(item.stem, entries, unread, known=False)
        job.unread.extend(e.key for e in entries)
        for strange in (e.key for e in entries if not re.search(route.ignores_names, e.key)):
            job.refuse(f"{route.error} for keys it does not know", strange)
        return Finding(item.stem, IGNORED, *_unknown_name(item, job))
    job.unread.extend(e.key for e in unread)
    if site is not None and site.component == DENOISER:
        job.layer(item.stem, entries, unread, known=True)
    if item.problem:
        return _broken(item, unread, job)
    return _unread(item, unread, job) or _misplaced(item, site, job) or effect(item, site, job, unread)


def _unread(item: Item, unread: Sequence[Entry], job: Job) -> Finding | None:
    """A module whose factors have words that are not read."""
    core = next((e for e in unread if e.word.family not in (ALPHA, BIAS, EXTRA, MAGNITUDE)), None)
    if core is None:
        return None
    lora = item.group.slots(LORA) and not any(e.word.family == LORA for e in unread)
    if core.word.family == SPARSE and lora:  # LyCORIS' residual beside a LoRA, which is read without it
        return Finding(item.stem, CHANGED, "suffix", f"{job.consumer.name} reads its LoRA and does not read {core.suffix}")
    return Finding(item.stem, IGNORED, "suffix", f"{job.consumer.name} does not read {core.suffix}")


def _lonely(item: Item, entries: Sequence[Entry], unread: Sequence[Entry], job: Job) -> list[Entry]:
    """Tensors that are not read because others of their module are missing; that may stop the loader, too."""
    found: list[Entry] = []
    have = {e.suffix for e in entries}
    strange = any(e.word.family not in (ALPHA, BIAS, EXTRA, MAGNITUDE) for e in unread)
    for need in job.route.needs:
        if strange and not need.names:
            continue
        given = [e for e in entries if re.search(need.given, e.suffix)]
        if not given or not re.search(need.names, item.stem) or all(have & words for words in need.words):
            continue
        if need.error:
            lacking = " or ".join(sorted(next(words for words in need.words if not have & words)))
            job.refuse(f"{need.error}: a module with {given[0].suffix} has no {lacking}", item.stem)
        else:
            found += given
    return found


def _misplaced(item: Item, site: Site | None, job: Job) -> Finding | None:
    """A module that is known by name and still finds no place."""
    if item.misfit:
        if job.consumer.misfit == REJECTED:
            job.refuse("size mismatch", f"{item.stem}: {item.misfit}")
        return Finding(item.stem, IGNORED, "shape", item.misfit)
    if site is not None and item.delta is not None:
        first = job.taken.setdefault(site, item.stem)
        if first != item.stem:
            return Finding(item.stem, IGNORED, "twice", "one of two names for the same weight is lost")
    return None


def _broken(item: Item, unread: Sequence[Entry], job: Job) -> Finding:
    """Factors that do not go together. An up factor alone stops a loader that looks up its partner."""
    passed = {e.word.family for e in unread}
    slots = item.group.slots(LORA)
    if len(item.group.families()) > 1 and LORA not in passed and {"down", "up"} <= slots.keys():
        return Finding(item.stem, CHANGED, "suffix", f"{job.consumer.name} reads its LoRA and does not read {unread[0].suffix}")
    if "up" in slots and not job.route.layers:
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
