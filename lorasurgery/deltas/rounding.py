"""Numbers folded into a factor and rounded once, and what that costs the change.

One mechanism for every verb: whether anything was rounded is decided by every value, how much it costs is measured on all
values of small tensors and on some rows of large ones, and on all rows where those do not speak for the rest. ``record``
hears of a rounding exactly when a stored value that the change depends on is not the number it stands for, and then never
of an error of zero.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from lorasurgery.deltas.effect import Effect
from lorasurgery.deltas.sampling import LEAST, blocks_of, sampled, unit
from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.io.tensors import computed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import ByRows
    from lorasurgery.deltas.effect import Felt
    from lorasurgery.deltas.times import Times
    from lorasurgery.io.tensors import Array, Float64, Tensor

Changed = TypeVar("Changed", bound="ByRows")
COMPUTED = 2.0**-106
"""The squared relative error that numbers have which were computed anew in float64, by a decomposition say."""


def multiplied(tensor: Tensor, factor: float, record: Record | None = None, effect: Callable[[], Felt] | None = None) -> Tensor:
    """``tensor`` times ``factor``, computed in float32 (float64 for F32 and F64 tensors) and rounded once to its dtype.

    ``record`` gets the squared rounding error and the squared norm of the product when it is first computed; ``effect``,
    made when it is needed, is what a change of this tensor does to the weight.
    """
    return tensor if factor == 1.0 else _converted(tensor, factor, tensor.dtype, record, effect)


def rounded(tensor: Tensor, dtype: str, record: Record | None = None, effect: Callable[[], Felt] | None = None) -> Tensor:
    """``tensor`` in ``dtype``; ``record`` and ``effect`` as in :func:`multiplied`."""
    return tensor if dtype == tensor.dtype else _converted(tensor, 1.0, dtype, record, effect)


def watched(old: Changed, new: Changed, tell: Callable[[Changed], None]) -> Changed:
    """``new``, of which some tensors are others than ``old``'s; ``tell(new)`` is called once, when one of them is computed."""
    slot = next((slot for slot, tensor in new.tensors.items() if tensor is not old.tensors[slot]), None)
    if slot is None:
        return new
    tensor = new.tensors[slot]
    called: list[bool] = []

    def values() -> Array:
        if not called:
            called.append(True)
            tell(new)
        return tensor.array()

    return replace(new, **{slot: computed(tensor.dtype, tensor.shape, values)})  # type: ignore[type-var]  # a dataclass


def told_by_rows(old: Changed, new: Changed, factor: float, record: Record | None) -> Changed:
    """``new``, which should be ``factor`` times ``old``, in those tensors that are others; ``record`` hears what it is not.

    Judged by rows of both, where any number is not what it should be.
    """
    from lorasurgery.deltas.by_rows import distance
    from lorasurgery.deltas.times import same

    if record is None:
        return new

    def tell(made: Changed) -> None:
        pairs = [(was, made.tensors[slot]) for slot, was in old.tensors.items() if made.tensors[slot] is not was]
        if all(same(own.f64(), was.f64() * factor).all() for was, own in pairs):
            return
        error, norm = distance(old, made, factor)
        if error > 0.0:
            record(error, norm)

    return watched(old, new, tell)


def _converted(tensor: Tensor, factor: float, dtype: str, record: Record | None, effect: Callable[[], Felt] | None) -> Tensor:
    recorded = once(record)
    shape = (tensor.shape[0], prod(tensor.shape[1:])) if tensor.shape else (1, 1)
    part = tensor.reshape(*shape), factor
    return computed(dtype, tensor.shape, lambda: beside([part], dtype, recorded, effect).reshape(tensor.shape))


