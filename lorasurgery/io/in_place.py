"""Other metadata in front of the same data: no tensor byte is decoded, moved or put in another order."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError, RequestError
from lorasurgery.io.header import MAX_HEADER, read_safetensors
from lorasurgery.io.sources import FileSource, Region
from lorasurgery.io.writer import copy_region, replacing, write_all

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.header import RawFile

NEW, IN_PLACE, REPLACED, UNCHANGED = "new file", "header rewritten in place", "replaced by a new file", "unchanged"


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says; unlike a RawFile it keeps no file open, so the file can be replaced on any system."""

    path: Path
    entries: Mapping[str, Mapping[str, Any]]
    """dtype, shape and data_offsets by name, in the file's own order."""
    metadata: Mapping[str, str]
    start: int
    """Where the data begins: the length prefix and the header take this many bytes."""
    size: int
    """Bytes in the file."""


def data_region(raw: RawFile) -> Region:
    """The data of all tensors as it lies on disk (the header was checked: no holes, nothing behind it)."""
    source = FileSource(raw.path)
    length = sum(tensor.nbytes for tensor in raw.tensors.values())
    return Region(source, source.size() - length, length)


def header_of(raw: RawFile) -> Header:
    """The header of a file that was read."""
    data = data_region(raw)
    entries = {}
    for name, tensor in raw.tensors.items():
        at = tensor.regions[0].offset - data.offset
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
    return Header(raw.path, entries, dict(raw.metadata), data.offset, data.offset + data.length)


def read_header(path: Path) -> Header:
    """The header of a file; raises what :func:`read_safetensors` raises."""
    return header_of(read_safetensors(path))


def header_text(header: Header, metadata: Mapping[str, str]) -> bytes:
    """The header's JSON with this metadata, the tensors where they are; raises RequestError when no reader would take it."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    text = json.dumps(entries | dict(header.entries), separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) + 7 > MAX_HEADER:
        raise RequestError(
            f"the header would be {len(text)} bytes, more than the {MAX_HEADER} the format allows",
            path=header.path,
            hint="a smaller thumbnail",
        )
    return text


def write_beside(header: Header, metadata: Mapping[str, str], out: Path) -> None:
    """Write the same tensors with this metadata to ``out``; it appears when it is complete."""
    text = header_text(header, metadata)
    text += b" " * (-len(text) % 8)
    source = FileSource(header.path)
    _same_file(header, source)
    with replacing(out) as fd:
        write_all(fd, len(text).to_bytes(8, "little") + text)
        copy_region(fd, Region(source, header.start, header.size - header.start))
        del source  # Windows replaces no file that is open


def rewrite(header: Header, metadata: Mapping[str, str]) -> str:
    """Give the file itself this metadata, and say how: ``IN_PLACE``, ``REPLACED`` or ``UNCHANGED``.

    The header is overwritten where the new one fits into the old one's length (the rest becomes spaces); otherwise, and
    where the file has another name (a hard link), a new file takes its place. A symbolic link is followed.
    """
    if list(metadata.items()) == list(header.metadata.items()):
        return UNCHANGED
    path = Path(os.path.realpath(header.path))
    text = header_text(header, metadata)
    status = path.stat()
    if len(text) > header.start - 8 or status.st_nlink > 1:
        write_beside(header, metadata, path)
        path.chmod(status.st_mode & 0o7777)
        return REPLACED
    _same_file(header, FileSource(path))
    fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    try:
        os.lseek(fd, 8, os.SEEK_SET)
        write_all(fd, text.ljust(header.start - 8))
        os.fsync(fd)
    finally:
        os.close(fd)
    return IN_PLACE


def _same_file(header: Header, source: FileSource) -> None:
    """Raises FileFormatError when the file is no longer the one whose header was read."""
    if source.size() != header.size or int.from_bytes(source.read(0, 8), "little") != header.start - 8:
        raise FileFormatError("the file changed while it was edited", path=header.path, hint="the same command again")
