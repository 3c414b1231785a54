"""Numbers times a factor, in the same or another dtype, rounded once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.sampling import ALIKE
from lorasurgery.io.dtypes import BITS, numpy_dtype, wide

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Array, Float64

SMALL = 16
"""Bits of the dtypes that tables are made for."""


class Times:
    """Multiplies arrays of dtype ``source`` by ``factor``, calculated in :func:`wide` and rounded once to ``dtype``.

    A 16-bit tensor has at most 65536 different numbers: from as many numbers on they are multiplied once and looked up,
    which is several times as fast as numpy's conversions between fp16 and float32.
    """

    def __init__(self, source: str, dtype: str, factor: float) -> None:
        self._source, self._dtype, self._factor = source, numpy_dtype(dtype), factor
        self._values: Array | None = None
        self._exact: Array | None = None
        self._seen = 0

    def into(self, array: Array, result: Array) -> None:
        """Write the products into ``result``, of the same shape. What is beyond its range becomes infinite."""
        self._seen += array.size
        if BITS[self._source] != SMALL or self._seen < 1 << SMALL:
            with np.errstate(over="ignore", invalid="ignore"):  # refused with its key when it is written
                result[...] = self._product(array)
            return
        if self._values is None:
            self._tabulate()
        assert self._values is not None  # noqa: S101  just made
        bits = f"u{result.itemsize}"
        result.view(bits)[...] = self._values.view(bits).take(array.view(np.uint16), mode="clip")

    def true(self, array: Array) -> Float64:
        """The products in float64, whatever they were calculated in: what a rounding error is measured against."""
        with np.errstate(over="ignore", invalid="ignore"):
            product: Float64 = array.astype(np.float64)
            product *= self._factor
        return product

    def kept(self, array: Array, result: Array) -> Array:
        """Where ``result``, as :meth:`into` made it, is the product itself, as far as float64 tells: a boolean array."""
        if self._exact is not None:
            return self._exact.take(array.view(np.uint16), mode="clip")
        return same(result.astype(np.float64), self.true(array))

    def _product(self, array: Array) -> Array:
        product = array.astype(wide(self._source))
        product *= product.dtype.type(self._factor)
        return product

    def _tabulate(self) -> None:
        every = np.arange(1 << SMALL, dtype=np.uint32).astype(np.uint16).view(numpy_dtype(self._source))
        with np.errstate(all="ignore"):
            values = self._product(every).astype(self._dtype)
            self._exact = same(values.astype(np.float64), self.true(every))
        self._values = values


def same(stored: Float64, true: Float64) -> Array:
    """Where numbers are equal but for the last bits of a factor that has no end in binary, such as 0.7."""
    equal: Array = stored == true
    if not equal.all():
        with np.errstate(invalid="ignore"):
            equal |= np.abs(stored - true) <= ALIKE * np.abs(true)
    return equal


@lru_cache(maxsize=32)
def times(source: str, dtype: str, factor: float) -> Times:
    """One :class:`Times` for all tensors of a file that are multiplied alike."""
    return Times(source, dtype, factor)
