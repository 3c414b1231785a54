"""From finished pairs to the adapter: LoRA modules through the same choice of ranks and the same cut as a resize."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.adapter import Adapter, Magnitude, Module, Scale
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import rounded
from lorasurgery.io.tensors import computed
from lorasurgery.layouts.targets import PEFT
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.cut.block_args import with_block_args
from lorasurgery.operations.cut.engine import resized_from
from lorasurgery.operations.cut.options import KEEP_RATIO
from lorasurgery.operations.cut.pick import has_list
from lorasurgery.operations.cut.report import ResizeReport
from lorasurgery.operations.cut.subject import Cut, Subject, low_rank_factors
from lorasurgery.operations.cut.survey import Survey
from lorasurgery.verbs.extract.bases import base_of
from lorasurgery.verbs.extract.change import change_of, stored
from lorasurgery.verbs.extract.pair import BIAS, NORM, PARAMETER
from lorasurgery.verbs.extract.parameters import with_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.linalg.policies.budget import Indices
    from lorasurgery.verbs.extract.options import ExtractOptions
    from lorasurgery.verbs.extract.pair import Pair
    from lorasurgery.verbs.extract.store import Entry, Store

STORED = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}
"""dtype of a model's weight -> dtype of what is extracted from it, where none is asked for; fp8 and GGUF give bf16."""


@dataclass(slots=True)
class StoredSource:
    """Singular triples in the store, as :mod:`lorasurgery.operations.cut.sources` gives them."""

    entry: Entry
    values: Array
    residual: float

    def left(self, kept: Indices, weights: Array) -> AnyArray:
        """``U[:, kept] * weights: (out, k)``."""
        found: AnyArray = self._side("u", kept, weights).T
        return found

    def right(self, kept: Indices, weights: Array) -> AnyArray:
        """``weights * Vt[kept]: (k, in)``."""
        return self._side("v", kept, weights)

    def _side(self, name: str, kept: Indices, weights: Array) -> AnyArray:
        rows = self.entry.arrays[name].rows([(0, int(kept[-1]) + 1)]).array()
        found: AnyArray = rows[kept] * weights.astype(rows.dtype)[:, None]
        limit = self.entry.numbers.get("clamp")
        if limit is not None:
            np.clip(found, -limit, limit, out=found)
        return found


@dataclass(slots=True)
class Assembled:
    """The adapter, what became of each pair, and why some are not in it."""

    adapter: Adapter
    resizing: ResizeReport
    chosen: dict[str, tuple[int | None, float]] = field(default_factory=dict)
    """Pair -> (rank, squared error), for those that are in the adapter."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Pair -> reason."""


def assembled(
    architecture: Architecture, pairs: Sequence[Pair], store: Store, options: ExtractOptions, metadata: Mapping[str, str]
) -> Assembled:
    """Choose the ranks and build the adapter, whose tensors are computed when it is saved.

    Raises RequestError for a size that cannot be met.
    """
    made = _Making(pairs, store, options)
    own = [pair for pair in pairs if pair.kind == PARAMETER and pair.site in made.modules]
    adapter = Adapter(with_parameters(architecture, own), made.modules, dict(metadata), options.layout.id)
    if not made.subjects:
        return Assembled(adapter, made.losses, made.chosen, made.left_out)
    survey = Survey(adapter, made.subjects, [])
    adapter, report = resized_from(survey, options.resizing, base_of(pairs))
    metadata = with_block_args(adapter, {}, adapter.layout, asked=has_list(options.cut.ranks))
    adapter = replace(adapter, metadata=metadata)
    made.losses = report  # the other modules' rounding is told when they are written
    for module in report.modules:
        squared = store.entries[module.name].numbers["squared"]
        if module.new_rank:
            made.chosen[module.name] = (module.new_rank, module.relative_error**2 * squared)
        else:
            made.left_out[module.name] = "the policy keeps nothing of it"
    return Assembled(adapter, report, made.chosen, made.left_out)


