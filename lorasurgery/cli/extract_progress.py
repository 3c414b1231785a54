"""Progress on stderr: one line that is written over in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lorasurgery.cli.render import plain

if TYPE_CHECKING:
    from typing_extensions import Self

    from lorasurgery.verbs.extract import Step

TERMINAL, ELSEWHERE = 0.2, 10.0
"""Seconds between two lines."""
WIDTH = 79


class ProgressLine:
    """Called with each step."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown
        self._live = sys.stderr.isatty()
        self._started = self._last = time.monotonic()
        self._first: int | None = None
        self._written = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._written and self._live:
            _write("\r" + " " * WIDTH + "\r")

    def __call__(self, step: Step) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        if self._first is None:
            self._first = step.done
        if not self._shown or now - self._last < (TERMINAL if self._live else ELSEWHERE):
            return
        self._last, self._written = now, True
        done = step.done - self._first
        left = (now - self._started) * (step.total - step.done) / done if done else None
        text = f"{step.done / step.total:4.0%}  {'' if left is None else f'{duration(left)} left':<16} {plain(step.name)}"
        if self._live:
            _write("\r" + text[:WIDTH].ljust(WIDTH))
        else:
            _write(f"{text}\n")


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def duration(seconds: float) -> str:
    """``45 s``, ``2 min 5 s``, ``1 h 20 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
