"""What applying may do."""

from __future__ import annotations

import os
from dataclasses import dataclass

from lorasurgery.deltas.dora import INTERPOLATE, MODES
from lorasurgery.errors import RequestError

NEAREST, STOCHASTIC = "nearest", "stochastic"
KEEP, NEW = "keep", "new"


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """How weights are changed and stored. The defaults round to nearest and stay in the model's dtypes."""

    unapply: bool = False
    """Take the adapters out again, the last one first."""
    rounding: str = NEAREST
    """``nearest`` (ties to even) or ``stochastic``: up or down with the probability that keeps the mean."""
    seed: int = 0
    """Of stochastic rounding: the same seed gives the same bytes, whatever the number of threads."""
    dora: str = INTERPOLATE
    """What a weight other than 1 means for DoRA, see :mod:`lorasurgery.deltas.dora`."""
    scales: str = KEEP
    """Of scaled fp8 weights: ``keep`` while the values fit, so that values that do not change keep their bits; ``new``:
    always the scale that brings the largest value to the end of the range."""
    strict: bool = False
    """Raise when a key of an adapter matches no weight."""
    verify: bool = False
    """Read the result again and compare some tensors with the definitions."""
    prefer_lycoris: bool = False
    """Compute some changes by the LyCORIS library, too, and report the difference."""
    workers: int | None = None
    """Threads, None: one for each core, at most 8; or processes, None: one more than that."""
    fork: bool = False
    """Let processes forked from this one change large models: they are faster than threads, which wait for the interpreter.

    For a program that has no other threads, where the system can fork.
    """

    def check(self) -> None:
        """Raises RequestError for values that mean nothing."""
        for name, value, known in (
            ("rounding", self.rounding, (NEAREST, STOCHASTIC)),
            ("dora", self.dora, MODES),
            ("scales", self.scales, (KEEP, NEW)),
        ):
            if value not in known:
                raise RequestError(f"--{name} is {', '.join(known[:-1])} or {known[-1]}, not {value}")
        if self.workers is not None and self.workers < 1:
            raise RequestError(f"--workers must be at least 1, not {self.workers}")
        if self.fork and not hasattr(os, "fork"):
            raise RequestError("this system cannot fork processes", hint="threads: fork=False")
        if self.seed < 0:
            raise RequestError(f"--seed is a number from 0 up, not {self.seed}")
