"""The difference of one pair of tensors, read a few rows at a time, and what is measured of it on the way."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.errors import BrokenModuleError

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import AnyArray
    from lorasurgery.models import Reader, Weight
    from lorasurgery.verbs.extract.pair import Pair

WIDE = frozenset({"F32", "F64"})
"""Where both models are at least this wide the difference is taken and decomposed in float64."""
TINY, HUGE = 1e-12, 1e12
"""Differences that are all smaller, or any larger, are decomposed in float64: their squares leave float32's range."""
SMALL = 1e-20
"""A float32 sum of squares below this may lack some that were too small for it."""


@dataclass(frozen=True, slots=True)
class Change:
    """What a tuned tensor is beyond its base."""

    squared: float
    """``||tuned - base||_F^2``"""
    base_squared: float
    """``||base||_F^2``"""
    largest: float
    """The largest absolute difference of an element."""
    delta: AnyArray | None
    """(out, in*k*k) or (out, 1), float32 or float64; None where only the numbers were asked for."""
    base: AnyArray | None = None
    """The base weight in the same form, where it was asked for."""
    broken: bool = False
    """Whether there are values that are not finite, which are not counted."""


def change_of(pair: Pair, *, keep: bool = True, keep_base: bool = False) -> Change:
    """Read both tensors. Differences of bf16, fp16 and fp8 values are exact to float32's last bit.

    Raises BrokenModuleError, with file and key, for NaN and infinity in what is not left out.
    """
    rows, width = pair.shape[0], prod(pair.shape[1:])
    wide = {stored(pair.base), stored(pair.tuned)} <= WIDE
    dtype = np.float64 if wide else np.float32
    delta = np.empty((rows, width), dtype) if keep else None
    base = np.empty((rows, width), dtype) if keep_base else None
    squared = base_squared = largest = 0.0
    broken = False
    for at, before in pair.base.chunks():
        after = pair.tuned.rows(at, at + len(before))
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            difference = np.subtract(after, before, dtype=dtype)
        flat = difference.reshape(-1)
        part = _squared(flat)
        if not np.isfinite(part):
            if not pair.reason:
                _refuse(pair, before, after)
            broken = True
            flat[~np.isfinite(flat)] = 0.0
            part = _squared(flat)
        squared += part
        norm = _squared(before.reshape(-1))
        base_squared += norm if np.isfinite(norm) else 0.0
        largest = max(largest, float(np.abs(flat).max(initial=0.0)))
        if delta is not None:
            delta[at : at + len(before)] = difference
        if base is not None:
            base[at : at + len(before)] = before
    if delta is not None and not TINY <= largest <= HUGE:
        delta = delta.astype(np.float64, copy=False)
    return Change(squared, base_squared, largest, delta, base, broken)


def stored(reader: Reader) -> str:
    """The dtype that a reader's values were stored in; GGUF's blocks are read as float32 and are none."""
    return "GGUF" if reader.parts[0].weight.file.path.suffix.lower() == ".gguf" else reader.dtype


def _squared(flat: AnyArray) -> float:
    """The sum of squares; a float32 product of a few million terms is right to 1e-6 or so, unless it leaves its range."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.dot(flat, flat)) if flat.size >= 1 << 16 else 0.0
        if not SMALL < found < np.inf:
            parts = flat.astype(np.float64)
            found = float(np.dot(parts, parts))
        return found


def _refuse(pair: Pair, before: AnyArray, after: AnyArray) -> None:
    """Raises BrokenModuleError for the tensor that is not finite."""
    reader: Reader = pair.tuned if np.isfinite(before).all() else pair.base
    values = after if reader is pair.tuned else before
    weight = _holder(reader)
    what = "NaN or infinity" if not np.isfinite(values).all() else "values beyond float32's range"
    raise BrokenModuleError(
        f"{weight.key} holds {what}", key=weight.key, path=weight.file.path,
        hint="an earlier checkpoint of the training run, or --exclude for this module",
    )  # fmt: skip


def _holder(reader: Reader) -> Weight:
    """The first part with a value that is not finite, else the first."""
    for part in reader.parts:
        if not np.isfinite(part.weight.rows(part.first, part.first + part.rows)).all():
            return part.weight
    return reader.parts[0].weight
