"""The new values of one tensor, some rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.architectures.table import Span
from lorasurgery.deltas.base import CannotError
from lorasurgery.errors import BrokenModuleError, NotRepresentableError
from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.operations.onto.numbers import work_dtype
from lorasurgery.operations.onto.step import Step, chunks, parts
from lorasurgery.operations.onto.steps import is_local, step_of
from lorasurgery.verbs.apply.match import runs_between

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from lorasurgery.models import Model
    from lorasurgery.operations.onto.options import ApplyOptions
    from lorasurgery.operations.onto.plan import Change, Placed, Plan, Run
    from lorasurgery.operations.onto.tools import Tools

    Work = NDArray[Any]


class Fresh:
    """Rows of a tensor with every change made, in the precision that it calculates in.

    The factors are read when it is made, and forgotten with it. Raises NotRepresentableError where a module cannot be
    applied, or not be taken out again.
    """

    def __init__(self, model: Model, plan: Plan, change: Change, options: ApplyOptions, tools: Tools) -> None:
        self.weight, self._change, self._tools = change.weight, change, tools
        self.rows, *kernel = change.shape
        self.columns = int(np.prod(kernel, dtype=np.int64))
        self._stored = int(np.prod(change.weight.shape[1:], dtype=np.int64))
        self.work = work_dtype(change.weight.tensor.dtype)
        placed = in_order(change.placed, undo=options.unapply)
        self._steps: list[tuple[Step, tuple[Run, ...]]] = []
        self._whole: Work | None = None
        self._read, self._held = bytearray(), np.empty(0, self.work)
        if all(is_local(own) for own in placed):
            self._steps = [(self._step(own, options), own.runs) for own in placed]
        else:
            self._whole = self._together(model, plan, options)
        self.chunks, self.parts = chunks(self.rows, self.columns), [slice(0, self.columns)]
        """(start, stop) of the rows that are read together, and the columns of them that are changed together."""
        if self.in_place and self._steps and all(step.part is not None for step, _ in self._steps):
            self.chunks, self.parts = parts(self.rows, self.columns)

    @property
    def in_place(self) -> bool:
        """Whether new values can be stored where :meth:`read` has put the old ones."""
        return self.weight.scale is None and self._stored == self.columns

    def _step(self, placed: Placed, options: ApplyOptions) -> Step:
        width = self._change.width(placed)
        step = made_step(placed, width, self.work, options, self._tools)
        return step if width == self.columns else Step(step.local, lambda block, at: step.change(block[:, :width], at))

    def old(self, start: int, stop: int) -> Work:
        """Rows as they are, (rows, columns). The array is used again by the next call."""
        return self.values(self.read(start, stop), slice(0, self._stored))

    def read(self, start: int, stop: int) -> Work:
        """Rows as they are stored; of scaled fp8 what they stand for. The array is used again by the next call."""
        tensor, shape = self.weight.tensor, (stop - start, self._stored)
        if self.weight.scale is not None:
            return self.weight.rows(start, stop)
        if len(tensor.regions) != 1:
            return np.array(tensor.rows([(start, stop)]).array()).reshape(shape)
        region, row = tensor.regions[0], tensor.nbytes // self.rows
        size = (stop - start) * row
        if len(self._read) < size:
            self._read = bytearray(size)
        region.source.read_into(region.offset + start * row, memoryview(self._read)[:size])
        return np.frombuffer(self._read, numpy_dtype(tensor.dtype), shape[0] * shape[1]).reshape(shape)

    def values(self, read: Work, part: slice) -> Work:
        """Some columns of what :meth:`read` has read, to calculate with. The array is used again by the next call."""
        own = read[:, part]
        if self.weight.scale is not None:
            return self._padded(own.astype(self.work, copy=False))
        if self._held.size < own.size:
            self._held = np.empty(own.size, self.work)
        block = self._held[: own.size].reshape(own.shape)
        self._tools.decode(own, self.weight.tensor.dtype, block)
        return self._padded(block)

    def _padded(self, block: Work) -> Work:
        """Rows with the columns that the weight gets, zeros."""
        return block if self._stored == self.columns else np.pad(block, ((0, 0), (0, self.columns - self._stored)))

    def new(self, start: int, stop: int, block: Work | None = None, column: int | None = None) -> Work:
        """Rows as they become; ``block``, their old values, is changed in place where it is given.

        With ``column``, ``block`` is a part of them from that column on; see :attr:`parts`.
        """
        if self._whole is not None:
            return self._whole[start:stop]
        if block is None:
            block = self.old(start, stop)
        for step, runs in self._steps:
            for run in runs:
                low, high = max(start, run.at), min(stop, run.at + run.length)
                if low < high:
                    own, row = block[low - start : high - start], run.first + low - run.at
                    if column is not None and step.part is not None:
                        step.part(own, row, column)
                    else:
                        step.change(own, row)
        return block

    def _together(self, model: Model, plan: Plan, options: ApplyOptions) -> Work:
        """All rows of the original weights that this tensor has rows of, changed, and then this tensor's own."""
        place = self.weight.place
        assert place is not None  # noqa: S101  it was matched by it
        names = dict.fromkeys(span.weight for span in place.spans)
        spans = tuple(Span(name, 0, height_of(model, place.component, name)) for name in names)
        reader = model.reader(place.component, spans)
        field = np.empty((reader.shape[0], self.columns), self.work)
        for low, high in chunks(*field.shape):
            field[low:high] = self._padded(reader.rows(low, high))
        for placed in in_order(of_weights(plan, place.component, names), undo=options.unapply):
            step = self._step(placed, options)
            _change(field, step, runs_between(spans, placed.module.site.spans))
        runs = runs_between(place.spans, spans)
        if len(runs) == 1:
            return field[runs[0].first : runs[0].first + runs[0].length]
        return np.concatenate([field[run.first : run.first + run.length] for run in runs])


