"""What is counted of a pretended accelerator: bytes in use, copies, and how often the host waits."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import NamedTuple

import torch

NAMES = {"cuda": ("cuda:0", "cuda:1"), "mps": ("mps:0",)}
WAITING = ("aten._linalg_eigh", "aten._linalg_svd", "aten.nonzero", "aten.equal")
"""Operations that make the host wait: they hand a number to it, or look whether a decomposition failed."""


class Copy(NamedTuple):
    """One transfer."""

    to_device: bool
    bytes: int
    waits: bool


class Memory:
    """The numbers of one storage on a device, counted while anything refers to them."""

    def __init__(self, board: Board, place: str, size: int) -> None:
        board.reserve(place, size)
        weakref.finalize(self, board.release, place, size).atexit = False


class Board:
    """What happens on the devices of one kind, on any thread."""

    def __init__(self, kind: str, limit: int | None = None) -> None:
        self.kind, self.limit = kind, limit
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.copies: list[Copy] = []
        self.waits = self.refused = 0
        self._lock = threading.RLock()

    def reserve(self, place: str, size: int) -> None:
        """Raises OutOfMemoryError beyond the limit."""
        with self._lock:
            if self.limit is not None and self.alive[place] + size > self.limit:
                self.refused += 1
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self.alive[place] += size
            self.peak[place] = max(self.peak[place], self.alive[place])

    def release(self, place: str, size: int) -> None:
        """Give back."""
        with self._lock:
            self.alive[place] -= size

    def copied(self, size: int, *, to_device: bool, waits: bool = True) -> None:
        """Note a transfer."""
        with self._lock:
            self.copies.append(Copy(to_device, size, waits))
            self.waits += waits

    def ran(self, name: str) -> None:
        """Note an operation."""
        with self._lock:
            self.waits += name.startswith(WAITING)

    def has(self, place: torch.device | str | None) -> bool:
        """Whether a device is one of these."""
        return place is not None and torch.device(place).type == self.kind

    def named(self, place: torch.device | str) -> str:
        """With its index; raises RuntimeError for one that is not there."""
        device = torch.device(place)
        name = f"{self.kind}:{device.index or 0}"
        if name not in NAMES[self.kind]:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return name
