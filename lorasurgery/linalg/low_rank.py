"""SVD, truncation and norms of ``up @ down`` from the factors alone, in O((out + in) rank^2): no product is formed.

Two routes. *Gram*: ``G_u = up^T up``, ``G_d = down down^T``, two small eigenproblems. Fast, but it squares the
condition number: a singular value S has relative error about ``eps (b / S)^2 / 2`` with ``b = ||up||_2 ||down||_2``.
*QR*: ``up = Q_u R_u``, ``down^T = Q_d R_d``, SVD of ``R_u R_d^T``; error ``eps b / S``, the same as a dense float64 SVD
of the product. The Gram route is kept only while the smallest singular value asked for is at least ``GRAM_LIMIT * b``
(relative error then below 1e-7); otherwise (nearly dependent or zero factors) QR is used. Only where the rank is above
out or in, and the product is smaller than its factors, is it formed and decomposed itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorasurgery.linalg.factors import AnyArray, Array, as_float64, check_request

GRAM_LIMIT = 1e-4
"""Smallest ``S / (||up||_2 ||down||_2)`` for which the Gram route is trusted."""
SMALLEST = 1e-100
"""Smallest ``||up||_2 ||down||_2`` for it: squares of what is smaller leave float64's range."""


@dataclass(frozen=True, slots=True)
class _Core:
    """``delta = (up_basis @ left) diag(values) (right @ down_basis)``, with orthonormal brackets."""

    up_basis: Array
    left: Array
    values: Array
    right: Array
    down_basis: Array


def factored_svd(up: AnyArray, down: AnyArray) -> tuple[Array, Array, Array]:
    """Thin SVD ``up @ down = U diag(S) Vt`` without forming the product.

    ``up: (out, rank)``, ``down: (rank, in)`` -> ``U: (out, k)``, ``S: (k,)`` descending, ``Vt: (k, in)`` in float64,
    with ``k = min(rank, out, in)``. Singular values agree with a float64 SVD of the dense product to 1e-6 relative, or
    to ``eps ||up||_2 ||down||_2`` where they are smaller than that resolves. Raises ``ValueError`` if the factors do
    not fit together or hold NaN or infinity.
    """
    core = _core(*_checked(up, down), rank=None)
    return core.up_basis @ core.left, core.values, core.right @ core.down_basis


def truncate(up: AnyArray, down: AnyArray, rank: int) -> tuple[AnyArray, AnyArray, float]:
    """The best approximation of ``up @ down`` of at most ``rank``, and its relative error (Eckart-Young).

    ``up: (out, r)``, ``down: (r, in)`` -> ``up': (out, k)``, ``down': (k, in)``, ``k = min(rank, r, out, in)``,
    balanced (``sqrt(S)`` on each side), and ``sqrt(sum_{i>k} S_i^2 / sum S_i^2)``, true to 1e-7 of the whole norm.
    Decompositions are float64; the result is float64 if both inputs are, else float32. Zero factors give zeros and
    error 0. Raises ``ValueError`` for a rank below 1 and as ``factored_svd`` does.
    """
    check_request(rank, None)
    left, right = _checked(up, down)
    core = _core(left, right, rank=rank)
    root = np.sqrt(core.values[:rank])
    dtype = np.float64 if up.dtype == down.dtype == np.float64 else np.float32
    new_up = core.up_basis.astype(dtype) @ (core.left[:, :rank] * root).astype(dtype)
    new_down = (root[:, None] * core.right[:rank]).astype(dtype) @ core.down_basis.astype(dtype)
    return new_up, new_down, tail_error(core.values, rank)


def product_norm(up: AnyArray, down: AnyArray) -> float:
    """``||up @ down||_F = sqrt(sum(G_u * G_d))``, by QR where the product is far smaller than its factors.

    ``up: (out, rank)``, ``down: (rank, in)``; relative error below 1e-7, or ``eps ||up|| ||down||`` if larger. Raises
    ``ValueError`` if the factors do not fit together or hold NaN or infinity.
    """
    left, right = _checked(up, down)
    up_gram, down_gram = left.T @ left, right @ right.T
    square = float(np.sum(up_gram * down_gram))
    if square >= GRAM_LIMIT**2 * float(np.trace(up_gram) * np.trace(down_gram)):
        return float(np.sqrt(square))
    return _norm_by_qr(left, right)


def difference_norm(up: AnyArray, down: AnyArray, other_up: AnyArray, other_down: AnyArray) -> float:
    """``||up @ down - other_up @ other_down||_F`` by QR of the concatenated ``[up, other_up] [down; -other_down]``.

    Nearly equal products do not cancel: the absolute error is ``eps (||up|| ||down|| + ||other_up|| ||other_down||)``.
    The ranks may differ. Raises ``ValueError`` if the two products differ in shape, and as ``factored_svd`` does.
    """
    left, right = _checked(up, down)
    other_left, other_right = _checked(other_up, other_down)
    if left.shape[0] != other_left.shape[0] or right.shape[1] != other_right.shape[1]:
        shapes = [(a.shape[0], b.shape[1]) for a, b in ((left, right), (other_left, other_right))]
        raise ValueError(f"the products differ in shape: {shapes[0]} and {shapes[1]}")
    return _norm_by_qr(np.hstack([left, other_left]), np.vstack([right, -other_right]))


