"""Work on a torch device in halves where its memory is too small for all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Item = TypeVar("Item")
    Result = TypeVar("Result")

FULL = ("out of memory", "ALLOC_FAILED")
"""In the messages of torch.OutOfMemoryError, of cuBLAS and cuSOLVER, and of mps, which raises a RuntimeError."""


class DeviceFullError(Exception):
    """The device's memory is too small for one item."""


def in_halves(items: Sequence[Item], work: Callable[[Sequence[Item]], list[Result]]) -> list[Result]:
    """``work`` on all items together; where the device has no memory left, on each half of them in turn, and so on.

    Raises DeviceFullError where it has too little for one item.
    """
    try:
        return work(items)
    except RuntimeError as error:
        if not any(words in str(error) for words in FULL):
            raise
    # Not above: the exception holds on to the tensors of the first try.
    if len(items) < 2:
        raise DeviceFullError
    half = len(items) // 2
    return in_halves(items[:half], work) + in_halves(items[half:], work)
