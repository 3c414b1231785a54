"""The dominant singular subspaces of a batch of matrices, by randomised subspace iteration with a stopping rule.

The range finder of Halko, Martinsson and Tropp (2011) with one-sided orthonormalisation, and two things that cost no
product with the matrix:

- The dynamic shift of Feng, Yu and Xie (dashSVD, 2023): ``Y = A A^T Q - c Q`` with ``c`` half the smallest Ritz value.
  That is never above the eigenvalue it stands for, so the unwanted part of the spectrum of ``A A^T`` is mapped to [-c, c]
  and falls behind nearly twice as fast.
- A window: the singular pairs are taken from the span of the last two bases together, whose images ``A^T Q`` are known.
  On flat spectra that saves about one round in three, as a block Krylov method does that keeps all bases.

The stopping rule
-----------------
Each round gives squared singular values ``t_i`` of A within the window; they rise to those of A. The energy that the r
largest still miss, ``g``, is a sum of parts, one for each wanted index i, that decay at a rate of at most
``p_i = (c / (t_i - c))^2``, the l-th value standing for the eigenvalue behind the block. With the gains ``d_i`` of the
last round the geometric series gives

    ``g <= sum_{i<=r} d_i p_i / (1 - p_i)``

The values being too small in early rounds, this is multiplied by ``SAFETY``, chosen so that no error was beyond the tolerance
in 1,500 runs over power laws, exponentials, steps, noise with and without adapters in it, and sums of them.
The residual ``R = ||A||^2 - sum_{i<=r} t_i`` is known and the optimum is ``R - g``, so the iteration ends when
``sqrt(R / (R - g)) - 1`` is within the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.linalg.dense.pencil import Block, block_of, in_order, ritz, window_ritz
from lorasurgery.linalg.dense.products import placed, times, turned

MAX_ROUNDS = 40
"""Or three times the smaller side over the columns: by then the complete decomposition is no dearer."""
SLOWEST = 0.98
"""The slowest rate that the stopping rule believes in."""
SLACK = 1e-4
"""What the squares may be more than the squared norm by rounding."""
SAFETY = (torch.inf, 5.0, 1.7)
"""What the bound is multiplied by in round 0, 1 and later."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """What the iteration found of one matrix A (m, n); singular pairs in descending order."""

    left: Tensor
    """(m, l), orthonormal columns"""
    image: Tensor
    """(n, l): ``A^T left``, orthogonal columns whose squared norms are ``squares``"""
    squares: Tensor
    """(l,), float64 on the CPU"""
    missing: float
    """The estimate of what the ``rank`` largest still miss, in squared norm"""
    passes: int
    converged: bool


@dataclass(frozen=True, slots=True)
class Request:
    """When to stop."""

    rank: int
    tolerance: float
    """Of the error, relative to the optimal error"""
    noise: float
    """Gains below this share of the squared norm are rounding"""


def subspaces(batch: Tensor, squared_norms: Tensor, start: Tensor, request: Request) -> list[Subspace]:
    """The dominant left singular subspace of each matrix of ``batch: (b, m, n)``, best with m <= n.

    ``start``: (1, n, l), l above the rank; ``squared_norms``: (b,). A matrix's result does not depend on the others (but
    for the rounding of the device's batched product); one that is finished leaves the batch.
    """
    found: dict[int, Subspace] = {}
    last = min(MAX_ROUNDS, max(3 * batch.shape[1] // start.shape[2], 3)) - 1
    names = list(range(len(batch)))
    older: Block | None = None
    before: Tensor | None = None
    sketch = times(batch, start.expand(len(batch), -1, -1))
    for number in range(last + 1):
        newer = block_of(batch, sketch)
        squares, turn = ritz(newer) if older is None else window_ritz(newer, older)
        missing = SAFETY[min(number, 2)] * _missing(squares, before, request.rank)
        done = _converged(squares, missing, squared_norms, request)
        if older is None or number == last or any(done):
            turn = placed(turn, newer.basis)
        for at, name in enumerate(names):
            if done[at] or number == last:
                sides = _sides(newer, older, turn, at)
                found[name] = Subspace(*sides, squares[at], float(missing[at]), 2 * number + 2, done[at])
        keep = [at for at, finished in enumerate(done) if not finished]
        if not keep:
            break
        if len(keep) < len(names):
            names, batch, squared_norms = [names[at] for at in keep], batch[keep], squared_norms[keep]
            newer, squares, turn = newer.only(keep), squares[keep], turn[keep]
        if older is None:
            newer = in_order(newer, turn)
        shift = placed(squares[:, -1:, None] / 2, newer.basis)
        sketch, older, before = times(batch, newer.image) - shift * newer.basis, newer, squares
    return [found[at] for at in sorted(found)]


def _sides(newer: Block, older: Block | None, turn: Tensor, at: int) -> tuple[Tensor, Tensor]:
    sides = []
    for name in ("basis", "image"):
        parts = [getattr(block, name)[at : at + 1] for block in (newer, older) if block is not None]
        sides.append(turned(torch.cat(parts, dim=2), turn[at : at + 1])[0])
    return sides[0], sides[1]


def _missing(squares: Tensor, before: Tensor | None, rank: int) -> Tensor:
    if before is None:
        return torch.ones(len(squares), dtype=torch.float64)
    wanted, cut = squares[:, :rank], squares[:, -1:]
    rate = (cut / (2.0 * wanted - cut).clamp_min(1e-300)).square().clamp(0.0, SLOWEST)
    return ((wanted - before[:, :rank]).clamp_min(0.0) * rate / (1.0 - rate)).sum(1)


def _converged(squares: Tensor, missing: Tensor, squared_norms: Tensor, request: Request) -> list[bool]:
    residual = (squared_norms - squares[:, : request.rank].sum(1)).clamp_min(0.0)
    allowed = residual * (1.0 - (1.0 + request.tolerance) ** -2)
    near = missing <= torch.maximum(allowed, request.noise * squared_norms)
    possible = squares.sum(1) <= squared_norms * (1.0 + SLACK)  # more than there is: the basis is none
    done: list[bool] = (near & possible).tolist()
    return done
