"""The written model read again, and some of its tensors compared with what they should be, computed another way."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.architectures.table import Span
from lorasurgery.deltas.base import CannotError
from lorasurgery.models import open_model
from lorasurgery.operations.onto.numbers import spacing
from lorasurgery.operations.onto.options import NEAREST
from lorasurgery.operations.onto.plan import Placed
from lorasurgery.operations.onto.steps import is_added, is_local
from lorasurgery.verbs.apply.dense import expected
from lorasurgery.verbs.apply.fresh import height_of, in_order, of_weights
from lorasurgery.verbs.apply.match import match

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lorasurgery.io.tensors import Float64
    from lorasurgery.models import Model, Weight
    from lorasurgery.operations.onto.options import ApplyOptions
    from lorasurgery.operations.onto.plan import Change, Plan
    from lorasurgery.operations.onto.source import Source

MOST, ROWS, ELEMENTS = 24, 8, 1 << 24
"""Tensors compared, rows of each, and the largest weight that is compared whole where rows depend on each other."""
CALCULATION = 1e-6
"""What float32 may be off by, of the largest value of a row, beside the rounding of the result."""


@dataclass(frozen=True, slots=True)
class Verified:
    """One tensor."""

    tensor: str
    families: tuple[str, ...]
    values: int
    """How many were compared."""
    difference: float
    """``||stored - exact|| / ||exact||``."""
    wrong: int
    """Values that are not the nearest (stochastically rounded: not one of the two nearest) to the exact ones."""

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return {
            "tensor": self.tensor, "families": list(self.families), "values": self.values, "difference": self.difference,
            "wrong": self.wrong,
        }  # fmt: skip


def verify(model: Model, sources: Sequence[Source], out: Path, options: ApplyOptions) -> list[Verified]:
    """Compare up to 24 tensors of ``out``, of every family first, with the float64 formulas applied to ``model``.

    What rows depend on others is compared where the weight is small enough; taken out, only additions are.
    """
    plan = match(model, sources)
    written = open_model(out, arch=model.architecture).weights
    found = []
    for change in _chosen(model, list(plan.changes.values()), options):
        weight = change.weight
        rows = np.arange(weight.shape[0]) if not _by_row(change) else _rows(weight.shape[0])
        try:
            exact = _exact(change, rows, options) if _by_row(change) else _together(model, plan, change, options)
        except CannotError:
            continue
        found.append(_compared(change, written[change.name], rows, exact, options))
    return found


def _chosen(model: Model, changes: Sequence[Change], options: ApplyOptions) -> list[Change]:
    """One of each combination of families and shape of step, then others spread over the model."""
    able = [c for c in changes if _can(model, c, options)]
    first = list({(_families(c), _by_row(c), c.weight.tensor.dtype): c for c in reversed(able)}.values())[:MOST]
    rest = [c for c in able if c not in first]
    left = MOST - len(first)
    return first + (rest[:: max(len(rest) // left, 1)][:left] if left else [])


def _can(model: Model, change: Change, options: ApplyOptions) -> bool:
    if options.unapply and not all(is_added(own) for own in change.placed):
        return False
    if _by_row(change):
        return True
    return sum(span.stop for span in _whole(model, change)) * prod(change.shape[1:]) <= ELEMENTS


def _whole(model: Model, change: Change) -> tuple[Span, ...]:
    """All rows of the original weights that a tensor holds rows of."""
    place = change.weight.place
    assert place is not None  # noqa: S101  it was matched by it
    names = dict.fromkeys(span.weight for span in place.spans)
    return tuple(Span(name, 0, height_of(model, place.component, name)) for name in names)


def _by_row(change: Change) -> bool:
    return all(is_local(own) for own in change.placed)


def _families(change: Change) -> tuple[str, ...]:
    return tuple("bias" if own.bias else own.module.family for own in change.placed)


def _rows(count: int) -> Any:  # noqa: ANN401  an array of row numbers
    return np.unique(np.linspace(0, count - 1, min(ROWS, count)).astype(int))


def _exact(change: Change, rows: Any, options: ApplyOptions) -> Float64:  # noqa: ANN401
    """The rows as they should be."""
    old = np.concatenate([change.weight.rows(int(r), int(r) + 1) for r in rows]).astype(np.float64)
    old = np.pad(old, ((0, 0), (0, prod(change.shape[1:]) - old.shape[1])))
    for own in in_order(change.placed, undo=options.unapply):
        placed = Placed(own.source, own.module, own.bias, -own.strength if options.unapply else own.strength, own.runs)
        width = change.width(own)
        for i, first in _held(placed, rows):
            old[i : i + 1, :width] = expected(placed, old[i : i + 1, :width], first, options.dora)
    return old


def _together(model: Model, plan: Plan, change: Change, options: ApplyOptions) -> Float64:
    """A tensor as it should be, where rows depend on rows that may be in other tensors of the same original weights."""
    place = change.weight.place
    assert place is not None  # noqa: S101  it was matched by it
    weights: dict[str, Float64] = {}
    for span in _whole(model, change):
        values = model.reader(place.component, (span,)).rows().astype(np.float64)
        weights[span.weight] = np.pad(values, ((0, 0), (0, prod(change.shape[1:]) - values.shape[1])))
    for own in in_order(of_weights(plan, place.component, weights), undo=options.unapply):
        spans, width = own.module.site.spans, change.width(own)
        values = np.concatenate([weights[span.weight][span.start : span.stop] for span in spans])
        placed = Placed(own.source, own.module, own.bias, -own.strength if options.unapply else own.strength, own.runs)
        values[:, :width] = expected(placed, values[:, :width], 0, options.dora)
        for span in spans:
            count = span.stop - span.start
            weights[span.weight][span.start : span.stop], values = values[:count], values[count:]
    return np.concatenate([weights[span.weight][span.start : span.stop] for span in place.spans])


def _held(placed: Placed, rows: Any) -> Iterator[tuple[int, int]]:  # noqa: ANN401
    """(place in ``rows``, the module's row) of each row that the module has."""
    for i, row in enumerate(rows):
        for run in placed.runs:
            if run.at <= row < run.at + run.length:
                yield i, int(run.first + row - run.at)


def _compared(change: Change, written: Weight, rows: Any, exact: Float64, options: ApplyOptions) -> Verified:  # noqa: ANN401
    dtype = written.tensor.dtype
    kept = np.concatenate([written.rows(int(r), int(r) + 1) for r in rows]).astype(np.float64)
    scale = _scales(written, rows, kept)
    steps = spacing(exact / scale, dtype) * scale
    allowed = steps * (0.5 if options.rounding == NEAREST else 1.0) * (1.0 + 1e-5)
    allowed += (CALCULATION if dtype not in {"F32", "F64"} else 1e-14) * np.abs(exact).max(axis=1, keepdims=True)
    norm = float(np.linalg.norm(exact))
    difference = float(np.linalg.norm(kept - exact)) / norm if norm else 0.0
    wrong = int((~(np.abs(kept - exact) <= allowed)).sum())  # NaN is wrong, too
    return Verified(change.name, _families(change), kept.size, difference, wrong)


def _scales(written: Weight, rows: Any, kept: Float64) -> Float64:  # noqa: ANN401
    """What each stored number is multiplied by, as ``kept``."""
    if written.scale is None:
        return np.ones_like(kept)
    if written.scale.size == 1:
        return np.full_like(kept, written.scale.item())
    own = written.scale.f64().reshape(written.shape[0], -1)[rows]
    return np.repeat(own, kept.shape[1] // own.shape[1], axis=1)
