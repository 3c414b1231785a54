"""What happens to each tensor of a model: the modules that change it, in order, and what of the adapters is not used."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.io.dtypes import BITS
from lorasurgery.layouts.detect import expected_shape

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Shape
    from lorasurgery.models import Weight
    from lorasurgery.operations.onto.source import Source


class Run(NamedTuple):
    """Rows ``at:at + length`` of a tensor are rows ``first:first + length`` of a module."""

    at: int
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class Placed:
    """What one module does to one tensor."""

    source: Source
    module: Module
    bias: bool
    """Whether it is the module's bias that is added."""
    strength: float
    runs: tuple[Run, ...]


@dataclass(slots=True)
class Change:
    """One tensor of the model and all that happens to it, in order."""

    name: str
    """Prefix and key."""
    weight: Weight
    placed: list[Placed] = field(default_factory=list)
    columns: int = 0
    """Those of the widest module that makes the weight wider; 0 where none does."""

    @property
    def shape(self) -> Shape:
        """The tensor's shape when everything has happened."""
        old = self.weight.shape
        return (old[0], self.columns // prod(old[2:]), *old[2:]) if self.columns else old

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor when everything has happened."""
        return prod(self.shape) * BITS[self.weight.tensor.dtype] // 8

    def width(self, placed: Placed) -> int:
        """The columns that a module acts on: the first ones, of a weight that another module makes wider."""
        if not self.columns or placed.bias:
            return prod(self.weight.shape[1:])
        return prod(expected_shape(placed.source.adapter.architecture, placed.module.site)[1:])


@dataclass(slots=True)
class Plan:
    """Every tensor that changes, in file order, and what of the adapters is not used."""

    changes: dict[str, Change] = field(default_factory=dict)
    unmatched: list[tuple[str, str, str]] = field(default_factory=list)
    """(file, key, reason)."""
    order: list[Source] = field(default_factory=list)
    """The sources in the order they are applied."""
    modules: list[int] = field(default_factory=list)
    """Modules used, for each source."""
    left_out: list[int] = field(default_factory=list)
    """Modules of weight 0, for each source."""