class _Making:
    """The modules while they are put together."""

    def __init__(self, pairs: Sequence[Pair], store: Store, options: ExtractOptions) -> None:
        self._store, self._options = store, options
        self.modules: dict[Any, Module] = {}
        self.subjects: list[Subject] = []
        self.losses = ResizeReport()
        self.chosen: dict[str, tuple[int | None, float]] = {}
        self.left_out: dict[str, str] = {}
        encoders = self._unchanged_encoders(pairs)
        for pair in pairs:
            entry = store.entries[pair.id]
            broken = "; it holds NaN or infinity" if entry.numbers.get("broken") else ""
            reason = (pair.reason and pair.reason + broken) or encoders.get(pair.site.component, "") or self._too_small(entry)
            reason = reason or (self._bias(pair, entry) if pair.kind == BIAS else self._weight(pair, entry))
            if reason:
                self.left_out[pair.id] = reason

    def _unchanged_encoders(self, pairs: Sequence[Pair]) -> dict[str, str]:
        """sd-scripts keeps or drops all text encoders together."""
        limit = self._options.encoder_min_diff
        own = [p for p in pairs if p.site.component != "denoiser" and p.kind == "linear" and not p.reason]
        if limit is None or any(self._store.entries[p.id].numbers["largest"] > limit for p in own):
            return {}
        return dict.fromkeys((p.site.component for p in own), f"the text encoders changed by no more than {limit:g}")

    def _too_small(self, entry: Entry) -> str:
        least = self._options.min_diff
        if entry.numbers["squared"] == 0.0:
            return "unchanged"
        return "" if entry.numbers["largest"] > least else f"changed by no more than {least:g}"

    def _recorder(self, pair: Pair) -> Record:
        def record(error: float, norm: float) -> None:
            self.losses.losses.record(pair.name, error, norm)

        return record

    def _bias(self, pair: Pair, entry: Entry) -> str:
        """Add a bias to its module; or why not."""
        module, target = self.modules.get(pair.site), self._options.layout
        if module is None and "bias" not in target.holds:
            return f"{target.reader} does not load a bias without factors"
        if target.words == PEFT and module is not None and self._options.family not in ("lora", "locon"):
            return f"{target.reader} does not load a bias beside {self._options.family} factors"
        bias = rounded(entry.arrays["diff"], dtype_of(pair, self._options), self._recorder(pair))
        module = module or Module(pair.site, pair.name, None, Scale(1.0, "none (1.0)"))
        self.modules[pair.site] = module = replace(module, bias=bias)
        if self.subjects and self.subjects[-1].module.site == pair.site:  # a bias follows its weight
            self.subjects[-1].module = module
        self.chosen[pair.id] = (None, 0.0)
        return ""

    def _weight(self, pair: Pair, entry: Entry) -> str:
        dtype = dtype_of(pair, self._options)
        if pair.kind == PARAMETER:
            values = rounded(entry.arrays["diff"], dtype, self._recorder(pair))
            self.modules[pair.site] = Module(pair.site, pair.name, Full(values), Scale(1.0, "none (1.0)"))
            self.chosen[pair.id] = (None, 0.0)
            return ""
        delta: Delta
        magnitude = None
        if pair.is_vector:
            family = "norm" if pair.kind == NORM else "full"
            delta, self.chosen[pair.id] = Full(entry.arrays["diff"], family).cast(dtype, self._recorder(pair)), (None, 0.0)
        elif self._options.family == "full":
            delta = Full(rounded(_difference(pair, "F32"), dtype, self._recorder(pair)))
            self.chosen[pair.id] = (None, 0.0)
        elif "u" in entry.arrays:
            delta = Full(_difference(pair, dtype))  # what the resize is told of: its dtype and size
        else:
            delta, magnitude = self._fitted(pair, entry, dtype)
            self.chosen[pair.id] = (delta.rank, entry.numbers["error"])
        module = Module(pair.site, pair.name, delta, Scale(1.0, "none (1.0)"), magnitude)
        if "u" in entry.arrays:
            self.subjects.append(_subject(module, pair, entry))
        elif not pair.is_vector and self._options.family != "full":
            module = self._with_alpha(module, pair)
        self.modules[pair.site] = module
        return ""

    def _fitted(self, pair: Pair, entry: Entry, dtype: str) -> tuple[Delta, Magnitude | None]:
        """A LoKr, LoHa, Tucker product or DoRA."""
        parts = dict(entry.arrays)
        magnitude = parts.pop("magnitude", None)
        kind = Kronecker if self._options.family == "lokr" else Hadamard if self._options.family == "loha" else LowRank
        if kind is LowRank:
            ones = tuple(1 for _ in pair.shape[2:])
            up, down = parts["up"], parts["down"]
            parts["up"] = up.reshape(*up.shape[:2], *ones)
            parts["down"] = down.reshape(down.shape[0], *(pair.shape[1:] if "mid" not in parts else (pair.shape[1], *ones)))
        delta = kind(**parts).cast(dtype, self._recorder(pair))
        return delta, None if magnitude is None else Magnitude(rounded(magnitude, dtype, self._recorder(pair)), "out")

    def _with_alpha(self, module: Module, pair: Pair) -> Module:
        """The alpha that is asked for, the effect unchanged."""
        alpha, delta = self._options.cut.alpha, module.delta
        if alpha in (KEEP_RATIO, "rank") or delta is None or not delta.rank:
            return module
        scale = float(alpha) / delta.rank
        return replace(module, delta=delta.scaled(1.0 / scale, self._recorder(pair)), scale=Scale(scale, "none (1.0)"))


def dtype_of(pair: Pair, options: ExtractOptions) -> str:
    """What a pair is written in."""
    return DTYPES.get(options.cut.dtype) or STORED.get(stored(pair.tuned), "BF16")


def _difference(pair: Pair, dtype: str) -> Tensor:
    """The whole difference, computed when it is written."""

    def whole() -> AnyArray:
        found = change_of(pair).delta
        assert found is not None  # noqa: S101  change_of keeps it unless told not to
        return found.reshape(pair.shape)

    return computed(dtype, pair.shape, whole)


def _subject(module: Module, pair: Pair, entry: Entry) -> Subject:
    """A matrix of which the store has the singular vectors."""
    out, width = pair.shape[0], prod(pair.shape[1:])
    limit = entry.arrays["u"].shape[0]
    source = StoredSource(entry, entry.arrays["values"].f64(), entry.numbers["residual"])

    def build(cut: Cut) -> Delta:
        ones = tuple(1 for _ in pair.shape[2:])
        return LowRank(*low_rank_factors(source, cut, (out, cut.rank, *ones), (cut.rank, *pair.shape[1:])))

    clamped = entry.numbers.get("clamped_error")
    squared = entry.numbers["squared"]
    reported = None if clamped is None else lambda _: float(np.sqrt(clamped / squared))
    return Subject(
        module, source, "lora", None, limit, (out, width), build, pair.shape, may_stay=False, reported=reported
    )  # fmt: skip
