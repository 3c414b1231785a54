"""What a resize did to each module and in total."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

from lorasurgery.alerts import Alert, large_errors
from lorasurgery.report import Losses

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """One module that could be cut."""

    name: str
    component: str
    kind: str
    """``linear``, ``conv``, ``1x1``."""
    was: str
    """Family before."""
    family: str
    """Family now; empty when the module was left out."""
    action: str
    """``resized``, ``unchanged``, ``padded``, ``to LoRA``, ``left out``."""
    old_rank: int | None
    new_rank: int
    relative_error: float
    """Of the change, ``||old - new|| / ||old||``, before rounding to the dtype."""
    squared_norm: float
    """Of the scaled change."""
    sum_kept: float
    """Share of the sum of the singular values, as sd-scripts prints it."""
    max_ratio: float
    """The largest singular value over the smallest kept."""
    note: str = ""

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept."""
        return max(1.0 - self.relative_error**2, 0.0)


@dataclass(slots=True)
class ResizeReport:
    """The outcome. Rounding errors of factors that are not computed yet arrive in ``losses`` while they are written."""

    modules: list[ModuleReport] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    """(module, why it stays as it is)."""
    losses: Losses = field(default_factory=Losses)
    """Rounding errors of the new factors, by module."""
    threshold: float | None = None
    """The score above which singular values stayed, where one decided for the whole file."""
    size: int | None = None
    """Bytes of the file, where a size was asked for."""
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def relative_error(self) -> float:
        """Of all modules that could be cut together: sqrt(sum of squared errors / sum of squared norms)."""
        norm = sum(m.squared_norm for m in self.modules)
        return sqrt(sum(m.relative_error**2 * m.squared_norm for m in self.modules) / norm) if norm else 0.0

    @property
    def energy(self) -> float:
        """Share of the squared norm that is kept, of all of them together."""
        return max(1.0 - self.relative_error**2, 0.0)

    def alerts(self) -> list[Alert]:
        """A warning, where the cut costs much."""
        return large_errors({module.name: module.relative_error for module in self.modules}, self.relative_error)

    def worst(self) -> ModuleReport | None:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda m: m.relative_error, default=None)

    def histogram(self) -> dict[int, int]:
        """New rank -> number of modules, 0 for those left out."""
        return dict(sorted(Counter(m.new_rank for m in self.modules).items()))

    def actions(self) -> dict[str, int]:
        """How many were resized, unchanged, ..."""
        return dict(Counter(m.action for m in self.modules))

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        worst = self.worst()
        return {
            "schema": SCHEMA,
            "relative_error": self.relative_error,
            "energy": self.energy,
            "worst": None if worst is None else {"module": worst.name, "relative_error": worst.relative_error},
            "rounding": self.losses.total(),
            "threshold": self.threshold,
            "size": self.size,
            "ranks": {str(rank): count for rank, count in self.histogram().items()},
            "actions": self.actions(),
            "modules": [{**asdict(m), "energy": m.energy} for m in self.modules],
            "kept": [{"name": name, "reason": reason} for name, reason in self.kept],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }
