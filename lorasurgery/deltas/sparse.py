"""A delta with single numbers of its own on top: LyCORIS' ``extract`` with ``use_sparse_bias``.

``values`` (n,) stand at ``indices`` (2, n), row and column of the matrix ``size`` (out, in*k*k). What is added to the weight is
the scale times the sum of both: ``(up @ down + sparse) * alpha / rank``. Sources: LyCORIS 4.1 ``utils/__init__.py``
(``extract_diff``, which writes alpha = rank), AUTOMATIC1111 ``extensions-builtin/Lora/network.py`` (``finalize_updown`` adds
before it scales).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.rounding import multiplied, rounded
from lorasurgery.io.dtypes import INTEGERS
from lorasurgery.io.tensors import computed, of_array

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import Rows
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.deltas.low_rank import LowRank
    from lorasurgery.io.tensors import Array, Float64, Ranges, Shape, Tensor


@dataclass(frozen=True, slots=True)
class Sparse:
    """``inner`` (None: nothing) plus the sparse matrix."""

    indices: Tensor
    values: Tensor
    size: Tensor
    shape: Shape
    """The weight's: ``inner``'s, or what ``size`` says."""
    inner: Delta | None = None

    family = "sparse"

    @property
    def rank(self) -> int | None:
        """Of ``inner``: what alpha is divided by."""
        return None if self.inner is None else self.inner.rank

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """``inner``'s and the three of the sparse matrix."""
        own = {"bias_indices": self.indices, "bias_values": self.values, "bias_size": self.size}
        return own if self.inner is None else {**self.inner.tensors, **own}

    def rows(self, ranges: Ranges) -> Sparse:
        """Those rows of both: exact. The numbers' places are read."""
        import numpy as np

        places = self._places()
        found: list[Array] = []
        start = 0
        for low, high in ranges:
            chosen = np.flatnonzero((places[0] >= low) & (places[0] < high))
            found.append(np.stack([places[0][chosen] - low + start, places[1][chosen], chosen]))
            start += high - low
        moved = np.concatenate(found, axis=1)
        columns = prod(self.shape[1:])
        return Sparse(
            of_array(moved[:2], "I64"),
            of_array(self.values.array().reshape(-1)[moved[2]], self.values.dtype),
            of_array(np.array([start, columns]), "I64"),
            (start, *self.shape[1:]),
            None if self.inner is None else self.inner.rows(ranges),
        )

    def scaled(self, factor: float, record: Record | None = None) -> Sparse:
        """Both, times ``factor``."""
        if factor == 1.0:
            return self
        inner = None if self.inner is None else self.inner.scaled(factor, record)
        return replace(self, inner=inner, values=multiplied(self.values, factor, record))

    def cast(self, dtype: str, record: Record | None = None) -> Sparse:
        """Both in ``dtype``; places and size keep theirs."""
        inner = None if self.inner is None else self.inner.cast(dtype, record)
        return replace(self, inner=inner, values=rounded(self.values, dtype, record))

    def added_to(self, block: Array, start: int, factor: float = 1.0) -> None:
        """Add ``factor`` times the sparse matrix' rows from ``start`` on to ``block`` (rows, in*k*k), in place."""
        import numpy as np

        rows, columns = self._places()
        chosen = (rows >= start) & (rows < start + len(block))
        values = self.values.f64().reshape(-1)[chosen] * factor
        np.add.at(block, (rows[chosen] - start, columns[chosen]), values.astype(block.dtype))

    def _places(self) -> Array:
        """Rows and columns of the numbers, (2, n); raises CannotError for one that the matrix does not have."""
        import numpy as np

        places: Array = self.indices.array().astype(np.int64)
        limits = np.array([[self.shape[0]], [prod(self.shape[1:])]])
        if ((places < 0) | (places >= limits)).any():
            raise CannotError(f"bias_indices name places outside of {limits.reshape(-1).tolist()}")
        return places

    def dense(self) -> Float64:
        """The sum in float64, of shape :attr:`shape`."""
        import numpy as np

        whole = np.zeros(self.shape) if self.inner is None else self.inner.dense().copy()
        self.added_to(whole.reshape(self.shape[0], prod(self.shape[1:])), 0)
        return whole

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """The inner delta's rows, and single numbers added to them."""
        import numpy as np

        inner = None if self.inner is None else self.inner.by_rows(work, factor)

        def rows(start: int, stop: int) -> Array:
            block: Array = np.zeros((stop - start, prod(self.shape[1:])), work) if inner is None else inner(start, stop)
            self.added_to(block, start, factor)
            return block

        return rows

    def to_low_rank(self) -> LowRank:
        """Of rank min(out, in*k*k): a sparse matrix touches nearly every row."""
        return Full(computed("F64", self.shape, self.dense)).to_low_rank()


def sparse(slots: Mapping[str, Tensor], inner: Delta | None) -> Sparse:
    """From a module's tensors; raises CannotError when one is missing or they do not fit each other or ``inner``."""
    missing = next((slot for slot in ("bias_indices", "bias_values", "bias_size") if slot not in slots), None)
    if missing is not None:
        raise CannotError(f"it has no {missing}")
    indices, values, size = slots["bias_indices"], slots["bias_values"], slots["bias_size"]
    if not {size.dtype, indices.dtype} <= INTEGERS or size.shape != (2,) or indices.shape != (2, values.size):
        raise CannotError(
            f"bias_indices {list(indices.shape)}, bias_values {list(values.shape)} and bias_size {list(size.shape)} make no"
            " sparse matrix"
        )
    out, columns = (int(n) for n in size.array())
    shape = (out, columns) if inner is None else inner.shape
    if (out, columns) != (shape[0], prod(shape[1:])):
        raise CannotError(f"bias_size says {[out, columns]}, its factors are {list(shape)}")
    return Sparse(indices, values, size, shape, inner)
