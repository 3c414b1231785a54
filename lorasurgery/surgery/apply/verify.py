"""The written model read again, and some of its tensors compared with what they should be, computed another way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.models import open_model
from lorasurgery.surgery.apply.dense import expected
from lorasurgery.surgery.apply.fresh import in_order
from lorasurgery.surgery.apply.match import Placed, match
from lorasurgery.surgery.apply.numbers import spacing
from lorasurgery.surgery.apply.options import NEAREST
from lorasurgery.surgery.apply.steps import is_added, is_local

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lorasurgery.io.tensors import Float64
    from lorasurgery.models import Model, Weight
    from lorasurgery.surgery.apply.inputs import Source
    from lorasurgery.surgery.apply.match import Change
    from lorasurgery.surgery.apply.options import ApplyOptions

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
    for change in _chosen(list(plan.changes.values()), options):
        weight = change.weight
        rows = np.arange(weight.shape[0]) if not _by_row(change) else _rows(weight.shape[0])
        try:
            exact = _exact(change, rows, options)
        except CannotError:
            continue
        found.append(_compared(change, written[change.name], rows, exact, options))
    return found


def _chosen(changes: Sequence[Change], options: ApplyOptions) -> list[Change]:
    """One of each combination of families and shape of step, then others spread over the model."""
    able = [c for c in changes if _can(c, options)]
    first = list({(_families(c), _by_row(c), c.weight.tensor.dtype): c for c in reversed(able)}.values())[:MOST]
    rest = [c for c in able if c not in first]
    left = MOST - len(first)
    return first + (rest[:: max(len(rest) // left, 1)][:left] if left else [])


def _can(change: Change, options: ApplyOptions) -> bool:
    if options.unapply and not all(is_added(own) for own in change.placed):
        return False
    if _by_row(change):
        return True
    whole = all(len(own.runs) == 1 and own.runs[0] == (0, 0, own.module.out) for own in change.placed)
    return whole and change.weight.tensor.size <= ELEMENTS and change.weight.shape[0] == change.placed[0].module.out


def _by_row(change: Change) -> bool:
    return all(is_local(own) for own in change.placed)


def _families(change: Change) -> tuple[str, ...]:
    return tuple("bias" if own.bias else own.module.family for own in change.placed)


def _rows(count: int) -> Any:  # noqa: ANN401  an array of row numbers
    return np.unique(np.linspace(0, count - 1, min(ROWS, count)).astype(int))


def _exact(change: Change, rows: Any, options: ApplyOptions) -> Float64:  # noqa: ANN401
    """The rows as they should be."""
    old = np.concatenate([change.weight.rows(int(r), int(r) + 1) for r in rows]).astype(np.float64)
    for own in in_order(change.placed, undo=options.unapply):
        placed = Placed(own.source, own.module, own.bias, -own.strength if options.unapply else own.strength, own.runs)
        if not is_local(own):
            old = expected(placed, old, 0, options.dora)
            continue
        for i, first in _held(placed, rows):
            old[i : i + 1] = expected(placed, old[i : i + 1], first, options.dora)
    return old


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
