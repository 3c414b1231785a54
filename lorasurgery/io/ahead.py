"""Computing the next tensors while the writer copies: one worker, two tensors ahead, bounded memory.

One, because the steps are many and small enough to stay in the cache, and threads that take turns for the interpreter at
each of them are slower together than one is alone (measured: a fold took 20 % longer with two).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from lorasurgery.io.finite import computed_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from lorasurgery.io.tensors import Tensor

AHEAD = 2
LARGEST = 32 << 20
"""A tensor of more bytes is computed when its turn comes, so that only one such is in memory."""


class Ahead:
    """The bytes of computed tensors in the order given, computed on another thread."""

    def __init__(self, tensors: Mapping[str, Tensor], order: Sequence[str]) -> None:
        self._tensors = tensors
        self._waiting = deque(name for name in order if tensors[name].compute is not None and tensors[name].nbytes <= LARGEST)
        self._running: deque[tuple[str, Future[bytes | memoryview]]] = deque()
        self._pool: ThreadPoolExecutor | None = None

    def get(self, name: str) -> bytes | memoryview:
        """The bytes of the next computed tensor, ``name``; raises what computing it raised."""
        if self._tensors[name].nbytes > LARGEST:
            return computed_bytes(name, self._tensors[name])
        self._fill()
        due, future = self._running.popleft()
        assert due == name, "asked for out of order"  # noqa: S101  the writer's own order
        result = future.result()
        self._fill()
        return result

    def _fill(self) -> None:
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(1)
        while self._waiting and len(self._running) < AHEAD:
            name = self._waiting.popleft()
            self._running.append((name, self._pool.submit(computed_bytes, name, self._tensors[name])))

    def close(self) -> None:
        """Forget what was not asked for."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
