"""What is added, and how the sum is to be written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Shape


@dataclass(frozen=True, slots=True)
class Adding:
    """How sums are written."""

    shape: Shape
    """(out, in[, k...]) of the weight."""
    dtype: str
    record: Record
    full: bool
    """Whether the target holds full differences."""
    lokr: bool = False
    """Whether sums of LoKr are to be the nearest LoKr."""
    factor: int | None = None
    """LyCORIS' factor of these; None: the members' own."""
    cut: Cutting | None = None
    """That the result is cut afterwards: the rank may exceed the sides, and members keep their dtypes on the way."""


@dataclass(frozen=True, slots=True)
class Cutting:
    """How a sum is cut afterwards."""

    needed: int | None
    """How many singular values decide; None: all."""


class Term(NamedTuple):
    """A change and what it is multiplied by."""

    delta: Delta
    factor: float
