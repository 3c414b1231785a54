"""What a check found: a verdict for every module, and one for the file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lorasurgery.checking.rules import Consumer

SCHEMA = 1
"""Version of the JSON form."""
LOADS, CHANGED, IGNORED, REJECTED, UNKNOWN = "loads", "changed", "ignored", "rejected", "unknown"


class Finding(NamedTuple):
    """One module: what becomes of it, a word for the reason, and a sentence."""

    module: str
    status: str
    """``loads``, ``changed`` (loads with another strength or effect), ``ignored``, ``rejected`` (with the whole file),
    or ``unknown`` (nothing is recorded)."""
    reason: str = ""
    """``prefix``, ``name``, ``suffix``, ``shape``, ``strength``, ``dora``, ``bias``, ``effect``, ``twice``, ``broken`` or
    ``file``."""
    text: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of checking one file for one program."""

    path: str
    consumer: Consumer
    architecture: str
    candidates: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    refusals: tuple[str, ...] = ()
    """Why the program refuses the whole file."""
    failures: tuple[str, ...] = ()
    """Why every forward pass fails after the file is loaded."""
    unread_keys: tuple[str, ...] = ()
    """Keys of no module, which it passes over."""
    notes: tuple[str, ...] = ()
    mend: str | None = None
    """The command that makes a file it loads completely."""
    known: bool = True
    """False when nothing is known here about this program and architecture."""
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        """Whether every module loads, with the effect the file gives it."""
        spoiled = self.refusals or self.failures or self.unread_keys
        return self.known and not spoiled and bool(self.findings) and self.counts[LOADS] == len(self.findings)

    @property
    def verdict(self) -> str:
        """One line."""
        total, used = len(self.findings), self.counts[LOADS] + self.counts[CHANGED]
        if not self.known:
            return f"unknown: nothing is recorded here about {self.consumer.name} and {self.architecture}"
        if self.refusals:
            return f"nothing loads: {self.refusals[0]}"
        if self.failures:
            return f"loads {used} of {total} modules, and every forward pass fails: {self.failures[0]}"
        return "loads completely" if self.complete else self._partly(total, used)

    def _partly(self, total: int, used: int) -> str:
        changed, why = self.counts[CHANGED], "; ".join(self.reasons()[:3])
        if total and self.counts[LOADS] == total:
            return f"loads all {total} modules, and {len(self.unread_keys)} keys are passed over, first {self.unread_keys[0]}"
        if not used:
            return f"nothing loads: {why}"
        if used == total:
            return f"loads, but {changed} of {total} modules with another effect: {why}"
        return f"loads {used} of {total} modules: {why}"

    def reasons(self) -> list[str]:
        """The sentences about modules that do not simply load, the most frequent first, each with its count."""
        texts = Counter(f.text for f in self.findings if f.status != LOADS)
        total = len(self.findings)
        return [t if n == total else f"{t} ({n} module{'s' * (n > 1)})" for t, n in texts.most_common()]

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``; the schema stands in docs/compatibility.md."""
        return {
            "schema": SCHEMA,
            "input": self.path,
            "for": self.consumer.id,
            "consumer": {"name": self.consumer.name, "version": self.consumer.version},
            "architecture": self.architecture,
            "candidates": list(self.candidates),
            "known": self.known,
            "complete": self.complete,
            "verdict": self.verdict,
            "modules": {
                "total": len(self.findings),
                **{s: self.counts[s] for s in (LOADS, CHANGED, IGNORED, REJECTED, UNKNOWN)},
            },
            "refusals": list(self.refusals),
            "failures": list(self.failures),
            "findings": [f._asdict() for f in self.findings if f.status != LOADS],
            "unread_keys": list(self.unread_keys),
            "notes": list(self.notes),
            "mend": self.mend,
        }
