"""Norms, inner product, distance and common directions of two changes ``scale * up @ down``, from their factors in float64.

Gram matrices give everything in O((out + in) r^2), but ``||A||^2 + ||B||^2 - 2 <A, B>`` has lost half of the digits where A
and B are nearly equal. So the distance is taken from them only where it is large enough; then from the differences of the
factors, ``A - B = s (X down + c up' Y)`` with ``X = up - c up'`` and ``Y = down - s' / (s c) down'``, which is small term by
term where B is A rounded or with its scale moved from one factor to the other; and from QR factorisations of the
concatenated factors, accurate to ``eps ||up|| ||down||``, in all other cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import Array

RELIABLE = 1e-7
"""Share of the terms' size below which a difference of them has too few digits left: half of float64's."""
CONDITION = 1e-5
"""Of the smallest to the largest entry on a Cholesky factor's diagonal, above which Gram matrices tell the directions."""
NEGLIGIBLE = 1e-12
"""Singular values below this share of the largest are rounding, and their directions mean nothing."""


@dataclass(frozen=True, slots=True)
class Product:
    """``scale * up @ down``."""

    up: Array
    """(out, rank)"""
    down: Array
    """(rank, in)"""
    scale: float = 1.0


class Measured(NamedTuple):
    """What two changes A and B have in common."""

    norm_a: float
    """Frobenius norm."""
    norm_b: float
    inner: float
    """``<A, B> = sum of A * B``"""
    difference: float
    """``||A - B||``"""
    left: float | None = None
    """Mean squared cosine of the principal angles between the column spaces, None where there are none to compare."""
    right: float | None = None
    """The same of the row spaces."""

    @property
    def distance(self) -> float:
        """``||A - B|| / max(||A||, ||B||)``; 0 for two zeros."""
        largest = max(self.norm_a, self.norm_b)
        return self.difference / largest if largest else 0.0

    @property
    def cosine(self) -> float | None:
        """Of the angle between A and B as vectors; None where one is zero."""
        if not self.norm_a or not self.norm_b:
            return None
        return max(-1.0, min(1.0, self.inner / self.norm_a / self.norm_b))


class _Grams(NamedTuple):
    """``first^T first``, ``second^T second``, ``first^T second`` of two matrices with vectors as columns."""

    aa: Array
    bb: Array
    ab: Array


def measure(a: Product, b: Product, *, directions: bool = True) -> Measured:
    """Everything of two changes of the same shape, or all but the common ``directions``; NaN in, NaN out."""
    if a.up is b.up and a.down is b.down and a.scale == b.scale:
        return itself(a)
    ups = _Grams(a.up.T @ a.up, b.up.T @ b.up, a.up.T @ b.up)
    downs = _Grams(a.down @ a.down.T, b.down @ b.down.T, a.down @ b.down.T)
    square_a, square_b = _square(ups.aa, downs.aa, a.scale), _square(ups.bb, downs.bb, b.scale)
    sizes = (_size(ups.aa, downs.aa, a.scale), _size(ups.bb, downs.bb, b.scale))
    overlaps = (overlap_of(ups), overlap_of(downs)) if directions else (None, None)
    exact = any(s < RELIABLE * size for s, size in zip((square_a, square_b), sizes, strict=True))
    if exact or (directions and None in overlaps and 0.0 not in sizes):
        return by_qr(a, b)
    inner = a.scale * b.scale * float(np.sum(ups.ab * downs.ab))
    square: float | None = square_a + square_b - 2.0 * inner
    if square is not None and not square > RELIABLE * sum(sizes):
        square = _aligned(a, b, ups, downs)
        if square is None:
            return by_qr(a, b)
        inner = (square_a + square_b - square) / 2.0
    return Measured(sqrt(square_a), sqrt(square_b), inner, sqrt(max(square or 0.0, 0.0)), *overlaps)


def itself(a: Product) -> Measured:
    """A change compared with itself."""
    up, down = a.up.T @ a.up, a.down @ a.down.T
    square = _square(up, down, a.scale)
    norm = sqrt(square) if square >= RELIABLE * _size(up, down, a.scale) else by_qr(a, a).norm_a
    same = 1.0 if norm else None
    return Measured(norm, norm, norm * norm, 0.0, same, same)


