"""Numbers times a factor, in the same or another dtype, rounded once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.rounding import wide
from lorasurgery.io.dtypes import BITS, numpy_dtype

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Array

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

    def exact(self, array: Array) -> Array:
        """The products, in the dtype to calculate in."""
        exact = array.astype(wide(self._source))
        exact *= exact.dtype.type(self._factor)
        return exact

    def into(self, array: Array, result: Array) -> None:
        """Write the products into ``result``, of the same shape. What is beyond its range becomes infinite."""
        self._seen += array.size
        if BITS[self._source] != SMALL or self._seen < 1 << SMALL:
            with np.errstate(over="ignore", invalid="ignore"):  # refused with its key when it is written
                result[...] = self.exact(array)
            return
        if self._values is None:
            self._tabulate()
        assert self._values is not None  # noqa: S101  just made
        bits = f"u{result.itemsize}"
        result.view(bits)[...] = self._values.view(bits).take(array.view(np.uint16), mode="clip")

    def is_exact(self, array: Array, result: Array) -> bool:
        """Whether ``result``, as :meth:`into` made it, is the product itself everywhere."""
        if self._exact is not None:
            return bool(self._exact.take(array.view(np.uint16), mode="clip").all())
        exact = self.exact(array)
        return np.array_equal(result.astype(exact.dtype), exact)

    def _tabulate(self) -> None:
        every = np.arange(1 << SMALL, dtype=np.uint32).astype(np.uint16).view(numpy_dtype(self._source))
        with np.errstate(all="ignore"):
            exact = self.exact(every)
            values = exact.astype(self._dtype)
            self._exact = (values.astype(exact.dtype) == exact) & np.isfinite(exact)
        self._values = values


@lru_cache(maxsize=32)
def times(source: str, dtype: str, factor: float) -> Times:
    """One :class:`Times` for all tensors of a file that are multiplied alike."""
    return Times(source, dtype, factor)
