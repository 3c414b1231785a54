"""What a sum that became large could be instead: the nearest LoKr, or a LoRA of some rank, with sizes and errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import Scale, written_in
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.io.tensors import zeros
from lorasurgery.linalg.randomized import dense_svd
from lorasurgery.linalg.threads import map_threads
from lorasurgery.operations.conversion.convert import Options, convert
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.cut.size import file_size
from lorasurgery.operations.sum.add import FULL
from lorasurgery.verbs.merge.engine import merge
from lorasurgery.verbs.merge.inputs import leading

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.verbs.merge.options import MergeOptions
    from lorasurgery.verbs.merge.report import MergeReport
    from lorasurgery.verbs.merge.source import Source

GROWN = 4
"""Times the inputs from which on a result is much larger than they are."""
RANKS = (16, 64)
SAMPLE = 3
"""Modules whose singular values stand for all."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Another form of the result."""

    family: str
    """``lokr`` or ``lora``."""
    rank: int | None
    size: int
    """Bytes of the file."""
    error: float
    """Relative distance from the sum."""
    measured: int | None = None
    """Modules that the error is estimated from; None: it is that of all."""


def choices(
    sources: Sequence[Source], made: tuple[Adapter, MergeReport], options: MergeOptions, target: str | None
) -> list[Choice]:
    """The smaller forms of a merge whose sums are full differences that no file has, if they make it much larger.

    ``made``: the merge and its report. Reads what the LoKr are made of, and :data:`SAMPLE` sums; writes nothing.
    """
    adapter, report = made
    large = [m for m in adapter.modules.values() if isinstance(m.delta, Full) and len(m.delta.shape) > 1]
    asked = options.as_full or options.as_lokr or options.resize is not None or options.compat is not None
    if asked or not large or not any(own.action == FULL for own in report.modules):
        return []
    if _bytes(adapter) < GROWN * sum(_bytes(source.adapter) for source in sources):
        return []
    lokr = _as_lokr(sources, options, target)
    return [*([lokr] if lokr is not None else []), *_as_lora(adapter, large, options, target)]


def _as_lokr(sources: Sequence[Source], options: MergeOptions, target: str | None) -> Choice | None:
    """The same merge, which has every error at once where the files' factors are alike; None where they are not."""
    first = leading([source.adapter for source in sources])
    if "lokr" not in written_in(first, target).holding(first.architecture):
        return None
    adapter, report = merge(sources, replace(options, as_lokr=True), target)
    if any(own.action == FULL for own in report.modules):
        return None
    written, writing = convert(adapter, target, Options(dtype=options.dtype))
    return Choice("lokr", None, file_size(written, target), max(report.losses.total(), writing.losses.total()))


def _as_lora(adapter: Adapter, large: Sequence[Module], options: MergeOptions, target: str | None) -> list[Choice]:
    sample = [large[i] for i in sorted({round(i) for i in np.linspace(0, len(large) - 1, SAMPLE)})]
    spectra = map_threads(_spectrum, sample, 1)  # each takes a few matrices of the weight's size
    dtype = DTYPES.get(options.dtype) or _widest(large)
    found = []
    for rank in RANKS:
        cut = {site: _of_rank(module, rank, dtype) for site, module in adapter}
        squares = sum(norm - float(np.sum(values[:rank] ** 2)) for values, norm in spectra)
        error = sqrt(max(squares, 0.0) / (sum(norm for _, norm in spectra) or 1.0))
        found.append(Choice("lora", rank, file_size(replace(adapter, modules=cut), target), error, len(sample)))
    return found


def _spectrum(module: Module) -> tuple[np.ndarray, float]:
    """The largest singular values, and the squared norm."""
    assert module.delta is not None  # noqa: S101  it is a full difference
    matrix = module.delta.dense().reshape(module.delta.shape[0], -1)
    return dense_svd(matrix, rank=min(max(RANKS), *matrix.shape)).singular_values, float(np.vdot(matrix, matrix))


def _of_rank(module: Module, rank: int, dtype: str) -> Module:
    """A module of that form, of which only the shapes are looked at."""
    delta = module.delta
    if delta is None or len(delta.shape) < 2:
        return module
    out, *rest = delta.shape
    kept = min(rank, out, prod(rest), delta.rank or rank)
    up = zeros(dtype, (out, kept, *(1 for _ in rest[1:])))
    return replace(module, delta=LowRank(up, zeros(dtype, (kept, *rest))), scale=Scale(1.0, "sum"))


def _widest(modules: Sequence[Module]) -> str:
    return next(tensor.dtype for module in modules if module.delta is not None for tensor in module.delta.tensors.values())


def _bytes(adapter: Adapter) -> int:
    """Of the factors."""
    return sum(t.nbytes for m in adapter.modules.values() if m.delta is not None for t in m.delta.tensors.values())
