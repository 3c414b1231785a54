"""One adapter that is applied, and what its modules are multiplied by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorasurgery.operations.onto.rules import PEFT_PREFIX, Rules

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorasurgery.adapter import Adapter, Module


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter and what each of its modules is multiplied by."""

    adapter: Adapter
    strength: Callable[[Module], float]
    text: str
    """The weight as it was asked for."""
    keys: Mapping[str, Sequence[str]]
    """Module name -> the file's keys of it."""
    rules: Mapping[str, Rules] = field(default_factory=dict)
    """Component ("" for all) -> how its OFT and (IA)^3 modules are meant."""

    def rules_of(self, module: Module) -> tuple[Rules, str]:
        """The rules of a module, and its name in the model that they were written for."""
        for component, own in self.rules.items():
            if component and module.name.startswith(component + "."):
                return own, module.name[len(component) + 1 :]
        return self.rules.get("", Rules()), module.name.removeprefix(PEFT_PREFIX)

    @property
    def path(self) -> str:
        """The file's path."""
        return str(self.adapter.path or "")

    def unexplained(self) -> list[tuple[str, str]]:
        """(key, reason) of what is in no module and may have an effect."""
        return [(left.key, left.reason) for left in self.adapter.leftovers if left.state != "harmless"]
