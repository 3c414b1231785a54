"""What applying did: which modules and tensors, how much they changed, what rounding took, what was not used."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lorasurgery.alerts import Alert, large_errors
from lorasurgery.verbs.apply.tally import Norms

if TYPE_CHECKING:
    from lorasurgery.ledger import Ledger
    from lorasurgery.verbs.apply.lycoris import Compared
    from lorasurgery.verbs.apply.tally import Tally
    from lorasurgery.verbs.apply.verify import Verified

SCHEMA = 1
NOTHING = 1e-6
"""A change that is only the rounding of the calculation: what two adapters add and take away, say."""


@dataclass(frozen=True, slots=True)
class Used:
    """One adapter."""

    path: str
    weight: str
    layout: str
    modules: int
    """Modules that changed something."""
    left_out: int
    """Modules whose weight is 0."""
    families: dict[str, int]
    """Of the modules that changed something."""


@dataclass(slots=True)
class ApplyReport:
    """The outcome. Sizes are measured on 128 rows of each tensor, all of a smaller one."""

    model: str
    output: str
    architecture: str
    layout: str
    undone: bool = False
    written: bool = False
    used: list[Used] = field(default_factory=list)
    tensors: list[Tally] = field(default_factory=list)
    """Every tensor that changed, in file order."""
    untouched: int = 0
    unmatched: list[tuple[str, str, str]] = field(default_factory=list)
    """(file, key, reason)."""
    ledgers: list[Ledger] = field(default_factory=list)
    """Where each adapter's keys ended, in the order of :attr:`used`."""
    copied: list[str] = field(default_factory=list)
    """Other files of a model's folder."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(file of the folder, reason)."""
    dropped_metadata: list[str] = field(default_factory=list)
    rounding: str = "nearest"
    verified: list[Verified] = field(default_factory=list)
    lycoris: list[Compared] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def modules(self) -> int:
        """Modules that changed something, of all adapters."""
        return sum(used.modules for used in self.used)

    @property
    def total(self) -> Norms:
        """All changed tensors together."""
        return Norms.together(tally.norms for tally in self.tensors)

    def blocks(self) -> dict[str, Norms]:
        """By component and block, in the order of the file."""
        found: dict[str, list[Norms]] = defaultdict(list)
        for tally in self.tensors:
            found[f"{tally.component} {tally.block or '(outside of blocks)'}"].append(tally.norms)
        return {name: Norms.together(own) for name, own in found.items()}

    def worst(self) -> Tally | None:
        """The tensor of which rounding took the largest share of the change."""
        return max(self.tensors, key=lambda tally: tally.norms.relative_loss, default=None)

    def alerts(self) -> list[Alert]:
        """A warning, where rounding took much of a change that is more than the rounding of the calculation."""
        changed = [tally for tally in self.tensors if tally.norms.relative_change > NOTHING]
        total = Norms.together(tally.norms for tally in changed)
        return large_errors({tally.name: tally.norms.relative_loss for tally in changed}, total.relative_loss)

    def new_scales(self) -> int:
        """fp8 scales that are new."""
        return sum(tally.scales for tally in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "output": self.output,
            "written": self.written,
            "operation": "unapply" if self.undone else "apply",
            "architecture": self.architecture,
            "layout": self.layout,
            "adapters": [asdict(own) for own in self.used],
            "tensors": {"changed": len(self.tensors), "untouched": self.untouched},
            **self._sizes(),
            "unmatched": [{"file": file, "key": key, "reason": reason} for file, key, reason in self.unmatched],
            "ledgers": [{"name": own.path, **of.to_json()} for own, of in zip(self.used, self.ledgers, strict=True)],
            "copied": self.copied,
            "left_out": [{"file": file, "reason": reason} for file, reason in self.left_out],
            "dropped_metadata": self.dropped_metadata,
            "verified": [own.to_json() for own in self.verified],
            "lycoris": [own.to_json() for own in self.lycoris],
            "warnings": [*self.warnings, *self.alerts()],
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
        }

    def _sizes(self) -> dict[str, Any]:
        """How much changed and what rounding took: in all, by block and by tensor."""
        total, worst = self.total, self.worst()
        return {
            "relative_change": total.relative_change,
            "rounding": {
                "mode": self.rounding,
                "share_of_change": total.relative_loss,
                "change_kept": total.kept,
                "relative_to_weights": total.relative_rounding,
                "worst": None if worst is None else {"tensor": worst.name, "share_of_change": worst.norms.relative_loss},
                "new_fp8_scales": self.new_scales(),
            },
            "restored": {"expected_relative_error": total.relative_restored} if self.undone else None,
            "blocks": [{"block": name, **_shares(own)} for name, own in self.blocks().items()],
            "changes": [{"tensor": own.name, "modules": own.modules, **_shares(own.norms)} for own in self.tensors],
        }


def _shares(norms: Norms) -> dict[str, float]:
    return {"relative_change": norms.relative_change, "rounding": norms.relative_loss}
