"""Tensors that know their dtype, their shape and how to get their bytes, and hold none until asked.

A tensor is either bytes that lie somewhere (``Stored``: file regions, so that renames, row slices, row permutations and
stacks move bytes and need no arithmetic), or a function that yields an array when the writer comes to it (``Computed``).
numpy is imported only when an array is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import SurgeryError
from lorasurgery.io.dtypes import BITS, cast_array, numpy_dtype, scalar_value, widest
from lorasurgery.io.sources import MemorySource, Region, ZeroSource

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Float64 = NDArray[np.float64]

Shape = tuple[int, ...]
Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Tensor:
    """A dtype (safetensors name), a shape, and either regions whose bytes follow each other or a function."""

    dtype: str
    shape: Shape
    regions: tuple[Region, ...] = ()
    compute: Callable[[], Array] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * BITS[self.dtype] // 8

    @cached_property
    def _numpy_dtype(self) -> np.dtype[Any]:
        return numpy_dtype(self.dtype)

    def array(self) -> Array:
        """The values in the tensor's own dtype (bf16 and fp8 through ``ml_dtypes``)."""
        import numpy as np

        if self.compute is not None:
            return cast_array(np.asarray(self.compute()), self.dtype).reshape(self.shape)
        return np.frombuffer(self.tobytes(), dtype=self._numpy_dtype).reshape(self.shape)

    def f64(self) -> Float64:
        """The values in float64."""
        import numpy as np

        return self.array().astype(np.float64)

    def f32(self) -> NDArray[np.float32]:
        """The values in float32 (exact for every 16 and 8 bit dtype)."""
        import numpy as np

        return self.array().astype(np.float32)

    def tobytes(self) -> bytes:
        """The bytes as they stand in a file: little endian, row major."""
        if self.compute is not None:
            return bytes(self.buffer())
        if len(self.regions) == 1:
            region = self.regions[0]
            return region.source.read(region.offset, region.length)
        return b"".join(r.source.read(r.offset, r.length) for r in self.regions)

    def buffer(self) -> bytes | memoryview:
        """:meth:`tobytes` without a copy of what was computed."""
        if self.compute is None:
            return self.tobytes()
        import numpy as np

        return np.ascontiguousarray(self.array()).reshape(-1).view(np.uint8).data

    def item(self) -> float:
        """The value of a tensor with one element."""
        return scalar_value(self.dtype, self.tobytes())

    def reshape(self, *shape: int) -> Tensor:
        """The same values in another shape of the same size."""
        if prod(shape) != self.size:
            raise ValueError(f"cannot see {self.shape} as {shape}")
        if self.compute is not None:
            return Tensor(self.dtype, shape, compute=lambda: self.array().reshape(shape))
        return Tensor(self.dtype, shape, self.regions)

    def rows(self, ranges: Ranges) -> Tensor:
        """The rows of axis 0 in ``ranges``, in that order; raises SurgeryError when rows do not begin on whole bytes."""
        shape = (sum(stop - start for start, stop in ranges), *self.shape[1:])
        if list(ranges) == [(0, self.shape[0])]:
            return self
        if self.compute is not None:
            return Tensor(self.dtype, shape, compute=lambda: _take(self.array(), ranges))
        row, bits = divmod(prod(self.shape[1:]) * BITS[self.dtype], 8)
        if bits:
            raise SurgeryError(f"rows of {self.shape[1:]} {self.dtype} are no whole number of bytes", hint="a wider dtype")
        regions = [part for start, stop in ranges for part in self._bytes(start * row, stop * row)]
        return Tensor(self.dtype, shape, tuple(regions))

    def columns(self, ranges: Ranges) -> Tensor:
        """The columns of axis 1 in ``ranges``, in that order."""
        if list(ranges) == [(0, self.shape[1])]:
            return self
        shape = (self.shape[0], sum(stop - start for start, stop in ranges), *self.shape[2:])
        return Tensor(self.dtype, shape, compute=lambda: _take(self.array().swapaxes(0, 1), ranges).swapaxes(0, 1))

    def cast(self, dtype: str) -> Tensor:
        """The values in another dtype, rounded to nearest even."""
        if dtype == self.dtype:
            return self
        return Tensor(dtype, self.shape, compute=lambda: cast_array(self.array(), dtype))

    def _bytes(self, start: int, stop: int) -> list[Region]:
        found, at = [], 0
        for region in self.regions:
            low, high = max(start, at), min(stop, at + region.length)
            if low < high:
                found.append(Region(region.source, region.offset + low - at, high - low))
            at += region.length
        return found


def of_bytes(dtype: str, shape: Shape, data: bytes) -> Tensor:
    """A tensor of bytes in memory."""
    return Tensor(dtype, shape, (Region(MemorySource(data), 0, len(data)),))


def of_array(array: Array, dtype: str) -> Tensor:
    """A tensor of an array's values, cast to ``dtype`` now."""
    import numpy as np

    data = np.ascontiguousarray(cast_array(array, dtype))
    return of_bytes(dtype, array.shape, data.tobytes())


def computed(dtype: str, shape: Shape, function: Callable[[], Array]) -> Tensor:
    """A tensor whose values ``function`` yields when the writer comes to it; they are cast to ``dtype``."""
    return Tensor(dtype, shape, compute=function)


def scalar(value: float, dtype: str = "F32") -> Tensor:
    """A 0-d tensor; raises OverflowError when ``value`` does not fit an integer or half dtype."""
    import struct

    code = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i"}.get(dtype)
    if code is None:
        import numpy as np

        return of_bytes(dtype, (), np.array(value).astype(numpy_dtype(dtype)).tobytes())
    return of_bytes(dtype, (), struct.pack(f"<{code}", value if code in "dfe" else int(value)))


def zeros(dtype: str, shape: Shape) -> Tensor:
    """A tensor of zeros that takes no memory."""
    return Tensor(dtype, shape, (Region(ZeroSource(), 0, prod(shape) * BITS[dtype] // 8),))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one after another on axis 0; the dtype is the widest of theirs.

    Raises ValueError when the other axes differ.
    """
    if len(tensors) == 1:
        return tensors[0]
    if len({t.shape[1:] for t in tensors}) > 1:
        raise ValueError(f"cannot stack {', '.join(str(t.shape) for t in tensors)}")
    dtype = widest([t.dtype for t in tensors])
    shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
    cast = [t.cast(dtype) for t in tensors]
    if all(t.compute is None for t in cast):
        return Tensor(dtype, shape, tuple(r for t in cast for r in t.regions))

    def concatenate() -> Array:
        import numpy as np

        return np.concatenate([t.array() for t in cast])

    return Tensor(dtype, shape, compute=concatenate)


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same bytes in the same shape."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return (first.compute is None and first.regions == second.regions) or first.tobytes() == second.tobytes()


def _take(array: Array, ranges: Ranges) -> Array:
    import numpy as np

    return np.concatenate([array[start:stop] for start, stop in ranges])
