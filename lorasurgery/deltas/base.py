"""What every kind of delta offers, and how a number is folded into one of its factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import frexp, sqrt
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lorasurgery.errors import SurgeryError
from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.io.tensors import computed

if TYPE_CHECKING:
    from lorasurgery.deltas.low_rank import LowRank
    from lorasurgery.io.tensors import Float64, Ranges, Shape, Tensor

Record = Callable[[float, float], None]
"""Called with (squared error, squared norm) when a rounded tensor has been computed."""


class CannotError(SurgeryError):
    """A delta cannot do this exactly; the message is the reason. Callers add the module and the options that would."""


@runtime_checkable
class Delta(Protocol):
    """One module's change of one weight, without its scale.

    ``shape`` is (out, in[, k...]); a flat convolution factor gives (out, in*k*k). ``rank`` is None where the word has no
    meaning. ``tensors`` maps the family's own slot names to the file's tensors.
    """

    @property
    def family(self) -> str:
        """``lora``, ``loha``, ``lokr``, ``full``, ``norm``, ..."""
        ...

    @property
    def shape(self) -> Shape:
        """(out, in[, k...])."""
        ...

    @property
    def rank(self) -> int | None:
        """What alpha is divided by."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Slot -> tensor."""
        ...

    def rows(self, ranges: Ranges) -> Delta:
        """The delta of these output rows, in this order; raises CannotError when it has another structure."""
        ...

    def scaled(self, factor: float, record: Record | None = None) -> Delta:
        """The delta times ``factor``, folded into one factor."""
        ...

    def cast(self, dtype: str, record: Record | None = None) -> Delta:
        """The same in another dtype; ``record`` gets what rounding each factor cost."""
        ...

    def dense(self) -> Float64:
        """The whole delta in float64, without the scale; raises CannotError when it needs the base weight."""
        ...

    def to_low_rank(self) -> LowRank:
        """The same delta as up @ down, exactly (products are float64: cast them).

        Raises CannotError when it needs the base weight.
        """
        ...


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
