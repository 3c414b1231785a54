"""Families other than a plain LoRA: the best LoKr, LoHa, Tucker product or DoRA for one difference, and its error."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.factorization import factorization
from lorasurgery.linalg.hadamard_target import hadamard_of_dense
from lorasurgery.linalg.nearest_hadamard import nearest_hadamard
from lorasurgery.linalg.nearest_kronecker import nearest_kronecker, rearranged_dense
from lorasurgery.verbs.extract.decompose import Wanted, decomposed

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import AnyArray
    from lorasurgery.verbs.extract.change import Change
    from lorasurgery.verbs.extract.options import ExtractOptions
    from lorasurgery.verbs.extract.pair import Pair

ROUNDS, ENOUGH, NOISE = 20, 1e-2, 1e-15
"""Of the search for a DoRA's direction: at most so many rounds, until one lowers the squared error by less than this share of
it, or the error is rounding."""
LOHA = 1e-4
"""A sweep that lowers a LoHa's squared error by less than this share of it is the last."""
Fitted = tuple[float, dict[str, "AnyArray"]]
"""(squared error, factors by their slots)"""


def fitted(pair: Pair, change: Change, rank: int | None, options: ExtractOptions, device: str) -> Fitted:
    """The factors of one changed matrix; ``rank`` None: whole factors, for a LoKr only."""
    assert change.delta is not None  # noqa: S101  it was asked for
    if options.family == "lokr":
        return lokr(change.delta, pair.shape, rank, options)
    if options.family == "loha":
        return loha(change.delta, rank or 1, options)
    if options.dora:
        return dora(change, rank or 1, options, device)
    return tucker(change.delta, pair.shape, rank or 1)


def lokr(delta: AnyArray, shape: tuple[int, ...], rank: int | None, options: ExtractOptions) -> Fitted:
    """``kron(w1, w2)`` with LyCORIS' factors of both sides; w2 is cut to the rank where that makes it smaller."""
    outer = tuple(factorization(size, options.factor)[0] for size in shape[:2])
    of = rearranged_dense(delta, (outer[0], outer[1]))
    smaller = rank is not None and rank < prod(of.inner) / sum(of.inner)
    found = nearest_kronecker(of, rank=rank if smaller else None, seed=options.seed)
    if found.w2_b is not None:
        return found.error, {"w1": found.w1, "w2_a": found.w2, "w2_b": found.w2_b}
    inner = (shape[0] // outer[0], shape[1] // outer[1], *shape[2:])
    return found.error, {"w1": found.w1, "w2": found.w2.reshape(inner)}


def loha(delta: AnyArray, rank: int, options: ExtractOptions, tolerance: float = LOHA) -> Fitted:
    """``(w1_a @ w1_b) * (w2_a @ w2_b)``, both arms of the rank; a convolution's columns are flat."""
    found = nearest_hadamard(hadamard_of_dense(delta), min(rank, *delta.shape), seed=options.seed, tolerance=tolerance)
    return found.error, dict(found.arms._asdict())


def tucker(delta: AnyArray, shape: tuple[int, ...], rank: int) -> Fitted:
    """``up: (out, r)``, ``mid: (r, r, k...)``, ``down: (r, in)``."""
    from lorasurgery.linalg.nearest_tucker import nearest_tucker

    found = nearest_tucker(delta.reshape(shape[0], shape[1], -1), rank)
    size = found.mid.shape[0]
    return found.error, {"up": found.up, "down": found.down, "mid": found.mid.reshape(size, size, *shape[2:])}


def dora(change: Change, rank: int, options: ExtractOptions, device: str) -> Fitted:
    """A LoRA for the directions of the rows, and for each row the magnitude that is best with it.

    With a length ``c_i`` for every tuned row, ``c_i tuned_i = base_i + D_i`` has to hold for a low-rank D. From the lengths
    of the base's rows, and from those that the rows have, D and c are the best for each other in turn. Then each magnitude
    is ``<tuned_i, v_i>`` with ``v_i`` the row's new direction. The norm is over all but the output axis, as in PEFT and in
    LyCORIS' ``wd_on_output``.
    """
    base, delta = change.base, change.delta
    assert base is not None  # noqa: S101  both were asked for
    assert delta is not None  # noqa: S101
    search = _Directions(base, base + delta, rank, options, device)
    before, after = (np.linalg.norm(rows, axis=1) for rows in (base, search.tuned))
    ratio = np.divide(before, after, out=np.ones_like(before), where=after > 0.0)
    best = min((search.round(lengths) for lengths in (np.ones_like(ratio), ratio)), key=lambda own: own.error)
    for _ in range(ROUNDS):
        new = search.round(search.lengths(best))
        if not new.error < best.error:
            break
        done = best.error - new.error <= ENOUGH * new.error
        best = new
        if done or best.error <= NOISE * search.squared:
            break
    return best.error, {"up": best.up, "down": best.down, "magnitude": best.magnitude}


@dataclass(frozen=True, slots=True)
class _Direction:
    """One answer."""

    up: AnyArray
    down: AnyArray
    magnitude: AnyArray
    error: float


@dataclass(frozen=True, slots=True)
class _Directions:
    """The search for a DoRA's direction."""

    base: AnyArray
    tuned: AnyArray
    rank: int
    options: ExtractOptions
    device: str

    @property
    def squared(self) -> float:
        """Of the tuned weight."""
        return float(np.sum(self.tuned.astype(np.float64) ** 2))

    def round(self, lengths: AnyArray) -> _Direction:
        """The best D for these lengths, and the magnitudes for that."""
        wanted = self.tuned * lengths[:, None] - self.base
        (found,) = decomposed([wanted], Wanted(self.rank, fixed=True), self.options, self.device)
        root = np.sqrt(found.values[: len(found.u)]).astype(found.u.dtype)
        up, down = np.ascontiguousarray((found.u * root[:, None]).T), found.v * root[:, None]
        new = self.base + up @ down
        norms = np.linalg.norm(new, axis=1)
        unit = np.divide(new, norms[:, None], out=np.zeros_like(new), where=norms[:, None] > 0.0)
        magnitude = np.sum(self.tuned * unit, axis=1)
        error = float(np.sum((self.tuned - magnitude[:, None] * unit).astype(np.float64) ** 2))
        return _Direction(up, down, magnitude, error)

    def lengths(self, own: _Direction) -> AnyArray:
        """The best for a D."""
        squares = np.sum(self.tuned**2, axis=1)
        along = np.sum(self.tuned * (self.base + own.up @ own.down), axis=1)
        found: AnyArray = np.divide(along, squares, out=np.ones_like(along), where=squares > 0.0)
        return found
