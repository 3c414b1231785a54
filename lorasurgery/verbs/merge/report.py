"""What a merge did to each module and in total."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

from lorasurgery.alerts import Alert, large_errors
from lorasurgery.report import Losses

if TYPE_CHECKING:
    from lorasurgery.ledger import Ledger
    from lorasurgery.operations.cut import ResizeReport

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One file."""

    name: str
    layout: str
    architecture: str
    weight: str
    modules: int
    used: int
    """Modules with a weight that is not 0."""
    families: dict[str, int]


@dataclass(frozen=True, slots=True)
class MergedModule:
    """One module of the result."""

    name: str
    component: str
    action: str
    """``kept``, ``scaled``, ``side by side``, ``added``, ``added in one factor``, ``added in full``, a method's name, ...;
    ``times 0`` and ``cancelled out`` for what is not in the result."""
    sources: tuple[int, ...]
    """Positions of the files that it comes from."""
    weights: tuple[float, ...]
    """What each was multiplied by."""
    was: tuple[str, ...]
    """Their families."""
    family: str
    rank: int | None
    error: float | None = None
    """Relative distance from the exact sum, of results that are another program's."""
    norm: float = 0.0
    """Squared norm of the exact sum, where ``error`` is known."""


@dataclass(slots=True)
class MergeReport:
    """The outcome. Rounding errors arrive in ``losses`` while the result is written."""

    method: str
    architecture: str = ""
    layout: str = ""
    sources: list[SourceReport] = field(default_factory=list)
    modules: list[MergedModule] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(module or key, reason)."""
    ledgers: list[Ledger] = field(default_factory=list)
    """Where every key of each file ended."""
    losses: Losses = field(default_factory=Losses)
    faults: list[str] = field(default_factory=list)
    """What is wrong with the other program's way, where its result was asked for."""
    resize: ResizeReport | None = None
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def actions(self) -> dict[str, int]:
        """How many were kept, added, ..."""
        return dict(Counter(m.action for m in self.modules))

    def ranks(self) -> dict[int, int]:
        """Rank -> number of modules."""
        return dict(sorted(Counter(m.rank for m in self.modules if m.rank is not None).items()))

    @property
    def deviation(self) -> float | None:
        """Relative distance of the whole result from the exact sum, where another program's way was asked for."""
        known = [(m.error, m.norm) for m in self.modules if m.error is not None]
        if not known:
            return None
        norm = sum(n for _, n in known)
        return sqrt(sum(e * e * n for e, n in known) / norm) if norm else 0.0

    @property
    def lost(self) -> list[tuple[str, str]]:
        """(file and key, why) of what every file is without in the result."""
        pairs = zip(self.sources, self.ledgers, strict=True)
        return [(f"{source.name}: {key}", why) for source, own in pairs for key, why in own.lost.items()]

    def alerts(self) -> list[Alert]:
        """What must be seen of a cut, and of another program's way."""
        errors = {module.name: module.error for module in self.modules if module.error is not None}
        return large_errors(errors, self.deviation or 0.0, "the sum") + (
            self.resize.alerts() if self.resize is not None else []
        )

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "architecture": self.architecture,
            "layout": self.layout,
            "sources": [asdict(source) for source in self.sources],
            "actions": self.actions(),
            "ranks": {str(rank): count for rank, count in self.ranks().items()},
            "rounding": self.losses.total(),
            "deviation": self.deviation,
            "faults": list(self.faults),
            "dropped": [{"key": key, "reason": reason} for key, reason in self.dropped],
            "ledgers": [{"name": of.name, **own.to_json()} for of, own in zip(self.sources, self.ledgers, strict=True)],
            "resize": None if self.resize is None else self.resize.to_json(),
            "modules": [asdict(module) for module in self.modules],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }
