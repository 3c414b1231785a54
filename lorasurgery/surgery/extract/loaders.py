"""What the programs that an extracted file is for make of it, from its header."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.checking.consumers import CONSUMERS
from lorasurgery.checking.engine import check
from lorasurgery.checking.subject import subject_of
from lorasurgery.files.opened import read_unparsed
from lorasurgery.surgery.extract.options import DIFFUSERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.checking.result import Result
    from lorasurgery.checking.rules import Consumer
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.models import Model


def loader_notes(path: Path, models: Sequence[Model], arch: Architecture, target: Layout, *, asked: bool) -> list[str]:
    """A sentence for each of the target's programs where none of them loads all of the file at ``path``.

    ``arch`` is the table it was written by. For Diffusers, too, beside its own models, unless the target was ``asked`` for.
    """
    file = read_unparsed(path)
    arch = arch if arch.rows else _family(arch)
    subject = subject_of(file.raw, among=(arch,), configs=file.configs)
    named = [check(subject, own) for own in CONSUMERS.values() if own.name in target.reader and _knows(own, arch)]
    told = [] if any(result.complete for result in named) else named
    own = CONSUMERS[DIFFUSERS]
    if not asked and target.id != DIFFUSERS and all(model.layout == DIFFUSERS for model in models) and _knows(own, arch):
        told = [*told, check(subject, own)]
    return [_sentence(result) for result in told if result.known and not result.complete]


def _sentence(result: Result) -> str:
    return f"{result.consumer.name} {result.consumer.version}: {result.verdict}"


def _knows(consumer: Consumer, arch: Architecture) -> bool:
    """Whether it has the model at all."""
    return arch.id in consumer.models or bool(consumer.default)


def _family(lone: Architecture) -> Architecture:
    """For a text encoder alone: a family that has it at the same place."""
    return next(arch for arch in architectures().values() if set(lone.encoders) <= set(arch.encoders))
