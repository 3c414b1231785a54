"""What kinds of deltas share: the error of what cannot be done exactly, and how a number is folded into a factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import frexp, sqrt
from typing import TYPE_CHECKING

from lorasurgery.errors import SurgeryError
from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.io.tensors import computed

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Float64, Tensor

Record = Callable[[float, float], None]
"""Called with (squared error, squared norm) when a rounded tensor has been computed."""


class CannotError(SurgeryError):
    """A delta cannot do this exactly; the message is the reason. Callers add the module and the options that would."""


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying a float by ``factor`` only changes exponents."""
    return abs(frexp(factor)[0]) == 0.5


def power_of_two(exponent: int) -> float:
    """2.0 ** exponent."""
    return float(2.0**exponent)


def split_factor(factor: float) -> tuple[float, int]:
    """``factor`` as remainder * 2**exponent with the remainder in [1/sqrt(2), sqrt(2))."""
    mantissa, exponent = frexp(factor)
    if abs(mantissa) < sqrt(0.5):
        return mantissa * 2, exponent - 1
    return mantissa, exponent


def block_columns(tensors: Sequence[tuple[Tensor | None, int, int]], dtype: str) -> Tensor:
    """Blocks on the diagonal: for each (tensor, rows, columns), ``tensor`` (or zeros for None) at its own rows and columns."""
    height, width = sum(rows for _, rows, _ in tensors), sum(columns for _, _, columns in tensors)

    def place() -> Float64:
        import numpy as np

        whole = np.zeros((height, width), numpy_dtype(dtype))
        top = left = 0
        for tensor, rows, columns in tensors:
            if tensor is not None:
                whole[top : top + rows, left : left + columns] = tensor.array().reshape(rows, columns)
            top, left = top + rows, left + columns
        return whole

    return computed(dtype, (height, width), place)
