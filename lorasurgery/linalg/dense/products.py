"""Products with a batch of large matrices (b, m, n), and small float64 matrices from them, on any device.

The small matrices (b, l, l) always live on the CPU in float64: their decompositions are cheap, the same on every device, and
Apple's mps has no float64. A batch of one is multiplied as a plain matrix, which is the same product with less around it.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Numbers converted to float64 at a time: 512 KiB, which stays in the cache."""
PANEL = 64
"""Rows of a matrix multiplied at a time where it is transposed and a side is ``WIDE`` at least."""
WIDE = 2048
DEPENDENT = 1e-5
"""Smallest pivot of the Cholesky factor of a scaled Gram matrix for which that is used."""
NEARLY = 1e-6
"""Up to this distance from 1, each number of a Gram matrix, one Newton step towards its inverse root is exact to rounding."""
FLOOR = 1e-14
"""Eigenvalues of a scaled Gram matrix below this are rounding."""


def times(matrix: Tensor, block: Tensor) -> Tensor:
    """``matrix @ block`` for (b, m, n) and (b, n, l), in the order that is fastest for how ``matrix`` lies in memory."""
    if len(matrix) == 1:
        return _times(matrix[0], block[0])[None]
    return matrix @ block


def _times(matrix: Tensor, block: Tensor) -> Tensor:
    if matrix.device.type != "cpu" or not transposed(matrix) or max(matrix.shape) < WIDE:
        return matrix.matmul(block)
    # MKL multiplies a transposed matrix up to twice as slowly; the products of a few of its rows at a time stay in the cache.
    rows, total = matrix.T, torch.zeros(block.shape[1], len(matrix), dtype=block.dtype)
    for start in range(0, len(rows), PANEL):
        total.addmm_(block[start : start + PANEL].T, rows[start : start + PANEL])
    return total.T.contiguous()


def transposed(matrix: Tensor) -> bool:
    """Whether the columns of a matrix (m, n) lie one after the other in memory."""
    return matrix.stride(0) == 1 and matrix.stride(1) != 1


def turned(block: Tensor, small: Tensor) -> Tensor:
    """``block @ small`` for a block (b, m, l) and a small float64 matrix (b, l, k), in the block's dtype."""
    return times(block, placed(small, block))


def placed(small: Tensor, like: Tensor) -> Tensor:
    """A small matrix in the dtype and on the device of another; in that order, as mps has no float64."""
    return small.to(like.dtype).to(like.device)


def gram(wide: Tensor, other: Tensor | None = None) -> Tensor:
    """``wide^T other`` (``wide`` itself by default) of float64 blocks, on the CPU: (b, m, l), (b, m, k) -> (b, l, k)."""
    other = wide if other is None else other
    return (wide[0].T @ other[0])[None].cpu() if len(wide) == 1 else (wide.mT @ other).cpu()


def float64(tensor: Tensor) -> Tensor:
    """The same values in float64, on the same device if it has float64 and on the CPU if not."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def squared_norms(batch: Tensor) -> Tensor:
    """``||A||_F^2`` of each matrix as float64 on the CPU: (b, m, n) -> (b,)."""
    if batch.device.type == "cuda":
        # One by one: CUDA makes a float64 copy of what it sums.
        norms: Tensor = torch.stack([torch.linalg.vector_norm(matrix, dtype=torch.float64) for matrix in batch])
        return norms.square().cpu()
    return torch.tensor([_squared_norm(matrix.cpu()) for matrix in batch], dtype=torch.float64)


def _squared_norm(matrix: Tensor) -> float:
    flat = (matrix if matrix.is_contiguous() else matrix.mT).reshape(-1)
    wide = torch.empty(min(CHUNK, len(flat)), dtype=torch.float64)
    total = 0.0
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        held = wide[: len(part)].copy_(part)
        total += float(held.dot(held))
    return total


def whitener(small: Tensor) -> Tensor:
    """M with ``M^T G M = 1`` for each Gram matrix ``G`` of ``small: (b, l, l)``, so that ``block @ M`` is orthonormal.

    From the Cholesky factor of G scaled to a unit diagonal (Cholesky-QR; Yamamoto et al. 2015). Where the columns are
    nearly dependent the eigendecomposition takes its place and eigenvalues below ``FLOOR`` count as that: those columns
    come out short, to be lengthened by a second round, not lost. Columns of zeros stay zeros.
    """
    identity = torch.eye(small.shape[-1], dtype=torch.float64).expand_as(small)
    if float((small - identity).abs().amax()) < NEARLY:
        return 1.5 * identity - 0.5 * small
    size = small.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
    inverse = torch.where(size > 0.0, 1.0 / size, 0.0)[:, :, None]
    scaled = small * inverse * inverse.mT
    factor, info = torch.linalg.cholesky_ex(scaled)
    pivots = factor.diagonal(dim1=1, dim2=2).amin(1).tolist()
    white: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    for at, (failed, pivot) in enumerate(zip(info.tolist(), pivots, strict=True)):
        if failed or not pivot > DEPENDENT:
            values, vectors = torch.linalg.eigh(scaled[at])
            white[at] = vectors / values.clamp_min(FLOOR).sqrt()
    return inverse * white
