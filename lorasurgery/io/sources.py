"""Where a tensor's bytes lie: a file, memory, or nowhere (zeros)."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Source(Protocol):
    """Something bytes can be read from."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``; raises OSError when they are not there."""
        ...

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; raises OSError when the bytes are not there."""
        ...

    def descriptor(self) -> int | None:
        """A file descriptor for kernel-side copies, or None."""
        ...


class FileSource:
    """An open file, closed when nothing refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``; safe from several threads."""
        data = self._read_once(offset, length)
        while len(data) < length:
            more = self._read_once(offset + len(data), length - len(data))
            if not more:
                raise OSError(f"{self.path}: the file ended at byte {offset + len(data)} while it was read")
            data += more
        return data

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; safe from several threads."""
        count = os.preadv(self._fd, [view], offset) if hasattr(os, "preadv") else 0
        if count < len(view):
            view[count:] = self.read(offset + count, len(view) - count)

    def _read_once(self, offset: int, length: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._fd, length, offset)
        with self._lock:  # Windows has no pread
            os.lseek(self._fd, offset, os.SEEK_SET)
            return os.read(self._fd, length)

    def descriptor(self) -> int:
        """The open file descriptor."""
        return self._fd

    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._fd).st_size

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # a default: ``os`` may be gone at exit
        if (fd := getattr(self, "_fd", None)) is not None:
            close(fd)


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Bytes in memory."""

    data: bytes

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``."""
        return self.data[offset : offset + length]

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""
        view[:] = memoryview(self.data)[offset : offset + len(view)]

    def descriptor(self) -> None:
        """None: there is no file."""


@dataclass(frozen=True, slots=True)
class ZeroSource:
    """As many zero bytes as anybody wants: the rows of a missing member."""

    def read(self, offset: int, length: int) -> bytes:  # noqa: ARG002  the protocol's signature
        """``length`` zero bytes."""
        return bytes(length)

    def read_into(self, offset: int, view: memoryview) -> None:  # noqa: ARG002  the protocol's signature
        """Fill ``view`` with zeros."""
        view[:] = bytes(len(view))

    def descriptor(self) -> None:
        """None: there is no file."""


class Region(NamedTuple):
    """``length`` bytes of ``source`` from ``offset``."""

    source: Source
    offset: int
    length: int
