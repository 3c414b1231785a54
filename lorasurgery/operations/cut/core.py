"""Singular values of ``up @ down`` from two small Gram matrices, and the small matrices that make the new factors.

``G_d = down down^T = L L^T``, ``L^T (up^T up) L = V S^2 V^T``: then ``U = up (L V / S)`` and ``Vt = (S^-2 V^T L^T up^T up)
down``. What is kept in memory of a module of rank r are its singular values and r x k numbers for each factor; the factors
themselves are read again when the result is written. Values below ``GRAM_LIMIT ||up|| ||down||`` are not accurate by this
route (see :mod:`lorasurgery.linalg.low_rank`); where they are asked for, QR factorisations take its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.linalg.factors import as_float64
from lorasurgery.linalg.low_rank import GRAM_LIMIT, SMALLEST, factored_svd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array

NUMERICAL_ZERO = 1e-13
"""Singular values below this share of ``||up|| ||down||`` are rounding and count as zero."""
STEEP = 1e-3
"""Above this ``S / (||up|| ||down||)`` the small matrices may be float32 when the result is not wider than that."""


@dataclass(frozen=True, slots=True)
class Core:
    """``U[:, :k] = up @ left``, ``Vt[:k] = right @ down``."""

    left: AnyArray
    """(rank, k)"""
    right: AnyArray
    """(k, rank)"""


class Cores(NamedTuple):
    """Of n products of one shape: singular values, and the small matrices of the first k."""

    values: Array
    """(n, rank), descending, or fewer where a side is smaller"""
    left: Array
    """(n, rank, k)"""
    right: Array
    """(n, k, rank)"""
    bounds: Array
    """(n,): ``(||up^T up||_F ||down down^T||_F)^(1/2)``, what errors are relative to; not finite for broken factors"""
    accurate: NDArray[np.bool_]
    """(n,): whether the first k are accurate by this route"""

    def core(self, i: int, *, narrow: bool) -> Core | None:
        """The small matrices of product ``i``; None where they are not accurate.

        ``narrow`` allows float32 where that costs nothing a 16-bit result could hold.
        """
        if not self.accurate[i]:
            return None
        last = self.values[i, : self.left.shape[2]][-1]
        kind = np.float32 if narrow and last > STEEP * self.bounds[i] else np.float64
        return Core(self.left[i].astype(kind), self.right[i].astype(kind))


class Measured(NamedTuple):
    """Singular values (rank or fewer, descending), and the small matrices where the Gram route is accurate enough."""

    values: Array
    core: Core | None


def wide(tensor: Tensor) -> AnyArray:
    """The values as (rows, -1) in float32, or float64 for tensors wider than that; exact."""
    array = matrix(tensor)
    return array if array.dtype == np.float64 else array.astype(np.float32, copy=False)


def matrix(tensor: Tensor) -> AnyArray:
    """The values as (rows, -1) in the tensor's dtype."""
    return tensor.array().reshape(tensor.shape[0], -1)


def batched_cores(up: Array, down: Array, needed: int | None) -> Cores:
    """The Gram route for ``up: (n, out, rank)`` and ``down: (n, rank, in)`` in float64; ``needed``: k, None for all."""
    up_gram, down_gram = up.swapaxes(1, 2) @ up, down @ down.swapaxes(1, 2)
    bounds = np.sqrt(np.linalg.norm(up_gram, axis=(1, 2)) * np.linalg.norm(down_gram, axis=(1, 2)))
    usable = np.isfinite(bounds)
    if not usable.all():
        up_gram[~usable], down_gram[~usable] = 0.0, 0.0
    root = _roots(down_gram)
    squares, vectors = np.linalg.eigh(root.swapaxes(1, 2) @ up_gram @ root)
    values = np.sqrt(np.maximum(squares[:, ::-1], 0.0))
    rank, most = down.shape[1], min(up.shape[1], down.shape[2])
    wanted = min(rank if needed is None else needed, rank)
    kept, zero = values[:, :wanted], bounds == 0.0
    accurate = usable & (zero | ((bounds > SMALLEST) & (kept[:, -1] > GRAM_LIMIT * bounds))) & (wanted <= most)
    safe = np.where(kept > 0.0, kept, np.inf)[:, None, :]
    mixed = root @ vectors[:, :, ::-1][:, :, :wanted]
    return Cores(values[:, :most], mixed / safe, (mixed / safe**2).swapaxes(1, 2) @ up_gram, bounds, accurate)


def _roots(grams: Array) -> Array:
    """``L`` with ``L L^T`` = each of them, by Cholesky, ten times as fast as the eigenvalues that singular matrices need."""
    try:
        return as_float64(np.linalg.cholesky(grams))
    except np.linalg.LinAlgError:
        spread, basis = np.linalg.eigh(grams)
        return as_float64(basis * np.sqrt(np.maximum(spread, 0.0))[:, None, :])


def measure(up: AnyArray, down: AnyArray, needed: int | None, *, narrow: bool = True) -> Measured:
    """The singular values of ``up: (out, r)`` times ``down: (r, in)``, and the small matrices of the first ``needed``.

    ``needed`` None: every value must be accurate (to 1e-7 relative, or ``eps ||up|| ||down||``); the small matrices then
    are for all of them. ``narrow`` as in :meth:`Cores.core`. Raises ``ValueError`` for factors with NaN or infinity.
    """
    left, right = as_float64(up), as_float64(down)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("its factors hold NaN or infinity")
    cores = batched_cores(left[None], right[None], needed)
    core = cores.core(0, narrow=narrow)
    return Measured(cores.values[0] if core is not None else exact_values(left, right, float(cores.bounds[0])), core)


def exact_values(up: AnyArray, down: AnyArray, bound: float) -> Array:
    """All singular values by QR; those that are rounding only are zero."""
    exact = factored_svd(up, down)[1]
    return np.where(exact > NUMERICAL_ZERO * bound, exact, 0.0)
