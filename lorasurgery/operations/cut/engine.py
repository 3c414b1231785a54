"""Resize: measure every module, choose the ranks, and describe the result.

Where the options name the ranks, results are made while the factors are in memory: all of them up to ``ALL_HELD`` bytes, of
more the first ``HELD`` bytes. All others are computed when they are written. Neither needs more memory than the file and a few
small matrices.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import Adapter, Module, Scale, written_in
from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import RequestError, SurgeryError
from lorasurgery.io.tensors import computed, of_array, stack, zeros
from lorasurgery.linalg.threads import map_threads
from lorasurgery.operations.conversion.cast import cast_module
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.conversion.settled import settled
from lorasurgery.operations.cut.block_args import with_block_args
from lorasurgery.operations.cut.choose import Choice, choose, cost_of, fixed_choice
from lorasurgery.operations.cut.families import dtype_of
from lorasurgery.operations.cut.network_args import with_network_args
from lorasurgery.operations.cut.options import KEEP_RATIO, KOHYA, ResizeOptions
from lorasurgery.operations.cut.pick import has_list, unfitting
from lorasurgery.operations.cut.report import ModuleReport, ResizeReport
from lorasurgery.operations.cut.size import file_size
from lorasurgery.operations.cut.sources import ComputedSource, FactoredSource
from lorasurgery.operations.cut.subject import Cut, Subject
from lorasurgery.operations.cut.survey import CORE_BYTES, Survey, result_bytes, survey, workers_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.deltas.delta import Delta
    from lorasurgery.operations.cut.base import BaseModel

ALL_HELD, HELD = 176 << 20, 64 << 20
"""Bytes of results that may be held in memory until they are written: of all of them, and of as many as that are."""


def resize(adapter: Adapter, options: ResizeOptions, base: BaseModel | None = None) -> tuple[Adapter, ResizeReport]:
    """The adapter with other ranks, in its own layout and families, and what that did to each module.

    The result is the best approximation of its rank (Eckart-Young) except where the report's ``note`` says otherwise.
    The singular values are computed now, most of the new factors when the result is saved. Modules of rank 0 are not in the
    result, as a 0 in sd-scripts' ``block_dims`` means, and count in the error. Where a list gave the ranks by block, or those
    of the file, sd-scripts' fields for it are in ``ss_network_args``. Raises RequestError for options and where nothing is
    left, NotRepresentableError for modules that cannot be cut, BrokenModuleError for NaN, UnknownArchitectureError where models
    that the keys fit equally well give different results in the target.
    """
    started = time.perf_counter()
    options.check()
    if options.layout is not None:  # before the work, which may take minutes
        settled(adapter, written_in(adapter, options.layout))
    options = options.on(adapter.architecture)
    report = ResizeReport(warnings=unfitting(options.patterns, adapter.modules.values()))
    held = None
    if options.is_fixed and not options.uniform:
        held = Held(options, report, ALL_HELD if result_bytes(adapter, options) <= ALL_HELD else HELD)
    found = survey(adapter, options, base, None if held is None else held.make)
    result, report = _resized(found, options, base, report, started)
    layout, asked = options.layout or adapter.layout, has_list(options.ranks)
    result = replace(result, metadata=with_block_args(result, adapter.metadata, layout, asked=asked))
    if options.has_size:
        report.size = file_size(result, options.layout)
    return result, report


def resized_from(found: Survey, options: ResizeOptions, base: BaseModel | None = None) -> tuple[Adapter, ResizeReport]:
    """The same from a survey that was made with the same options but for the ranks."""
    options = options.on(found.adapter.architecture)
    return _resized(found, options, base, ResizeReport(), time.perf_counter())


class Held:
    """Makes results while their factors are at hand, as many as fit into ``room`` bytes; the rest wait for the writer."""

    def __init__(self, options: ResizeOptions, report: ResizeReport, room: int) -> None:
        self._options, self._report, self._left, self._lock = options, report, room, Lock()

    def make(self, subject: Subject) -> None:
        """Compute the result of a subject, unless it stays as it is or needs more than its factors."""
        choice = fixed_choice(subject, self._options)
        source = subject.source
        if not choice.rank or choice.untouched or subject.magnitude is not None:
            return
        if not isinstance(source, (FactoredSource, ComputedSource)) or not source.at_hand:
            return
        size = choice.rank * cost_of(subject, self._options)
        with self._lock:
            if size > self._left:
                return
            self._left -= size
        made = subject.build(_cut(subject, choice, self._options, self._report))
        if isinstance(made, LowRank):
            with suppress(SurgeryError):  # a value out of range is told when it is written, with its key
                up, down = (of_array(tensor.array(), tensor.dtype) for tensor in (made.up, made.down))
                subject.ready = LowRank(up, down)


def _resized(
    found: Survey, options: ResizeOptions, base: BaseModel | None, report: ResizeReport, started: float
) -> tuple[Adapter, ResizeReport]:
    if not found.subjects:
        reasons = sorted({reason for _, reason in found.kept})
        rankless = bool(found.kept) and all(isinstance(module.delta, Opaque) for module, _ in found.kept)
        others = "text encoders, full differences, or other patterns"
        raise RequestError(
            f"nothing to resize: {'; '.join(reasons) or 'the file has no modules'}", path=found.adapter.path,
            hint="extracting a LoRA from the model with it applied" if rankless else others,
        )  # fmt: skip
    report.kept = [(module.name, reason) for module, reason in found.kept]

    def size_of(choices: Sequence[Choice]) -> int:
        return file_size(_applied(found, choices, options, ResizeReport()), options.layout)

    choices, report.threshold = choose(found.subjects, options, base, size_of)
    _prepare(found, choices, options)
    result = _applied(found, choices, options, report)
    for subject, choice in zip(found.subjects, choices, strict=True):
        report.modules.append(_reported(subject, choice, _cut(subject, choice, options, report)))
    if len(result) == 0:
        raise RequestError(
            "no module would be left", path=found.adapter.path, hint="a lower threshold, min rank 1, or a rank above 0"
        )
    report.warnings += report.alerts()
    report.seconds = time.perf_counter() - started
    return result, report


def _prepare(found: Survey, choices: Sequence[Choice], options: ResizeOptions) -> None:
    """Compute what the survey had to forget, on all threads, where what is needed of it is small enough to be held."""
    pairs = [
        (subject.source, choice.kept)
        for subject, choice in zip(found.subjects, choices, strict=True)
        if isinstance(subject.source, FactoredSource)
        and subject.source.core is None
        and subject.ready is None
        and not choice.untouched
    ]
    if sum(8 * source.down.shape[0] * len(kept) for source, kept in pairs) <= CORE_BYTES:
        map_threads(lambda pair: pair[0].prepare(pair[1]), pairs, workers_of(options))


def _applied(found: Survey, choices: Sequence[Choice], options: ResizeOptions, report: ResizeReport) -> Adapter:
    """The adapter with these choices; its new factors are not computed yet."""
    adapter = found.adapter
    chosen = {s.module.site: (s, c) for s, c in zip(found.subjects, choices, strict=True)}
    modules, pairs = {}, []
    for site, module in adapter:
        if site not in chosen:
            modules[site] = _cast(module, options, report)
            continue
        subject, choice = chosen[site]
        if choice.rank or module.bias is not None:
            modules[site] = _cast(_cut_module(subject, choice, options, report), options, report)
            pairs.append((subject, modules[site]))
    return replace(adapter, modules=modules, metadata=with_network_args(adapter.metadata, pairs), path=None)


def _cut_module(subject: Subject, choice: Choice, options: ResizeOptions, report: ResizeReport) -> Module:
    module = subject.module
    if not choice.rank:
        return replace(module, delta=None, magnitude=None, scale=Scale(1.0, "none (1.0)"))
    cut = _cut(subject, choice, options, report)
    scale = module.scale.value * _rescale(options) / cut.factor if cut.factor else module.scale.value
    if not choice.untouched:
        delta = subject.build(cut) if subject.ready is None else subject.ready
        done = replace(module, delta=delta, scale=Scale(scale, module.scale.source))
        return done if subject.magnitude is None else replace(done, magnitude=subject.magnitude(cut))
    assert module.delta is not None  # noqa: S101  it has a rank
    delta = _padded(module.delta, choice.rank)
    if options.dtype != "keep":
        delta = delta.cast(DTYPES[options.dtype], cut.record)
    if cut.factor != 1.0:
        delta = delta.scaled(cut.factor, cut.record)
    return module.with_delta(delta, scale)


def _cut(subject: Subject, choice: Choice, options: ResizeOptions, report: ResizeReport) -> Cut:
    """How to cut; ``factor`` goes into the factors and comes off the scale, so that the effect stays."""
    module, wanted = subject.module, DTYPES.get(options.dtype, "keep")
    assert module.delta is not None  # noqa: S101  it is a subject
    record = partial(report.losses.record, module.name)
    old, factor = module.scale.value * _rescale(options), _rescale(options)
    if options.alpha != KEEP_RATIO and old != 0.0 and choice.rank:
        factor = old if options.alpha == "rank" else old * choice.rank / float(options.alpha)
    elif subject.form != module.family:  # another family's alpha has no ratio to keep
        factor = old
    return Cut(choice.kept, choice.rank, factor, options.factors == KOHYA, dtype_of(module.delta, wanted), record)


def _rescale(options: ResizeOptions) -> float:
    recipe = options.parsed_recipe()
    return 1.0 if recipe is None else recipe.rescale


def _padded(delta: Delta, rank: int) -> Delta:
    """A LoRA's own factors with zero columns and rows: exact."""
    if not isinstance(delta, LowRank) or delta.mid is not None or rank <= delta.rank:
        return delta
    more = rank - delta.rank
    down = stack([delta.down, zeros(delta.down.dtype, (more, *delta.down.shape[1:]))])
    turned = delta.up.reshape(*delta.up.shape[:2])

    up = computed(turned.dtype, (turned.shape[0], rank), lambda: np.pad(turned.array(), ((0, 0), (0, more))))
    return LowRank(up.reshape(delta.up.shape[0], rank, *delta.up.shape[2:]), down)


