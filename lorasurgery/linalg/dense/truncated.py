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
    from collections.abc import Sequence

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
    done = iter(finished(ready, [(at, one) for at, one in enumerate(found) if one.converged], rank))
    return [next(done) if one.converged else complete(ready, at, rank) for at, one in enumerate(found)]


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


def finished(ready: Prepared, found: Sequence[tuple[int, Subspace]], rank: int) -> list[DenseSvd]:
    """Some matrices, each with its place in the batch, from the subspaces that were found of them.

    A device is waited for twice at most, however many they are.
    """
    if not found:
        return []
    spectra = [torch.where(own.squares > ready.rounding.value * own.squares[0], own.squares, 0.0) for _, own in found]
    lengths = torch.stack([squares[:rank] for squares in spectra]).sqrt()
    inverses = torch.where(lengths > 0.0, 1.0 / lengths, 0.0).to(ready.batch.dtype).to(ready.batch.device)
    results = []
    for (at, own), squares, inverse, residual in zip(found, spectra, inverses, _residuals(ready, found), strict=True):
        error = residual + float(squares[rank:].sum())
        least = max(error - own.missing, 1e-6 * error)
        excess = (error / least) ** 0.5 - 1.0 if error > ready.rounding.bound * float(ready.squared_norms[at]) else 0.0
        sides = (own.left[:, :rank] * (inverse > 0.0), own.image[:, :rank] * inverse)
        results.append(_result(ready, at, sides, squares, residual=residual, excess=excess, passes=own.passes))
    return results


def _result(
    ready: Prepared, at: int, sides: tuple[Tensor, Tensor], squares: Tensor, *, residual: float, excess: float, passes: int
) -> DenseSvd:
    u, v = reversed(sides) if ready.flipped else sides
    scale = float(ready.scales[at])
    values = squares.sqrt() / scale
    norm = float(ready.squared_norms[at]) / scale / scale
    return DenseSvd(u, v, values.numpy(), norm, residual / scale / scale, excess, passes, exact=passes == 0)


def _residuals(ready: Prepared, found: Sequence[tuple[int, Subspace]]) -> list[float]:
    """The squared norm of each matrix beyond its subspace, formed itself where the difference would be rounding."""
    norms = [float(ready.squared_norms[at]) for at, _ in found]
    residuals = [max(norm - float(own.squares.sum()), 0.0) for norm, (_, own) in zip(norms, found, strict=True)]
    near = [i for i, norm in enumerate(norms) if residuals[i] < ready.rounding.direct * norm]
    if near:
        formed = torch.stack([_rest(ready.batch[found[i][0]], found[i][1]) for i in near])
        for i, parts in zip(near, formed.tolist(), strict=True):
            residuals[i] = sum(part**2 for part in parts)
    return residuals


def _rest(matrix: Tensor, found: Subspace) -> Tensor:
    """``||A - left image^T||_F``, of ``ROWS`` rows each."""
    rows, left, right = (matrix.T, found.image, found.left) if transposed(matrix) else (matrix, found.left, found.image)
    parts = [slice(start, start + ROWS) for start in range(0, len(rows), ROWS)]
    rests = [torch.linalg.vector_norm(torch.addmm(rows[part], left[part], right.T, alpha=-1.0)) for part in parts]
    return torch.stack(rests)
