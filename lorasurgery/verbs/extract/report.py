"""What an extraction found, kept and left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

from lorasurgery.alerts import large_errors
from lorasurgery.ledger import Ledger
from lorasurgery.report import Losses

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA = 1
FOREIGN_CHANGE, FOREIGN_SHARE, LIKE_NOISE = 0.2, 0.75, 0.5
"""Where this share of the matrices changed by more than FOREIGN_CHANGE of their norm, with a spectrum as flat as noise (a
stable rank of LIKE_NOISE of a random matrix's at least), the base is not what was tuned: training never does that."""
SHOWN = 512
NAMES = (
    "name", "component", "weight", "kind", "family", "shape", "rank", "energy", "relative_error", "relative_change", "squared",
)  # fmt: skip
"""What ``--json`` says of each module."""


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """One weight, norm or bias of the result."""

    name: str
    component: str
    weight: str
    """The original weight's name."""
    kind: str
    family: str
    shape: tuple[int, ...]
    rank: int | None
    squared: float
    """``||tuned - base||^2``"""
    base_squared: float
    """``||base||^2``"""
    squared_error: float
    """Of the change, before rounding to the dtype."""
    values: tuple[float, ...] = ()
    """The largest singular values of the change, where they were computed."""
    complete: bool = False
    """Whether they are all."""

    @property
    def relative_error(self) -> float:
        """``||change - result|| / ||change||``."""
        return sqrt(self.squared_error / self.squared) if self.squared else 0.0

    @property
    def energy(self) -> float:
        """Share of the squared change that is kept."""
        return max(1.0 - self.squared_error / self.squared, 0.0) if self.squared else 1.0

    @property
    def relative_change(self) -> float:
        """``||change|| / ||base||``."""
        return sqrt(self.squared / self.base_squared) if self.base_squared else 0.0

    @property
    def is_foreign(self) -> bool:
        """Whether the change is as large and as full of rank as between two weights that have nothing to do with each other."""
        if not self.values or not self.values[0] or len(self.shape) < 2:
            return False
        sides = self.shape[0], prod(self.shape[1:])
        noise = prod(sides) / (sqrt(sides[0]) + sqrt(sides[1])) ** 2
        return self.relative_change > FOREIGN_CHANGE and self.squared / self.values[0] ** 2 > LIKE_NOISE * noise


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A pair that is not in the result."""

    name: str
    kind: str
    reason: str
    squared: float


@dataclass(slots=True)
class ExtractReport:
    """The outcome."""

    base: str = ""
    tuned: str = ""
    output: str = ""
    written: bool = False
    architecture: str = ""
    layouts: tuple[str, str, str] = ("", "", "")
    """Of the base, of the tuned model, of the result."""
    operation: str = ""
    modules: list[ModuleResult] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    only_base: list[str] = field(default_factory=list)
    only_tuned: list[str] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    """Where every tensor that both models have ended."""
    losses: Losses = field(default_factory=Losses)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    size: int | None = None
    """Bytes of the result."""
    resumed: int = 0
    """Tensors that an earlier run had finished."""
    seconds: float = 0.0

    @property
    def squared(self) -> float:
        """``||tuned - base||^2`` of everything that both models have."""
        return sum(m.squared for m in self.modules) + sum(one.squared for one in self.left_out)

    @property
    def squared_error(self) -> float:
        """Of everything, what is left out included."""
        return sum(m.squared_error for m in self.modules) + sum(one.squared for one in self.left_out)

    @property
    def relative_error(self) -> float:
        """What is not represented, ``||change - result|| / ||change||``, what is left out included."""
        return sqrt(self.squared_error / self.squared) if self.squared else 0.0

    @property
    def energy(self) -> float:
        """Share of the squared change that is kept."""
        return 1.0 - self.squared_error / self.squared if self.squared else 1.0

    @property
    def share_left_out(self) -> float:
        """Share of the squared change in tensors that are left out."""
        return sum(one.squared for one in self.left_out) / self.squared if self.squared else 0.0

    def blocks(self) -> dict[str, tuple[int, float, float]]:
        """Block -> (modules, share of the squared change, energy kept), what is left out aside."""
        from lorasurgery.operations.select.blocks import block_and_kind

        groups: dict[str, list[ModuleResult]] = {}
        for module in self.modules:
            block = block_and_kind(module.weight)[0] or "(outside blocks)"
            groups.setdefault(block if module.component == "denoiser" else f"{module.component} {block}", []).append(module)
        return {block: (len(own), *_totals(own, self.squared)) for block, own in groups.items()}

    def ranks(self) -> dict[int, int]:
        """Rank -> number of modules."""
        return dict(sorted(Counter(m.rank for m in self.modules if m.rank is not None).items()))

    def reasons(self) -> dict[str, tuple[int, float]]:
        """Reason -> (tensors left out for it, their share of the squared change)."""
        found: dict[str, tuple[int, float]] = {}
        for one in self.left_out:
            count, squared = found.get(one.reason, (0, 0.0))
            found[one.reason] = count + 1, squared + one.squared
        return {why: (count, squared / self.squared if self.squared else 0.0) for why, (count, squared) in found.items()}

    def warn(self) -> None:
        """Add what should be looked into."""
        matrices = [m for m in self.modules if m.values]
        foreign = sum(m.is_foreign for m in matrices)
        if matrices and foreign >= FOREIGN_SHARE * len(matrices):
            self.warnings.append(
                f"{foreign} of {len(matrices)} matrices changed strongly and at full rank, as between unrelated models: "
                "this is probably not the base that was tuned"
            )
        self.warnings += large_errors({m.name: m.relative_error for m in self.modules}, self.relative_error)
        if self.only_tuned:
            self.warnings.append(
                f"{len(self.only_tuned)} weights are in the tuned model only (first: {self.only_tuned[0]}) and stay behind"
            )
        if self.only_base:
            self.warnings.append(f"{len(self.only_base)} weights are in the base model only (first: {self.only_base[0]})")

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        total = self.squared
        return {
            "schema": SCHEMA,
            "base": self.base,
            "tuned": self.tuned,
            "output": self.output,
            "written": self.written,
            "architecture": self.architecture,
            "layout": dict(zip(("base", "tuned", "output"), self.layouts, strict=True)),
            "operation": self.operation,
            "relative_error": self.relative_error,
            "energy": self.energy,
            "not_represented": 1.0 - self.energy,
            "share_left_out": self.share_left_out,
            "rounding": self.losses.total(),
            "size": self.size,
            "ranks": {str(rank): count for rank, count in self.ranks().items()},
            "blocks": [
                {"block": block, "modules": count, "share": share, "energy": energy}
                for block, (count, share, energy) in self.blocks().items()
            ],
            "modules": [
                {**{name: getattr(m, name) for name in NAMES}, "singular_values": list(m.values[:SHOWN])} for m in self.modules
            ],
            "left_out": [
                {"name": one.name, "kind": one.kind, "reason": one.reason, "share": one.squared / total if total else 0.0}
                for one in self.left_out
            ],
            "only_in_base": list(self.only_base),
            "only_in_tuned": list(self.only_tuned),
            "ledger": self.ledger.to_json(),
            "dropped": [{"key": key, "reason": reason} for key, reason in self.dropped],
            "warnings": list(self.warnings),
            "resumed": self.resumed,
            "seconds": round(self.seconds, 3),
        }


def _totals(modules: Sequence[ModuleResult], total: float) -> tuple[float, float]:
    """(share of the squared change, energy kept)."""
    squared = sum(m.squared for m in modules)
    error = sum(m.squared_error for m in modules)
    return (squared / total if total else 0.0), (1.0 - error / squared if squared else 1.0)
