"""One changed tensor: read, changed, rounded, checked and handed on, some rows at a time."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.dtypes import all_finite, numpy_dtype
from lorasurgery.operations.onto.numbers import FORMATS, spacing, surely_finite
from lorasurgery.operations.onto.steps import is_added, is_local
from lorasurgery.operations.onto.tools import tools_for
from lorasurgery.operations.select.blocks import block_and_kind
from lorasurgery.verbs.apply.fresh import Fresh
from lorasurgery.verbs.apply.stored import Stored
from lorasurgery.verbs.apply.tally import Tally, sampled

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from lorasurgery.models import Model
    from lorasurgery.operations.onto.options import ApplyOptions
    from lorasurgery.operations.onto.plan import Change, Plan

    Work = NDArray[Any]
    Put = Callable[[int, Work], None]

BIG = 16 << 20
"""Elements of a weight that has to be changed whole; only one larger than this is in memory at a time."""


class Stopped(Exception):  # noqa: N818  no error: somebody else's is on its way
    """The run is over before this tensor is."""


class Producer:
    """Makes the new bytes of tensors; its calls may run on several threads."""

    def __init__(self, model: Model, plan: Plan, options: ApplyOptions) -> None:
        self._model, self._plan, self._options = model, plan, options
        self.tools = tools_for(plan)
        self._whole = Lock()
        self.stop = Event()

    def make(self, change: Change, put: Put | None, put_scale: Callable[[bytes], None]) -> Tally:
        """Hand every row to ``put`` (first row, rows in the stored dtype), in order; without it look at the sampled ones.

        Raises NotRepresentableError where a module cannot be applied, BrokenModuleError for NaN and infinity.
        """
        held = self._whole if needs_much(change) else nullcontext()
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"), held:
            return self._make(change, put, put_scale)

    def _make(self, change: Change, put: Put | None, put_scale: Callable[[bytes], None]) -> Tally:
        fresh = Fresh(self._model, self._plan, change, self._options, self.tools)
        stored, tally = Stored(change.weight, self._options, self.tools), tally_of(change)
        blocks = fresh.chunks
        if put is None:
            blocks = [(int(row), int(row) + 1) for row in sampled(fresh.rows, 0, fresh.rows)]
        stored.fit((low, self._next(fresh, low, high)) for low, high in blocks)
        for low, high in blocks:
            self._rows(change, fresh, stored, tally, (low, high), put)
        if stored.scales is not None:
            stored.scales.check(change.weight.key, change.weight.file.path)
            tally.scales = stored.scales.changed
            put_scale(stored.scales.tobytes())
        if not tally.norms.change:  # what changes may lie between the rows that were looked at
            tally = replace(tally_of(change), scales=tally.scales)
            for low, high in fresh.chunks:
                self._rows(change, fresh, stored, tally, (low, high), None, every=True)
        tally.done()
        return tally

    def _next(self, fresh: Fresh, low: int, high: int) -> Work:
        if self.stop.is_set():
            raise Stopped
        return fresh.new(low, high)

    def _rows(
        self, change: Change, fresh: Fresh, stored: Stored, tally: Tally, rows: tuple[int, int], put: Put | None,
        *, every: bool = False,
    ) -> None:  # fmt: skip
        if self.stop.is_set():
            raise Stopped
        low, high = rows
        read, looked = fresh.read(low, high), np.arange(low, high) if every else sampled(fresh.rows, low, high)
        data = read if fresh.in_place else np.empty((high - low, fresh.columns), numpy_dtype(stored.dtype))
        before, after = np.empty((2, looked.size, fresh.columns), fresh.work)
        for part in fresh.parts:
            block, out = fresh.values(read, part), data[:, part]
            if looked.size:
                before[:, part] = block[looked - low]
            new = fresh.new(low, high, block, part.start if len(fresh.parts) > 1 else None)
            if looked.size:
                after[:, part] = new[looked - low]
            stored.encode(new, low, part.start, out)
            sure = stored.scales is None and surely_finite(new, stored.dtype)
            if not sure and not all_finite(stored.dtype, np.ascontiguousarray(out).view(np.uint8).data):
                raise blamed(change, fresh, out, (low, part.start))
        if looked.size:
            kept = stored.decode(data[looked - low], looked, fresh.work)
            tally.add(before, after, kept)
            if self._options.unapply:
                spaces = [stored.steps(spacing(_unscaled(stored, v, looked), stored.dtype), looked) for v in (before, kept)]
                tally.expect(*spaces, added=all(is_added(own) for own in change.placed))
        if put is not None:
            put(low, data)


def needs_much(change: Change) -> bool:
    """Whether a tensor of more than :data:`BIG` elements has to be in memory whole."""
    return change.weight.tensor.size > BIG and not all(is_local(own) for own in change.placed)


def _unscaled(stored: Stored, values: Work, rows: NDArray[np.intp]) -> Work:
    if stored.scales is None:
        return values
    return values / stored.scales.times(np.ones_like(values), rows)


def tally_of(change: Change) -> Tally:
    """An empty tally."""
    place = change.weight.place
    assert place is not None  # noqa: S101  it was matched by it
    block, _ = block_and_kind(place.spans[0].weight)
    modules = list(dict.fromkeys(own.module.name for own in change.placed))
    return Tally(change.name, block, place.component, change.weight.shape[0], modules)


def blamed(change: Change, fresh: Fresh, data: Work, first: tuple[int, int]) -> BrokenModuleError:
    """Why stored values, from row and column ``first`` on, hold NaN or infinity: the model's, the adapter's, or too large."""
    at, column = (int(i[0]) + own for i, own in zip(np.nonzero(~np.isfinite(data.astype(np.float64))), first, strict=True))
    key, path = change.weight.key, change.weight.file.path
    modules = ", ".join(dict.fromkeys(f"{own.module.name} of {own.source.path}" for own in change.placed))
    where = f"{key} [{at}, {column}]"
    if not np.isfinite(fresh.old(at, at + 1)[0, column]):
        return BrokenModuleError(
            f"{where} is NaN or infinite in the model", key=key, path=path, hint="download the model again"
        )
    value = float(fresh.new(at, at + 1)[0, column])
    if not np.isfinite(value):
        return BrokenModuleError(
            f"{where} comes out as NaN or infinity: {modules}", key=key, path=path,
            hint="an earlier checkpoint of the training run; lorasurgery inspect shows which modules are broken",
        )  # fmt: skip
    dtype = change.weight.tensor.dtype
    return BrokenModuleError(
        f"{where} would be {value:.4g}, beyond the range of {dtype} ({FORMATS[dtype].largest:.5g}): {modules}", key=key,
        path=path, hint="a smaller weight, or the model in a wider dtype",
    )  # fmt: skip
