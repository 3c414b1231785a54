"""The command that mends a file for a program: tried in memory on this very file, on headers alone, before it is offered."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.adapter import written_in
from lorasurgery.checking.advice import saved_split
from lorasurgery.checking.emitted import hollow, in_memory
from lorasurgery.checking.result import CHANGED, LOADS
from lorasurgery.errors import SurgeryError
from lorasurgery.layouts.targets import layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorasurgery.checking.result import Result
    from lorasurgery.checking.rules import Consumer, Route
    from lorasurgery.checking.subject import Subject
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.targets import Layout

FAILURES = (SurgeryError, ArithmeticError, LookupError, OSError, TypeError, ValueError)
"""A file that cannot be converted is no reason to give no verdict."""


class Mend(NamedTuple):
    """A command whose result is known, or why there is none."""

    command: str | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class _Way:
    """One conversion: the words of its command after input and output, and what it makes of the file."""

    suffix: str
    words: tuple[str, ...]
    verb: str = "convert"
    as_lora: bool = False
    lossy: bool = False


def mend(subject: Subject, consumer: Consumer, route: Route | None, result: Result, check: Callable[[Subject], Result]) -> Mend:
    """The first conversion whose result ``check`` calls complete, else the one of which most loads, else why there is none."""
    chosen = consumer.layout if route is None or route.layout is None else route.layout
    has_loader = bool(consumer.models.get(subject.architecture.id, consumer.default))
    if chosen is None or result.complete or not subject.items or subject.raw is None or not has_loader:
        return Mend(None)
    raw, best, most, why = hollow(subject.raw), Mend(None), _worth(result), ""
    for way in _ways(chosen, subject):
        try:
            after, left = _tried(way, layout(chosen), subject, raw, check)
        except FAILURES as error:
            why = why or (error.message if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}")
            continue
        if after.complete:
            return Mend(_command(way, subject, consumer), _left_out(left))
        why = why or after.verdict
        if _worth(after) > most:
            best, most = Mend(_command(way, subject, consumer), f"after the command below it {after.verdict}"), _worth(after)
    return best if best.command else Mend(None, f"no conversion makes a file that {consumer.name} loads completely: {why}")


def _worth(result: Result) -> int:
    """How much of a file is used: modules that load count twice, those with another effect once."""
    return 0 if result.refusals or result.failures else 2 * result.counts[LOADS] + result.counts[CHANGED]


def _ways(target: str, subject: Subject) -> Iterator[_Way]:
    """Exact ones first, then those that leave something out."""
    for lossy in (False, True):
        for as_lora in (False, True):
            words = ("--target", target, *(["--as", "lora"] if as_lora else []), *(["--lossy"] if lossy else []))
            yield _Way(target, words, as_lora=as_lora, lossy=lossy)
    if any(item.site is None for item in subject.items):
        key = subject.architecture.key
        yield _Way(key, ("--prune-for", key), verb="prune")


def _command(way: _Way, subject: Subject, consumer: Consumer) -> str:
    path = subject.path
    name = path.stem if path.suffix else path.name
    suffix = "" if consumer.folder else ".safetensors"
    words = ["lorasurgery", way.verb, str(path), str(path.with_name(f"{name}-{way.suffix}{suffix}")), *way.words]
    words += ["--fix-split-alpha"] if way.verb == "convert" and saved_split(subject) else []
    return shlex.join([*words, *(["--arch", subject.architecture.id] if subject.candidates and way.verb == "convert" else [])])


def _left_out(left: list[str]) -> str:
    if not left:
        return ""
    rest = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return f"the command below leaves out {left[0]}{rest}; that is a choice"


def _tried(
    way: _Way, target: Layout, subject: Subject, raw: RawFile, check: Callable[[Subject], Result]
) -> tuple[Result, list[str]]:
    """The verdict on a conversion's result, and what it left out."""
    from lorasurgery.checking.subject import subject_of
    from lorasurgery.files.read import parse
    from lorasurgery.layouts.emit import emit
    from lorasurgery.operations.conversion.convert import Options, convert
    from lorasurgery.verbs.prune import PruneOptions, prune

    if way.verb == "prune":
        made, pruned = prune(parse(raw, configs=subject.configs), PruneOptions(target=way.words[-1]))
        made, report = convert(made)
        left = [name for name, _ in pruned.dropped]
    else:
        options = Options(as_lora=way.as_lora, lossy=way.lossy, fix_split_alpha=saved_split(subject))
        made, report = convert(parse(raw, among=(subject.architecture,), configs=subject.configs), target.id, options)
        left = []
    target = written_in(made)
    after, configs = in_memory(emit(made, target, report), made.architecture, target)
    left += [name for name, _ in report.dropped]
    return check(subject_of(after, among=(subject.architecture,), configs=configs)), left
