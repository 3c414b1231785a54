"""How much a tensor changed and what rounding took of it, measured on some of its rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    Work = NDArray[Any]

RUNS, LENGTH, ALL = 16, 2, 128
"""Rows that are looked at: so many runs of so many rows, spread evenly over a tensor; all rows of a tensor of 128 or fewer."""


def sampled(rows: int, start: int, stop: int) -> NDArray[np.intp]:
    """Of rows ``start:stop`` of a tensor of ``rows`` rows, the numbers of those that are looked at."""
    if rows <= ALL:
        return np.arange(start, stop)
    step = rows // RUNS
    first = start // step * step
    if start - first >= LENGTH and first + step >= stop:
        return np.arange(0)
    own = np.arange(start, stop)
    return own[own % step < LENGTH]


@dataclass(slots=True)
class Norms:
    """Squared norms, of the sampled rows while they are added up, then of everything."""

    weight: float = 0.0
    """Of the weights before."""
    change: float = 0.0
    """Of the exact change."""
    loss: float = 0.0
    """Of what is stored less the exact sum."""
    along: float = 0.0
    """The stored change times the exact one, summed."""
    restored: float = 0.0
    """Expected, of what ``unapply`` gives less the weight before the adapter was applied."""

    @classmethod
    def together(cls, parts: Iterable[Norms]) -> Norms:
        """The sums."""
        own = list(parts)
        return cls(*(sum(getattr(part, name) for part in own) for name in cls.__slots__))

    def scaled(self, factor: float) -> Norms:
        """Each of them times ``factor``."""
        return Norms(*(getattr(self, name) * factor for name in self.__slots__))

    @property
    def relative_change(self) -> float:
        """``||new - old|| / ||old||``."""
        return _root_of(self.change, self.weight)

    @property
    def relative_loss(self) -> float:
        """``||stored - exact|| / ||new - old||``: the share of the change that rounding took."""
        return _root_of(self.loss, self.change)

    @property
    def kept(self) -> float:
        """The part of the change that is in what is stored: 1 but for rounding, 0 where rounding took it all back."""
        return self.along / self.change if self.change else 1.0

    @property
    def relative_rounding(self) -> float:
        """``||stored - exact|| / ||old||``."""
        return _root_of(self.loss, self.weight)

    @property
    def relative_restored(self) -> float:
        """``||restored - original|| / ||original||``, expected."""
        return _root_of(self.restored, self.weight)


def _root_of(part: float, whole: float) -> float:
    return sqrt(part / whole) if whole else 0.0


@dataclass(slots=True)
class Tally:
    """One tensor's norms, from some of its rows."""

    name: str
    """Prefix and key."""
    block: str
    """The block of the model, empty outside of all."""
    component: str
    rows: int
    modules: list[str] = field(default_factory=list)
    looked: int = 0
    norms: Norms = field(default_factory=Norms)
    scales: int = 0
    """fp8 scales that are new."""

    def add(self, old: Work, exact: Work, kept: Work) -> None:
        """Sampled rows: before, after, and after as stored."""
        self.looked += len(old)
        self.norms.weight += _squared(old)
        self.norms.change += _squared(exact - old)
        self.norms.loss += _squared(kept - exact)
        self.norms.along += float((kept - old).reshape(-1).astype(np.float64) @ (exact - old).reshape(-1).astype(np.float64))

    def expect(self, before: Work, after: Work, *, added: bool) -> None:
        """Distances between stored numbers at the sampled rows, with the adapter in and with it out.

        The weight was rounded when the adapter went in, by up to half of the distance there: a twelfth of its square on
        average. Of an addition the rounding on the way out takes that back, exactly where the numbers are not closer
        together then; where they are, it puts an error spread evenly on a grid of ``after``, which adds a sixth of its square.
        """
        lost = before**2 / 12.0
        restored = np.where(after < before, lost + after**2 / 6.0, 0.0) if added else lost + after**2 / 12.0
        self.norms.restored += float(restored.sum())

    def done(self) -> None:
        """All rows have been seen: the norms become the whole tensor's."""
        if self.looked:
            self.norms = self.norms.scaled(self.rows / self.looked)


def _squared(values: Work) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ flat)
