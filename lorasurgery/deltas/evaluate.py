"""Some rows of a delta at a time, in a working precision: what is added to rows of a base weight that is read in chunks.

A low-rank delta of 21504 x 3072 would be 264 MB in float32; its rows ``start:stop`` are ``up[start:stop] @ down``.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import FEWEST, LEAST, SAMPLED, sampled, unit
from lorasurgery.deltas.sparse import Sparse
from lorasurgery.deltas.times import ALIKE
from lorasurgery.io.dtypes import numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.tensors import Float64, Tensor

    Work = NDArray[Any]

MOST = 0.5
"""A share of rows."""
Rows = Callable[[int, int], "Work"]
"""(start, stop) -> those rows, (stop - start, in*k*k), in the working precision, a fresh array."""


def row_function(delta: Delta, work: str, factor: float = 1.0) -> Rows:
    """Rows of ``factor`` times the delta in the dtype ``work`` (``float32`` or ``float64``); factors are read now.

    Everything but the last product is computed in float64. Raises CannotError for a family that multiplies the base weight.
    """
    if isinstance(delta, LowRank):
        return _low_rank(delta, work, factor)
    if isinstance(delta, Hadamard):
        return _hadamard(delta, work, factor)
    if isinstance(delta, Kronecker):
        return _kronecker(delta, work, factor)
    if isinstance(delta, Full):
        diff = delta.diff
        return lambda start, stop: flat(diff.rows([(start, stop)]).array(), work) * np.asarray(factor, work)
    if isinstance(delta, Sparse):
        return _sparse(delta, work, factor)
    if isinstance(delta, Opaque):
        raise CannotError(f"the change {delta.called} makes depends on the base weight")
    return _low_rank(delta.to_low_rank(), work, factor)


def distance(old: Delta, new: Delta, factor: float) -> tuple[float, float]:
    """(||new - factor old||^2, ||factor old||^2), of some rows where those speak for the others, else of all.

    They do where they lost about what rounding can take, or most of them something.
    The distance is 0 where no number changed that the delta depends on, as far as float64 tells.
    """
    true, stored = row_function(old, "float64", factor), row_function(new, "float64")
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


def squared_norm(delta: Delta) -> float:
    """``||delta||^2``, some rows at a time."""
    rows, height = row_function(delta, "float64"), delta.shape[0]
    step = max(SAMPLED // prod(delta.shape[1:]), 1)
    return float(sum((rows(start, min(start + step, height)) ** 2).sum() for start in range(0, height, step)))


def _apart(true: Rows, stored: Rows, start: int, stop: int) -> tuple[float, float]:
    """Squared norms of the difference and of what it should be, of some rows."""
    exact = true(start, stop)
    off = stored(start, stop) - exact
    return float(np.vdot(off, off)), float(np.vdot(exact, exact))


def _sparse(delta: Sparse, work: str, factor: float) -> Rows:
    """The inner delta's rows, and single numbers added to them."""
    inner = None if delta.inner is None else row_function(delta.inner, work, factor)

    def rows(start: int, stop: int) -> Work:
        block: Work = np.zeros((stop - start, prod(delta.shape[1:])), work) if inner is None else inner(start, stop)
        delta.added_to(block, start, factor)
        return block

    return rows


def flat(array: Work, work: str) -> Work:
    """(rows, -1) in ``work``."""
    return array.reshape(array.shape[0], prod(array.shape[1:])).astype(work)


def flat_factors(delta: LowRank, work: str, factor: float = 1.0) -> tuple[Work, Work]:
    """(out, rank) times ``factor``, and (rank, in*k*k) with a Tucker core multiplied into it."""
    return _times(delta.up, factor, work), _flat64(delta.to_low_rank().down).astype(work)


def _low_rank(delta: LowRank, work: str, factor: float) -> Rows:
    up, down = flat_factors(delta, work, factor)
    return lambda start, stop: up[start:stop] @ down


def _hadamard(delta: Hadamard, work: str, factor: float) -> Rows:
    """Both arms' products, multiplied; a Tucker core is multiplied into ``w*_b`` first."""
    arms = []
    for a, b, core in ((delta.w1_a, delta.w1_b, delta.t1), (delta.w2_a, delta.w2_b, delta.t2)):
        left, right = (a.f64(), _flat64(b)) if core is None else (a.f64().T, _cored(core, b))
        arms.append((left, right.astype(work)))
    (one, first), (two, second) = arms
    one, two = (one * factor).astype(work), two.astype(work)

    def rows(start: int, stop: int) -> Work:
        product: Work = one[start:stop] @ first
        product *= two[start:stop] @ second
        return product

    return rows


def _kronecker(delta: Kronecker, work: str, factor: float) -> Rows:
    """Row ``o * out_k + p`` is ``kron(w1[o], w2[p])``."""
    outer = (delta.outer_array() * factor).astype(work)
    inner = delta.inner_array()
    inner = inner.reshape(inner.shape[0], -1).astype(work)

    def rows(start: int, stop: int) -> Work:
        block, row = np.divmod(np.arange(start, stop), inner.shape[0])
        product: Work = outer[block][:, :, None] * inner[row][:, None, :]
        return product.reshape(stop - start, -1)

    return rows


def _cored(core: Tensor, b: Tensor) -> Float64:
    """core (i, j, k...) and b (j, in) -> (i, in*k...)."""
    product: Float64 = np.einsum("ij...,jr->ir...", core.f64(), b.f64())
    return product.reshape(product.shape[0], -1)


def _flat64(tensor: Tensor) -> Float64:
    return tensor.f64().reshape(tensor.shape[0], -1)


def _times(tensor: Tensor, factor: float, work: str) -> Work:
    """(rows, -1) times ``factor``: the product in float64, rounded once."""
    scaled: Work = (_flat64(tensor) * factor).astype(work)
    return scaled
