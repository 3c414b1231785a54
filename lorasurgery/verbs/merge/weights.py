"""What one file of a merge is multiplied by: a number, other numbers for parts of the model, and a list of block weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.operations.select.block_lists import listed
from lorasurgery.operations.select.blocks import chooser

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.operations.select.blocks import Selection


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a file, module by module: ``value``, or that of the last rule that has the module, times its list's.

    A rule takes the place of ``value``, as ``te=`` and ``unet=`` do in the web UIs; a list multiplies, as it does there.
    """

    value: float = 1.0
    rules: tuple[tuple[Selection, float], ...] = ()
    blocks: str | None = None
    """A list of block weights, see :mod:`lorasurgery.operations.select.block_lists`."""
    others: float = 1.0
    """The factor of blocks that the list leaves out: 1 in sd-scripts, 0 in the web UIs' extension."""
    dyn: int | None = None
    """Only the first so many ranks, with the scale of all of them: the web UIs' ``dyn``."""
    text: str = ""
    """As it was written."""

    def __str__(self) -> str:
        return self.text or f"{self.value:g}"

    def of(self, arch: Architecture) -> Callable[[Module], float]:
        """The function from modules to numbers; raises RequestError for what the architecture does not have."""
        choose = chooser([selection for selection, _ in self.rules], arch)
        rows = [] if self.blocks is None else listed(self.blocks, arch, others=self.others)
        block = chooser([selection for selection, _ in rows], arch)

        def weight(module: Module) -> float:
            rule, row = choose(module), block(module)
            value = self.value if rule is None else self.rules[rule][1]
            return value * (1.0 if row is None else rows[row][1])

        return weight

    def unused(self, arch: Architecture, modules: list[Module]) -> list[str]:
        """Rules that decide nothing: no module of the file belongs to them, or later rules have them all."""
        choose = chooser([selection for selection, _ in self.rules], arch)
        used = {choose(module) for module in modules}
        return [selection.text for i, (selection, _) in enumerate(self.rules) if i not in used]
