"""What a truncated SVD of a dense matrix returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import Array


@dataclass(frozen=True, slots=True)
class DenseSvd:
    """``u @ diag(s) @ v.T``, the best approximation of a matrix (out, in) of rank r or very near to it, and its error.

    ``u``, ``s`` and ``v`` have the matrix's dtype and device. ``u`` and ``v`` have orthonormal columns, except that a
    column may be zero where the singular value is.
    """

    u: Tensor
    """(out, r)"""
    v: Tensor
    """(in, r)"""
    values: Array
    """All singular values found, descending, at least r; unless ``exact``, those beyond r are some percent too small"""
    squared_norm: float
    """``||matrix||_F^2``, summed in float64"""
    squared_residual: float
    """``||matrix||_F^2`` less the squares of all ``values``, found so that it is right even where it is tiny; not negative"""
    excess: float
    """The estimate of ``error / optimal error - 1`` at rank r; 0 if ``exact``"""
    passes: int
    """How often the matrix was multiplied by a block of vectors; 0 if ``exact``"""
    exact: bool
    """Whether ``values`` is the complete spectrum"""

    @property
    def s(self) -> Tensor:
        """(r,), descending."""
        return torch.from_numpy(self.values[: self.rank]).to(self.u.dtype).to(self.u.device)

    @property
    def rank(self) -> int:
        """The number of columns of ``u`` and ``v``."""
        return int(self.u.shape[1])

    def squared_error(self, rank: int | None = None) -> float:
        """``||matrix - u s v.T||_F^2`` when the first ``rank`` columns are kept (all by default)."""
        kept = self.rank if rank is None else rank
        return self.squared_residual + float(np.sum(self.values[kept:] ** 2))

    def relative_error(self, rank: int | None = None) -> float:
        """``||matrix - u s v.T||_F / ||matrix||_F`` when the first ``rank`` columns are kept; 0 for a zero matrix."""
        if not self.squared_norm > 0.0:
            return 0.0
        return float(np.sqrt(min(self.squared_error(rank) / self.squared_norm, 1.0)))

    def truncated(self, rank: int) -> DenseSvd:
        """The first ``rank`` columns only; ``values`` stay. ``excess`` is that of the larger rank."""
        return DenseSvd(
            self.u[:, :rank],
            self.v[:, :rank],
            self.values,
            self.squared_norm,
            self.squared_residual,
            self.excess,
            self.passes,
            self.exact,
        )

    def balanced(self, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """``up: (out, rank)`` and ``down: (rank, in)`` with the root of ``s`` in each, as copies."""
        kept = self.rank if rank is None else rank
        root = self.s[:kept].sqrt()
        return self.u[:, :kept] * root, (self.v[:, :kept] * root).T.contiguous()
