"""Some rows of a change at a time, in a working precision: how each kind of delta gives them, and what may be said of all.

A low-rank delta of 21504 x 3072 would be 264 MB in float32; its rows ``start:stop`` are ``up[start:stop] @ down``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from lorasurgery.deltas.sampling import ALIKE, FEWEST, LEAST, SAMPLED, sampled, unit
from lorasurgery.io.dtypes import numpy_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Float64, Shape, Tensor

    Work = NDArray[Any]

MOST = 0.5
"""A share of rows."""
Rows = Callable[[int, int], "Work"]
"""(start, stop) -> those rows, (stop - start, in*k*k), in the working precision, a fresh array."""


class ByRows(Protocol):
    """What gives its rows some at a time: every kind of delta."""

    @property
    def shape(self) -> Shape:
        """(out, in[, k...])."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Slot -> tensor."""
        ...

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """Rows of ``factor`` times the delta in the dtype ``work`` (``float32`` or ``float64``); factors are read now.

        Everything but the last product is computed in float64. Raises CannotError where the change needs the base weight.
        """
        ...


def distance(old: ByRows, new: ByRows, factor: float) -> tuple[float, float]:
    """(||new - factor old||^2, ||factor old||^2), of some rows where those speak for the others, else of all.

    They do where they lost about what rounding can take, or most of them something.
    The distance is 0 where no number changed that the delta depends on, as far as float64 tells.
    """
    import numpy as np

    true, stored = old.by_rows("float64", factor), new.by_rows("float64")
    height, width = old.shape[0], prod(old.shape[1:])
    rows = sampled(height, width, FEWEST)
    if len(rows) < height:
        some = np.array([_apart(true, stored, int(row), int(row) + 1) for row in rows])
        error, norm = map(float, some.sum(axis=0) * (height / len(rows)))
        largest = max(unit(numpy_dtype(tensor.dtype)) for tensor in new.tensors.values())
        if error > (largest / LEAST) ** 2 * norm or (some[:, 0] > ALIKE**2 * some[:, 1]).mean() > MOST:
            return error, norm
    step = max(SAMPLED // width, 1)
    every = [_apart(true, stored, start, min(start + step, height)) for start in range(0, height, step)]
    error, norm = map(float, np.sum(every, axis=0))
    return (error if error > ALIKE**2 * norm else 0.0), norm


def squared_norm(delta: ByRows) -> float:
    """``||delta||^2``, some rows at a time."""
    rows, height = delta.by_rows("float64"), delta.shape[0]
    step = max(SAMPLED // prod(delta.shape[1:]), 1)
    return float(sum((rows(start, min(start + step, height)) ** 2).sum() for start in range(0, height, step)))


def _apart(true: Rows, stored: Rows, start: int, stop: int) -> tuple[float, float]:
    """Squared norms of the difference and of what it should be, of some rows."""
    import numpy as np

    exact = true(start, stop)
    off = stored(start, stop) - exact
    return float(np.vdot(off, off)), float(np.vdot(exact, exact))


def flat(array: Work, work: str) -> Work:
    """(rows, -1) in ``work``."""
    return array.reshape(array.shape[0], prod(array.shape[1:])).astype(work)


def flat64(tensor: Tensor) -> Float64:
    """(rows, -1) in float64."""
    return tensor.f64().reshape(tensor.shape[0], -1)
