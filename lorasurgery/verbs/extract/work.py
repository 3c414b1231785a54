"""What is done with every pair, and the order of it: read, decompose and keep overlap, with few matrices in memory."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import NoRoomError
from lorasurgery.interrupts import held
from lorasurgery.linalg.threads import one_blas_thread
from lorasurgery.operations.cut.survey import named_rank, rank_asked
from lorasurgery.verbs.extract.change import WIDE, change_of, stored
from lorasurgery.verbs.extract.decompose import Wanted, decomposed
from lorasurgery.verbs.extract.families import fitted
from lorasurgery.verbs.extract.options import FACTORED
from lorasurgery.verbs.extract.parameters import bare_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from lorasurgery.linalg.factors import AnyArray
    from lorasurgery.verbs.extract.change import Change
    from lorasurgery.verbs.extract.decompose import Found
    from lorasurgery.verbs.extract.options import ExtractOptions
    from lorasurgery.verbs.extract.pair import Pair

BATCH_BYTES = 128 << 20
"""Matrices of one shape that a GPU decomposes together have at most so many bytes; the work needs a few times that."""
GPU_JOBS = 4
"""Batches at a time on each GPU: while one is multiplied there, the small problems of the others are solved on the CPU."""
MEMORY = 1 << 30
"""About as much for the matrices in flight, unless one alone is larger."""
MOST_JOBS = 8
READERS = 8
"""Threads that read for GPUs, at most one a core: a thread reads and subtracts more slowly than a GPU decomposes."""


@dataclass(frozen=True, slots=True)
class Done:
    """A finished pair, for the store."""

    id: str
    numbers: Mapping[str, Any]
    arrays: Mapping[str, AnyArray]


@dataclass(frozen=True, slots=True)
class Unit:
    """Pairs that are decomposed together: one, or several of one shape and rank on a GPU."""

    pairs: tuple[Pair, ...]
    wanted: Wanted
    device: str


@dataclass(frozen=True, slots=True)
class _Running:
    """A unit that is worked on."""

    unit: Unit
    loading: Future[list[Change]]
    future: Future[list[Done]]


def wanted_of(pair: Pair, options: ExtractOptions) -> Wanted:
    """The rank that the options name for a matrix; sd-scripts' is at most the number of its rows and of its channels."""
    module = bare_module(pair.site, pair.name)
    rank = rank_asked(module, pair.kind, options.cut)
    if options.as_sd_scripts and rank is not None:
        rank = min(rank, *pair.shape[:2])
    return Wanted(rank, options.cut.is_fixed or named_rank(module, options.cut))


def needs_factors(pair: Pair, options: ExtractOptions) -> bool:
    """Whether a pair is a matrix to be decomposed."""
    return not pair.reason and not pair.is_vector and options.family != "full"


def units_of(pairs: Sequence[Pair], options: ExtractOptions) -> Iterator[Unit]:
    """All pairs in the order of the target's names; equal shapes together on a GPU, always in the same way."""
    waiting: dict[tuple[Any, ...], list[Pair]] = {}
    devices, at = options.devices, 0

    def unit(own: Sequence[Pair]) -> Unit:
        nonlocal at
        at += 1
        return Unit(tuple(own), wanted_of(own[0], options), devices[at % len(devices)])

    for pair in pairs:
        if not _on_gpus(options) or options.tucker or options.dora or not needs_factors(pair, options):
            if pair.kind in ("linear", "conv", "1x1"):
                yield unit([pair])
            else:
                yield Unit((pair,), Wanted(None, fixed=True), "cpu")
            continue
        key = (pair.shape, pair.base.dtype, pair.tuned.dtype, wanted_of(pair, options))
        own = waiting.setdefault(key, [])
        own.append(pair)
        wide = {stored(pair.base), stored(pair.tuned)} <= WIDE
        if (len(own) + 1) * _bytes(pair) * (1 + wide) > BATCH_BYTES:
            yield unit(waiting.pop(key))
    yield from (unit(own) for own in waiting.values())


def _bytes(pair: Pair) -> int:
    return 4 * prod(pair.shape)


