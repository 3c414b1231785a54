"""Another rank from a file whose first components are an adapter of their own (DyLoRA), or from any LoRA by its SVD.

Names, layout and everything that is no LoRA factor stay as they are, so no architecture has to be known.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import RequestError
from lorasurgery.io.tensors import scalar
from lorasurgery.layouts.numbered import named_keys, with_ranks
from lorasurgery.layouts.words import split_key
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.verbs.rerank.alpha import (
    KEEP,
    POLICIES,
    SCALE,
    SPEC_HASH,
    metadata_at,
    new_alpha,
    trained_scale,
    written_scale,
)
from lorasurgery.verbs.rerank.cut import curve_of, cut_module
from lorasurgery.verbs.rerank.nested import Origin, nested_modules, origin, verdict

if TYPE_CHECKING:
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.ledger import Ledger
    from lorasurgery.linalg.prefix import PrefixCurve
    from lorasurgery.verbs.rerank.nested import NestedModule


@dataclass(frozen=True, slots=True)
class Request:
    """What to make: one rank, every multiple of a unit, or the smallest rank that meets a bound."""

    rank: int | None = None
    every: bool = False
    energy: float | None = None
    """The share of the file's squared norm to keep at least."""
    error: float | None = None
    """The largest relative Frobenius error."""
    unit: int | None = None
    """Ranks are multiples of it; None is the trainer's own, or 1."""
    svd: bool = False
    """The best approximation of a rank in place of the first components."""
    alpha: str | None = None
    """See :data:`POLICIES`; None keeps alpha for a prefix, as sd-scripts does, and the scale for ``svd``."""
    dtype: str = "keep"

    @property
    def policy(self) -> str:
        """The alpha policy that holds; ``kohya`` is sd-scripts' own, which is to keep alpha."""
        name = self.alpha or (SCALE if self.svd else KEEP)
        return KEEP if name == "kohya" else name

    def check(self) -> None:
        """Raises RequestError for contradictions and values out of range."""
        best = self.energy is not None or self.error is not None
        if (self.rank is not None) + self.every + best != 1:
            raise RequestError("one of --rank N, --all and --best says which ranks to write", hint="--all --unit 4")
        for name, value in (("--rank", self.rank), ("--unit", self.unit)):
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RequestError(f"the energy must lie in (0, 1], not {self.energy}")
        if self.error is not None and not 0 <= self.error < 1:
            raise RequestError(f"the error must lie in [0, 1), not {self.error}")
        if self.alpha is not None and self.alpha not in POLICIES:
            raise RequestError(f"--alpha is {', '.join(POLICIES)}, not {self.alpha}")
        if self.dtype not in ("keep", *DTYPES):
            raise RequestError(f"--dtype is keep, fp32, fp16 or bf16, not {self.dtype}")


class Strength(NamedTuple):
    """The scale of modules that were cut alike."""

    modules: int
    old_rank: int
    rank: int
    file: float
    """alpha / rank as the input is read."""
    written: float
    trained: float | None
    """What the trainer multiplied this rank by."""


