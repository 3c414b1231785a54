"""The scalars of a file (alphas, flags, counters), read at once."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.io.sources import FileSource
from lorasurgery.io.tensors import of_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lorasurgery.io.header import RawFile
    from lorasurgery.io.sources import Region

SMALL = 8
"""Bytes of the largest scalar."""
SHAPE = 40
"""Bytes of the largest shape: five numbers."""
NEAR = 4096
"""Bytes between two scalars that are read along rather than with a call of its own."""


def with_scalars(raw: RawFile) -> RawFile:
    """The file with its scalars (alphas, flags) read, neighbours at once; the kernel is told of all before the first."""
    scalars = [
        (t.regions[0], name)
        for name, t in raw.tensors.items()
        if len(t.regions) == 1 and t.regions[0].length <= SMALL and t.size == 1
    ]
    runs = [(own[0][0].source, own[0][0].offset, own[-1][0].offset + own[-1][0].length, own) for own in _runs(scalars)]
    if hasattr(os, "posix_fadvise"):
        for source, begin, end, _ in runs:
            if isinstance(source, FileSource):
                os.posix_fadvise(source.descriptor(), begin, end - begin, os.POSIX_FADV_WILLNEED)
    tensors = dict(raw.tensors)
    for source, begin, end, own in runs:
        data = source.read(begin, end - begin)
        for region, name in own:
            at = region.offset - begin
            tensors[name] = of_bytes(tensors[name].dtype, tensors[name].shape, data[at : at + region.length])
    return replace(raw, tensors=tensors)


def _runs(scalars: Iterable[tuple[Region, str]]) -> list[list[tuple[Region, str]]]:
    """Regions, with their names, that are read at once: they lie in one file and near each other."""
    runs: list[list[tuple[Region, str]]] = []
    for own in sorted(scalars, key=lambda one: (id(one[0].source), one[0].offset)):
        last = runs[-1][-1][0] if runs else None
        if last is not None and last.source is own[0].source and own[0].offset - last.offset <= NEAR:
            runs[-1].append(own)
        else:
            runs.append([own])
    return runs
