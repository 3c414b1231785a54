"""What a change of one factor does to the change of the weight that it is part of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Array, Float64, Tensor

EXACTLY, PROBES = 16, 8
"""Up to this rank a product is measured exactly, above it with so many random vectors."""


class Felt(Protocol):
    """What changes of a factor, of one in two dimensions, do to the weight."""

    def felt(self, changed: Array, rows: Array) -> bool:
        """Whether a change at these places, of these rows of the factor, reaches the weight: what meets zeros does not."""
        ...

    def squared(self, values: Float64, rows: Array) -> float:
        """The squared norm of what ``values``, at these rows of the factor, make of the weight; 0 only where none is felt."""
        ...


TINY = 1e-30
"""A squared norm that float32 may not have all of."""


@dataclass(frozen=True, slots=True)
class Effect:
    """``||diag(left) x R||`` for a change x (rows, columns) of a factor; R is what stands to the right of it.

    Without R columns count by their own weights; without any, rows or columns count alike.
    """

    gain: float = 1.0
    """Squared: of factors whose norm multiplies that of this one."""
    left: Float64 | None = None
    """(rows,): what the square of each row counts for."""
    right: Float64 | None = None
    """(columns, m) with ``||x right|| = ||x R||``, or nearly so: see :func:`sketch_of`."""
    columns: Float64 | None = None
    """(columns,): squared norms of R's rows, what the square of each column counts for where columns do not hang together."""

    def felt(self, changed: Array, rows: Array) -> bool:
        """See :class:`Felt`."""
        if not self.gain:
            return False
        if self.left is not None:
            changed = changed[self.left[rows] > 0.0]
        if self.columns is not None:
            changed = changed[:, self.columns > 0.0]
        return bool(changed.any())

    def squared(self, values: Float64, rows: Array) -> float:
        """See :class:`Felt`."""
        import numpy as np

        if self.left is not None:
            values = values * np.sqrt(self.left[rows])[:, None]
        through = values if self.right is None else values @ self.right
        found = float(np.vdot(through, through))
        if self.columns is not None and (self.right is None or found == 0.0):  # random vectors may be at right angles to it
            found = float((values * values @ self.columns).sum())
        return self.gain * found


def before(other: Tensor, gain: float = 1.0) -> Effect:
    """Of the left factor of a product, ``x other``; ``other``: (rank, in)."""
    right, columns = sketch_of(other)
    return Effect(gain, None, right, columns)


def behind(other: Tensor, gain: float = 1.0) -> Effect:
    """Of the right factor of a product, ``other x``, for changes of its rows that do not hang together.

    ``other``: (out, rank), its own rank the rows of x.
    """
    import numpy as np

    from lorasurgery.deltas.sampling import row_blocks
    from lorasurgery.io.dtypes import wide

    blocks = (block.astype(wide(other.dtype)).T for _, block in row_blocks(other))
    return Effect(gain, np.sum([_row_squares(columns) for columns in blocks], axis=0))


def sketch_of(down: Tensor) -> tuple[Float64, Float64]:
    """M (rank, m) with ``||x M||^2 = ||x down||^2``: exact up to rank 16, else estimated; and its rows' squared norms.

    ``down``: (rank, in), read some rows at a time. The estimate is Hutchinson's with 8 random vectors of signs, unbiased,
    with the same vectors every time; of two norms taken with it the ratio is good to a few percent where many rows of x
    count. Rows are brought to the length 1 first, so that short ones do not drown.
    """
    import numpy as np

    from lorasurgery.deltas.sampling import row_blocks
    from lorasurgery.io.dtypes import wide

    few = down.shape[0] <= EXACTLY
    dtype = "float64" if few else wide(down.dtype)
    parts, squares = [], []
    for _, block in row_blocks(down):
        rows = block.astype(dtype)
        squares.append(_row_squares(rows))
        parts.append(rows if few else rows @ signs(down.shape[1], dtype))
    columns = np.concatenate(squares)
    if not few:
        return np.concatenate(parts).astype(np.float64), columns
    lengths = np.sqrt(columns)
    unit = np.concatenate(parts) / np.where(lengths > 0.0, lengths, 1.0)[:, None]
    values, vectors = np.linalg.eigh(unit @ unit.T)
    return lengths[:, None] * vectors * np.sqrt(np.maximum(values, 0.0)), columns


def _row_squares(rows: Array) -> Float64:
    """Squared norms, 0 only for zeros: what is too small for squares in float32 is squared in float64."""
    import numpy as np

    found: Float64 = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
    tiny = found < TINY
    if tiny.any():
        found[tiny] = (rows[tiny].astype(np.float64) ** 2).sum(axis=1)
    return found


@lru_cache(maxsize=8)
def signs(size: int, dtype: str) -> Array:
    """(size, 8) random signs over sqrt(8)."""
    import numpy as np

    signs = np.random.default_rng(0).integers(0, 2, (size, PROBES), dtype=np.int8).astype(dtype)
    scaled: Array = (signs - 0.5) * (2.0 / PROBES**0.5)
    return scaled
