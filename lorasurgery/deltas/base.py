"""What every kind of delta offers, and how a number is folded into one of its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import frexp, prod, sqrt
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lorasurgery.errors import SurgeryError
from lorasurgery.io.tensors import computed, numpy_dtype

if TYPE_CHECKING:
    from lorasurgery.deltas.low_rank import LowRank
    from lorasurgery.deltas.times import Times
    from lorasurgery.io.tensors import Array, Float64, Ranges, Shape, Tensor

Record = Callable[[float, float], None]
"""Called with (squared error, squared norm) when a rounded tensor has been computed."""


class CannotError(SurgeryError):
    """A delta cannot do this exactly; the message is the reason. Callers add the module and the options that would."""


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

    def to_low_rank(self) -> LowRank:
        """The same delta as up @ down, exactly (products are float64: cast them).

        Raises CannotError when it needs the base weight.
        """
        ...


def is_power_of_two(factor: float) -> bool:
    """Whether multiplying a float by ``factor`` only changes exponents."""
    return abs(frexp(factor)[0]) == 0.5


def power_of_two(exponent: int) -> float:
    """2.0 ** exponent."""
    return float(2.0**exponent)


def split_factor(factor: float) -> tuple[float, int]:
    """``factor`` as remainder * 2**exponent with the remainder in [1/sqrt(2), sqrt(2))."""
    mantissa, exponent = frexp(factor)
    if abs(mantissa) < sqrt(0.5):
        return mantissa * 2, exponent - 1
    return mantissa, exponent


def multiplied(
    tensor: Tensor, factor: float, record: Record | None = None, sketch: Callable[[], Array] | None = None
) -> Tensor:
    """``tensor`` times ``factor``, computed in float32 (float64 for F32 and F64 tensors) and rounded once to its dtype.

    ``record`` gets the squared rounding error and the squared norm of the product when it is first computed; ``sketch``
    as in :class:`Rounding`.
    """
    if factor == 1.0:
        return tensor
    recorded = once(record)
    return computed(tensor.dtype, tensor.shape, lambda: _converted(tensor, tensor.dtype, factor, Rounding(recorded, sketch)))


def rounded(tensor: Tensor, dtype: str, record: Record | None = None) -> Tensor:
    """``tensor`` in ``dtype``; ``record`` gets the squared rounding error and the squared norm when first computed."""
    if dtype == tensor.dtype:
        return tensor
    recorded = once(record)
    return computed(dtype, tensor.shape, lambda: _converted(tensor, dtype, 1.0, Rounding(recorded)))


def _converted(tensor: Tensor, dtype: str, factor: float, rounding: Rounding) -> Array:
    """``tensor`` times ``factor`` in ``dtype``, some rows at a time: they stay in the cache, and wide copies stay small."""
    import numpy as np

    from lorasurgery.deltas.times import times

    shape = (tensor.shape[0], prod(tensor.shape[1:])) if tensor.shape else (1, 1)
    result, way = np.empty(shape, numpy_dtype(dtype)), times(tensor.dtype, dtype, factor)
    for start, block in row_blocks(tensor.reshape(*shape)):
        own = result[start : start + len(block)]
        way.into(block, own)
        rounding.look(start, len(result), block, own, way)
    rounding.tell()
    return result.reshape(tensor.shape)


def row_blocks(tensor: Tensor) -> Iterator[tuple[int, Array]]:
    """(first row, values) of a matrix, about :data:`CHUNK` elements at a time."""
    rows = max(CHUNK // max(tensor.shape[1], 1), 1)
    whole = None if tensor.compute is None else tensor.array()
    for start in range(0, tensor.shape[0], rows):
        stop = min(start + rows, tensor.shape[0])
        yield start, tensor.rows([(start, stop)]).array() if whole is None else whole[start:stop]


def wide(dtype: str) -> str:
    """The dtype to calculate in: float32 holds every 16 and 8 bit value exactly."""
    return "float64" if dtype in ("F32", "F64") else "float32"


CHUNK = 1 << 17
"""Elements converted at a time."""
ROWS = 512
"""Rows that are enough to measure a rounding error by."""


class Rounding:
    """Measures what rounding a tensor costs while it is converted, and tells ``record`` its square and that of the norm.

    ``sketch``, a matrix M (columns, m) made when needed, measures x as ||x M||^2: the effect on a product x D instead of
    on one factor, see :func:`sketch_of`. Of many rows, 512 evenly spread ones stand for all. Nothing is told when nothing
    was rounded, which is decided by every value.
    """

    def __init__(self, record: Record | None, sketch: Callable[[], Array] | None = None) -> None:
        self._record, self._sketch = record, sketch
        self._happened = False
        self._samples: list[tuple[Array, Array]] = []
        self._step = 1

    def look(self, start: int, total: int, block: Array, result: Array, way: Times) -> None:
        """Rows from ``start`` of ``total``: before they were multiplied, and as they are stored."""
        if self._record is None:
            return
        self._step = max(total // ROWS, 1)
        first = -start % self._step
        sample = way.exact(block[first :: self._step])
        off = result[first :: self._step].astype(sample.dtype) - sample
        self._samples.append((sample, off))
        self._happened = self._happened or bool(off.any()) or not way.is_exact(block, result)

    def tell(self) -> None:
        """All rows have been looked at."""
        if self._record is None or not self._happened:
            return
        import numpy as np

        whole, off = (np.concatenate(side) for side in zip(*self._samples, strict=True))
        if self._sketch is not None:
            matrix = self._sketch()
            whole, off = whole @ matrix, off @ matrix
        self._record(float((off * off).sum()) * self._step, float((whole * whole).sum()) * self._step)


EXACTLY, PROBES = 16, 8
"""Up to this rank a product is measured exactly, above it with so many random vectors."""


def sketch_of(down: Tensor) -> Array:
    """M (rank, m) with ||x M||^2 = ||x down||^2: exact up to rank 16, else estimated with 8 random vectors of signs.

    ``down``: (rank, in), read some rows at a time. The estimate is Hutchinson's, unbiased, with the same vectors every
    time; of two norms taken with it the ratio is good to a few percent.
    """
    import numpy as np

    if down.shape[0] <= EXACTLY:
        rows = down.array().astype(wide(down.dtype))
        values, vectors = np.linalg.eigh(rows @ rows.T)
        exact: Array = vectors * np.sqrt(np.maximum(values, 0.0))
        return exact
    dtype = wide(down.dtype)
    return np.concatenate([block.astype(dtype) @ signs(down.shape[1], dtype) for _, block in row_blocks(down)])


@lru_cache(maxsize=8)
def signs(size: int, dtype: str) -> Array:
    """(size, 8) random signs over sqrt(8)."""
    import numpy as np

    signs = np.random.default_rng(0).integers(0, 2, (size, PROBES), dtype=np.int8).astype(dtype)
    scaled: Array = (signs - 0.5) * (2.0 / PROBES**0.5)
    return scaled


def once(record: Record | None) -> Record | None:
    """``record``, deaf after its first call: a tensor may be computed more than once."""
    if record is None:
        return None
    called: list[bool] = []

    def first(error: float, norm: float) -> None:
        if not called:
            called.append(True)
            record(error, norm)

    return first


def factor_records(record: Record | None, factors: Sequence[Tensor]) -> Record | None:
    """For a delta that is a product of several rounded factors: its squared relative error is the sum of theirs.

    To first order, for independent roundings. The norm reported is the product of the factors' squared norms.
    """
    if record is None:
        return None
    norms: list[float] = []

    def own(error: float, norm: float) -> None:
        if not norms:
            norms.append(prod(float((tensor.f64() ** 2).sum()) for tensor in factors))
        if norm > 0.0:
            record(error / norm * norms[0], norms[0])

    return own


def block_columns(tensors: Sequence[tuple[Tensor | None, int, int]], dtype: str) -> Tensor:
    """Blocks on the diagonal: for each (tensor, rows, columns), ``tensor`` (or zeros for None) at its own rows and columns."""
    height, width = sum(rows for _, rows, _ in tensors), sum(columns for _, _, columns in tensors)

    def place() -> Float64:
        import numpy as np

        whole = np.zeros((height, width), numpy_dtype(dtype))
        top = left = 0
        for tensor, rows, columns in tensors:
            if tensor is not None:
                whole[top : top + rows, left : left + columns] = tensor.array().reshape(rows, columns)
            top, left = top + rows, left + columns
        return whole

    return computed(dtype, (height, width), place)
