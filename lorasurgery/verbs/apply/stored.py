"""New values in the form the file keeps them in: rounded to its dtype, fp8 with its scales."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.operations.onto.numbers import FORMATS, stochastic
from lorasurgery.operations.onto.options import NEW, STOCHASTIC

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from lorasurgery.models import Weight
    from lorasurgery.operations.onto.options import ApplyOptions
    from lorasurgery.operations.onto.tools import Tools

    Work = NDArray[Any]


class Stored:
    """How one tensor's rows are stored."""

    def __init__(self, weight: Weight, options: ApplyOptions, tools: Tools) -> None:
        self._tools, self.dtype = tools, weight.tensor.dtype
        self._name, self._options = weight.file.prefix + weight.key, options
        self.scales = None if weight.scale is None else Scales(weight)

    def fit(self, blocks: Iterable[tuple[int, Work]]) -> None:
        """Look at all new values, (first row, rows), and choose scales that they fit; nothing to do without scales."""
        if self.scales is None:
            return
        for start, values in blocks:
            self.scales.see(start, values)
        self.scales.decide(always=self._options.scales == NEW)

    def encode(self, values: Work, row: int, column: int, out: Work) -> None:
        """Rows from ``row`` on, or parts of them from ``column`` on, rounded to the stored dtype into ``out``.

        What is out of range becomes infinite or NaN.
        """
        if self.scales is not None:
            values = self.scales.divided(values, row)
        if self._options.rounding == STOCHASTIC:
            seed = (self._options.seed, zlib.crc32(self._name.encode()), row, column)
            values = stochastic(values, self.dtype, np.random.Generator(np.random.SFC64(seed)))
        self._tools.encode(values, self.dtype, out)

    def decode(self, stored: Work, rows: NDArray[np.intp], work: str) -> Work:
        """The numbers that stored rows stand for; ``rows`` are their numbers in the tensor."""
        values: Work = stored.astype(work)
        return values if self.scales is None else self.scales.times(values, rows)

    def steps(self, spaces: Work, rows: NDArray[np.intp]) -> Work:
        """Distances between neighbouring stored numbers as distances between what they stand for."""
        return spaces if self.scales is None else self.scales.times(spaces, rows)


class Scales:
    """The scales of an fp8 weight, (1, 1), (rows, 1) or (rows, blocks of columns): kept while values fit, else new."""

    def __init__(self, weight: Weight) -> None:
        scale = weight.scale
        assert scale is not None  # noqa: S101  it is a scaled weight
        self._dtype, self._shape = scale.dtype, scale.shape
        values = np.array(scale.f64()).reshape(-1)
        rows = weight.shape[0] if weight.shape else 1
        self.values = values.reshape(1, 1) if scale.size == 1 else values.reshape(rows, -1)
        self._largest = FORMATS[weight.tensor.dtype].largest
        self._seen = np.zeros(self.values.shape)
        self.changed = 0

    def see(self, start: int, values: Work) -> None:
        """Remember the largest values of these rows."""
        if len(self.values) == 1:
            self._seen[0, 0] = max(self._seen[0, 0], float(np.abs(values).max(initial=0.0)))
            return
        blocks = np.abs(values).reshape(len(values), self.values.shape[1], -1).max(axis=2)
        own = self._seen[start : start + len(values)]
        np.maximum(own, blocks, out=own)

    def decide(self, *, always: bool) -> None:
        """New scales where the largest value is out of range with the old one, or everywhere."""
        wanted = self._seen / self._largest
        new = (self._seen > 0) & (np.ones_like(wanted, bool) if always else wanted > np.abs(self.values))
        rounded = self._at_least(wanted)
        self.changed = int((new & (rounded != self.values)).sum())
        self.values = np.where(new, rounded, self.values)

    def _at_least(self, wanted: Work) -> Work:
        """The nearest scales of their dtype that are not smaller: of fp16's least numbers a smaller one would cut off much."""
        with np.errstate(over="ignore"):
            rounded = wanted.astype(numpy_dtype(self._dtype))
        smaller = rounded.astype(np.float64) < wanted
        bits = rounded.view(f"u{rounded.itemsize}")
        bits += smaller.astype(bits.dtype)
        found: Work = rounded.astype(np.float64)
        return found

    def check(self, name: str, path: Path) -> None:
        """Raises BrokenModuleError for a scale that its dtype cannot hold."""
        if not np.isfinite(self.values).all():
            raise BrokenModuleError(
                f"{name}: its new scale is beyond the range of {self._dtype}", key=name, path=path, hint="a smaller weight"
            )

    def divided(self, values: Work, start: int) -> Work:
        """Rows by their scales, cut off at the ends of the range: the division's rounding may put a value just beyond."""
        scale = self.values if len(self.values) == 1 else self.values[start : start + len(values)]
        blocks = values.reshape(len(values), scale.shape[1], -1) / scale[:, :, None].astype(values.dtype)
        np.clip(blocks, -self._largest, self._largest, out=blocks)
        whole: Work = blocks.reshape(values.shape)
        return whole

    def times(self, values: Work, rows: NDArray[np.intp]) -> Work:
        """Rows times their scales."""
        scale = self.values if len(self.values) == 1 else self.values[rows]
        blocks = values.reshape(len(values), scale.shape[1], -1) * scale[:, :, None].astype(values.dtype)
        whole: Work = blocks.reshape(values.shape)
        return whole

    def tobytes(self) -> bytes:
        """As the file's scale tensor."""
        return self.values.astype(numpy_dtype(self._dtype)).tobytes()