def in_order(placed: Iterable[Placed], *, undo: bool) -> list[Placed]:
    """The order in which modules act; taken out, the last one goes first."""
    found = list(placed)
    return found[::-1] if undo else found


def made_step(placed: Placed, columns: int, work: str, options: ApplyOptions, tools: Tools) -> Step:
    """The step of a module; raises NotRepresentableError with the reason where there is none."""
    try:
        return step_of(placed, columns, work, options, tools)
    except CannotError as reason:
        done = "taken out" if options.unapply else "applied"
        raise NotRepresentableError(
            f"{placed.module.name} cannot be {done}: {reason.message}", module=placed.module.name, path=placed.source.path,
            hint="the model as it was before" if options.unapply else f"a weight of 0 for it: FILE:1:re={placed.module.name}=0",
        ) from reason  # fmt: skip


def of_weights(plan: Plan, component: str, names: Iterable[str]) -> Iterator[Placed]:
    """What happens to any row of some original weights, each module once, in order."""
    wanted, seen = set(names), set()
    found: list[Placed] = []
    for change in plan.changes.values():
        place = change.weight.place
        if place is None or place.component != component or not wanted & {span.weight for span in place.spans}:
            continue
        for own in change.placed:
            if not own.bias and (key := (id(own.source), id(own.module))) not in seen:
                seen.add(key)
                found.append(own)
    order = {id(source): i for i, source in enumerate(plan.order)}
    yield from sorted(found, key=lambda own: order[id(own.source)])


def _change(field: Work, step: Step, runs: Sequence[Run]) -> None:
    """Let a step change its rows of ``field`` in place, all at once when it is not local."""
    if step.local:
        for run in runs:
            for low, high in chunks(run.length, field.shape[1]):
                step.change(field[run.at + low : run.at + high], run.first + low)
        return
    if len(runs) == 1:
        step.change(field[runs[0].at : runs[0].at + runs[0].length], 0)
        return
    ordered = sorted(runs, key=lambda run: run.first)
    own = np.concatenate([field[run.at : run.at + run.length] for run in ordered])
    step.change(own, 0)
    for run in ordered:
        field[run.at : run.at + run.length] = own[run.first : run.first + run.length]


def height_of(model: Model, component: str, name: str) -> int:
    """Rows of an original weight that the model has, from the first one on."""
    ends = [
        span.stop
        for weight in model.weights.values()
        if weight.place is not None and weight.place.component == component and weight.role != "bias"
        for span in weight.place.spans
        if span.weight == name
    ]
    if not ends:
        raise BrokenModuleError(f"the model has no {name}", key=name)
    return max(ends)
