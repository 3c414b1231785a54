"""One sweep of alternating least squares towards ``min ||A - (P Q) * (R S)||_F``: each arm of a side in turn.

Written by rows, ``(P Q) * (R S)`` is ``T X`` with ``T_i = R_i x P_i`` (row-wise Kronecker, ``(out, r^2)``) and ``X = [S_k *
Q_l]`` (``(r^2, in)``). With ``M = A X^T`` and ``H = X X^T``, computed once for a side, row i minimises

    ``||a_i||^2 - 2 <T_i, M_i> + T_i H T_i^T``

over ``P_i`` for given ``R_i``: an r x r system ``G_i p = b_i``, ``G_i[l, l'] = sum_kk' R_ik R_ik' H[kl, k'l']``,
``b_i[l] = sum_k R_ik M_i[kl]``. Then over ``R_i`` for given ``P_i``; the columns likewise. ``H[kl, k'l'] = sum_j S_kj S_k'j
Q_lj Q_l'j`` is symmetric in k, k' and in l, l', so with the ``r (r + 1) / 2`` products of two columns of each factor both H and
all the systems of a side are one matrix product each: a sweep is two products with A and ``O((out + in) r^4)`` besides.
Each step is the exact minimum over its arm (with a proximal term of 1e-10 of the system's trace, which keeps singular systems
where they are), so the error never rises. Alternating over the factors is also what Wertz, Vandaele and Gillis do (Efficient
algorithms for the Hadamard decomposition, arXiv:2504.13633, 2025), where each subproblem is solved over the entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64

if TYPE_CHECKING:
    from lorasurgery.linalg.hadamard_target import Approximated

PROXIMAL = 1e-10


class Arms(NamedTuple):
    """``(w1_a @ w1_b) * (w2_a @ w2_b)``: ``w*_a: (out, r)``, ``w*_b: (r, in)``."""

    w1_a: Array
    w1_b: Array
    w2_a: Array
    w2_b: Array


@dataclass(frozen=True, slots=True)
class _Side:
    """The factors of one side, rows by rows: P and R, or the transposes of Q and S."""

    first: Array
    """(rows, r)"""
    second: Array
    """(rows, r)"""

    @property
    def kron(self) -> Array:
        """(rows, r^2): ``second x first`` for each row."""
        return (self.second[:, :, None] * self.first[:, None]).reshape(len(self.first), -1)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """The ``s = r (r + 1) / 2`` pairs of columns."""

    one: AnyArray
    """(s,): the first of each"""
    other: AnyArray
    """(s,): the second of each"""
    weights: Array
    """(s, 1): how often it stands in a symmetric r x r matrix"""
    places: AnyArray
    """(r^2,): which of them stands there"""

    @classmethod
    def of(cls, rank: int) -> _Pairs:
        """Those of so many columns."""
        one, other = np.triu_indices(rank)
        places = np.zeros((rank, rank), np.intp)
        places[one, other] = places[other, one] = np.arange(len(one))
        return cls(one, other, np.where(one == other, 1.0, 2.0)[:, None], places.ravel())

    def products(self, factor: Array) -> Array:
        """``(rows, r) -> (s, rows)``."""
        columns = np.ascontiguousarray(factor.T)
        found: Array = columns[self.one] * columns[self.other]
        return found


def sweep(of: Approximated, arms: Arms, *, fast: bool) -> tuple[Arms, float]:
    """Better arms, rows first, and their ``||A - (P Q) * (R S)||_F^2``; ``fast``: A's products in float32."""
    pairs = _Pairs.of(arms.w1_a.shape[1])
    rows, columns = _Side(arms.w1_a, arms.w2_a), _Side(arms.w1_b.T, arms.w2_b.T)
    rows, _ = _better(of.apply(columns.kron, fast=fast), rows, columns, pairs)
    columns, gain = _better(of.apply_t(rows.kron, fast=fast), columns, rows, pairs)
    return Arms(rows.first, columns.first.T, rows.second, columns.second.T), max(of.norm - gain, 0.0)


def _better(moments: Array, own: _Side, other: _Side, pairs: _Pairs) -> tuple[_Side, float]:
    """The best first factor, then the best second one; and ``||A||^2`` less the squared error."""
    rank = own.first.shape[1]
    moments = moments.reshape(-1, rank, rank)
    gram = pairs.products(other.second) @ pairs.products(other.first).T
    first, _ = _solved(pairs, gram, np.matmul(own.second[:, None], moments)[:, 0], own.second, own.first)
    second, gain = _solved(pairs, gram.T, np.matmul(moments, first[:, :, None])[:, :, 0], first, own.second)
    return _Side(first, second), gain


def _solved(pairs: _Pairs, gram: Array, right: Array, fixed: Array, old: Array) -> tuple[Array, float]:
    """The best rows beside ``fixed`` ones, ``(rows, r)`` both, and ``2 <rows, right>`` less their quadratic form.

    ``gram: (s, s)``, pairs of the fixed factor's columns first; ``right: (rows, r)``. The systems need not be kept for the
    quadratic form: ``(G + c) p = b + c old``, so that ``p G p = p b + c p (old - p)``.
    """
    rank = fixed.shape[1]
    system = pairs.products(fixed).T @ (pairs.weights * gram)[:, pairs.places]
    diagonal = system[:, :: rank + 1]
    ridge = PROXIMAL * np.mean(diagonal, axis=1, keepdims=True) + 1e-280
    diagonal += ridge
    new = as_float64(np.linalg.solve(system.reshape(-1, rank, rank), (right + ridge * old)[..., None])[..., 0])
    return new, float(np.sum(new * (right + ridge * (new - old))))