def by_qr(a: Product, b: Product) -> Measured:
    """The same from ``[up, up'] = Q R`` and ``[down; down']^T = P S``: small matrices that hold all of A and B."""
    ups, downs = np.hstack([a.up, b.up]), np.vstack([a.down, b.down]).T
    if not (np.isfinite(ups).all() and np.isfinite(downs).all()):
        return Measured(np.nan, np.nan, np.nan, np.nan)
    left, right = _triangle(ups), _triangle(downs)
    rank = a.up.shape[1]
    first = a.scale * (left[:, :rank] @ right[:, :rank].T)
    second = b.scale * (left[:, rank:] @ right[:, rank:].T)
    overlaps = _directions(first, second)
    norms = float(np.linalg.norm(first)), float(np.linalg.norm(second))
    return Measured(*norms, float(np.sum(first * second)), float(np.linalg.norm(first - second)), *overlaps)


def _triangle(matrix: Array) -> Array:
    """R of ``matrix = Q R``."""
    found: Any = np.linalg.qr(matrix, mode="r")
    triangle: Array = found
    return triangle


def overlap_of(grams: _Grams) -> float | None:
    """``||Q_a^T Q_b||^2 = tr(G_aa^-1 G_ab G_bb^-1 G_ba)`` over the smaller rank; None where either matrix is near singular."""
    for gram in (grams.aa, grams.bb):
        try:
            diagonal = np.diagonal(np.linalg.cholesky(gram))
        except np.linalg.LinAlgError:
            return None
        if not diagonal.min() > CONDITION * diagonal.max():
            return None
    total = np.sum(np.linalg.solve(grams.aa, grams.ab) * np.linalg.solve(grams.bb, grams.ab.T).T)
    return _share(float(total), min(len(grams.aa), len(grams.bb)))


def _share(total: float, angles: int) -> float:
    return min(max(total / angles, 0.0), 1.0)


def _square(up: Array, down: Array, scale: float) -> float:
    """``||scale * up @ down||^2`` from the Gram matrices; never below zero."""
    return max(scale * scale * float(np.sum(up * down)), 0.0)


def _size(up: Array, down: Array, scale: float) -> float:
    """``scale^2 ||up||^2 ||down||^2``: what the rounding of the Gram route is relative to."""
    return scale * scale * float(np.trace(up) * np.trace(down))


def _aligned(a: Product, b: Product, ups: _Grams, downs: _Grams) -> float | None:
    """``||A - B||^2`` from the differences of the factors; None where the factors do not correspond."""
    if ups.aa.shape != ups.bb.shape or not a.scale or not b.scale or not np.trace(ups.bb):
        return None
    ratio = float(np.trace(ups.ab) / np.trace(ups.bb))  # exactly 2 where one file has twice the other's factor
    if ratio == 0.0:
        return None
    other = b.scale / (a.scale * ratio)
    x, y = a.up - ratio * b.up, a.down - other * b.down
    x_gram, y_gram = x.T @ x, y @ y.T
    if np.trace(x_gram) > 1e-2 * np.trace(ups.aa) or np.trace(y_gram) > 1e-2 * np.trace(downs.aa):
        return None
    cross = float(np.sum((x.T @ b.up) * (a.down @ y.T)))
    terms = _square(x_gram, downs.aa, 1.0) + ratio**2 * _square(ups.bb, y_gram, 1.0) + 2.0 * ratio * cross
    size = _size(x_gram, downs.aa, 1.0) + ratio**2 * _size(ups.bb, y_gram, 1.0)
    if size and not terms > RELIABLE * size:
        return None
    return a.scale**2 * terms


def _directions(first: Array, second: Array) -> tuple[float | None, float | None]:
    """Both overlaps of two small matrices, without the directions that are rounding."""
    (left_a, right_a), (left_b, right_b) = _singular(first), _singular(second)
    angles = min(left_a.shape[1], left_b.shape[1])
    if not angles:
        return None, None
    left, right = float(np.sum((left_a.T @ left_b) ** 2)), float(np.sum((right_a @ right_b.T) ** 2))
    return _share(left, angles), _share(right, angles)


def _singular(matrix: Array) -> tuple[Array, Array]:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = int(np.sum(values > NEGLIGIBLE * values[0])) if values.size else 0
    return left[:, :kept], right[:kept]
