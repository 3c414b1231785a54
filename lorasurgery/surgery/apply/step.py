"""What a step is: one module's effect on rows of a weight, in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lorasurgery.deltas.full import Opaque
    from lorasurgery.surgery.apply.rules import Rules

    Work = NDArray[Any]

CHUNK = 1 << 19
"""Elements changed at a time, whole rows: enough that threads rarely wait for each other."""
HEIGHT, WIDTH = 128, 512
"""Rows and columns changed at a time where parts of rows can be: they stay in the processor's cache from the reading to the
rounding, and are so near to a square that BLAS spends little on rearranging the factors (both measured)."""


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


def chunks(rows: int, columns: int, *, whole: bool = True) -> list[tuple[int, int]]:
    """(start, stop) of blocks of about :data:`CHUNK` elements, or of :data:`HEIGHT` rows that need not be ``whole``."""
    step = max(CHUNK // max(columns, 1), 1) if whole else max(HEIGHT * WIDTH // max(columns, 1), HEIGHT)
    return [(at, min(at + step, rows)) for at in range(0, rows, step)]


def parts(columns: int) -> list[slice]:
    """Columns in equal parts of about :data:`WIDTH`."""
    count = max(round(columns / WIDTH), 1)
    return [slice(columns * i // count, columns * (i + 1) // count) for i in range(count)]


def on_columns(delta: Opaque) -> bool:
    """PEFT's OFT (from 0.14 on) and BOFT, and OneTrainer's OFT, turn columns."""
    return any(suffix.startswith((".oft_R", ".oft_s", ".boft_R")) for suffix in delta.tensors)
