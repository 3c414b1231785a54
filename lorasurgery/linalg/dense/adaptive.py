"""The truncated SVD to an error instead of a rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lorasurgery.linalg.dense.power import Request, subspaces
from lorasurgery.linalg.dense.prepare import Prepared, prepared, start_block
from lorasurgery.linalg.dense.truncated import block_columns, check_tolerance, complete, finished, wants_all

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.linalg.dense.result import DenseSvd

FIRST_RANK = 32
"""Where the search for the rank begins."""


def svd_until(
    delta: Tensor,
    *,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int | None = None,
    tolerance: float = 1e-3,
    exact: bool = False,
    seed: int = 0,
) -> DenseSvd:
    """The smallest rank that keeps ``energy``, or leaves at most the relative ``error``, without a complete SVD.

    ``energy`` in (0, 1] is the share of the squared Frobenius norm, ``error`` (0 to 1) that of the norm itself; exactly
    one of them is given. At most ``max_rank`` columns, at least 1. The basis grows in blocks and keeps what it has, until
    the bound is met; a rank that would be a large share of the smaller side is found by the complete decomposition. As in
    :func:`truncated_svd` the error at the rank is within ``1 + tolerance`` of the optimum, so the rank may be one too high
    (more on a flat spectrum); an error below the dtype's rounding, 1e-6 for float32, counts as none. Raises ``ValueError``
    as that does, and for a bound out of range.
    """
    share = _left_out(energy, error)
    check_tolerance(tolerance)
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"the largest rank must be at least 1, not {max_rank}")
    ready = prepared(delta[None])
    share = max(share, ready.rounding.bound)
    most = min(*delta.shape, *([] if max_rank is None else [max_rank]))
    found = None if exact else _grown(ready, share, most, tolerance=tolerance, seed=seed)
    if found is None:
        found = complete(ready, 0, most)
    return found.truncated(_rank(found, share))


def _left_out(energy: float | None, error: float | None) -> float:
    """The share of the squared norm that may be missing."""
    if energy is not None and error is None:
        if not 0.0 < energy <= 1.0:
            raise ValueError(f"energy must be above 0 and at most 1, not {energy}")
        return 1.0 - energy
    if error is not None and energy is None:
        if not 0.0 <= error <= 1.0:
            raise ValueError(f"the relative error must be between 0 and 1, not {error}")
        return error**2
    raise ValueError("one of energy and error says where to stop")


def _grown(ready: Prepared, share: float, most: int, *, tolerance: float, seed: int) -> DenseSvd | None:
    """Enough columns for the bound, or ``most``; None where the complete decomposition is cheaper.

    Every value still to come is at most the last one found, so the missing energy over it bounds from below how many more
    are needed: a hopeless search ends after the first try.
    """
    rank, known = min(FIRST_RANK, most), None
    size, width = ready.batch.shape[1:]
    while not wants_all(rank, size):
        fresh = start_block(width, block_columns(rank) - (0 if known is None else known.shape[2]), seed, ready.batch)
        start = fresh if known is None else torch.cat((known, fresh), dim=2)
        (found,) = subspaces(ready.batch, ready.squared_norms, start, Request(rank, tolerance, ready.rounding.gain))
        if not found.converged:
            return None
        (svd,) = finished(ready, [(0, found)], rank)
        missing = svd.squared_error() - share * svd.squared_norm
        if missing <= 0.0 or rank == most:
            return svd
        at_least = rank + int(missing / max(float(svd.values[rank - 1]) ** 2, missing / size))
        rank, known = min(max(2 * rank, at_least), most), torch.nn.functional.normalize(found.image, dim=0)[None]
    return None


def _rank(found: DenseSvd, share: float) -> int:
    """The smallest rank whose error is allowed, at least 1; all there are if none is."""
    tails = found.squared_residual + np.append(np.cumsum(found.values[::-1] ** 2)[::-1], 0.0)
    met = np.flatnonzero(tails[: found.rank + 1] <= share * found.squared_norm)
    return max(int(met[0]), 1) if len(met) else found.rank
