"""Stored values to numbers to calculate with, and back, rounded to nearest or stochastically."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorasurgery.io.dtypes import numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Work = NDArray[Any]


class Format(NamedTuple):
    """A binary format: stored bits of the mantissa, the exponent of its smallest normal number, its largest number."""

    mantissa: int
    lowest: int
    largest: float


FORMATS = MappingProxyType(
    {
        "F64": Format(52, -1022, float(np.finfo(np.float64).max)),
        "F32": Format(23, -126, float(np.finfo(np.float32).max)),
        "BF16": Format(7, -126, 3.3895313892515355e38),
        "F16": Format(10, -14, 65504.0),
        "F8_E4M3": Format(3, -6, 448.0),
        "F8_E5M2": Format(2, -14, 57344.0),
    }
)
"""By safetensors' names. Sources: IEEE 754, ml_dtypes' finfo."""


def work_dtype(dtype: str) -> str:
    """What to calculate in: float32 for 16 and 8 bit weights, which it holds exactly, float64 for wider ones."""
    return "float64" if dtype in {"F32", "F64"} else "float32"


def nearest(values: Work, dtype: str, out: Work | None = None) -> Work:
    """Rounded to nearest, ties to even, into ``out`` where it is given; what is out of range becomes infinite or NaN."""
    rounded = np.empty(values.shape, numpy_dtype(dtype)) if out is None else out
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(rounded, values, casting="unsafe")
    return rounded


def surely_finite(values: Work, dtype: str) -> bool:
    """Whether the norm of the values alone shows that none of them is NaN, infinite or out of range.

    numpy warns of those, unless it is told not to.
    """
    flat = values.reshape(-1)
    return float(np.dot(flat, flat)) < min(FORMATS[dtype].largest, 1e18) ** 2


def stochastic(values: Work, dtype: str, random: np.random.Generator) -> Work:
    """One of the two neighbours in ``dtype``, either with the probability that makes the mean the value; not cast yet.

    Random bits are added below the last one that stays, and cut off. Below the smallest normal number, where steps are
    equal, that number is added before and taken off afterwards, which makes the bits of a step the same everywhere.
    """
    own, wide = FORMATS[dtype], FORMATS["F64" if values.dtype == np.float64 else "F32"]
    spare = wide.mantissa - own.mantissa
    if spare <= 0:
        return values
    unsigned = np.uint64 if values.dtype == np.float64 else np.uint32
    size = 8 * values.dtype.itemsize
    magnitudes = np.abs(values)
    least = values.dtype.type(2.0**own.lowest if own.lowest > wide.lowest else 0.0)
    offsets = (magnitudes < least) * least
    magnitudes += offsets
    bits = random.integers(0, 1 << size, values.shape, dtype=unsigned)
    bits >>= unsigned(size - spare)
    bits += magnitudes.view(unsigned)
    bits &= unsigned((1 << size) - (1 << spare))
    result: Work = bits.view(values.dtype)
    result -= offsets
    return np.copysign(result, values, out=result)


def spacing(values: Work, dtype: str) -> Work:
    """The distance from each number to the next in ``dtype``, away from zero."""
    own = FORMATS[dtype]
    _, exponents = np.frexp(np.maximum(np.abs(values), 2.0**own.lowest).astype(np.float64))
    steps: Work = np.ldexp(1.0, exponents - 1 - own.mantissa)
    return steps
