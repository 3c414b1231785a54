"""What Diffusers makes of a file that was extracted from its own models, for whatever program it was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.checking.consumers import CONSUMERS
from lorasurgery.checking.loading import family, knows, sentences
from lorasurgery.checking.subject import subject_of
from lorasurgery.files.opened import read_unparsed
from lorasurgery.verbs.extract.options import DIFFUSERS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.models import Model


def loader_notes(path: Path, models: Sequence[Model], arch: Architecture, target: Layout) -> list[str]:
    """A sentence where the models are Diffusers', the target is not, and Diffusers does not load all of the file.

    ``arch`` is the table it was written by.
    """
    own = CONSUMERS[DIFFUSERS]
    if target.id == DIFFUSERS or any(model.layout != DIFFUSERS for model in models):
        return []
    arch = family(arch)
    if not knows(own, arch):
        return []
    file = read_unparsed(path)
    return sentences(subject_of(file.raw, among=(arch,), configs=file.configs), [own])
