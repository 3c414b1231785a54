"""MiSS (and Bone, its first name): delta[o, j] = block[j mod r, o mod n], the same small block of rows for every r inputs.

Shapes: block (r, out), or (r, n) with out a multiple of n for PEFT's ``mini``. Exactly a LoRA of rank r whose ``down`` adds
up every r-th input: up = block^T (repeated), down[i, j] = 1 where j mod r = i. There is no alpha. The variant ``bat``,
block (out / r, r, r), multiplies the base weight. Source: PEFT 0.18 ``tuners/miss/layer.py`` and 0.14 ``tuners/bone``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import multiplied, rounded
from lorasurgery.io.tensors import computed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import Rows
    from lorasurgery.io.tensors import Array, Float64, Ranges, Shape, Tensor


@dataclass(frozen=True, slots=True)
class Miss:
    """A block of rows and the layer it is repeated over, which only the model's table knows."""

    block: Tensor
    shape: Shape = ()
    """(out, in) of the layer; () until :meth:`over`."""

    family = "miss"

    def over(self, shape: Shape) -> Miss:
        """The same with the layer's shape (out, in); raises CannotError when the block does not fit."""
        rank, columns = self.block.shape
        if len(shape) != 2 or shape[0] % columns or rank > shape[1]:
            raise CannotError(f"a block of {list(self.block.shape)} is none of a layer {list(shape)}")
        return replace(self, shape=shape)

    @property
    def rank(self) -> int:
        """Rows of the block: the rank of the LoRA that it is."""
        return self.block.shape[0]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """``miss_block``."""
        return {"miss_block": self.block}

    def rows(self, ranges: Ranges) -> Miss:
        """Columns of the whole block: exact."""
        found = self._whole().columns(ranges)
        return Miss(found, (found.shape[1], *self.shape[1:]))

    def scaled(self, factor: float, record: Record | None = None) -> Miss:
        """Multiply the block."""
        return self if factor == 1.0 else replace(self, block=multiplied(self.block, factor, record))

    def cast(self, dtype: str, record: Record | None = None) -> Miss:
        """The block in ``dtype``."""
        return replace(self, block=rounded(self.block, dtype, record))

    def dense(self) -> Float64:
        """The repeated block in float64, (out, in)."""
        import numpy as np

        whole: Float64 = self._whole().f64().T[:, np.arange(self.shape[1]) % self.rank]
        return whole

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """Those of the LoRA that it is."""
        return self.to_low_rank().by_rows(work, factor)

    def to_low_rank(self) -> LowRank:
        """``up`` (out, r) is the block turned, ``down`` (r, in) adds up every r-th input: exact in every dtype."""
        whole, (rank, width) = self._whole(), (self.rank, self.shape[1])
        up = computed(whole.dtype, (self.shape[0], rank), lambda: whole.array().T)
        return LowRank(up, computed(whole.dtype, (rank, width), lambda: _every(rank, width)))

    def _whole(self) -> Tensor:
        """(r, out): the block as often as it fits."""
        rank, columns = self.block.shape
        times = self.shape[0] // columns
        if times == 1:
            return self.block

        def repeated() -> Array:
            import numpy as np

            return np.tile(self.block.array(), (1, times))

        return computed(self.block.dtype, (rank, times * columns), repeated)


def _every(rank: int, width: int) -> Float64:
    import numpy as np

    found = np.zeros((rank, width))
    found[np.arange(width) % rank, np.arange(width)] = 1.0
    return found