def relative_error(up: AnyArray, down: AnyArray, other_up: AnyArray, other_down: AnyArray) -> float:
    """``||up @ down - other_up @ other_down||_F / ||up @ down||_F``; the first product is the reference.

    0 if both are zero, infinity if only the reference is. Raises as ``difference_norm`` does.
    """
    difference = difference_norm(up, down, other_up, other_down)
    if difference == 0.0:
        return 0.0
    norm = product_norm(up, down)
    return difference / norm if norm > 0.0 else float("inf")


def rank_for_energy(values: AnyArray, energy: float) -> int:
    """The smallest k with ``sum_{i<=k} S_i^2 >= energy * sum S_i^2`` for descending singular values S.

    Counted from the small end in extended precision, so an energy next to 1 is not lost in the sum; a tie within
    ``4 eps`` of the total counts as reached (0.9 of ten equal values is 9). An energy of exactly 1 keeps every non-zero
    value. 0 for a zero or empty spectrum. Raises ``ValueError`` unless ``0 < energy <= 1``.
    """
    check_request(None, energy)
    scale = float(np.max(values, initial=0.0))
    if scale == 0.0:
        return 0
    squares = (np.asarray(values, dtype=np.longdouble) / scale) ** 2
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)  # tails[k] = what is left out at rank k
    slack = 4 * np.finfo(np.float64).eps if energy < 1.0 else 0.0
    allowed = (1 - np.longdouble(energy) + slack) * tails[0]
    return int(np.argmax(tails <= allowed))


def tail_error(values: Array, rank: int) -> float:
    """``sqrt(sum_{i>rank} S_i^2 / sum S_i^2)`` for descending singular values S; 0 for a zero spectrum."""
    scale = float(np.max(values, initial=0.0))
    if scale == 0.0:
        return 0.0
    squares = (values / scale) ** 2
    return float(np.sqrt(np.sum(squares[rank:]) / np.sum(squares)))


def _checked(up: AnyArray, down: AnyArray) -> tuple[Array, Array]:
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise ValueError(f"up {up.shape} and down {down.shape} are not (out, rank) and (rank, in)")
    left, right = as_float64(up), as_float64(down)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise ValueError("the factors hold NaN or infinity")
    return left, right


def _core(up: Array, down: Array, *, rank: int | None) -> _Core:
    """The Gram route where it is accurate for the first ``rank`` (None: all) values, else QR."""
    full = up.shape[1]
    if 0 < full <= min(up.shape[0], down.shape[1]):
        core = _gram_core(up, down, min(full, rank or full))
        if core is not None:
            return core
    return _qr_core(up, down)


def _gram_core(up: Array, down: Array, needed: int) -> _Core | None:
    """``G_d = L L^T``, ``L^T G_u L = V S^2 V^T``; U = up L V / S, Vt = S^-2 V^T L^T G_u down. None if inaccurate."""
    up_gram = up.T @ up
    spread, basis = np.linalg.eigh(down @ down.T)
    root = basis * np.sqrt(np.maximum(spread, 0.0))
    squares, vectors = np.linalg.eigh(root.T @ up_gram @ root)
    values = np.sqrt(np.maximum(squares[::-1], 0.0))
    bound = np.sqrt(np.linalg.norm(up_gram) * max(spread[-1], 0.0))
    if not (bound > SMALLEST and values[needed - 1] > GRAM_LIMIT * bound):
        return None
    safe = np.maximum(values, GRAM_LIMIT * bound)  # those below are never used: not among the first `needed`
    mixed = root @ vectors[:, ::-1]
    return _Core(up, mixed / safe, values, (mixed / safe**2).T @ up_gram, down)


def _qr_core(up: Array, down: Array) -> _Core:
    if up.shape[1] > min(up.shape[0], down.shape[1]):
        left, values, right = np.linalg.svd(up @ down, full_matrices=False)
        same = np.eye(len(values))
        return _Core(left, same, values, same, right)
    up_basis, up_rest = np.linalg.qr(up)
    down_basis, down_rest = np.linalg.qr(down.T)
    left, values, right = np.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    return _Core(up_basis, left, values, right, down_basis.T)


def _norm_by_qr(up: Array, down: Array) -> float:
    _, up_rest = np.linalg.qr(up)
    _, down_rest = np.linalg.qr(down.T)
    return float(np.linalg.norm(up_rest @ down_rest.T))
