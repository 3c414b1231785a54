"""The LoHa near a matrix, ``min ||A - (P Q) * (R S)||_F`` over arms of one rank, by alternating least squares.

Written by rows, ``(P Q) * (R S)`` is ``T X`` with ``T_i = R_i x P_i`` (row-wise Kronecker, ``(out, r^2)``) and ``X = [S_k *
Q_l]`` (``(r^2, in)``). With ``M = A X^T`` and ``H = X X^T``, computed once for a side, row i minimises

    ``||a_i||^2 - 2 <T_i, M_i> + T_i H T_i^T``

over ``P_i`` for given ``R_i``: an r x r system ``G_i p = b_i``, ``G_i[l, l'] = sum_kk' R_ik R_ik' H[kl, k'l']``,
``b_i[l] = sum_k R_ik M_i[kl]``. Then over ``R_i`` for given ``P_i``; the columns likewise. A enters by ``A X^T`` and ``A^T Y``
only, so ``up @ down`` is never formed. Each half-step is the exact minimum over its arm (with a proximal term of 1e-10 of
the system's trace, which keeps singular systems where they are), so the error never rises.

The problem has local minima and no closed form (the arms are a weighted low-rank approximation of each other, which is
NP-hard in general): several starts are tried, the best goes on. Both kinds come from an SVD: the best LoRA of the rank in
the first arm beside a second arm of ones, whose error the result can only lower; and, for a dense matrix, the arms' own
truncated SVDs of ``sign(A) |A|^(1/2)`` and ``|A|^(1/2)``, which multiply to A at full rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64, check_request
from lorasurgery.linalg.hadamard import khatri_rao
from lorasurgery.linalg.low_rank import factored_svd, product_norm, rank_for_energy
from lorasurgery.linalg.randomized import dense_svd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Spreads = Sequence[tuple[float, float]]

OF_PRODUCT: Spreads = ((0.1, 0.0), (0.1, 0.1), (1.0, 1.0), (3.0, 3.0))
"""Sizes of what is random in the second arm, its columns and its rows, one start each; the first still is the LoRA."""
OF_DENSE: Spreads = ((0.1, 0.0), (1.0, 1.0), (3.0, 3.0))
"""Fewer: each sweep costs more, and there is the other kind of start."""
TRIAL, SWEEPS, INNER = 6, 300, 2
"""Sweeps after which the worst start is given up, and at most in all; turns between the two arms of a side."""
TOLERANCE = 1e-5
"""Of the squared error: a sweep that gains less is the last."""
NOISE = 1e-15
"""Of ``||A||^2``: squared errors below it are rounding."""
PROXIMAL = 1e-10


class Arms(NamedTuple):
    """``(w1_a @ w1_b) * (w2_a @ w2_b)``: ``w*_a: (out, r)``, ``w*_b: (r, in)``."""

    w1_a: Array
    w1_b: Array
    w2_a: Array
    w2_b: Array


@dataclass(frozen=True, slots=True)
class Approximated:
    """The matrix A as an operator, with the arms to begin from."""

    apply: Callable[[Array], Array]
    """``X: (in, l) -> A @ X``"""
    apply_t: Callable[[Array], Array]
    """``Y: (out, l) -> A^T @ Y``"""
    shape: tuple[int, int]
    """(out, in)"""
    norm: float
    """``||A||_F^2``"""
    lora_rank: Callable[[float], int]
    """The rank, at least 1, of the smallest LoRA that keeps this share of the squared norm"""
    starts: Callable[[int, np.random.Generator], list[Arms]]
    """Arms of a rank to begin from, the best LoRA first."""


@dataclass(frozen=True, slots=True)
class NearestHadamard:
    """A LoHa near the matrix."""

    arms: Arms
    error: float
    """``||A - (P Q) * (R S)||_F^2``, true to 1e-15 of ``||A||_F^2``"""
    lora_error: float
    """The same of the best LoRA of this rank: never below ``error``, but for rounding"""
    sweeps: int
    """How many the chosen start took"""
    converged: bool
    """Whether the last sweep gained less than the tolerance"""


def hadamard_of_product(up: AnyArray, down: AnyArray) -> Approximated:
    """``A = up @ down``, ``up: (out, R)``, ``down: (R, in)``. Raises ``ValueError`` as ``factored_svd`` does."""
    left, right = as_float64(up), as_float64(down)
    u, values, vt = factored_svd(left, right)

    def starts(rank: int, rng: np.random.Generator) -> list[Arms]:
        root = np.sqrt(values[:rank])
        return _beside_ones(u[:, :rank] * root, root[:, None] * vt[:rank], rank, rng, OF_PRODUCT)

    return Approximated(
        apply=lambda x: left @ (right @ x),
        apply_t=lambda y: right.T @ (left.T @ y),
        shape=(len(left), right.shape[1]),
        norm=product_norm(left, right) ** 2,
        lora_rank=lambda energy: max(rank_for_energy(values, energy), 1),
        starts=starts,
    )


def hadamard_of_dense(matrix: AnyArray) -> Approximated:
    """A dense A (out, in); a float64 copy is made. Raises ``ValueError`` for NaN and infinity."""
    whole = as_float64(matrix)
    if not np.isfinite(whole).all():
        raise ValueError("the matrix holds NaN or infinity")

    def starts(rank: int, rng: np.random.Generator) -> list[Arms]:
        best, root = dense_svd(whole, rank=rank, dtype=np.float64), np.sqrt(np.abs(whole))
        arms = [dense_svd(arm, rank=rank, dtype=np.float64) for arm in (np.sign(whole) * root, root)]
        split = Arms(*(_wide(side, rank, axis) for arm in arms for axis, side in ((1, arm.up), (0, arm.down))))
        return [*_beside_ones(as_float64(best.up), as_float64(best.down), rank, rng, OF_DENSE), split]

    return Approximated(
        apply=lambda x: whole @ x,
        apply_t=lambda y: whole.T @ y,
        shape=(len(whole), whole.shape[1]),
        norm=float(np.sum(whole**2)),
        lora_rank=lambda energy: dense_svd(whole, energy=energy).rank,
        starts=starts,
    )


def nearest_hadamard(of: Approximated, rank: int, *, seed: int = 0, tolerance: float = TOLERANCE) -> NearestHadamard:
    """Arms of ``rank`` near A, all of one size: a local minimum no farther from it than the best LoRA of the rank.

    A matrix that is a LoHa of the rank is found again where it has many times the parameters of its arms (all but one of
    twelve random ones of 480 x 640, rank 4 and 8; of 160 x 160, rank 4, hardly any). LoRAs of twice the rank have as many
    parameters and are often nearer to other matrices. Raises ``ValueError`` for a rank below 1.
    """
    check_request(rank, None)
    begun = [_Run(of, arms) for arms in of.starts(rank, np.random.default_rng(seed))]
    lora = begun[0].error
    while len(begun) > 1:
        for run in begun:
            run.go(TRIAL, tolerance)
        begun.remove(max(begun, key=lambda run: run.error))
    best = begun[0]
    best.go(SWEEPS - best.sweeps, tolerance)
    return NearestHadamard(_balanced(best.arms), best.error, lora, best.sweeps, best.converged)


def hadamard_error(of: Approximated, arms: Arms) -> float:
    """``||A - (P Q) * (R S)||_F^2`` for arms as stored; differences below 1e-15 of ``||A||_F^2`` are rounding."""
    up, down = khatri_rao(*arms)
    return max(of.norm - 2.0 * float(np.sum(of.apply(down.T) * up)) + float(np.sum((up.T @ up) * (down @ down.T))), 0.0)


class _Run:
    """One start on its way down."""

    def __init__(self, of: Approximated, arms: Arms) -> None:
        self.of, self.arms, self.sweeps, self.converged = of, arms, 0, False
        self.error = hadamard_error(of, arms)

    def go(self, sweeps: int, tolerance: float) -> None:
        """At most so many further sweeps."""
        for _ in range(sweeps):
            if self.converged:
                return
            p, q, r, s = self.arms
            p, r, _ = _side(self.of.apply, self.of.norm, p, r, q, s)
            qt, st, error = _side(self.of.apply_t, self.of.norm, q.T, s.T, p.T, r.T)
            self.arms, self.sweeps = Arms(p, qt.T, r, st.T), self.sweeps + 1
            self.converged = self.error - error <= tolerance * error + NOISE * self.of.norm
            self.error = error


def _side(apply: Callable[[Array], Array], norm: float, p: Array, r: Array, q: Array, s: Array) -> tuple[Array, Array, float]:
    """Better ``p`` and ``r`` (rows of this side, ``(rows, rank)``) for the other side's ``q`` and ``s``, and the error."""
    rank = p.shape[1]
    x = (s[:, None] * q[None]).reshape(rank * rank, -1)
    moments, gram = apply(x.T).reshape(-1, rank, rank), x @ x.T
    turned = gram.reshape(rank, rank, rank, rank).transpose(1, 0, 3, 2).reshape(rank * rank, -1)
    for _ in range(INNER):
        p = _rows(moments, gram, r, p)
        r = _rows(moments.swapaxes(1, 2), turned, p, r)
    rows = (r[:, :, None] * p[:, None]).reshape(len(p), -1)
    error = norm - 2.0 * float(np.sum(rows * moments.reshape(len(p), -1))) + float(np.sum((rows @ gram) * rows))
    return p, r, max(error, 0.0)


