"""What becomes of an interrupt that nobody catches: a word, not a traceback. Imports nothing, so that it can come first."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

STOPPED = 130
"""The exit code of a command that was interrupted."""


def quiet() -> None:
    """Hooks for the process of a command; another program's stay.

    An interrupt in a place that cannot raise, a finaliser say, is raised after it.
    """
    if (sys.excepthook, sys.unraisablehook) == (sys.__excepthook__, sys.__unraisablehook__):
        sys.excepthook, sys.unraisablehook = _uncaught, _unraisable


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("stopped\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    if isinstance(what.exc_value, KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    else:
        sys.__unraisablehook__(what)
