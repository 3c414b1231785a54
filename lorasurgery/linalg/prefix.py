"""What the first components of ``up @ down`` hold of the whole, at every rank at once, and whether they come in an order.

All of it follows from two small Gram matrices: with ``H = (up^T up) * (down down^T)`` (element by element) the squared
norm of the components i and j together is ``H_ii + H_jj + 2 H_ij``, so leaving out everything from r on costs
``sum_{i,j>=r} H_ij``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64
from lorasurgery.linalg.tucker import orthogonal_core

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class PrefixCurve:
    """One module's squared errors by rank. The errors are true to 1e-7 of the norm."""

    norm: float
    """``||up @ down||_F^2``"""
    prefix: Array
    """(rank + 1,): ``||up @ down - up[:, :r] @ down[:r]||_F^2`` at r = 0 ... rank; it need not fall everywhere"""
    best: Array
    """(rank + 1,): the same for the best approximation of rank r (Eckart-Young); for a Tucker core, a bound on it"""
    components: Array
    """(rank,): ``||up[:, i]|| ||down[i]||``"""
    first: Array
    """(rows,): for each row of ``up`` that is not all zero, the first column that it uses"""

    @property
    def rank(self) -> int:
        """Number of components."""
        return len(self.components)


def prefix_curve(up: AnyArray, down: AnyArray) -> PrefixCurve:
    """``up: (out, rank)``, ``down: (rank, in)``. Raises ``ValueError`` for factors that are not finite."""
    left, right = as_float64(up), as_float64(down)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("the factors hold NaN or infinity")
    up_gram, down_gram = left.T @ left, right @ right.T
    both = up_gram * down_gram
    corners = np.diag(both[::-1, ::-1].cumsum(axis=0).cumsum(axis=1))[::-1]
    prefix = np.append(np.maximum(corners, 0.0), 0.0)
    spread, basis = np.linalg.eigh(down_gram)
    root = basis * np.sqrt(np.maximum(spread, 0.0))
    squares = np.maximum(np.linalg.eigvalsh(root.T @ up_gram @ root), 0.0)
    best = np.append(squares.cumsum()[::-1], 0.0)
    components = np.sqrt(np.maximum(np.diag(both), 0.0))
    return PrefixCurve(float(prefix[0]), prefix, best, components, _first_used(left))


def tucker_curve(up: AnyArray, mid: AnyArray, down: AnyArray) -> PrefixCurve:
    """The same for ``up: (out, r1)``, ``mid: (r1, r2, kernel)``, ``down: (r2, in)``, cut to r on both sides.

    ``best`` is the bound of the higher-order SVD: the sum of both sides' tails.
    """
    core = orthogonal_core(up, mid, down)[1]
    rank = max(mid.shape[:2])
    left, middle, right = as_float64(up), as_float64(mid), as_float64(down)
    up_rest, down_rest = np.linalg.qr(left)[1], np.linalg.qr(right.T)[1]
    norm = float(np.sum(core**2))
    prefix = np.empty(rank + 1)
    for r in range(rank + 1):
        cut = np.einsum("ai,ijk,bj->abk", up_rest[:, :r], middle[:r, :r], down_rest[:, :r])
        prefix[r] = np.sum((core - cut) ** 2)
    tails = [_tails(np.moveaxis(core, side, 0).reshape(core.shape[side], -1), rank) for side in (0, 1)]
    best = np.minimum(tails[0] + tails[1], norm)
    sizes = np.zeros(rank)
    own = np.sqrt(np.sum(middle**2, axis=(1, 2))) * np.linalg.norm(left, axis=0)
    sizes[: len(own)] = own
    return PrefixCurve(norm, prefix, best, sizes, _first_used(left))


def order_score(modules: Sequence[Array]) -> tuple[float, float]:
    """How the components' norms run with their index, over many modules: (mean rank correlation, standard score).

    Components that were trained alike are exchangeable, so each module's Spearman correlation has mean 0 and variance
    1 / (rank - 1), and the score is standard normal. -1 is strictly falling. (0, 0) where nothing can be said.
    """
    total = variance = 0.0
    count = 0
    for norms in modules:
        rank = len(norms)
        if rank < 3 or not norms.any():
            continue
        places = np.argsort(np.argsort(norms, kind="stable"), kind="stable")
        gaps = float(np.sum((places - np.arange(rank)) ** 2.0))
        total += 1 - 6 * gaps / (rank * (rank**2 - 1.0))
        variance += 1 / (rank - 1.0)
        count += 1
    return (total / count, total / float(np.sqrt(variance))) if count else (0.0, 0.0)


def falling_share(modules: Sequence[Array], slack: float = 0.02) -> float:
    """The share of modules (of rank 2 or more) whose norms never rise by more than ``slack``: 1 for an SVD's factors."""
    said = [norms for norms in modules if len(norms) > 1 and norms.any()]
    return sum(bool(np.all(n[1:] <= n[:-1] * (1 + slack))) for n in said) / len(said) if said else 0.0


def _tails(matrix: Array, rank: int) -> Array:
    """(rank + 1,): the squared norm beyond the r largest singular values."""
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    tails = np.zeros(rank + 1)
    sums = values[::-1].cumsum()[::-1]
    tails[: min(len(sums), rank + 1)] = sums[: rank + 1]
    return tails


def _first_used(up: Array) -> Array:
    used = up != 0
    first: Array = np.argmax(used, axis=1)[used.any(axis=1)].astype(np.float64)
    return first
