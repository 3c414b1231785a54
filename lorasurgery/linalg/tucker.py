"""Tucker cores between two factors: delta[p, r, k] = sum_ij up[p, i] mid[i, j, k] down[j, r], cut to a smaller core."""

from __future__ import annotations

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64


def orthogonal_core(up: AnyArray, mid: AnyArray, down: AnyArray) -> tuple[Array, Array, Array]:
    """``(up_basis: (out, a), core: (a, b, kernel), down_basis: (b, in))`` with orthonormal bases and the same product."""
    up_basis, up_rest = np.linalg.qr(as_float64(up))
    down_basis, down_rest = np.linalg.qr(as_float64(down).T)
    core: Array = np.einsum("ai,ijk,bj->abk", up_rest, as_float64(mid), down_rest)
    return up_basis, core, down_basis.T


def truncate_tucker(up: AnyArray, mid: AnyArray, down: AnyArray, rank: int) -> tuple[Array, Array, Array]:
    """``up: (out, k)``, ``mid: (k', k'', kernel)``, ``down: (k'', in)`` of at most ``rank`` on both sides, near the optimum.

    Higher-order orthogonal iteration (De Lathauwer 2000) on the small core, from the higher-order SVD, whose squared
    error is at most twice the best one; every step lowers it. The norm is shared evenly by the three factors.
    """
    up_basis, core, down_basis = orthogonal_core(up, mid, down)
    right = _leading(np.moveaxis(core, 1, 0), rank)
    kept = -1.0
    for _ in range(50):
        left = _leading(np.einsum("abk,bj->ajk", core, right), rank)
        right = _leading(np.einsum("abk,ai->bik", core, left), rank)
        small = np.einsum("abk,ai,bj->ijk", core, left, right)
        energy = float(np.sum(small**2))
        if energy <= kept * (1 + 1e-12):
            break
        kept = energy
    share = max(kept, 0.0) ** (1 / 6) or 1.0
    return up_basis @ left * share, small / share**2, right.T @ down_basis * share


def _leading(core: Array, rank: int) -> Array:
    """The leading left singular vectors of the first unfolding: (a, min(rank, a))."""
    left: Array = np.linalg.svd(core.reshape(core.shape[0], -1), full_matrices=False)[0]
    return left[:, :rank]
