"""A file like another with some tensors changed: the same keys in the same order, everything else copied as bytes.

The places of all tensors are known before anything is computed, so workers write theirs while the rest is copied by the
kernel. Nothing has its name before it is complete.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from math import prod
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.io.dtypes import BITS
from lorasurgery.io.header import header_bytes, serialiser_order
from lorasurgery.io.in_place import header_of, header_text
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.io.sources import Region
from lorasurgery.io.tensors import zeros
from lorasurgery.io.writer import copy_region

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from contextlib import AbstractContextManager

    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Shape, Tensor

PIECE = 64 << 20
"""Bytes copied between two looks at whether to go on."""
WRITTEN = 1 << 18
"""Bytes handed to the system at a time. It takes memory for a file in pieces as large as what it is given: of 1 MiB there are
fewer at hand, and on a virtual machine they may have to come from the host first, which took longer than all the rest."""


class Skeleton(NamedTuple):
    """What a changed file begins with, and where each tensor's data goes."""

    head: bytes
    offsets: Mapping[str, int]


def skeleton(raw: RawFile, metadata: Mapping[str, str], shapes: Mapping[str, Shape] | None = None) -> Skeleton:
    """The header of ``raw`` with this metadata, its keys and data in their own order; ``shapes``: of tensors that have others.

    A PyTorch file's tensors are laid out as safetensors writes them.
    """
    if raw.path.suffix.lower() in TORCH_SUFFIXES:
        tensors = {n: _shaped(tensor, (shapes or {}).get(n, tensor.shape)) for n, tensor in raw.tensors.items()}
        head, offsets, at = header_bytes(tensors, metadata), {}, 0
        for name in serialiser_order(tensors):
            offsets[name], at = at, at + tensors[name].nbytes
    else:
        header = header_of(raw)
        if shapes:
            header = replace(header, entries=_moved(header.entries, shapes))
        text = header_text(header, metadata)
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        offsets = {name: entry["data_offsets"][0] for name, entry in header.entries.items()}
    return Skeleton(head, {name: len(head) + at for name, at in offsets.items()})


def _shaped(tensor: Tensor, shape: Shape) -> Tensor:
    return tensor if shape == tensor.shape else zeros(tensor.dtype, shape)


def _moved(entries: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Shape]) -> dict[str, Mapping[str, Any]]:
    """The entries in their order, some of other shapes, the data of all one behind the other in the order that it has."""
    at, places = 0, {}
    for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
        entry = entries[name]
        shape = shapes.get(name, tuple(entry["shape"]))
        end = at + prod(shape) * BITS[entry["dtype"]] // 8
        places[name] = {**entry, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return {name: places[name] for name in entries}


class Output:
    """A file that several threads or processes write at once, each at its own places.

    ``turn``: what each write waits for. The system lets one process at a time write a file, and the next one does not sleep
    until it may: it takes a core that a third one could calculate on.
    """

    def __init__(self, fd: int, turn: AbstractContextManager[None] | None = None) -> None:
        self._fd, self._lock, self._turn = fd, Lock(), turn or nullcontext()
        self._parallel = hasattr(os, "pwrite")

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """All of ``data`` at ``offset``."""
        view = memoryview(data).cast("B")
        while view:
            count = self._some(view, offset)
            view, offset = view[count:], offset + count

    def _some(self, view: memoryview, offset: int) -> int:
        if self._parallel:
            with self._turn:
                return os.pwrite(self._fd, view[:WRITTEN], offset)
        with self._lock:  # Windows has no pwrite
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.write(self._fd, view[:WRITTEN])

    def copy(self, region: Region, offset: int) -> None:
        """A region's bytes at ``offset``, inside the kernel where it can; for one thread at a time."""
        with self._lock:
            os.lseek(self._fd, offset, os.SEEK_SET)
            copy_region(self._fd, region)


def copy_rest(
    raw: RawFile, output: Output, offsets: Mapping[str, int], changed: Collection[str], done: Callable[[int], None]
) -> None:
    """Copy every tensor but the changed ones; neighbours go together. ``done`` is told how many bytes went."""
    for region, offset in _gaps(raw, offsets, changed):
        for at in range(0, region.length, PIECE):
            length = min(PIECE, region.length - at)
            output.copy(Region(region.source, region.offset + at, length), offset + at)
            done(length)


def _gaps(raw: RawFile, offsets: Mapping[str, int], changed: Collection[str]) -> Iterator[tuple[Region, int]]:
    """(region, where it goes), one for each run of neighbours on both sides."""
    run: tuple[Region, int] | None = None
    for name in sorted((n for n in raw.tensors if n not in changed), key=lambda n: offsets[n]):
        at = offsets[name]
        for region in raw.tensors[name].regions:
            if run is not None and _follows(run, region, at):
                run = Region(region.source, run[0].offset, run[0].length + region.length), run[1]
            else:
                if run is not None:
                    yield run
                run = region, at
            at += region.length
    if run is not None:
        yield run


def _follows(run: tuple[Region, int], region: Region, offset: int) -> bool:
    before, at = run
    return before.source is region.source and before.offset + before.length == region.offset and at + before.length == offset
