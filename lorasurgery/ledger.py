"""One account of a file's keys: every key is used, harmless or lost, and exactness is read off it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where each key of an input ended; every key is in exactly one of the three."""

    used: Mapping[str, str] = field(default_factory=dict)
    """Key -> the module (or other thing) that it is a part of."""
    harmless: Mapping[str, str] = field(default_factory=dict)
    """Key -> why it changes nothing."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Key -> why its effect is not in the result."""

    def concerns(self, name: str) -> bool:
        """Whether this is a key of the file, or a module of it."""
        return name in self.used or name in self.harmless or name in self.lost or name in set(self.used.values())

    def without(self, keys: Iterable[tuple[str, str]]) -> Ledger:
        """The account after these (key or module, reason) were left out; names that are neither count as keys."""
        gone: dict[str, str] = {}
        parts: dict[str, list[str]] = {}
        for key, module in self.used.items():
            parts.setdefault(module, []).append(key)
        for name, reason in keys:
            for key in [name] if name in self.used or name in self.harmless or name not in parts else parts[name]:
                gone.setdefault(key, reason)
        used, harmless = ({k: v for k, v in own.items() if k not in gone} for own in (self.used, self.harmless))
        return Ledger(used, harmless, {**self.lost, **gone})

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``: the number of used keys, and every other key with its reason."""
        rows = {name: [{"key": k, "reason": v} for k, v in own.items()] for name, own in self._others()}
        return {"used": len(self.used), **rows}

    def _others(self) -> Iterable[tuple[str, Mapping[str, str]]]:
        return (("harmless", self.harmless), ("lost", self.lost))
