"""One tensor of a base model: what it is, and its rows in float32."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lorasurgery.models.floats import floats
from lorasurgery.models.scales import scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Shape, Tensor
    from lorasurgery.models.files import ModelFile
    from lorasurgery.models.names import Place


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a base model. Nothing is read until rows are asked for; several threads may ask at once."""

    key: str
    """As its file has it."""
    file: ModelFile
    tensor: Tensor
    """As stored; a GGUF tensor's rows are dequantised when they are read."""
    place: Place | None
    """The rows of original base weights that it holds; None when the tables do not know it."""
    role: str
    """``weight``, ``bias``, ``norm`` (1-D), ``parameter`` (called none of these), ``turned`` (a weight stored as (in, out)), or
    ``other``: scales, what has no place."""
    scale: Tensor | None = None
    """The factor of an fp8 weight: a scalar, one number per row, or one per block of columns, (out, blocks, 1)."""
    listed: bool = True
    """Whether a table has the place; otherwise it is the parameter's own name."""

    @property
    def shape(self) -> Shape:
        """The tensor's own shape, (out, in[, k...]) or (out,)."""
        return self.tensor.shape

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows ``start:stop`` of the true weight as (rows, in*k...), 1-D ones as (rows, 1): float32, float64 if stored so."""
        values = floats(self.tensor.rows([(start, stop)])).reshape(stop - start, prod(self.shape[1:]))
        return values if self.scale is None else scaled(values, self.scale, start, stop)

    def array(self) -> NDArray[Any]:
        """The whole true weight in its own shape."""
        if not self.shape:
            return floats(self.tensor)
        return self.rows(0, self.shape[0]).reshape(self.shape)
