"""A thread that does something with each block of a stream while the next one is made."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING

from lorasurgery.interrupts import held

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.io.sources import Region

    Item = Region | memoryview

CHUNK = 1 << 20
"""Bytes of a block."""
WAITING = 4
"""Blocks that may wait: they are in memory meanwhile."""


class Behind:
    """Does ``steps`` with everything that is added, in order.

    Hashing, copying and writing release the interpreter lock, so on two cores they take no extra time. Blocks must stay as
    they are until then; :meth:`spare` gives room for the next.
    """

    def __init__(self, *steps: Callable[[Item], None]) -> None:
        self._steps = steps
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=WAITING)
        self._done: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        with held():
            self._thread.start()

    def add(self, item: Item) -> None:
        """The next bytes of the stream; raises what a step raised."""
        self._queue.put(item)
        if self._failure is not None:
            raise self._failure

    def spare(self) -> memoryview:
        """Room for the next block: a bytearray that is done with, or a new one."""
        try:
            return memoryview(self._done.get_nowait())
        except queue.Empty:
            return memoryview(bytearray(CHUNK))

    def wait(self) -> None:
        """Until everything added so far is done."""
        self._queue.join()

    def close(self) -> None:
        """Stop when everything is done; idempotent."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def finish(self) -> None:
        """:meth:`close`; raises what a step raised."""
        self.close()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._failure is None:
                try:
                    for step in self._steps:
                        step(item)
                except Exception as error:  # noqa: BLE001  raised again where the stream is made, which would wait for ever
                    self._failure = error
            if isinstance(item, memoryview) and isinstance(item.obj, bytearray):
                self._done.put(item.obj)
            item = None  # not in memory while it waits for the next
            self._queue.task_done()
