"""What a comparison found: for every module, in total, and in one sentence."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import inf, isfinite, sqrt
from types import MappingProxyType
from typing import Any

SCHEMA = 1
"""Version of the JSON form; see docs/compare.md."""

IDENTICAL, SAME, DIFFERENT = "identical", "same", "different"
ONLY_A, ONLY_B, UNKNOWN = "only a", "only b", "unknown"
STATES = (IDENTICAL, SAME, DIFFERENT, ONLY_A, ONLY_B, UNKNOWN)
"""In words: not one bit of difference in effect; within the tolerance; beyond it; in one file only (and not zero there); not
comparable, for the reason in ``note``."""

TOLERANCES = MappingProxyType(
    {
        "F64": 1e-12,
        "F32": 4 * 2.0**-24,
        "F16": 4 * 2.0**-11,
        "BF16": 4 * 2.0**-8,
        "F8_E4M3": 4 * 2.0**-4,
        "F8_E5M2": 4 * 2.0**-3,
    }
)
"""Four times what one rounding to the dtype may change: two or four rounded factors stay well below it."""


@dataclass(frozen=True, slots=True)
class Half:
    """One file's module."""

    name: str
    family: str
    rank: int | None
    scale: float
    dtype: str
    """Of its tensors, joined with + where mixed."""


@dataclass(frozen=True, slots=True)
class ModulePair:
    """The same rows of the model in both files."""

    component: str
    weight: str
    """The original weight's name."""
    rows: tuple[tuple[int, int], ...]
    """Of that weight."""
    status: str
    a: Half | None = None
    b: Half | None = None
    distance: float | None = None
    """``||A - B|| / max(||A||, ||B||)`` of the change; 1 where one file has nothing, None where it cannot be told."""
    cosine: float | None = None
    norm_a: float = 0.0
    norm_b: float = 0.0
    inner: float = 0.0
    left: float | None = None
    """Mean squared cosine of the principal angles between the column spaces (outputs)."""
    right: float | None = None
    """The same between the row spaces (inputs)."""
    vectors: tuple[tuple[str, float], ...] = ()
    """Distances of what stands beside the change: ``magnitude`` (DoRA), ``bias``."""
    tolerance: float = 0.0
    part: bool = False
    """Whether a module of either file has more rows than these."""
    note: str = ""

    @property
    def name(self) -> str:
        """As the first file that has it spells it."""
        half = self.a or self.b
        return "" if half is None else half.name

    @property
    def worst(self) -> float:
        """The largest of its distances; infinity where one cannot be told."""
        if self.distance is None:
            return inf
        return max([self.distance, *(value for _, value in self.vectors)])

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        found = {**asdict(self), "vectors": dict(self.vectors), "rows": [list(own) for own in self.rows]}
        return {key: value if not isinstance(value, float) or isfinite(value) else None for key, value in found.items()}


