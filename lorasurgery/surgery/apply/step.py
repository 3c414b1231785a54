"""What a step is: one module's effect on rows of a weight, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lorasurgery.deltas.full import Opaque

    Work = NDArray[Any]

CHUNK = 1 << 18
"""Elements changed at a time: two arrays of them in float32 stay in a core's cache."""


class Step(NamedTuple):
    """One module's effect."""

    local: bool
    """Whether rows change without regard to other rows."""
    change: Callable[[Work, int], None]
    """Change rows in place, given the module's row that the first of them is; all rows at once when not local."""


class Wanted(NamedTuple):
    """What a step is made for."""

    out: int
    columns: int
    work: str
    strength: float
    undo: bool
    dora: str
    neumann: bool

    @property
    def sign(self) -> float:
        """-1 where what is added is taken out."""
        return -1.0 if self.undo else 1.0


def chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks of rows of about :data:`CHUNK` elements."""
    step = max(CHUNK // max(columns, 1), 1)
    return [(at, min(at + step, rows)) for at in range(0, rows, step)]


def on_columns(delta: Opaque) -> bool:
    """PEFT's OFT turns columns."""
    return any(suffix.startswith(".oft_R") for suffix in delta.tensors)