@dataclass(frozen=True, slots=True)
class Reranked:
    """One result; its tensors are read or computed when they are written."""

    rank: int
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    error: float
    """``||old - new||_F / ||old||_F`` over all modules, both at the input's scale: what the cut costs."""
    best: float
    """The smallest such error of this rank (with Tucker cores: a bound on it)."""
    strengths: tuple[Strength, ...]
    worst: tuple[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nested:
    """A file opened for reranking."""

    raw: RawFile
    modules: list[NestedModule]
    others: list[str]
    """Modules of other families, which stay as they are."""
    ledger: Ledger
    """Every key of the file; what is not understood is copied, and cannot be cut."""
    origin: Origin = field(default_factory=lambda: Origin(None, None, None, None))
    numbered: bool = False
    """Whether the file numbers its modules (cloneofsimo/lora)."""

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(module.rank for module in self.modules)

    @cached_property
    def curves(self) -> list[PrefixCurve]:
        """Every module's errors by rank."""
        from lorasurgery.linalg.threads import map_threads

        return map_threads(curve_of, self.modules, workers())

    @cached_property
    def verdict(self) -> tuple[str, str]:
        """Whether this is a DyLoRA; see :func:`lorasurgery.verbs.rerank.nested.verdict`."""
        return verdict(self.origin, self.curves)

    def error_at(self, rank: int, *, best: bool = False) -> float:
        """The relative error of the prefix of ``rank``, or of the best approximation."""
        lost = norm = 0.0
        for module, curve in zip(self.modules, self.curves, strict=True):
            weight = module.scale**2
            lost += weight * float((curve.best if best else curve.prefix)[min(rank, curve.rank)])
            norm += weight * curve.norm
        return sqrt(lost / norm) if norm else 0.0

    def ranks(self, request: Request) -> list[int]:
        """The ranks to write. The largest is among ``--all`` even where it is no multiple of the unit."""
        if request.rank is not None:
            if request.rank > self.rank:
                raise RequestError(
                    f"rank {request.rank} is more than the file's {self.rank}", path=self.raw.path, hint=f"--rank {self.rank}"
                )
            return [request.rank]
        unit = request.unit or self.origin.unit or 1
        ranks = [*range(unit, self.rank, unit), self.rank]
        if request.every:
            return ranks
        bound = min(1.0 if request.error is None else request.error, sqrt(1 - (request.energy or 0.0)))
        return [next(r for r in ranks if self.error_at(r, best=request.svd) <= bound + 1e-9)]


def open_nested(raw: RawFile) -> Nested:
    """Read the modules of ``raw``; raises SurgeryError for a file without LoRA modules."""
    modules, others, ledger = nested_modules(raw)
    return Nested(raw, modules, others, ledger, origin(raw.metadata), bool(named_keys(raw.tensors)))


def rerank(nested: Nested, rank: int, request: Request) -> Reranked:
    """The file at ``rank``; modules of a smaller rank stay as they are. Raises RequestError and BrokenModuleError."""
    from lorasurgery.linalg.threads import map_threads

    pairs = list(zip(nested.modules, nested.curves, strict=True))
    dtype = DTYPES.get(request.dtype)
    cuts = map_threads(lambda pair: cut_module(*pair, rank, svd=request.svd, dtype=dtype), pairs, workers())
    tensors = dict(nested.raw.tensors)
    unit = nested.origin.unit or request.unit
    made: list[tuple[NestedModule, int, float | None]] = []
    for module, cut in zip(nested.modules, cuts, strict=True):
        tensors |= {module.keys[slot]: tensor for slot, tensor in cut.delta.tensors.items()}
        alpha = new_alpha(module, cut.rank, request.policy, unit)
        if nested.numbered and alpha is not None:
            raise RequestError(
                f"{module.keys['down']}: a file that numbers its modules has no alphas, so its strength stays",
                path=nested.raw.path, hint="--alpha scale, or lorasurgery convert --target sd-scripts first",
            )  # fmt: skip
        made.append((module, cut.rank, alpha))
        if alpha is not None and alpha != module.alpha and module.component is None:
            tensors[module.alpha_key or f"{module.stem}.alpha"] = scalar(alpha)
    errors = [(m.scale**2 * cut.error, m.scale**2 * c.norm, m.stem) for (m, c), cut in zip(pairs, cuts, strict=True)]
    lost, norm = sum(e for e, *_ in errors), sum(n for _, n, _ in errors)
    worst = max(((stem, sqrt(e / n) if n else 0.0) for e, n, stem in errors), key=lambda item: item[1])
    return Reranked(
        rank, _others_cast(tensors, request),
        with_ranks(metadata_at(nested.raw.metadata, made, rank, request.policy, svd=request.svd), tensors),
        sqrt(lost / norm) if norm else 0.0, nested.error_at(rank, best=True), _strengths(nested, made), worst,
        tuple(_notes(nested, rank, request)),
    )  # fmt: skip


def workers() -> int:
    """Threads for the decompositions."""
    return min(8, os.cpu_count() or 1)


def _others_cast(tensors: dict[str, Tensor], request: Request) -> dict[str, Tensor]:
    """``--dtype`` for the factors of other families, too; alphas and counters keep theirs."""
    if request.dtype == "keep":
        return tensors
    wide = {"F64", "F32", "F16", "BF16"}
    dtype = DTYPES[request.dtype]
    factor = {key: t.dtype in wide and len(t.shape) > 0 and split_key(key) is not None for key, t in tensors.items()}
    return {key: t.cast(dtype) if factor[key] else t for key, t in tensors.items()}


def _strengths(nested: Nested, made: list[tuple[NestedModule, int, float | None]]) -> tuple[Strength, ...]:
    counts: Counter[Strength] = Counter()
    for module, rank, alpha in made:
        trained = trained_scale(module, rank, nested.origin)
        counts[Strength(0, module.rank, rank, module.scale, written_scale(module, rank, alpha), trained)] += 1
    return tuple(strength._replace(modules=count) for strength, count in counts.most_common())


def _notes(nested: Nested, rank: int, request: Request) -> list[str]:
    """What a reader of the report should know."""
    found = []
    unit = nested.origin.unit
    if unit is not None and rank % unit and rank != nested.rank and not request.svd:
        found.append(f"rank {rank} ends inside a unit of {unit} components, which were trained together")
    lost = sum(bool((curve.first >= rank).any()) for curve in nested.curves)
    if lost and not request.svd:
        found.append(
            f"in {lost} modules the first {rank} components leave whole rows without any change (fused layers with an up of "
            "diagonal blocks?); --svd keeps what counts"
        )
    doras = sum(module.magnitude and module.rank > rank for module in nested.modules)
    if doras:
        found.append(f"{doras} DoRA magnitudes are kept as they were trained, beside rank {nested.rank}")
    if SPEC_HASH in nested.raw.metadata:
        found.append(f"{SPEC_HASH} was removed: it was the input's")
    if nested.others:
        found.append(f"{len(nested.others)} modules of other families are carried as they are (first: {nested.others[0]})")
    return found
