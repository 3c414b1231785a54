"""The complete decomposition of a matrix, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorasurgery.linalg.dense.prepare import prepared
from lorasurgery.linalg.dense.products import float64

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import Array

COLUMNS = 1024
"""How many columns are float64 at a time."""
GRAM_ROUNDING = 1e-14
"""Squared singular values below this share of the largest are rounding of the Gram matrix, and count as zero."""
GRAM_SEES = 1e-10
"""A rest of the squared norm below this share is too near to the rounding of the Gram matrix."""


def full_spectrum(delta: Tensor) -> Array:
    """All ``min(out, in)`` singular values of ``delta: (out, in)``, descending, float64 on the CPU.

    From the eigenvalues of the smaller Gram matrix in float64: right to about 1e-8 of the largest; what is
    below 1e-7 of it is rounding. Raises ``ValueError`` as :func:`truncated_svd`.
    """
    ready = prepared(delta[None])
    values: Array = torch.linalg.eigvalsh(wide_gram(ready.batch[0])).cpu().flip(0).clamp_min(0.0).sqrt().numpy()
    return values / float(ready.scales[0])


def decompose(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """``left: (m, r)``, all squared singular values (m,), ``right: (n, r)`` of a matrix (m, n), m <= n; all float64.

    Through the Gram matrix. Where the rest is too small for it (it sees the squares of singular values to 1e-16 of the
    largest), a float64 matrix is decomposed itself.
    """
    values, vectors = torch.linalg.eigh(wide_gram(matrix))
    squares, left = values.flip(0).clamp_min(0.0), vectors.flip(1)[:, :rank]
    if matrix.dtype == torch.float64 and float(squares[rank:].sum()) < GRAM_SEES * float(squares.sum()):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s.square(), vh[:rank].T
    right = torch.cat([float64(part).mT @ left for part in _columns(matrix)])
    lengths = torch.linalg.vector_norm(right, dim=0)
    # Near to rounding the more exact lengths may be out of order.
    squares = torch.cat((lengths.square(), squares[rank:])).cummin(0).values
    squares = torch.where(squares > GRAM_ROUNDING * squares[0], squares, 0.0)
    inverse = torch.where(squares[: left.shape[1]] > 0.0, 1.0 / lengths, 0.0)
    return left * (inverse > 0.0), squares, right * inverse


def wide_gram(matrix: Tensor) -> Tensor:
    """``A A^T`` in float64, (m, n) -> (m, m), with no float64 copy of A; on the CPU for mps."""
    first, *others = _columns(matrix)
    wide = float64(first)
    total: Tensor = wide @ wide.mT
    for part in others:
        wide = float64(part)
        total.addmm_(wide, wide.mT)
    return total


def _columns(matrix: Tensor) -> list[Tensor]:
    return [matrix[:, start : start + COLUMNS] for start in range(0, matrix.shape[1], COLUMNS)]
