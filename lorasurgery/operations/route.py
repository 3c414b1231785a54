"""Which way to the singular values of a change costs least: by its factors, or by the dense matrix.

*Factors*: two Gram matrices of the size of the rank. *Dense*: the matrix itself, then random products where few values are
wanted, its Gram matrix otherwise (:mod:`lorasurgery.linalg.randomized`). All costs are in multiplications of a float64 matrix
product, measured on OpenBLAS with one thread (2026): an eigendecomposition of size n takes as long as 14 n^3 of them.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.linalg.randomized import EXACT_SIZE, SMALL_SHARE
from lorasurgery.linalg.subspace import OVERSAMPLE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lorasurgery.deltas.delta import Delta

EIGENVALUES, ROOT, VECTORS = 14.0, 1.0, 38.0
"""Of an eigendecomposition, a Cholesky factor and a singular value decomposition with vectors, times n^3."""
PASSES = 32.0
"""Products with the matrix in float64 that a subspace iteration takes: 16 rounds, each there and back, on flat spectra."""


ELEMENT = 30.0
"""What one number read, multiplied and added by itself takes, which waits for memory."""


def dense_is_cheaper(sides: tuple[int, int], rank: int, needed: int | None, making: float) -> bool:
    """Whether ``needed`` (None: all) singular values of a change of this rank are had sooner from the dense matrix.

    ``sides``: (out, in*k*k); ``making``: what the dense matrix takes, as :func:`making_dense` counts.
    """
    return making + _by_matrix(sides, needed) < _by_factors(sides, rank, needed)


def is_dense_cheaper(delta: Delta, needed: int | None) -> bool:
    """The same of one change that has a low-rank form."""
    sides = (delta.shape[0], prod(delta.shape[1:]))
    return dense_is_cheaper(sides, delta.to_low_rank().rank, needed, making_dense([delta]))


def making_dense(deltas: Iterable[Delta]) -> float:
    """The multiplications that the dense sum of these takes."""
    return sum(prod(delta.shape) * _depth(delta) for delta in deltas)


def _depth(delta: Delta) -> float:
    """Multiplications for one element of the dense change."""
    if isinstance(delta, LowRank):
        return ELEMENT + delta.rank
    return ELEMENT + (delta.w1_b.shape[0] + delta.w2_b.shape[0] if isinstance(delta, Hadamard) else 0)


def _by_factors(sides: tuple[int, int], rank: int, needed: int | None) -> float:
    """Beyond both sides the Gram matrices say nothing more than the product: it is formed and decomposed in full."""
    out, width = sides
    most = min(sides)
    if rank > most:
        return out * width * rank + VECTORS * out * width * most
    return (rank + (rank if needed is None else min(needed, rank))) * rank * (out + width) + (EIGENVALUES + ROOT) * rank**3


def _by_matrix(sides: tuple[int, int], needed: int | None) -> float:
    out, width = sides
    most = min(sides)
    if most <= EXACT_SIZE:
        return VECTORS * out * width * most
    if needed is not None and needed <= most // SMALL_SHARE:
        return PASSES * out * width * (needed + max(OVERSAMPLE, needed // 2))
    return out * width * most + EIGENVALUES * most**3