def beside(
    parts: Sequence[tuple[Tensor, float]], dtype: str, record: Record | None, effect: Callable[[], Felt] | None = None
) -> Array:
    """Matrices (rows, columns_i), each times its factor, beside each other in ``dtype``; ``record`` hears of the rounding.

    Some rows at a time: they stay in the cache, and wide copies stay small.
    """
    import numpy as np

    from lorasurgery.deltas.times import times

    edges = np.cumsum([0, *(tensor.shape[1] for tensor, _ in parts)])
    columns = [slice(int(first), int(last)) for first, last in pairwise(edges)]
    made = [_Part(times(tensor.dtype, dtype, factor), own) for (tensor, factor), own in zip(parts, columns, strict=True)]
    tensors = [_at_hand(tensor) for tensor, _ in parts]
    result = np.empty((tensors[0].shape[0], int(edges[-1])), numpy_dtype(dtype))
    rounding = None if record is None else _Rounding(made, result, effect)
    for start, blocks in blocks_of(tensors):
        for (way, own), block in zip(made, blocks, strict=True):
            way.into(block, result[start : start + len(block), own])
        if rounding is not None:
            rounding.look(start, blocks)
    if record is not None and rounding is not None and rounding.felt:
        record(*rounding.measured(lambda: blocks_of(tensors)))
    return result


def _at_hand(tensor: Tensor) -> Tensor:
    """What is computed is computed once: the whole, of which rows are taken then."""
    if tensor.compute is None:
        return tensor
    array = tensor.array()
    return computed(tensor.dtype, tensor.shape, lambda: array)


class _Part(NamedTuple):
    """Columns of a result and how they are made."""

    way: Times
    columns: slice


class _Rounding:
    """Looks at a matrix while it is written: whether a value was rounded that is felt, and what that costs the weight."""

    def __init__(self, parts: Sequence[_Part], result: Array, effect: Callable[[], Felt] | None) -> None:
        self._parts, self._result, self._make = parts, result, effect
        self._rows = sampled(*result.shape)
        self._samples: list[tuple[Float64, Float64]] = []
        self.felt = False

    @cached_property
    def _effect(self) -> Felt:
        return Effect() if self._make is None else self._make()

    def look(self, start: int, blocks: Sequence[Array]) -> None:
        """Rows from ``start`` of every part, as they were before they were multiplied."""
        import numpy as np

        rows = np.arange(start, start + len(blocks[0]))
        own = self._rows[slice(*np.searchsorted(self._rows, (rows[0], rows[-1] + 1)))]
        if own.size:
            self._samples.append(self._off([block[own - start] for block in blocks], own))
        if not self.felt:
            result = self._result[start : start + len(rows)]
            kept = [way.kept(block, result[:, own]) for (way, own), block in zip(self._parts, blocks, strict=True)]
            if not all(own.all() for own in kept):
                self.felt = self._effect.felt(~np.hstack(kept), rows)

    def measured(self, again: Callable[[], Iterator[tuple[int, list[Array]]]]) -> tuple[float, float]:
        """(squared error, squared norm) of the weight, when all rows have been looked at; ``again`` gives them once more."""
        import numpy as np

        off, true = (np.concatenate(side) for side in zip(*self._samples, strict=True))
        error, norm = self._effect.squared(off, self._rows), self._effect.squared(true, self._rows)
        whole = len(self._result) / len(self._rows)
        if whole == 1.0 or error > (unit(self._result.dtype) / LEAST) ** 2 * norm:
            return error * whole, norm * whole
        error = norm = 0.0
        for start, blocks in again():
            rows = np.arange(start, start + len(blocks[0]))
            off, true = self._off(blocks, rows)
            error, norm = error + self._effect.squared(off, rows), norm + self._effect.squared(true, rows)
        return error, norm

    def _off(self, blocks: Sequence[Array], rows: Array) -> tuple[Float64, Float64]:
        """What rounding took from these rows, and what they stand for."""
        import numpy as np

        trues = [way.true(block) for (way, _), block in zip(self._parts, blocks, strict=True)]
        true = trues[0] if len(trues) == 1 else np.hstack(trues)
        with np.errstate(invalid="ignore"):
            return self._result[rows].astype(np.float64) - true, true


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
