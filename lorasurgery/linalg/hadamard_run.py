"""Sweeps from one start until they gain little."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from lorasurgery.linalg.hadamard_sweep import Arms, sweep

if TYPE_CHECKING:
    from lorasurgery.linalg.hadamard_target import Approximated

PACE, LONGER, SHORTER = 0.5, 1.05, 0.6
"""Of the extrapolation: its share of the last step at first, and its changes after a sweep that gains and one that does not."""
NOISE = 1e-15
"""Of ``||A||^2``: squared errors below it are rounding."""
FLOAT32 = 1e-6
"""Of ``||A||^2``: sweeps that look for smaller gains need products in float64."""


class Run:
    """One start on its way down, each sweep from a little beyond the last one's arms, as long as that pays.

    Extrapolation as by Wertz, Vandaele and Gillis: its length grows while errors fall, and is cut back where one does not.
    """

    def __init__(self, of: Approximated, arms: Arms, *, exact: bool = False) -> None:
        """``exact``: no products in float32, whose rounding a LoHa in closed form would take long to lose again."""
        self.of, self.begun, self.arms, self._ahead = of, arms, arms, arms
        self.error, self.sweeps, self.converged = inf, 0, False
        self._pace, self._fast, self._exact = PACE, False, exact

    def go(self, sweeps: int, tolerance: float) -> None:
        """At most so many further sweeps."""
        for _ in range(sweeps):
            if self.converged:
                return
            fast = not self._exact and tolerance * min(self.error, self.of.norm) > FLOAT32 * self.of.norm
            arms, error = sweep(self.of, self._ahead, fast=fast)
            self.sweeps += 1
            if fast is not self._fast:  # errors of two precisions do not compare
                self._fast, self.error = fast, inf
            self._take(arms, error, tolerance)

    def _take(self, arms: Arms, error: float, tolerance: float) -> None:
        old, gain, plain = self.arms, self.error - error, self._ahead is self.arms
        if gain >= 0.0:
            self.arms, self.error = arms, error
        if gain > tolerance * error + NOISE * self.of.norm:
            self._ahead = Arms(*(new + self._pace * (new - past) for new, past in zip(arms, old, strict=True)))
            self._pace = min(self._pace * LONGER, 1.0)
        else:
            self._ahead, self._pace = self.arms, self._pace * SHORTER
            self.converged = plain
