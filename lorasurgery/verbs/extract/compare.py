"""Which family describes a change best per byte: each of them fitted to some of its matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, prod, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.errors import RequestError
from lorasurgery.io.dtypes import BITS
from lorasurgery.operations.cut.options import ResizeOptions
from lorasurgery.verbs.extract.change import change_of
from lorasurgery.verbs.extract.decompose import Wanted, decomposed
from lorasurgery.verbs.extract.engine import Running, Step
from lorasurgery.verbs.extract.families import dora, loha, lokr, tucker
from lorasurgery.verbs.extract.inputs import check_devices, opened
from lorasurgery.verbs.extract.options import ExtractOptions
from lorasurgery.verbs.extract.pairs import pair_up
from lorasurgery.verbs.extract.result import dtype_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lorasurgery.linalg.factors import AnyArray
    from lorasurgery.verbs.extract.change import Change
    from lorasurgery.verbs.extract.pair import Pair

SAMPLES = 16
"""Matrices looked at, evenly spread over the model."""
LARGE, ROUGH = 1 << 22, 1e-2
"""A LoHa takes minutes for matrices of more elements, so those are left to the other families; smaller ones end early."""
RANKS = (4, 8, 16, 32, 64, 128)
BETTER, EXACT = 0.99, 1e-4
"""Below this share of a LoRA's error a family is better than a LoRA of as many bytes, unless that is below EXACT."""
Fit = tuple[float, dict[str, "AnyArray"]]


@dataclass(frozen=True, slots=True)
class FamilyRow:
    """One family with one setting."""

    name: str
    size: int
    """Bytes of its factors for the matrices looked at."""
    error: float
    """Relative, of the change of all of them together, before rounding."""
    as_lora: float
    """That of a LoRA of as many bytes (of rank 128, where that is less)."""
    matrices: int
    """How many of the matrices have the family: a Tucker product is for convolutions, a LoHa for what is not too large."""


@dataclass(frozen=True, slots=True)
class Families:
    """The comparison."""

    rows: tuple[FamilyRow, ...]
    matrices: int
    """How many were looked at."""
    of: int
    """How many there are."""
    dtype: str

    @property
    def best(self) -> str:
        """The family whose error is the smallest share of that of a LoRA of as many bytes; ``lora`` where none is smaller.

        What is no smaller than the whole difference, or only better than rounding, does not count.
        """
        whole = max((row.size for row in self.rows if row.name == "full"), default=0)
        others = [
            row for row in self.rows
            if not row.name.startswith(("lora", "full")) and row.as_lora > EXACT and row.size < whole
        ]  # fmt: skip
        best = min(others, key=lambda row: row.error / row.as_lora, default=None)
        return best.name if best is not None and best.error < BETTER * best.as_lora else "lora"

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        names = ("name", "size", "error", "as_lora", "matrices")
        rows = [{name: getattr(row, name) for name in names} for row in self.rows]
        return {"schema": 1, "matrices": self.matrices, "of": self.of, "dtype": self.dtype, "best": self.best, "families": rows}


@dataclass(frozen=True, slots=True)
class _One:
    """One matrix: its LoRA curve, and what every other family makes of it."""

    squared: float
    per_rank: int
    """Bytes of one rank of a LoRA."""
    values: AnyArray
    fits: dict[str, tuple[int, float]]
    """Family -> (bytes, squared error)."""