def _rows(moments: Array, gram: Array, fixed: Array, old: Array) -> Array:
    """The best rows l for ``fixed`` rows k; ``moments: (rows, k, l)``, ``gram: (k l, k' l')``, both ``(rows, rank)``."""
    rank = fixed.shape[1]
    half = (fixed @ gram.reshape(rank, -1)).reshape(-1, rank, rank, rank)  # (rows, l, k', l')
    system = np.matmul(fixed[:, None, None, :], half)[:, :, 0]
    right = np.matmul(fixed[:, None], moments)[:, 0]
    ridge = PROXIMAL * np.trace(system, axis1=1, axis2=2) / rank + 1e-280
    system += ridge[:, None, None] * np.eye(rank)
    return as_float64(np.linalg.solve(system, (right + ridge[:, None] * old)[..., None])[..., 0])


def _beside_ones(up: Array, down: Array, rank: int, rng: np.random.Generator, spreads: Spreads) -> list[Arms]:
    """The LoRA ``up @ down``: its factors beside an arm of ones, whose other columns and rows are random."""
    first, second = _wide(up, rank, 1), _wide(down, rank, 0)
    found = []
    for columns, rows in spreads:
        left, right = columns * rng.standard_normal(first.shape), rows * rng.standard_normal(second.shape)
        left[:, 0], right[0] = 1.0, 1.0
        found.append(Arms(first, second, left, right))
    return found


def _wide(side: AnyArray, rank: int, axis: int) -> Array:
    """With zeros where the matrix had fewer than ``rank`` singular values."""
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, rank - side.shape[axis])
    return np.pad(as_float64(side), missing)


def _balanced(arms: Arms) -> Arms:
    """The same product with factors of one mean square, so that none leaves the range of a narrow dtype."""
    sizes = [float(np.sqrt(np.mean(arm**2))) for arm in arms]
    if 0.0 in sizes:
        return arms
    mean = float(np.prod(sizes)) ** 0.25
    return Arms(*(arm * (mean / size) for arm, size in zip(arms, sizes, strict=True)))
