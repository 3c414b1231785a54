"""Numbers folded into a factor and rounded once, and what that costs the change."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.io.tensors import computed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.times import Times
    from lorasurgery.io.tensors import Array, Tensor


def multiplied(
    tensor: Tensor, factor: float, record: Record | None = None, sketch: Callable[[], Array] | None = None
) -> Tensor:
    """``tensor`` times ``factor``, computed in float32 (float64 for F32 and F64 tensors) and rounded once to its dtype.

    ``record`` gets the squared rounding error and the squared norm of the product when it is first computed; ``sketch``
    as in :class:`Rounding`.
    """
    if factor == 1.0:
        return tensor
    recorded = once(record)
    return computed(tensor.dtype, tensor.shape, lambda: _converted(tensor, tensor.dtype, factor, Rounding(recorded, sketch)))


def rounded(tensor: Tensor, dtype: str, record: Record | None = None) -> Tensor:
    """``tensor`` in ``dtype``; ``record`` gets the squared rounding error and the squared norm when first computed."""
    if dtype == tensor.dtype:
        return tensor
    recorded = once(record)
    return computed(dtype, tensor.shape, lambda: _converted(tensor, dtype, 1.0, Rounding(recorded)))


def _converted(tensor: Tensor, dtype: str, factor: float, rounding: Rounding) -> Array:
    """``tensor`` times ``factor`` in ``dtype``, some rows at a time: they stay in the cache, and wide copies stay small."""
    import numpy as np

    from lorasurgery.deltas.times import times

    shape = (tensor.shape[0], prod(tensor.shape[1:])) if tensor.shape else (1, 1)
    result, way = np.empty(shape, numpy_dtype(dtype)), times(tensor.dtype, dtype, factor)
    for start, block in row_blocks(tensor.reshape(*shape)):
        own = result[start : start + len(block)]
        way.into(block, own)
        rounding.look(start, len(result), block, own, way)
    rounding.tell()
    return result.reshape(tensor.shape)


def row_blocks(tensor: Tensor) -> Iterator[tuple[int, Array]]:
    """(first row, values) of a matrix, about :data:`CHUNK` elements at a time."""
    rows = max(CHUNK // max(tensor.shape[1], 1), 1)
    whole = None if tensor.compute is None else tensor.array()
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        yield start, tensor.rows([(start, stop)]).array() if whole is None else whole[start:stop]


def wide(dtype: str) -> str:
    """The dtype to calculate in: float32 holds every 16 and 8 bit value exactly."""
    return "float64" if dtype in ("F32", "F64") else "float32"


CHUNK = 1 << 17
"""Elements converted at a time."""
ROWS = 512
"""Rows that are enough to measure a rounding error by."""


class Rounding:
    """Measures what rounding a tensor costs while it is converted, and tells ``record`` its square and that of the norm.

    ``sketch``, a matrix M (columns, m) made when needed, measures x as ||x M||^2: the effect on a product x D instead of
    on one factor, see :func:`sketch_of`. Of many rows, 512 evenly spread ones stand for all. Nothing is told when nothing
    was rounded, which is decided by every value.
    """

    def __init__(self, record: Record | None, sketch: Callable[[], Array] | None = None) -> None:
        self._record, self._sketch = record, sketch
        self._happened = False
        self._samples: list[tuple[Array, Array]] = []
        self._step = 1

    def look(self, start: int, total: int, block: Array, result: Array, way: Times) -> None:
        """Rows from ``start`` of ``total``: before they were multiplied, and as they are stored."""
        if self._record is None:
            return
        self._step = max(total // ROWS, 1)
        first = -start % self._step
        sample = way.exact(block[first :: self._step])
        off = result[first :: self._step].astype(sample.dtype) - sample
        self._samples.append((sample, off))
        self._happened = self._happened or bool(off.any()) or not way.is_exact(block, result)

    def tell(self) -> None:
        """All rows have been looked at."""
        if self._record is None or not self._happened:
            return
        import numpy as np

        whole, off = (np.concatenate(side) for side in zip(*self._samples, strict=True))
        if self._sketch is not None:
            matrix = self._sketch()
            whole, off = whole @ matrix, off @ matrix
        self._record(float((off * off).sum()) * self._step, float((whole * whole).sum()) * self._step)


EXACTLY, PROBES = 16, 8
"""Up to this rank a product is measured exactly, above it with so many random vectors."""


def sketch_of(down: Tensor) -> Array:
    """M (rank, m) with ||x M||^2 = ||x down||^2: exact up to rank 16, else estimated with 8 random vectors of signs.

    ``down``: (rank, in), read some rows at a time. The estimate is Hutchinson's, unbiased, with the same vectors every
    time; of two norms taken with it the ratio is good to a few percent.
    """
    import numpy as np

    if down.shape[0] <= EXACTLY:
        rows = down.array().astype(wide(down.dtype))
        values, vectors = np.linalg.eigh(rows @ rows.T)
        exact: Array = vectors * np.sqrt(np.maximum(values, 0.0))
        return exact
    dtype = wide(down.dtype)
    return np.concatenate([block.astype(dtype) @ signs(down.shape[1], dtype) for _, block in row_blocks(down)])


@lru_cache(maxsize=8)
def signs(size: int, dtype: str) -> Array:
    """(size, 8) random signs over sqrt(8)."""
    import numpy as np

    signs = np.random.default_rng(0).integers(0, 2, (size, PROBES), dtype=np.int8).astype(dtype)
    scaled: Array = (signs - 0.5) * (2.0 / PROBES**0.5)
    return scaled


def once(record: Record | None) -> Record | None:
    """``record``, deaf after its first call: a tensor may be computed more than once."""
    if record is None:
        return None
    called: list[bool] = []

    def first(error: float, norm: float) -> None:
        if not called:
            called.append(True)
            record(error, norm)

    return first


def factor_records(record: Record | None, factors: Sequence[Tensor]) -> Record | None:
    """For a delta that is a product of several rounded factors: its squared relative error is the sum of theirs.

    To first order, for independent roundings. The norm reported is the product of the factors' squared norms.
    """
    if record is None:
        return None
    norms: list[float] = []

    def own(error: float, norm: float) -> None:
        if not norms:
            norms.append(prod(float((tensor.f64() ** 2).sum()) for tensor in factors))
        if norm > 0.0:
            record(error / norm * norms[0], norms[0])

    return own
