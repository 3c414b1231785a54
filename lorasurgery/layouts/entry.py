"""The tensors of one module, as a file spells them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.layouts.peft_keys import BIAS as WHOLE_BIAS
from lorasurgery.layouts.peft_keys import ROWS, role_of
from lorasurgery.layouts.words import ALPHA, BIAS, EXTRA, MAGNITUDE, SET

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Shape, Tensor
    from lorasurgery.layouts.words import Word

COMPOSED = "longcat"
"""The dialect of words that no other program has."""
_MODIFIERS = (ALPHA, MAGNITUDE, BIAS, EXTRA)
_SLOTS = {EXTRA: "reshape_weight"}


class Entry(NamedTuple):
    """One tensor of a module: its key as the file spells it, its word, the tensor."""

    key: str
    word: Word
    tensor: Tensor
    suffix: str
    """What follows the module's name in the key."""
    stored: Tensor | None = None
    """The file's own tensor, where ``tensor`` was made of it."""


@dataclass(slots=True)
class Group:
    """The tensors of one module."""

    stem: str
    """Its name, without what stands around it in the file (``pipe.dit.``) and in the place of a number (``unet:3``)."""
    spelled: str
    """The name as the file has it."""
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def families(self) -> list[str]:
        """The families its tensors belong to, modifiers (alpha, magnitude, bias) left out."""
        found: list[str] = []
        for family, _ in self.entries:
            if family not in found and family not in _MODIFIERS:
                found.append(family)
        return found

    def modifier(self, name: str) -> Entry | None:
        """The alpha, magnitude, bias or extra entry."""
        return self.entries.get((name, _SLOTS.get(name, name)))

    def slots(self, family: str) -> dict[str, Tensor]:
        """The family's tensors by slot."""
        return {slot: entry.tensor for (own, slot), entry in self.entries.items() if own == family}

    def key(self) -> str:
        """A key to name in messages."""
        return next(iter(self.entries.values())).key

    @property
    def parameter(self) -> bool:
        """Whether it is one parameter of a layer that PEFT saved whole, a bias or rows, which no table of weights has."""
        return any(e.word.family == SET and role_of(e.suffix) in (WHOLE_BIAS, ROWS) for e in self.entries.values())

    @property
    def composed(self) -> bool:
        """Whether its delta or its alpha is put together from tensors that are not themselves a factor or the alpha.

        LongCat-Video's several up factors and its alpha / rank: what is cut or scaled cannot be written under their keys.
        """
        return any(entry.word.dialect == COMPOSED for entry in self.entries.values())

    def tableless(self, shape: Shape | None) -> Shape | None:
        """The shape by which a table is found for a delta of ``shape``; None where the table's is to be widened."""
        return None if self.modifier(EXTRA) is not None else shape