@dataclass(slots=True)
class Comparison:
    """Two files, module by module, in the order of the first."""

    pairs: list[ModulePair] = field(default_factory=list)
    leftovers: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    """Keys that no table explains and that the other file has not, or has with other bytes."""
    models: tuple[str, str] = ("", "")
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def comparable(self) -> bool:
        """Whether both are adapters of one model."""
        return self.models[0] == self.models[1]

    @property
    def same(self) -> bool:
        """Whether every module of either file does the same in the other, within its tolerance, and nothing else differs."""
        fine = all(pair.status in (IDENTICAL, SAME) for pair in self.pairs)
        return self.comparable and fine and not any(self.leftovers)

    def counts(self) -> dict[str, int]:
        """How many modules have which status."""
        return dict(Counter(pair.status for pair in self.pairs))

    def norms(self) -> tuple[float, float]:
        """Frobenius norms of all changes that could be measured, ``(||A||, ||B||)``."""
        known = self._known()
        return sqrt(sum(p.norm_a**2 for p in known)), sqrt(sum(p.norm_b**2 for p in known))

    def distance(self) -> float:
        """``||A - B|| / max(||A||, ||B||)`` over all modules that could be measured, missing ones counting as nothing."""
        known, largest = self._known(), max(self.norms())
        square = sum(((p.distance or 0.0) * max(p.norm_a, p.norm_b)) ** 2 for p in known)
        return sqrt(square) / largest if largest else 0.0

    def cosine(self) -> float | None:
        """Of the angle between the two files' changes as one vector each."""
        norm_a, norm_b = self.norms()
        if not norm_a or not norm_b:
            return None
        return max(-1.0, min(1.0, sum(p.inner for p in self._known()) / norm_a / norm_b))

    def overlaps(self) -> tuple[float | None, float | None]:
        """The means of the overlaps, over the modules that have them."""
        found = [[value for p in self.pairs if (value := getattr(p, side)) is not None] for side in ("left", "right")]
        left, right = (sum(values) / len(values) if values else None for values in found)
        return left, right

    def strength(self) -> float | None:
        """The number B is A times, where it is the same for every module to within its tolerance; None where it is not."""
        norm_a, norm_b = self.norms()
        if not norm_a or not norm_b:
            return None
        ratio = norm_b / norm_a
        pairs = [p for p in self.pairs if p.norm_a or p.norm_b]
        signs = {(p.cosine or 0.0) > 0.0 for p in pairs}
        if len(signs) != 1 or len(pairs) + sum(p.worst == 0.0 for p in self.pairs) < len(self.pairs):
            return None
        for pair in pairs:
            if pair.cosine is None or 1.0 - abs(pair.cosine) > max(pair.tolerance**2, 1e-14):
                return None
            if abs(pair.norm_b / pair.norm_a / ratio - 1.0) > 2.0 * pair.tolerance:
                return None
        return ratio if signs.pop() else -ratio

    def worst_first(self) -> list[ModulePair]:
        """The modules, what cannot be compared or is missing first, then by distance."""
        return sorted(self.pairs, key=lambda pair: (-pair.worst, pair.status in (IDENTICAL, SAME)))

    def verdict(self) -> str:
        """One sentence: ``identical``, ``same`` or ``different``, and why."""
        if not self.comparable:
            return f"different: they are for different models, {self.models[0]} and {self.models[1]}"
        count = f"{len(self.pairs)} modules"
        if self.same and all(pair.status == IDENTICAL for pair in self.pairs):
            return f"identical: the {count} change exactly the same in both"
        worst = max((p.worst for p in self.pairs), default=0.0)
        if self.same:
            return f"same: the {count} agree within the tolerance of their dtypes, the worst to {worst:.1e}"
        return f"different: {', '.join(self._reasons())}"

    def _reasons(self) -> list[str]:
        counts, total = self.counts(), len(self.pairs)
        strength = self.strength()
        if counts.get(DIFFERENT) and strength is not None:
            found = [f"B is A times {strength:.6g}"]
        else:
            wrong = counts.get(DIFFERENT, 0)
            found = [f"{wrong} of {total} modules differ (distance of the whole {self.distance():.2g})"] if wrong else []
        found += [f"{counts[state]} only in {state[-1].upper()}" for state in (ONLY_A, ONLY_B) if counts.get(state)]
        found += [f"{counts[UNKNOWN]} cannot be compared"] if counts.get(UNKNOWN) else []
        for keys, name in zip(self.leftovers, "AB", strict=True):
            found += [f"{len(keys)} keys only in {name} that no table explains"] if keys else []
        return found

    def _known(self) -> list[ModulePair]:
        return [p for p in self.pairs if p.distance is not None]

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        norms, overlaps, counts = self.norms(), self.overlaps(), self.counts()
        return {
            "schema": SCHEMA,
            "same": self.same,
            "verdict": self.verdict(),
            "distance": self.distance() if self.comparable else None,
            "cosine": self.cosine(),
            "strength": self.strength(),
            "norm": {"a": norms[0], "b": norms[1]},
            "overlap": {"left": overlaps[0], "right": overlaps[1]},
            "counts": {state: counts.get(state, 0) for state in STATES},
            "leftovers": {"a": self.leftovers[0], "b": self.leftovers[1]},
            "modules": [pair.to_json() for pair in self.worst_first()],
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }
