"""Ctrl-C: where it has to wait.

An interrupt raises KeyboardInterrupt between any two steps of the main thread, which is right everywhere but where a process or
a thread is started: what is half started is known to nobody, and a new process runs with its parent's handlers at first. There
it is held back, in this process and in the new one, and raised a moment later.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)
"""Those whose handlers may raise."""


@contextmanager
def held() -> Iterator[None]:
    """Let interrupts wait while this lasts. Threads and processes that are started meanwhile never get one.

    Handlers run on the main thread alone; on others there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    handlers = {number: found for number in NUMBERS if callable(found := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda *own: waiting.append(own))
    masks = hasattr(signal, "pthread_sigmask")  # not on Windows; without it the handlers above are enough in this process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else set()
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            first, frame = waiting[0]
            handlers[signal.Signals(first)](first, frame)


def ignored() -> None:
    """For a process that its parent ends: the terminal's interrupt is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
