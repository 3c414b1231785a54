"""Every error this library raises, each with its data, so that the command line can format it.

An error says what was found, where, why it cannot be used, and what to do next. ``SurgeryError`` is the root; catching it
catches everything that is the file's or the request's fault. Programming errors stay ordinary Python exceptions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class SurgeryError(Exception):
    """The root of the tree: a message, the file it is about, and what to try next."""

    def __init__(self, message: str, *, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole, for a worker process's: exceptions are made again from their messages alone."""
        return _again, (type(self), self.message, vars(self))

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return where + self.message if not self.hint else f"{where}{self.message.rstrip('.')}. Try: {self.hint}"


def _again(kind: type[SurgeryError], message: str, state: dict[str, Any]) -> SurgeryError:
    error = kind.__new__(kind, message)
    vars(error).update(state)
    return error


class FileFormatError(SurgeryError):
    """The bytes are not a readable file of the kind they claim to be (truncated, HTML page, LFS pointer, bad header)."""


class NotAnAdapterError(SurgeryError):
    """A readable file, but not a LoRA-family adapter (a checkpoint, a ControlNet, LLLite, an embedding)."""


class UnknownArchitectureError(SurgeryError):
    """No table explains the module names; ``candidates`` holds the nearest tables with the share of modules they explain."""

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        hint: str | None = None,
        candidates: Sequence[tuple[str, float]] = (),
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.candidates = tuple(candidates)


class BrokenModuleError(SurgeryError):
    """One module's tensors do not fit together or do not fit the base weight; ``key`` is the key to look at."""

    def __init__(self, message: str, *, key: str, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.key = key


class ValueRangeError(SurgeryError):
    """A finite value has no finite counterpart in the dtype it is to be written in."""


class NotRepresentableError(SurgeryError):
    """The target cannot hold this exactly; ``module`` is the first module, the hint names options that would do it."""

    def __init__(self, message: str, *, module: str, path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.module = module


class DroppedKeysError(SurgeryError):
    """``--strict``: something would be left out of the result; ``keys`` lists it."""

    def __init__(self, message: str, *, keys: Sequence[str], path: str | Path | None = None, hint: str | None = None) -> None:
        super().__init__(message, path=path, hint=hint)
        self.keys = tuple(keys)


class OutputExistsError(SurgeryError):
    """The output is there already, or is the input itself."""


class RequestError(SurgeryError):
    """The options contradict each other or name something that does not exist."""


class NoRoomError(SurgeryError):
    """A device's memory is too small for one matrix."""
