"""Processes forked from this one: they share what it has read, and wait for nobody's interpreter."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from multiprocessing import get_context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from lorasurgery.errors import RequestError
from lorasurgery.interrupts import held, ignored

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

Result = TypeVar("Result")
STEP = 4 << 20
"""Bytes between two messages about how far a child is."""


class Turn:
    """A lock between forked processes: a byte in a pipe. While it waits, a process takes no time from the others."""

    def __init__(self) -> None:
        self._take, self._give = os.pipe()
        self.__exit__()

    def __enter__(self) -> None:
        os.read(self._take, 1)

    def __exit__(self, *_: object) -> None:
        os.write(self._give, b".")

    def close(self) -> None:
        """Of this process's ends; nobody here holds it any more."""
        os.close(self._take)
        os.close(self._give)


class Child(NamedTuple):
    """A forked process and this end of the pipe to it."""

    process: BaseProcess
    pipe: Connection


class Forks(Generic[Result]):
    """``count`` children that answer calls of ``function(number, tell)``, as it is when they are made.

    ``tell`` takes how many bytes were done since the last time. What a child changes in memory stays its own; it has no
    other threads of this process, so nothing that it needs may be held by one. A child ends with the block, and when this
    process is gone. Raises OSError when the system starts no more processes; none of them is left then.
    """

    def __init__(self, function: Callable[[int, Callable[[int], None]], Result], count: int) -> None:
        self._idle = SimpleQueue[Child]()
        self._children: list[Child] = []
        try:
            with held():
                for _ in range(count):
                    self._begin(function)
        except BaseException:  # too many processes, say
            self.__exit__()
            raise

    def _begin(self, function: Callable[[int, Callable[[int], None]], Result]) -> None:
        """One more child."""
        context = get_context("fork")
        ours, theirs = context.Pipe()
        others = [ours, *(child.pipe for child in self._children)]
        process = context.Process(target=_serve, args=(function, theirs, others), daemon=True)
        process.start()
        theirs.close()
        self._children.append(Child(process, ours))
        self._idle.put(self._children[-1])

    def call(self, number: int, tell: Callable[[int], None]) -> Result:
        """What the function returns for ``number`` in an idle child, or raises; for as many threads as there are children.

        ``tell`` is told, here, of bytes done; what it raises ends the call. Raises RequestError when the child is gone.
        """
        child = self._idle.get()
        try:
            child.pipe.send(number)
            while isinstance(message := child.pipe.recv(), int):
                tell(message)
        except (EOFError, ConnectionError):
            child.process.join()
            code = child.process.exitcode or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
            raise RequestError(f"a worker process {how}", hint="--workers 1, which needs least memory") from None
        self._idle.put(child)
        if isinstance(message, BaseException):
            raise message
        result: Result = message[0]
        return result

    def __enter__(self) -> Forks[Result]:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.pipe.close()
            child.process.kill()
            child.process.join()


def _serve(function: Callable[[int, Callable[[int], None]], Any], pipe: Connection, others: list[Connection]) -> None:
    """A child's life: numbers come in; how many bytes are done goes out, and (result,) or an error."""
    ignored()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in others:  # this one would never see the end of its own otherwise
        other.close()
    with suppress(EOFError, ConnectionError):  # the parent has closed its end, or is gone
        while True:
            pipe.send(_answer(function, pipe.recv(), _Counter(pipe)))


def _answer(function: Callable[[int, Callable[[int], None]], Any], number: int, tell: _Counter) -> object:
    try:
        result = function(number, tell)
    except ConnectionError:
        raise
    except BaseException as error:  # noqa: BLE001  raised again by the parent
        return error
    tell.rest()
    return (result,)


class _Counter:
    """Tells the parent now and then: each message takes both of them some microseconds."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._held = pipe, 0

    def __call__(self, size: int) -> None:
        self._held += size
        if self._held >= STEP:
            self.rest()

    def rest(self) -> None:
        """Tell what is left."""
        self._pipe.send(self._held)
        self._held = 0
