"""The LoHa near a matrix, ``min ||A - (P Q) * (R S)||_F`` over arms of one rank, by alternating least squares.

The problem has local minima and no closed form (the arms are a weighted low-rank approximation of each other, which is
NP-hard in general), but for a matrix that is a LoHa, and large enough for its rank, there is one
(:mod:`lorasurgery.linalg.hadamard_segre`): where the singular values look like that it is tried first. Otherwise sweeps
(:mod:`lorasurgery.linalg.hadamard_sweep`) begin from several starts (:mod:`lorasurgery.linalg.hadamard_starts`) and the best
goes on; the first is the best LoRA of the rank beside an arm of ones, whose error the result can only lower.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.factors import check_request
from lorasurgery.linalg.hadamard_run import Run
from lorasurgery.linalg.hadamard_segre import may_be_solved
from lorasurgery.linalg.hadamard_starts import (
    SPREADS,
    beside_ones,
    in_closed_form,
    split,
    squared_tail,
    starts_worth,
    values_wanted,
    with_room,
)
from lorasurgery.linalg.hadamard_sweep import Arms
from lorasurgery.linalg.low_rank import factored_svd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasurgery.linalg.factors import Array
    from lorasurgery.linalg.hadamard_target import Approximated, Leading

TRIAL, SWEEPS = 8, 400
"""Sweeps after which the worse half of the starts is given up first, and at most in all."""
FINALISTS = 3
"""Starts that go on to the end, of six and more: early errors tell little of the last percent."""
INNER = 4
"""The largest rank of a LoHa in closed form that a start for another matrix is made of."""
SETTLE = 40
"""Sweeps of each candidate in closed form: a right one needs few."""
MORE, ENOUGH, LARGE = 10, 150, 200
"""Starts for a matrix that looks like a LoHa, while none is found and there is no closed form; sweeps of each; and the smaller
side from which on they find one. Of 20 for random LoHas of rank 8: 3 at a side of 200 and of 256, all at 320, none at 180.
"""
TOLERANCE = 1e-5
"""Of the squared error: a sweep that gains less is the last."""
FOUND = 2.0
"""A LoHa is found if the squared error is at most so many times what lies outside of its singular vectors."""
CHUNK = 512
"""Rows of A at a time in the error."""
LEAST = 1e-12
"""Of ``||A||^2``: and by so much more."""


@dataclass(frozen=True, slots=True)
class NearestHadamard:
    """A LoHa near the matrix."""

    arms: Arms
    error: float
    """``||A - (P Q) * (R S)||_F^2`` of these arms"""
    lora_error: float
    """The same of the best LoRA of this rank: never below ``error``, but for rounding"""
    sweeps: int
    """How many the chosen start took"""
    converged: bool
    """Whether the last sweep gained less than the tolerance"""


def nearest_hadamard(of: Approximated, rank: int, *, seed: int = 0, tolerance: float = TOLERANCE) -> NearestHadamard:
    """Arms of ``rank`` near A, all of one size: a local minimum no farther from it than the best LoRA of the rank.

    A matrix that is a LoHa of the rank is found again up to rounding, and one beside noise up to the noise, where a side has
    ``(r (r + 1) / 2)^2`` rows or columns (9 at rank 2, 100 at rank 4) and the rank is at most 6. At rank 8 random ones were
    found from a side of 320 on, some of those of 192 to 256, none of smaller ones. LoRAs of twice the rank have as many
    parameters and are often nearer to other matrices. Raises ``ValueError`` for a rank below 1.
    """
    check_request(rank, None)
    search = _Search.of(of, rank, np.random.default_rng(seed), tolerance)
    lora = search.begun(SPREADS[0])
    alike = search.alike()
    best = alike[0] if any(map(search.is_found, alike)) else search.best_of([lora, *alike, *search.others()])
    arms, lora_error = _settled(best.arms), hadamard_error(of, lora.begun)
    error = hadamard_error(of, arms)
    if error > lora_error:  # by what float32 hides
        arms, error = _settled(lora.begun), lora_error
    return NearestHadamard(arms, error, lora_error, best.sweeps, best.converged)


def hadamard_error(of: Approximated, arms: Arms) -> float:
    """``||A - (P Q) * (R S)||_F^2`` for arms as stored, entry by entry, some rows at a time: nothing cancels."""
    total = 0.0
    for start in range(0, of.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        off = of.rows(part) - (arms.w1_a[part] @ arms.w1_b) * (arms.w2_a[part] @ arms.w2_b)
        total += float(np.sum(off * off))
    return total


@dataclass(frozen=True, slots=True)
class _Search:
    """What the starts are made of."""

    target: Approximated
    leading: Leading
    tail: float | None
    """Where the matrix looks like a LoHa of the rank: what of it no LoHa can hold"""
    rank: int
    rng: np.random.Generator
    tolerance: float

    @classmethod
    def of(cls, target: Approximated, rank: int, rng: np.random.Generator, tolerance: float) -> _Search:
        """With the singular vectors that are needed."""
        leading = target.leading(values_wanted(rank, target.shape))
        return cls(target, leading, squared_tail(target, leading, rank), rank, rng, tolerance)

    def begun(self, spread: tuple[float, float]) -> Run:
        """From the LoRA beside ones."""
        return Run(self.target, beside_ones(self.leading, self.rank, self.rng, spread))

    def others(self) -> list[Run]:
        """The starts of every matrix but the first, those first that are never left out."""
        if self.rank == 1:
            return []
        target, inner, lora = self.target, self._inner(), [self.begun(spread) for spread in SPREADS[1:]]
        halves = [Run(target, split(target.dense, self.rank))] if target.dense is not None else [lora.pop()]
        found = [*inner[:1], *halves, *inner[1:2], *lora[:1], *inner[2:], *lora[1:]]
        return found[: starts_worth(target.shape, self.rank) - 1]

    def _inner(self) -> list[Run]:
        """From LoHas of small ranks in closed form: of the LoHa that is there beside noise, they see the largest part."""
        found = []
        for rank in range(min(self.rank, INNER), 1, -1):
            runs = [Run(self.target, arms) for arms in in_closed_form(self.target, self.leading, rank, self.rng)]
            for run in runs:
                run.go(TRIAL // 2, self.tolerance)
            found += [with_room(run.arms, self.rank, self.rng) for run in sorted(runs, key=lambda run: run.error)[:1]]
        return [Run(self.target, arms) for arms in found]

    def best_of(self, runs: list[Run]) -> Run:
        """The worse half is given up after so many sweeps, twice as many are the next round; the last go on to the end."""
        left, sweeps, last = runs, TRIAL, min(len(runs) // 2, FINALISTS)
        while len(left) > max(last, 1):
            for run in left:
                run.go(sweeps, self.tolerance)
            left = sorted(left, key=lambda run: run.error)[: len(left) // 2]
            sweeps *= 2
        for run in left:
            run.go(SWEEPS - run.sweeps, self.tolerance)
        return min(left, key=lambda run: run.error)

    def alike(self) -> list[Run]:
        """Runs for the LoHa that the matrix looks like: the first that finds it alone, or the best one."""
        tried: list[Run] = []
        for run, sweeps in self._candidates():
            run.go(sweeps, self.tolerance)
            if self.is_found(run):
                return [run]
            tried.append(run)
        return sorted(tried, key=lambda run: run.error)[:1]

    def is_found(self, run: Run) -> bool:
        """Whether a run is at the LoHa that the matrix looks like."""
        return self.tail is not None and run.error <= FOUND * self.tail + LEAST * self.target.norm

    def _candidates(self) -> Iterator[tuple[Run, int]]:
        if self.tail is None:
            return
        if may_be_solved(self.target.shape, self.rank):
            solved = in_closed_form(self.target, self.leading, self.rank, self.rng)
            for arms in sorted(solved, key=partial(hadamard_error, self.target)):
                yield Run(self.target, arms, exact=True), SETTLE
        elif min(self.target.shape) >= LARGE:
            for _ in range(MORE):
                yield self.begun(SPREADS[0]), ENOUGH


def _settled(arms: Arms) -> Arms:
    """The same product of arms as their SVDs leave them, so that errors of rounding do not cancel in it.

    All factors have one mean square, so that none leaves the range of a narrow dtype.
    """
    if arms.w1_a.shape[1] <= min(len(arms.w1_a), arms.w1_b.shape[1]):
        arms = Arms(*_halves(arms.w1_a, arms.w1_b), *_halves(arms.w2_a, arms.w2_b))
    sizes = [float(np.sqrt(np.mean(arm**2))) for arm in arms]
    if 0.0 in sizes:
        return arms
    mean = float(np.prod(sizes)) ** 0.25
    return Arms(*(arm * (mean / size) for arm, size in zip(arms, sizes, strict=True)))


def _halves(left: Array, right: Array) -> tuple[Array, Array]:
    u, values, vt = factored_svd(left, right)
    root = np.sqrt(values)
    return u * root, root[:, None] * vt
