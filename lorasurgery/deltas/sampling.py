"""Which rows of a matrix speak for the others, and matrices some rows at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np

    from lorasurgery.io.tensors import Array, Tensor


CHUNK = 1 << 17
"""Elements converted at a time."""
WHOLE = 1 << 17
"""Elements of a tensor that is measured whole."""
ROWS, FEWEST, SAMPLED = 256, 32, 1 << 19
"""Of a larger one so many rows are measured at first, fewer where they are long: about so many elements, but no fewer rows."""
ALIKE = 2.0**-50
"""A relative difference that is none: four units in the last place of float64."""
LEAST = 8.0
"""Rows that lost less than this part of what rounding can take at most do not speak for the others: then all are measured."""


def blocks_of(tensors: Sequence[Tensor]) -> Iterator[tuple[int, list[Array]]]:
    """(first row, those rows of every matrix), about :data:`CHUNK` elements at a time."""
    height, rows = tensors[0].shape[0], max(CHUNK // max(sum(tensor.shape[1] for tensor in tensors), 1), 1)
    wholes = [None if tensor.compute is None else tensor.array() for tensor in tensors]
    for start in range(0, height, rows):
        own = [(start, min(start + rows, height))]
        yield start, [t.rows(own).array() if w is None else w[slice(*own[0])] for t, w in zip(tensors, wholes, strict=True)]


def row_blocks(tensor: Tensor) -> Iterator[tuple[int, Array]]:
    """(first row, values) of a matrix, about :data:`CHUNK` elements at a time."""
    for start, blocks in blocks_of([tensor]):
        yield start, blocks[0]


def unit(dtype: np.dtype[Any]) -> float:
    """The largest relative error of rounding to a float dtype; 1 for integers."""
    import ml_dtypes

    if dtype.kind in "iub":
        return 1.0
    return float(ml_dtypes.finfo(dtype).eps) / 2.0  # type: ignore[no-untyped-call]  # ml_dtypes tells no types


@lru_cache(maxsize=64)
def sampled(height: int, width: int, most: int = ROWS) -> Array:
    """The rows of a matrix that are measured at first: all of a small one, else one at random of each of equal runs."""
    import numpy as np

    rows = max(min(most, SAMPLED // max(width, 1)), FEWEST)
    if height * width <= WHOLE or height <= rows:
        return np.arange(height)
    edges = np.arange(rows + 1) * height // rows
    found: Array = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    return found