def compare_families(base: str | Path, tuned: str | Path, options: ExtractOptions, running: Running | None = None) -> Families:
    """Fit every family to up to 16 changed matrices. Raises as :func:`lorasurgery.verbs.extract.extract` does.

    ``running``: the architecture and the progress.
    """
    from lorasurgery.linalg.dense import full_precision  # with torch

    options.check()
    running = running or Running()
    models = opened(base, tuned, running.arch, running.only)
    check_devices(options)
    options = options.aimed(models).on(models[0].architecture)
    pairs = [p for p in pair_up(*models, options).pairs if not p.reason and not p.is_vector]
    chosen = [pairs[i * len(pairs) // SAMPLES] for i in range(SAMPLES)] if len(pairs) > SAMPLES else pairs
    found: list[_One] = []
    with full_precision():
        for at, pair in enumerate(chosen):
            change = change_of(pair, keep_base=True)
            if change.squared > 0.0:
                found.append(_one(pair, change, options))
            if running.progress is not None:
                running.progress(Step(at + 1, len(chosen), pair.name))
    if not found:
        raise RequestError("none of the matrices changed", path=models[1].path, hint="another tuned model, or other patterns")
    dtype = dtype_of(chosen[0], options)
    return Families(tuple(_rows(found)), len(found), len(pairs), dtype)


def _one(pair: Pair, change: Change, options: ExtractOptions) -> _One:
    assert change.delta is not None  # noqa: S101  it was asked for
    width = BITS[dtype_of(pair, options)] // 8
    plain = ExtractOptions(cut=ResizeOptions(rank=RANKS[-1]), seed=options.seed, device=options.device)
    (spectrum,) = decomposed([change.delta], Wanted(RANKS[-1], fixed=True), plain, options.devices[0])
    fits: dict[str, tuple[int, float]] = {"full": (prod(pair.shape) * width, 0.0)}
    for name, fit in _fits(pair, change, plain, options.devices[0]):
        error, arrays = fit()
        fits[name] = sum(array.size for array in arrays.values()) * width, error
    return _One(change.squared, (pair.shape[0] + prod(pair.shape[1:])) * width, spectrum.values, fits)


def _fits(pair: Pair, change: Change, plain: ExtractOptions, device: str) -> Iterator[tuple[str, Callable[[], Fit]]]:
    """Every setting but LoRA's ranks, which one decomposition gives."""
    delta = change.delta
    assert delta is not None  # noqa: S101  the caller has looked
    for factor in (-1, 4, 16):
        whole = replace(plain, family="lokr", factor=factor)
        yield f"lokr factor {factor}", lambda whole=whole: lokr(delta, pair.shape, None, whole)  # type: ignore[misc]
    for rank in (4, 16):
        cut = replace(plain, family="lokr")
        yield f"lokr rank {rank}", lambda rank=rank, cut=cut: lokr(delta, pair.shape, rank, cut)  # type: ignore[misc]
        if delta.size <= LARGE:
            yield f"loha rank {rank}", lambda rank=rank: loha(delta, rank, plain, ROUGH)  # type: ignore[misc]
        yield f"dora rank {rank}", lambda rank=rank: dora(change, rank, plain, device)  # type: ignore[misc]
        if pair.kind == "conv":
            yield f"tucker rank {rank}", lambda rank=rank: tucker(delta, pair.shape, rank)  # type: ignore[misc]


def _rows(found: Sequence[_One]) -> Iterator[FamilyRow]:
    total = sum(one.squared for one in found)
    step = sum(one.per_rank for one in found)
    for rank in RANKS:
        size = sum(one.per_rank * min(rank, len(one.values)) for one in found)
        error = _lora_error(found, rank, total)
        yield FamilyRow(f"lora rank {rank}", size, error, error, len(found))
    names = dict.fromkeys(name for one in found for name in one.fits)
    for name in names:
        # a family that only some matrices have is compared on those
        own = [one for one in found if name in one.fits]
        squared = sum(one.squared for one in own)
        size = sum(one.fits[name][0] for one in own)
        error = sqrt(sum(one.fits[name][1] for one in own) / squared)
        per_rank = step if len(own) == len(found) else sum(one.per_rank for one in own)
        yield FamilyRow(name, size, error, _lora_error(own, size / per_rank, squared), len(own))


def _lora_error(found: Sequence[_One], rank: float, total: float) -> float:
    """Relative error of LoRAs of a rank, between two whole ones by squares."""
    low = floor(rank)
    below, above = (sum(max(one.squared - float(np.sum(one.values[:r] ** 2)), 0.0) for one in found) for r in (low, low + 1))
    return sqrt((below + (above - below) * (rank - low)) / total)
