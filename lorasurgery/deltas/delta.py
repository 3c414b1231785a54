"""What every kind of delta offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import Rows
    from lorasurgery.deltas.low_rank import LowRank
    from lorasurgery.io.tensors import Float64, Ranges, Shape, Tensor


@runtime_checkable
class Delta(Protocol):
    """One module's change of one weight, without its scale.

    ``shape`` is (out, in[, k...]); a flat convolution factor gives (out, in*k*k). ``rank`` is None where the word has no
    meaning. ``tensors`` maps the family's own slot names to the file's tensors.
    """

    @property
    def family(self) -> str:
        """``lora``, ``loha``, ``lokr``, ``full``, ``norm``, ..."""
        ...

    @property
    def shape(self) -> Shape:
        """(out, in[, k...])."""
        ...

    @property
    def rank(self) -> int | None:
        """What alpha is divided by."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Slot -> tensor."""
        ...

    def rows(self, ranges: Ranges) -> Delta:
        """The delta of these output rows, in this order; raises CannotError when it has another structure."""
        ...

    def scaled(self, factor: float, record: Record | None = None) -> Delta:
        """The delta times ``factor``, folded into one factor."""
        ...

    def cast(self, dtype: str, record: Record | None = None) -> Delta:
        """The same in another dtype; ``record`` gets what rounding each factor cost."""
        ...

    def dense(self) -> Float64:
        """The whole delta in float64, without the scale; raises CannotError when it needs the base weight."""
        ...

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """Rows of ``factor`` times the delta, some at a time: see :class:`lorasurgery.deltas.by_rows.ByRows`."""
        ...

    def to_low_rank(self) -> LowRank:
        """The same delta as up @ down, exactly (products are float64: cast them).

        Raises CannotError when it needs the base weight.
        """
        ...
