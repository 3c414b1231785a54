"""Compare two adapters: pair their rows, measure every pair, and say what it comes to."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Opaque
from lorasurgery.errors import RequestError
from lorasurgery.io.tensors import same_values
from lorasurgery.layouts.module import TOP_LEVEL
from lorasurgery.linalg.threads import map_threads
from lorasurgery.operations.effect.forms import measure_sides, norm_of
from lorasurgery.operations.effect.pairs import Pair, only_second, pairs_of
from lorasurgery.operations.effect.products import Measured
from lorasurgery.verbs.compare.report import (
    DIFFERENT,
    IDENTICAL,
    ONLY_A,
    ONLY_B,
    SAME,
    TOLERANCES,
    UNKNOWN,
    Comparison,
    Half,
    ModulePair,
)
from lorasurgery.verbs.compare.vectors import beside, measure_opaque

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.io.tensors import Tensor

    Effect = Callable[[Pair], Measured | None]


"""What a table made of a file's own names is called."""


class CompareOptions(NamedTuple):
    """How to compare."""

    tolerance: float | None = None
    """The largest distance that counts as the same; None: by the dtypes of each pair of modules, see ``TOLERANCES``."""
    workers: int | None = None
    """Threads; None: one for each core, at most 8."""

    def check(self) -> None:
        """Raises RequestError for values out of range."""
        if self.tolerance is not None and not 0.0 <= self.tolerance < 1.0:
            raise RequestError(f"the tolerance must be at least 0 and below 1, not {self.tolerance}", hint="1e-3")
        if self.workers is not None and self.workers < 1:
            raise RequestError(f"workers must be at least 1, not {self.workers}")


def compare(a: Adapter, b: Adapter, options: CompareOptions | None = None, effect: Effect | None = None) -> Comparison:
    """Whether two adapters do the same, module by module, across layouts, families, granularities, dtypes and alphas.

    ``effect`` measures the pairs whose change depends on the base model (see ``effect_of``); without it DoRA modules are
    compared by what they are made of, and families that multiply the base weight tensor by tensor.
    Raises RequestError for options, BrokenModuleError for a file with two modules for one row.
    """
    started = time.perf_counter()
    options = options or CompareOptions()
    options.check()
    found = Comparison(models=(a.architecture.key, b.architecture.key), warnings=_warnings(a, b))
    if a.architecture.id == b.architecture.id:
        found.models = (a.architecture.key, a.architecture.key)
        workers = options.workers or min(os.cpu_count() or 1, 8)
        found.pairs = map_threads(lambda pair: _compared(pair, options, effect), pairs_of(a, b), workers)
        found.leftovers = _leftovers(a, b), _leftovers(b, a)
    found.seconds = time.perf_counter() - started
    return found


def _compared(pair: Pair, options: CompareOptions, effect: Effect | None) -> ModulePair:
    first, second = (None if side is None else _half(side.module) for side in (pair.a, pair.b))
    dtypes = {dtype for half in (first, second) if half is not None for dtype in half.dtype.split("+")}
    tolerance = max((TOLERANCES.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    tolerance = tolerance if options.tolerance is None else options.tolerance
    part = any(side is not None and side.module.out > pair.size for side in (pair.a, pair.b))
    empty = ModulePair(pair.component, pair.weight, pair.rows, DIFFERENT, first, second, tolerance=tolerance, part=part)
    try:
        with np.errstate(all="ignore"):  # what is not finite is told by module
            measured = None if effect is None else effect(pair)
            found = _measured(pair) if measured is None else measured
            vectors = tuple(beside(pair.a, pair.b, effective=measured is not None))
    except (CannotError, ValueError) as reason:
        return replace(empty, status=UNKNOWN, note=str(reason))
    told = replace(
        empty, distance=found.distance, cosine=found.cosine, norm_a=found.norm_a, norm_b=found.norm_b,
        inner=found.inner, left=found.left, right=found.right, vectors=vectors,
    )  # fmt: skip
    if not all(isfinite(value) for value in (found.norm_a, found.norm_b, told.worst)):
        return replace(empty, status=UNKNOWN, note="it holds NaN or infinity")
    return replace(told, status=_status(told, found))


def _status(told: ModulePair, found: Measured) -> str:
    if told.worst == 0.0 and found.difference == 0.0:
        return IDENTICAL
    if told.worst <= told.tolerance:
        return SAME
    return DIFFERENT if told.a is not None and told.b is not None else ONLY_A if told.b is None else ONLY_B


def _measured(pair: Pair) -> Measured:
    """What the change of the weight is on both sides; a bias alone changes no weight."""
    a, b = (None if side is None or side.module.delta is None else side for side in (pair.a, pair.b))
    if a is not None and b is not None:
        if isinstance(a.module.delta, Opaque) or isinstance(b.module.delta, Opaque):
            return measure_opaque(a, b)
        return measure_sides(a, b)
    if a is None and b is None:
        return Measured(0.0, 0.0, 0.0, 0.0)
    side = a or b
    assert side is not None  # noqa: S101  one of them is there
    norm = measure_opaque(side, side).norm_a if isinstance(side.module.delta, Opaque) else norm_of(side)
    return Measured(norm, 0.0, 0.0, norm) if b is None else Measured(0.0, norm, 0.0, norm)


def _half(module: Module) -> Half:
    delta, magnitude = module.delta, module.magnitude
    tensors: list[Tensor] = [] if delta is None else list(delta.tensors.values())
    tensors += [] if module.bias is None else [module.bias]
    tensors += [] if magnitude is None else [magnitude.tensor]
    dtype = "+".join(sorted({tensor.dtype for tensor in tensors}))
    return Half(module.name, module.family, None if delta is None else delta.rank, module.scale.value, dtype)


def _leftovers(a: Adapter, b: Adapter) -> list[str]:
    """Keys of the first file that no table explains and that the second has not, or has with other bytes."""
    others = {left.key: left.tensor for left in b.leftovers}
    return [
        left.key
        for left in a.leftovers
        if left.key not in TOP_LEVEL and not (left.key in others and same_values(left.tensor, others[left.key]))
    ]


def _warnings(a: Adapter, b: Adapter) -> list[str]:
    found = [f"{name}: {text}" for name, adapter in (("A", a), ("B", b)) for text in adapter.warnings]
    if only_second(a) != only_second(b):
        found.append(
            f"{'A' if only_second(a) else 'B'} is for Wan 2.2's second expert; it is compared with the other's modules"
        )
    return found