def _cast(module: Module, options: ResizeOptions, report: ResizeReport) -> Module:
    """Everything that is not in the asked dtype yet."""
    if options.dtype == "keep":
        return module
    return cast_module(module, DTYPES[options.dtype], lambda name: partial(report.losses.record, name))


def _reported(subject: Subject, choice: Choice, cut: Cut) -> ModuleReport:
    module, values = subject.module, subject.values
    norm, total = subject.squared_norm, float(np.sum(values))
    error = 0.0 if choice.untouched or norm == 0.0 else np.sqrt(subject.squared_error(choice.kept) / norm)
    if subject.reported is not None and choice.rank and not choice.untouched:
        error = subject.reported(cut)
    kept = values[choice.kept]
    smallest = float(kept[-1]) if kept.size else 0.0
    action = "resized" if subject.form == module.family else f"to {NAMES[subject.form]}"
    if choice.untouched:
        action = "unchanged" if choice.rank <= (subject.old_rank or choice.rank) else "padded"
    return ModuleReport(
        name=module.name,
        component=module.site.component,
        kind=subject.kind,
        was=module.family,
        family="" if not choice.rank else module.family if choice.untouched else subject.form,
        action=action if choice.rank else "left out",
        old_rank=subject.old_rank,
        new_rank=subject.length if choice.untouched and subject.old_rank is None else choice.rank,
        relative_error=float(error),
        squared_norm=norm if subject.effect is None else subject.effect(),
        sum_kept=float(np.sum(kept)) / total if total else 1.0,
        max_ratio=float(values[0]) / smallest if smallest else 1.0,
        note="" if choice.untouched else subject.note,
    )


NAMES = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "dora": "DoRA"}
