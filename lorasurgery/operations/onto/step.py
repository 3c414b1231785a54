"""What a step is: one module's effect on rows of a weight, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lorasurgery.deltas.full import Opaque
    from lorasurgery.operations.onto.rules import Rules

    Work = NDArray[Any]

CHUNK = 1 << 19
"""Elements of whole rows changed at a time: enough that threads rarely wait for each other."""
READ, PART = 3 << 17, 1 << 16
"""Elements read at a time where parts of rows can be changed, and elements of a part: from the reading to the rounding they
stay in the processor's cache."""
HEIGHT = (128, 512)
"""Fewest and most rows of those: parts are so near to a square that BLAS spends little on rearranging the factors."""

GRAIN = 64
"""Columns of which parts have a multiple."""


GONE = "some of its factors are 0: what they multiplied is gone"


class Step(NamedTuple):
    """One module's effect."""

    local: bool
    """Whether rows change without regard to other rows."""
    change: Callable[[Work, int], None]
    """Change rows in place, given the module's row that the first of them is; all rows at once when not local."""
    part: Callable[[Work, int, int], None] | None = None
    """Change parts of rows, given the column that their first one is, too; None where rows are needed whole."""


class Wanted(NamedTuple):
    """What a step is made for."""

    out: int
    columns: int
    channels: int
    """Input channels: ``columns`` without a convolution's kernel."""
    convolution: bool
    """Whether the model's layer is one, of whatever kernel."""
    work: str
    strength: float
    undo: bool
    dora: str
    rules: Rules
    feedforward: bool | None
    """Whether the configuration has it among the modules whose inputs (IA)^3 multiplies; None: not told."""

    @property
    def sign(self) -> float:
        """-1 where what is added is taken out."""
        return -1.0 if self.undo else 1.0


def chunks(rows: int, columns: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks of whole rows of about :data:`CHUNK` elements."""
    return _blocks(rows, max(CHUNK // max(columns, 1), 1))


def parts(rows: int, columns: int) -> tuple[list[tuple[int, int]], list[slice]]:
    """(start, stop) of blocks of about :data:`READ` elements, and parts of their columns of about :data:`PART`."""
    height = min(max(READ // max(columns, 1), HEIGHT[0]), HEIGHT[1], max(rows, 1))
    width = max(round(PART / height / GRAIN), 1) * GRAIN
    return _blocks(rows, height), [slice(at, min(at + width, columns)) for at in range(0, max(columns, 1), width)]


def _blocks(rows: int, step: int) -> list[tuple[int, int]]:
    return [(at, min(at + step, rows)) for at in range(0, rows, step)]


def on_columns(delta: Opaque) -> bool:
    """PEFT's OFT (from 0.14 on) and BOFT, and OneTrainer's OFT, turn columns."""
    return any(suffix.startswith((".oft_R", ".oft_s", ".boft_R")) for suffix in delta.tensors)