def jobs_of(pairs: Sequence[Pair], options: ExtractOptions) -> int:
    """How many units are worked on at a time."""
    if options.jobs is not None:
        return options.jobs
    cores, places = os.cpu_count() or 1, len(options.devices)
    if _on_gpus(options):
        return max(min(GPU_JOBS * places, cores), places)
    if options.family in FACTORED and not options.devices[0].startswith("cpu"):
        return places
    largest = max((_bytes(p) for p in pairs if needs_factors(p, options)), default=1)
    return max(min(cores, MOST_JOBS, MEMORY // (3 * largest)), 1)


def _on_gpus(options: ExtractOptions) -> bool:
    """Whether CUDA devices decompose; the other families' arithmetic is the CPU's."""
    return options.family in FACTORED and options.devices[0].startswith("cuda")


def run(units: Sequence[Unit], options: ExtractOptions, jobs: int, keep: Callable[[Unit, list[Done]], None]) -> None:
    """Work on every unit; ``keep`` is called with each in their order, on this thread.

    One thread reads ahead while ``jobs`` decompose, more for a GPU. The first error ends the work and is raised here; a unit
    that a device had no room for is tried once more when the others are finished.
    """
    running: deque[_Running] = deque()
    ahead = min(READERS, os.cpu_count() or 1) if _on_gpus(options) else 1
    readers, workers = ThreadPoolExecutor(ahead), ThreadPoolExecutor(jobs)
    try:
        with _threads(options, jobs):
            for unit in units:
                while len(running) >= jobs + ahead:
                    _drain(running, keep, options)
                with held():
                    loading = readers.submit(_load, unit, options)
                    running.append(_Running(unit, loading, workers.submit(_finish, unit, loading, options)))
            while running:
                _drain(running, keep, options)
    finally:
        readers.shutdown(wait=True, cancel_futures=True)
        workers.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _threads(options: ExtractOptions, jobs: int) -> Iterator[None]:
    """Threads inside torch's operations, so that all jobs together use every core, and float32 products that are float32."""
    if options.family not in FACTORED:
        with one_blas_thread():
            yield
        return
    from lorasurgery.linalg.dense import full_precision, torch_threads

    with full_precision(), torch_threads(max((os.cpu_count() or 1) // jobs, 1)):
        yield


def _drain(running: deque[_Running], keep: Callable[[Unit, list[Done]], None], options: ExtractOptions) -> None:
    own = running.popleft()
    try:
        done = own.future.result()
    except NoRoomError:
        done = None
    if done is None:
        wait([other.future for other in running])
        done = _alone(own, options)
    keep(own.unit, done)


def _alone(own: _Running, options: ExtractOptions) -> list[Done]:
    """Again, with nothing else on the device; raises NoRoomError that names the module."""
    try:
        return _finish(own.unit, own.loading, options)
    except NoRoomError as error:
        raise NoRoomError(f"{own.unit.pairs[0].name}: {error.message}", hint=error.hint) from error


def _load(unit: Unit, options: ExtractOptions) -> list[Change]:
    first = unit.pairs[0]
    wants = not first.reason and (first.is_vector or options.family != "full")
    return [change_of(pair, keep=wants, keep_base=wants and options.dora and not first.is_vector) for pair in unit.pairs]


def _finish(unit: Unit, loading: Future[list[Change]], options: ExtractOptions) -> list[Done]:
    changes = loading.result()
    changed = [c.squared > 0.0 and c.largest > options.min_diff for c in changes]
    first = unit.pairs[0]
    if first.is_vector and not first.reason:
        return [_vector(p, c) if new else _plain(p, c) for p, c, new in zip(unit.pairs, changes, changed, strict=True)]
    if not needs_factors(first, options):
        return [_plain(p, c) for p, c in zip(unit.pairs, changes, strict=True)]
    if options.family not in FACTORED or options.dora or (options.tucker and first.kind == "conv"):
        return [
            _fitted(p, c, unit, options) if new else _plain(p, c)
            for p, c, new in zip(unit.pairs, changes, changed, strict=True)
        ]
    matrices = [c.delta for c, new in zip(changes, changed, strict=True) if new and c.delta is not None]
    found = iter(decomposed(matrices, unit.wanted, options, unit.device) if matrices else ())
    return [
        _factored(p, c, next(found)) if new else _plain(p, c) for p, c, new in zip(unit.pairs, changes, changed, strict=True)
    ]


def _numbers(change: Change) -> dict[str, Any]:
    found = {"squared": change.squared, "base_squared": change.base_squared, "largest": change.largest}
    return found | {"broken": True} if change.broken else found


def _plain(pair: Pair, change: Change) -> Done:
    """Only measured."""
    return Done(pair.id, _numbers(change), {})


def _vector(pair: Pair, change: Change) -> Done:
    assert change.delta is not None  # noqa: S101  it was asked for
    return Done(pair.id, _numbers(change), {"diff": change.delta.reshape(pair.shape)})


def _factored(pair: Pair, change: Change, found: Found) -> Done:
    numbers = _numbers(change) | {"residual": found.residual}
    if found.clamp is not None:
        numbers |= {"clamp": found.clamp, "clamped_error": found.clamped_error}
    return Done(pair.id, numbers, {"u": found.u, "v": found.v, "values": found.values})


def _fitted(pair: Pair, change: Change, unit: Unit, options: ExtractOptions) -> Done:
    """Another family than a plain LoRA."""
    error, arrays = fitted(pair, change, unit.wanted.rank, options, unit.device)
    return Done(pair.id, _numbers(change) | {"error": error}, arrays)
