"""What two modules do to the base model's weights: ``W' - W``, where their tensors alone do not say it.

A DoRA's change, an OFT's and the other families' that multiply the weight are compared as what ``lorasurgery apply`` adds to
the weight at strength 1, in float64. Everything else needs no base model and is left to the factors.
"""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.full import Opaque
from lorasurgery.operations.onto.inputs import source_of
from lorasurgery.operations.onto.options import ApplyOptions
from lorasurgery.operations.onto.plan import Placed
from lorasurgery.operations.onto.steps import step_of
from lorasurgery.verbs.compare.vectors import measure_arrays

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.linalg.factors import Array
    from lorasurgery.models import Model
    from lorasurgery.operations.effect.pairs import Pair, Side
    from lorasurgery.operations.effect.products import Measured
    from lorasurgery.operations.onto.source import Source


def effect_of(model: Model, a: Adapter, b: Adapter) -> Callable[[Pair], Measured | None]:
    """Measures a pair by its effect on ``model``; None for pairs that need no base model.

    The function raises RequestError when the model lacks the rows, CannotError for a family that cannot be applied. One
    weight is in memory at a time.
    """
    lock, sources = Lock(), (source_of(a), source_of(b))

    def effect(pair: Pair) -> Measured | None:
        sides = (pair.a, pair.b)
        if not any(side is not None and needs_base(side.module) for side in sides):
            return None
        with lock:
            return measure_arrays(*(_change(model, pair, side, own) for side, own in zip(sides, sources, strict=True)))

    return effect


def needs_base(module: Module) -> bool:
    """Whether the change depends on the weight it is made to."""
    return module.magnitude is not None or isinstance(module.delta, Opaque)


def _change(model: Model, pair: Pair, side: Side | None, source: Source) -> Array:
    """The rows of a pair of what one side adds to the weight, (rows, in*k*k); zero where it has no module."""
    if side is None or side.module.delta is None:
        return np.zeros(1)
    module = side.module
    before = np.asarray(model.reader(pair.component, module.site.spans).rows(), np.float64)
    after = before.copy()
    placed = Placed(source, module, bias=False, strength=1.0, runs=())
    step_of(placed, before.shape[1], "float64", ApplyOptions()).change(after, 0)
    after -= before
    return np.concatenate([after[start:stop] for start, stop in side.ranges])
