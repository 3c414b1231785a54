"""The truncated SVD of dense matrices to a rank, within a tolerance of the optimal error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasurgery.linalg.dense.exact import decompose
from lorasurgery.linalg.dense.power import Request, Subspace, subspaces
from lorasurgery.linalg.dense.prepare import Prepared, prepared, start_block
from lorasurgery.linalg.dense.products import transposed
from lorasurgery.linalg.dense.result import DenseSvd

if TYPE_CHECKING:
    from torch import Tensor

OVERSAMPLE = 16
"""Columns beyond the rank asked for, or half of it if that is more. Measured: 32 saves a pass of six at best."""
EXACT_SIZE = 192
"""Up to this smaller side the complete decomposition is cheaper, ..."""
EXACT_SHARE = 4
"""... and where the iteration would need more columns than the smaller side / EXACT_SHARE."""
ROWS = 256
"""Rows whose residual is formed at a time."""


def truncated_svd(delta: Tensor, rank: int, *, tolerance: float = 1e-3, exact: bool = False, seed: int = 0) -> DenseSvd:
    """The SVD of ``delta: (out, in)``, float32 or float64 on any device, truncated to ``min(rank, out, in)``.

    The Frobenius error is at most ``1 + tolerance`` times the optimum (Eckart and Young 1936), as estimated from how the
    iteration converges (see :mod:`lorasurgery.linalg.dense.power`), or within the dtype's rounding, about 1e-6 of the norm
    for float32. ``exact``, or a rank that is a large share of the smaller side, takes the complete decomposition in float64.
    The same ``seed`` gives the same result. Raises ``ValueError`` for a rank below 1, a tolerance that is not positive,
    another dtype, an empty matrix, NaN or infinity.
    """
    return truncated_svds(delta[None], rank, tolerance=tolerance, exact=exact, seed=seed)[0]


def truncated_svds(deltas: Tensor, rank: int, *, tolerance: float = 1e-3, exact: bool = False, seed: int = 0) -> list[DenseSvd]:
    """:func:`truncated_svd` of each matrix of ``deltas: (b, out, in)``: together on a GPU, one by one on the CPU.

    Each result is that of the matrix alone (on a GPU, up to the rounding of its batched product). Beyond the input this
    takes about as much memory again where some matrices are finished before others.
    """
    if deltas.device.type == "cpu" and len(deltas) > 1:
        return [found for one in deltas for found in batched(one[None], rank, tolerance=tolerance, exact=exact, seed=seed)]
    return batched(deltas, rank, tolerance=tolerance, exact=exact, seed=seed)


def batched(deltas: Tensor, rank: int, *, tolerance: float, exact: bool, seed: int) -> list[DenseSvd]:
    """:func:`truncated_svds` in batched products whatever the device."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    check_tolerance(tolerance)
    ready = prepared(deltas)
    if exact or wants_all(rank, ready.batch.shape[1]):
        return [complete(ready, at, rank) for at in range(len(deltas))]
    start = start_block(ready.batch.shape[2], block_columns(rank), seed, ready.batch)
    found = subspaces(ready.batch, ready.squared_norms, start, Request(rank, tolerance, ready.rounding.gain))
    return [finished(ready, at, one, rank) if one.converged else complete(ready, at, rank) for at, one in enumerate(found)]


def check_tolerance(tolerance: float) -> None:
    """Raises ``ValueError`` unless it is positive."""
    if not tolerance > 0.0:
        raise ValueError(f"the tolerance must be positive, not {tolerance}")


def block_columns(rank: int) -> int:
    """How many columns the iteration has for a rank: a multiple of 16, which matrix products like best."""
    return -(-(rank + max(OVERSAMPLE, rank // 2)) // 16) * 16


def wants_all(rank: int, size: int) -> bool:
    """Whether the complete decomposition is cheaper, for a smaller side ``size``."""
    return size <= EXACT_SIZE or block_columns(rank) * EXACT_SHARE > size


def complete(ready: Prepared, at: int, rank: int) -> DenseSvd:
    """Matrix ``at`` by the complete decomposition."""
    matrix = ready.batch[at]
    left, squares, right = decompose(matrix, rank)
    u, v = (side.to(matrix.dtype).to(matrix.device) for side in (left, right))
    return _result(ready, at, (u, v), squares.cpu(), residual=0.0, excess=0.0, passes=0)


def finished(ready: Prepared, at: int, found: Subspace, rank: int) -> DenseSvd:
    """Matrix ``at`` from the subspace that was found of it."""
    norm, rounding = float(ready.squared_norms[at]), ready.rounding
    residual = max(norm - float(found.squares.sum()), 0.0)
    if residual < rounding.direct * norm:
        residual = _direct_residual(ready.batch[at], found)
    squares = torch.where(found.squares > rounding.value * found.squares[0], found.squares, 0.0)
    lengths = squares[:rank].sqrt()
    error = residual + float(squares[rank:].sum())
    least = max(error - found.missing, 1e-6 * error)
    excess = (error / least) ** 0.5 - 1.0 if error > rounding.bound * norm else 0.0
    inverse = torch.where(lengths > 0.0, 1.0 / lengths, 0.0).to(found.image.dtype).to(found.image.device)
    sides = (found.left[:, :rank] * (inverse > 0.0), found.image[:, :rank] * inverse)
    return _result(ready, at, sides, squares, residual=residual, excess=excess, passes=found.passes)


def _result(
    ready: Prepared, at: int, sides: tuple[Tensor, Tensor], squares: Tensor, *, residual: float, excess: float, passes: int
) -> DenseSvd:
    u, v = reversed(sides) if ready.flipped else sides
    scale = float(ready.scales[at])
    values = squares.sqrt() / scale
    s = values[: u.shape[1]].to(u.dtype).to(u.device)
    norm = float(ready.squared_norms[at]) / scale / scale
    return DenseSvd(u, s, v, values.numpy(), norm, residual / scale / scale, excess, passes, exact=passes == 0)


def _direct_residual(matrix: Tensor, found: Subspace) -> float:
    """``||A - left image^T||_F^2``, by rows: where the difference of two large numbers would be rounding."""
    rows, left, right = (matrix.T, found.image, found.left) if transposed(matrix) else (matrix, found.left, found.image)
    total = 0.0
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        rest = torch.addmm(rows[part], left[part], right.T, alpha=-1.0)
        total += float(torch.linalg.vector_norm(rest)) ** 2
    return total
