"""What an extraction would take up, from the headers of both models alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, Magnitude, Module, Scale
from lorasurgery.deltas.factorization import factorization
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import RequestError
from lorasurgery.io.tensors import zeros
from lorasurgery.operations.cut.size import file_size
from lorasurgery.verbs.extract.inputs import opened
from lorasurgery.verbs.extract.meta import metadata_of, operation
from lorasurgery.verbs.extract.pair import BIAS, NORM, PARAMETER
from lorasurgery.verbs.extract.pairs import pair_up
from lorasurgery.verbs.extract.parameters import with_parameters
from lorasurgery.verbs.extract.result import dtype_of
from lorasurgery.verbs.extract.work import wanted_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Shape
    from lorasurgery.verbs.extract.options import ExtractOptions
    from lorasurgery.verbs.extract.pair import Pair


@dataclass(frozen=True, slots=True)
class Planned:
    """Everything that both models have, and what would become of it."""

    base: str
    tuned: str
    architecture: str
    layouts: tuple[str, str, str]
    """Of the base, of the tuned model, of the result."""
    operation: str
    kinds: Mapping[str, str]
    """Tensor -> ``linear``, ``conv``, ``1x1``, ``norm``, ``bias``, ``embedding``: what would be extracted."""
    left_out: Mapping[str, str]
    """Tensor -> reason."""
    only_base: tuple[str, ...]
    only_tuned: tuple[str, ...]
    size: int | None
    """Bytes of the result if every tensor changed; None where the change decides the ranks."""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain object for ``--json``."""
        return {
            "schema": 1,
            "written": False,
            "base": self.base,
            "tuned": self.tuned,
            "architecture": self.architecture,
            "layout": dict(zip(("base", "tuned", "output"), self.layouts, strict=True)),
            "operation": self.operation,
            "tensors": dict(self.kinds),
            "left_out": [{"name": name, "reason": reason} for name, reason in self.left_out.items()],
            "only_in_base": list(self.only_base),
            "only_in_tuned": list(self.only_tuned),
            "size": self.size,
            "warnings": list(self.warnings),
        }


def plan(
    base: str | Path, tuned: str | Path, options: ExtractOptions, arch: str | None = None, only: str | None = None
) -> Planned:
    """Match the models and read nothing else. Raises as :func:`lorasurgery.verbs.extract.extract` does."""
    options.check()
    models = opened(base, tuned, arch, only)
    options = options.aimed(models).on(models[0].architecture)
    pairs = pair_up(*models, options)
    taken = [p for p in pairs.pairs if not p.reason]
    if not taken:
        reasons = "; ".join(sorted({p.reason for p in pairs.pairs}))
        raise RequestError(f"nothing to extract: {reasons}", path=models[1].path, hint="another tuned model, or other patterns")
    metadata = metadata_of(*models, options, "", {}, conv=any(p.kind == "conv" for p in taken))
    size = None
    if options.cut.is_fixed and not options.cut.uniform:
        modules = _modules(taken, options)
        table = with_parameters(models[0].architecture, [p for p in taken if p.kind == PARAMETER])
        size = file_size(Adapter(table, modules, metadata, options.layout.id))
    return Planned(
        str(models[0].path), str(models[1].path), models[0].architecture.key,
        (models[0].layout, models[1].layout, options.layout.id), operation(options),
        {p.id: p.kind for p in taken}, {p.id: p.reason for p in pairs.pairs if p.reason},
        tuple(pairs.only_base), tuple(pairs.only_tuned), size, tuple(pairs.notes(options.cut)),
    )  # fmt: skip


def _modules(pairs: Sequence[Pair], options: ExtractOptions) -> dict[Any, Module]:
    """Modules of zeros in the shapes and dtypes of the result."""
    found: dict[Any, Module] = {}
    for pair in pairs:
        dtype = dtype_of(pair, options)
        if pair.kind == BIAS:
            old = found.get(pair.site)
            if old is not None or "bias" in options.layout.holds:
                delta = None if old is None else old.delta
                magnitude = None if old is None else old.magnitude
                bias = zeros(dtype, pair.shape)
                found[pair.site] = Module(pair.site, pair.name, delta, Scale(1.0, ""), magnitude, bias)
            continue
        magnitude = Magnitude(zeros(dtype, pair.shape[:1]), "out") if options.dora and not pair.is_vector else None
        found[pair.site] = Module(pair.site, pair.name, _delta(pair, dtype, options), Scale(1.0, ""), magnitude)
    return found


def _delta(pair: Pair, dtype: str, options: ExtractOptions) -> Delta:
    shape = pair.shape
    if pair.is_vector or options.family == "full":
        return Full(zeros(dtype, shape), "norm" if pair.kind == NORM else "full")
    out, width, ones = shape[0], prod(shape[1:]), tuple(1 for _ in shape[2:])
    rank = wanted_of(pair, options).rank
    if options.family == "lokr":
        return _lokr(shape, rank, dtype, options)
    size = min(rank or 1, out, width)
    if options.family == "loha":
        sides = [zeros(dtype, side) for side in ((out, size), (size, width))]
        return Hadamard(*sides, *sides)
    if options.tucker and pair.kind == "conv":
        size = min(size, shape[1])
        mid = zeros(dtype, (size, size, *shape[2:]))
        return LowRank(zeros(dtype, (out, size, *ones)), zeros(dtype, (size, shape[1], *ones)), mid)
    return LowRank(zeros(dtype, (out, size, *ones)), zeros(dtype, (size, *shape[1:])))


def _lokr(shape: Shape, rank: int | None, dtype: str, options: ExtractOptions) -> Kronecker:
    one, two = (factorization(size, options.factor)[0] for size in shape[:2])
    inner = (shape[0] // one, shape[1] // two, *shape[2:])
    rows, columns = inner[0], prod(inner[1:])
    w1 = zeros(dtype, (one, two))
    if rank is not None and rank < rows * columns / (rows + columns):
        return Kronecker(w1=w1, w2_a=zeros(dtype, (rows, rank)), w2_b=zeros(dtype, (rank, columns)))
    return Kronecker(w1=w1, w2=zeros(dtype, inner))
