"""Checks of a batch of matrices, its scale, and its start block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.linalg.dense.products import placed, squared_norms

SAFE = (1e-20, 1e20)
"""Between these ``||A||_F^2`` needs no scaling: its square and its small parts stay in float32's range."""

FLOAT64 = (1e-140, 1e140)
"""The largest number of a matrix must be between these for its squared norm to be a float64 number."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a dtype can tell, as shares of ``||A||_F^2``."""

    gain: float
    """Gains of the iteration below this count as none"""
    direct: float
    """A residual below this is formed itself: the difference of two sums would be rounding"""
    bound: float
    """A smaller squared error counts as nothing"""
    value: float
    """Squared singular values below this share of the largest count as zero"""


ROUNDING = {torch.float32: Rounding(1e-10, 1e-5, 1e-12, 1e-12), torch.float64: Rounding(1e-17, 1e-11, 1e-14, 1e-14)}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A batch (b, m, n) with m <= n: the matrices times ``scales``, transposed if ``flipped``."""

    batch: Tensor
    scales: Tensor
    """(b,), float64: powers of two; 1 for a zero matrix"""
    squared_norms: Tensor
    """(b,), float64, of ``batch``"""
    flipped: bool

    @property
    def rounding(self) -> Rounding:
        """Of the batch's dtype."""
        return ROUNDING[self.batch.dtype]


def prepared(batch: Tensor) -> Prepared:
    """Raises ``ValueError`` for a tensor that is not (b, m, n) of float32 or float64, is empty, or holds NaN or infinity."""
    if batch.ndim != 3 or 0 in batch.shape:
        raise ValueError(f"not a matrix with rows and columns: shape {tuple(batch.shape[1:])}")
    if batch.dtype not in ROUNDING:
        raise ValueError(f"a difference is float32 or float64 here, not {batch.dtype}")
    flipped = batch.shape[1] > batch.shape[2]
    batch = batch.detach().mT if flipped else batch.detach()
    norms = squared_norms(batch)
    if all(SAFE[0] <= norm <= SAFE[1] for norm in norms.tolist()):
        return Prepared(batch, torch.ones_like(norms), norms, flipped)
    scales = _scales(batch)
    batch = batch * placed(scales, batch)[:, None, None]
    return Prepared(batch, scales, squared_norms(batch), flipped)


def _scales(batch: Tensor) -> Tensor:
    """The powers of two (b,) that bring the largest number of each matrix to [1, 2); as far as float32 has them."""
    largest = torch.stack([matrix.abs().amax() for matrix in batch]).cpu().double()
    if not bool(largest.isfinite().all()):
        raise ValueError("the difference holds NaN or infinity")
    if float(largest.amax()) > FLOAT64[1] or float(torch.where(largest > 0.0, largest, 1.0).amin()) < FLOAT64[0]:
        raise ValueError(f"numbers as large or small as {float(largest.amax()):.0e} have no square in float64")
    most = 126.0 if batch.dtype == torch.float32 else 1022.0
    powers = torch.floor(torch.log2(torch.where(largest > 0.0, largest, 1.0))).clamp(-most, most)
    return torch.exp2(-powers)


def start_block(size: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Gaussian (1, size, columns), drawn on the CPU in float32, so that every device begins with the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return placed(torch.randn(1, size, columns, generator=generator), like)
