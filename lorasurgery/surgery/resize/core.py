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


def _root(gram: Array) -> Array:
    """``L`` with ``L L^T = gram``, by Cholesky, ten times as fast as the eigenvalues that singular matrices need."""
    try:
        return as_float64(np.linalg.cholesky(gram))
    except np.linalg.LinAlgError:
        spread, basis = np.linalg.eigh(gram)
        return as_float64(basis * np.sqrt(np.maximum(spread, 0.0)))


def measure(up: AnyArray, down: AnyArray, needed: int | None, *, narrow: bool = True) -> Measured:
    """The singular values of ``up: (out, r)`` times ``down: (r, in)``, and the small matrices of the first ``needed``.

    ``needed`` None: every value must be accurate (to 1e-7 relative, or ``eps ||up|| ||down||``); the small matrices then
    are for all of them. ``narrow`` allows float32 small matrices where that costs nothing a 16-bit result could hold.
    Raises ``ValueError`` for factors with NaN or infinity.
    """
    left, right = as_float64(up), as_float64(down)
    up_gram, down_gram = left.T @ left, right @ right.T
    if not (np.isfinite(up_gram).all() and np.isfinite(down_gram).all()):
        raise ValueError("its factors hold NaN or infinity")
    rank, most = len(down_gram), min(up.shape[0], down.shape[1])
    root = _root(down_gram)
    squares, vectors = np.linalg.eigh(root.T @ up_gram @ root)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    bound = float(np.sqrt(np.linalg.norm(up_gram) * np.linalg.norm(down_gram)))
    if bound == 0.0:
        count = min(rank, most)
        return Measured(np.zeros(count), Core(np.zeros((rank, count)), np.zeros((count, rank))))
    wanted = min(rank if needed is None else needed, rank)
    if wanted > most or not (bound > SMALLEST and values[wanted - 1] > GRAM_LIMIT * bound):
        exact = factored_svd(left, right)[1]
        return Measured(np.where(exact > NUMERICAL_ZERO * bound, exact, 0.0), None)
    mixed, kept = root @ vectors[:, ::-1][:, :wanted], values[:wanted]
    kind = np.float32 if narrow and kept[-1] > STEEP * bound else np.float64
    core = Core((mixed / kept).astype(kind), ((mixed / kept**2).T @ up_gram).astype(kind))
    return Measured(values[:most], core)
