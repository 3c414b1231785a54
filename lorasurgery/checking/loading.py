"""What the programs that a layout is for make of a file that is about to be written, from its keys and shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.checking.consumers import CONSUMERS
from lorasurgery.checking.emitted import hollow, in_memory
from lorasurgery.checking.engine import verdict_of
from lorasurgery.checking.subject import subject_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.checking.result import Result
    from lorasurgery.checking.rules import Consumer
    from lorasurgery.checking.subject import Subject
    from lorasurgery.layouts.emit import Emitted
    from lorasurgery.layouts.targets import Layout


def loading_notes(emitted: Emitted, arch: Architecture, target: Layout) -> list[str]:
    """A sentence for each program that ``target`` is written for where none of them loads all of what was emitted.

    Empty for a file in its own spelling, which is for nobody in particular, for PEFT's folders, and for models that none of
    them has.
    """
    arch = family(arch)
    own = [consumer for consumer in CONSUMERS.values() if consumer.name in target.reader and knows(consumer, arch)]
    if target.own or target.folder or not own:  # a folder is refused where PEFT would not read it
        return []
    raw, configs = in_memory(emitted, arch, target)
    return sentences(subject_of(hollow(raw), among=(arch,), configs=configs), own)


def sentences(subject: Subject, consumers: Iterable[Consumer]) -> list[str]:
    """What each program says of a file, where none of them loads it completely."""
    results = [verdict_of(subject, own)[0] for own in consumers]
    return [] if any(result.complete for result in results) else [_sentence(result) for result in results if result.known]


def knows(consumer: Consumer, arch: Architecture) -> bool:
    """Whether a program has the model at all."""
    return arch.id in consumer.models or bool(consumer.default)


def family(arch: Architecture) -> Architecture:
    """For a text encoder alone a family that has it at the same place; any other table itself."""
    return arch if arch.rows else next(own for own in architectures().values() if set(arch.encoders) <= set(own.encoders))


def _sentence(result: Result) -> str:
    return f"{result.consumer.name} {result.consumer.version}: {result.verdict}"
