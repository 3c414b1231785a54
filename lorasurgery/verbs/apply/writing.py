"""The files of the new model: changed ones written by several threads or processes, all others copied."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from threading import Lock
from typing import TYPE_CHECKING

from lorasurgery.interrupts import held
from lorasurgery.io.sources import FileSource, Region
from lorasurgery.io.writer import copy_region, replacing, write_all
from lorasurgery.linalg.threads import one_blas_thread
from lorasurgery.verbs.apply.forks import Forks, Turn
from lorasurgery.verbs.apply.output import Output, copy_rest, skeleton
from lorasurgery.verbs.apply.produce import Stopped, needs_much

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from lorasurgery.models import Model, ModelFile
    from lorasurgery.operations.onto.plan import Change, Plan
    from lorasurgery.verbs.apply.produce import Producer
    from lorasurgery.verbs.apply.tally import Tally

    Tell = Callable[[int], None]

WORTH = 64 << 20
"""Bytes that change from which on processes are forked: that takes some milliseconds."""


class Writing:
    """Writes every file of a model; ``progress`` is told (bytes done, bytes in all), from any thread."""

    def __init__(self, model: Model, plan: Plan, producer: Producer, workers: int, *, fork: bool = False) -> None:
        self.model, self.producer, self.workers, self.fork = model, producer, workers, fork
        self.changes: dict[Path, dict[str, Change]] = {}
        for change in plan.changes.values():
            self.changes.setdefault(change.weight.file.path, {})[change.weight.key] = change
        self.total = sum(file.path.stat().st_size for file in model.files)
        self.total += sum(change.nbytes - change.weight.tensor.nbytes for change in plan.changes.values())
        self._progress: Callable[[int, int], None] = lambda _done, _total: None
        self._done, self._lock = 0, Lock()

    def told(self, progress: Callable[[int, int], None] | None) -> Writing:
        """Itself, telling how far it is."""
        self._progress = progress or self._progress
        return self

    def every_change(self) -> Iterator[Change]:
        """The changes of all files."""
        for own in self.changes.values():
            yield from own.values()

    def _count(self, size: int) -> None:
        """Tell the progress; raises Stopped when a worker failed."""
        with self._lock:
            self._done += size
            self._progress(min(self._done, self.total), self.total)
        if self.producer.stop.is_set():
            raise Stopped

    def file(self, file: ModelFile, out: Path, metadata: Mapping[str, str]) -> list[Tally]:
        """One file; without a change it is copied whole. ``metadata`` is what a changed one gets."""
        changes = self.changes.get(file.path, {})
        with replacing(out) as fd:
            if not changes:
                source = FileSource(file.path)
                copy_region(fd, Region(source, 0, source.size()))
                self._count(source.size())
                return []
            wider = {key: own.shape for key, own in changes.items() if own.shape != own.weight.shape}
            head, offsets = skeleton(file.raw, metadata, wider)
            write_all(fd, head)
            with one_blas_thread(), self.producer.tools.running(), ExitStack() as ends:
                output = Output(fd)
                work = self._work(list(changes.values()), output, fd, offsets, ends)
                pool = ends.enter_context(ThreadPoolExecutor(self.workers))
                try:
                    with held():
                        futures = [pool.submit(work, number) for number in range(len(changes))]
                    with suppress(Stopped):
                        copy_rest(file.raw, output, offsets, _owned(changes.values()), self._count)
                    return _results(futures)
                except BaseException as error:
                    self.producer.stop.set()
                    pool.shutdown(wait=True, cancel_futures=True)
                    if isinstance(error, OSError) and error.filename is None:  # a full disk, say
                        error.filename = str(out)
                    raise

    def _work(
        self, changes: Sequence[Change], here: Output, fd: int, offsets: Mapping[str, int], ends: ExitStack
    ) -> Callable[[int], Tally]:
        """A thread's work: to make the change of a number, or to have a forked process make it."""
        forks = None
        if self.fork and self.workers > 1 and sum(own.nbytes for own in changes) >= WORTH:
            with closing(Turn()) as turn:
                there = Output(fd, turn)
                forks = Forks(lambda number, tell: self._change(changes[number], there, offsets, tell), self.workers)
                ends.enter_context(forks)

        def work(number: int) -> Tally:
            self._count(0)
            try:
                if forks is None or needs_much(changes[number]):
                    return self._change(changes[number], here, offsets, self._count)
                return forks.call(number, self._count)
            except BaseException:
                self.producer.stop.set()
                raise

        return work

    def _change(self, change: Change, output: Output, offsets: Mapping[str, int], tell: Tell) -> Tally:
        row = change.nbytes // max(change.shape[0], 1)
        start = offsets[change.weight.key]

        def put(first: int, data: NDArray[np.generic]) -> None:
            output.write(data.view("u1").data, start + first * row)
            tell(data.nbytes)

        def put_scale(data: bytes) -> None:
            output.write(data, offsets[scale_key(change)])

        return self.producer.make(change, put, put_scale)


def _results(futures: Sequence[Future[Tally]]) -> list[Tally]:
    """What the workers return; raises the first error that is not the echo of another one's."""
    errors = [error for future in futures if (error := future.exception()) is not None]
    real = next((error for error in errors if not isinstance(error, Stopped)), None)
    if real is not None:
        raise real
    return [future.result() for future in futures]


def _owned(changes: Iterable[Change]) -> set[str]:
    """The keys whose bytes the workers write: changed tensors and their scales."""
    own: set[str] = set()
    for change in changes:
        own.add(change.weight.key)
        if change.weight.scale is not None:
            own.add(scale_key(change))
    return own


def scale_key(change: Change) -> str:
    """The key of an fp8 weight's scale."""
    scale = change.weight.scale
    return next(key for key, tensor in change.weight.file.raw.tensors.items() if tensor is scale)
