"""What was done to every module, how exact it is, and what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import inf, sqrt
from operator import mul
from sys import float_info
from typing import TYPE_CHECKING, Any

from lorasurgery.alerts import Alert, large_errors

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.ledger import Ledger

SCHEMA = 1
"""Version of the JSON form."""


@dataclass(slots=True)
class Losses:
    """What is not exact, by module: every entry is an error, and none is ever 0.

    Rounding errors arrive while the result is written, so a report is complete only after saving.
    """

    entries: dict[str, list[float]] = field(default_factory=dict)
    """Module -> [squared relative error, squared norm of its change; 0: not known]."""

    def record(self, module: str, error: float, norm: float) -> None:
        """Add a squared error of a module's delta, and the squared norm of the delta that it was measured against.

        Errors of one module add up as shares of their own norms, for a factor's may be measured against that factor. What
        has no norm to be a share of, or is no number, counts as the whole: there was no change, and now there is one.
        Nothing is added for an error of 0.
        """
        if error == 0.0:
            return
        share = error / norm if norm > 0.0 else 1.0
        self.add(module, share if 0.0 <= share < inf else 1.0, norm if 0.0 < norm < inf else 0.0)

    def add(self, module: str, share: float, norm: float = 0.0) -> None:
        """Add a squared relative error, of a change whose squared norm may be unknown (0)."""
        entry = self.entries.setdefault(module, [0.0, 0.0])
        entry[0] += max(share, float_info.min)
        entry[1] = max(entry[1], norm)

    def gather(self, other: Losses) -> None:
        """Add the entries of another list."""
        for module, (share, norm) in other.entries.items():
            self.add(module, share, norm)

    def alerts(self) -> list[Alert]:
        """A warning, where an error is large."""
        return large_errors(self.relative(), self.total())

    def relative(self) -> dict[str, float]:
        """Module -> relative Frobenius error."""
        return {name: sqrt(share) for name, (share, _) in self.entries.items()}

    def total(self) -> float:
        """The relative Frobenius error over all modules that have one; no less than the largest of those without a norm."""
        if not self.entries:
            return 0.0
        largest = max(norm for _, norm in self.entries.values()) or 1.0  # sums of norms themselves may be infinite
        weights = [norm / largest for _, norm in self.entries.values()]
        shares = [share for share, _ in self.entries.values()]
        together = sum(map(mul, shares, weights)) / (sum(weights) or 1.0)
        return sqrt(max(together, float_info.min, *(share for share, norm in self.entries.values() if not norm)))


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one module of the result."""

    name: str
    """The (first) input module it was made of, as the input spells it."""
    action: str
    """``renamed``, ``split``, ``fused``, ``permuted``, ``to LoRA``, ``fused to LoRA``."""
    family: str
    was: str
    """Family before."""
    rank: int | None = None


@dataclass(slots=True)
class Report:
    """The outcome of one conversion."""

    input: str = ""
    output: str = ""
    written: bool = False
    """False until the output is in place, and after a dry run."""
    architecture: str = ""
    candidates: tuple[tuple[str, float], ...] = ()
    source_layout: str = ""
    target_layout: str = ""
    modules: int = 0
    changes: list[Change] = field(default_factory=list)
    losses: Losses = field(default_factory=Losses)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    """(key or module, reason)."""
    carried: list[tuple[str, str]] = field(default_factory=list)
    """Keys copied as they are, with the reason they were not understood."""
    warnings: list[str] = field(default_factory=list)
    scale_sources: Counter[str] = field(default_factory=Counter)
    scale_written: str = ""
    seconds: float = 0.0
    ledger: Ledger | None = None
    """Where every key of the input ended; None where there is no one input."""

    @classmethod
    def of(cls, adapter: Adapter, target_layout: str) -> Report:
        """The report of what is about to be done to ``adapter``."""
        return cls(
            input=str(adapter.path or ""),
            architecture=adapter.architecture.key,
            candidates=adapter.candidates,
            source_layout=adapter.layout,
            target_layout=target_layout,
            modules=len(adapter),
            warnings=list(adapter.warnings),
            scale_sources=Counter(module.scale.source for module in adapter.modules.values()),
            ledger=adapter.ledger,
        )

    def lose(self, key: str, reason: str) -> None:
        """Enter a key whose effect the result's reader does not have, although the file still has its bytes."""
        if self.ledger is not None:
            self.ledger = self.ledger.without([(key, reason)])

    def settle(self) -> None:
        """Enter what was left out into the ledger."""
        if self.ledger is not None:
            self.ledger = self.ledger.without(self.dropped)

    @property
    def exact(self) -> bool:
        """Whether the result has the whole effect of the input: nothing was rounded, left out or not understood."""
        return not self.losses.entries and not self.dropped and (self.ledger is None or not self.ledger.lost)

    def families(self) -> Counter[str]:
        """Families of the result's modules."""
        return Counter(change.family for change in self.changes)

    def actions(self) -> Counter[str]:
        """How many modules were renamed, split, fused, ..."""
        return Counter(change.action for change in self.changes)

    def worst(self) -> tuple[str, float] | None:
        """The module with the largest relative error."""
        errors = self.losses.relative()
        return max(errors.items(), key=lambda item: item[1]) if errors else None

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``; see docs/json.md."""
        errors = self.losses.relative()
        worst = self.worst()
        return {
            "schema": SCHEMA,
            "input": self.input,
            "output": self.output,
            "written": self.written,
            "architecture": self.architecture,
            "candidates": [{"architecture": key, "explains": share} for key, share in self.candidates],
            "layout": {"from": self.source_layout, "to": self.target_layout},
            "exact": self.exact,
            "error": {
                "worst_module": worst[0] if worst else None,
                "worst": worst[1] if worst else 0.0,
                "total": self.losses.total(),
            },
            "modules": {"input": self.modules, "output": len(self.changes)},
            "families": dict(self.families()),
            "actions": dict(self.actions()),
            "scale": {"sources": dict(self.scale_sources), "written": self.scale_written},
            "dropped": [{"key": key, "reason": reason} for key, reason in self.dropped],
            "carried": [{"key": key, "reason": reason} for key, reason in self.carried],
            "ledger": None if self.ledger is None else self.ledger.to_json(),
            "warnings": list(self.warnings),
            "changes": [
                {
                    "name": change.name,
                    "action": change.action,
                    "family": change.family,
                    "was": change.was,
                    "rank": change.rank,
                    "error": errors.get(change.name, 0.0),
                }
                for change in self.changes
            ],
            "seconds": round(self.seconds, 3),
        }
