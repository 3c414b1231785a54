"""What becomes of an interrupt that nobody catches: a word, not a traceback. Imports little, so that it can come first."""

from __future__ import annotations

import _thread
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType, TracebackType

STOPPED = 130
"""The exit code of a command that was interrupted."""
LATER = 0.02
"""Seconds after which an interrupt that came at a bad moment is tried again."""
IMPORTING = "<frozen importlib"
"""Begins the names of the files that Python's import is in: what is half imported fails in other words, and a library in C++
ends the process."""


def quiet() -> None:
    """Hooks for the process of a command; another program's stay.

    An interrupt waits until nothing is being imported; one in a place that cannot raise, a finaliser say, comes after it.
    """
    if (sys.excepthook, sys.unraisablehook) == (sys.__excepthook__, sys.__unraisablehook__):
        sys.excepthook, sys.unraisablehook = _uncaught, _unraisable
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)


def _interrupted(_number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith(IMPORTING) or frame.f_code is _unraisable.__code__:
            _once_more()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    if isinstance(what.exc_value, KeyboardInterrupt):
        _once_more()
    else:
        sys.__unraisablehook__(what)


def _once_more() -> None:
    """Interrupt this thread, the main one, again in a moment, whatever it does or waits for then."""
    _thread.start_new_thread(_interrupt, (_thread.get_ident(),))


def _interrupt(main: int) -> None:
    time.sleep(LATER)
    if hasattr(signal, "pthread_kill"):  # not on Windows
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()
