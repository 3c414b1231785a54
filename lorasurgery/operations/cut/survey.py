"""Which modules of an adapter can and shall be cut, and their singular values."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.errors import BrokenModuleError, NoRoomError, NotRepresentableError
from lorasurgery.io.dtypes import BITS
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.linalg.threads import map_threads
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.cut.batches import Numpy, batches, is_plain, measured_together
from lorasurgery.operations.cut.dora import folded_subject, recomputed_subject
from lorasurgery.operations.cut.families import dtype_of, subject_of
from lorasurgery.operations.cut.options import KOHYA
from lorasurgery.operations.cut.pick import named
from lorasurgery.operations.cut.sources import NARROW, ComputedSource, FactoredSource
from lorasurgery.operations.cut.subject import CONV, LINEAR, POINTWISE, kind_of
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.operations.cut.base import BaseModel
    from lorasurgery.operations.cut.batches import Backend
    from lorasurgery.operations.cut.options import ResizeOptions
    from lorasurgery.operations.cut.subject import Subject


CORE_BYTES = 48 << 20
"""Small matrices of all modules that may be held together; beyond it they are computed again once the ranks are known."""

MOST_WORKERS = 8
"""Threads unless more are asked for: beyond that they wait for memory."""


@dataclass(slots=True)
class Survey:
    """What can be cut, and what stays with the reason."""

    adapter: Adapter
    subjects: list[Subject] = field(default_factory=list)
    kept: list[tuple[Module, str]] = field(default_factory=list)


def survey(
    adapter: Adapter, options: ResizeOptions, base: BaseModel | None = None, then: Callable[[Subject], None] | None = None
) -> Survey:
    """Sort the modules and measure those that shall be cut, on N threads with one BLAS thread each.

    ``then`` is called with each subject on its thread, while the factors are at hand.
    Raises NotRepresentableError for DoRA modules without a base, for LoHa where anything but a fixed rank is asked,
    BrokenModuleError for NaN and infinity.
    """
    found, options = Survey(adapter), options.on(adapter.architecture)
    wanted: list[Module] = []
    for module in adapter.modules.values():
        reason = _stays(module, options) or _is_low_enough(adapter, module, options)
        if reason is None:
            _refuse(adapter, module, options, base)
            wanted.append(module)
        else:
            found.kept.append((module, reason))

    keep = sum(_core_bytes(adapter, module, options) for module in wanted) <= CORE_BYTES
    backend: Backend = Numpy() if options.device is None else _device(options.device)

    def measured(batch: Sequence[Module]) -> list[Subject]:
        subjects = []
        for module, known in zip(batch, _together(adapter, batch, options, backend), strict=True):
            subject = _subject(adapter, module, options, base, known)
            subjects.append(subject)
            if then is not None:
                then(subject)
            source = subject.source
            if isinstance(source, (FactoredSource, ComputedSource)):
                source.forget()
            if isinstance(source, FactoredSource) and (not keep or subject.ready is not None):
                source.core = None
        return subjects

    workers = workers_of(options) if options.device is None else 1
    several = batches(wanted, lambda module: _needed(adapter, module, options), backend.batch_bytes // workers)
    done = {subject.module.site: subject for own in map_threads(measured, several, workers) for subject in own}
    found.subjects = [done[module.site] for module in wanted]
    return found


def _device(name: str) -> Backend:
    from lorasurgery.operations.cut.device import Device

    return Device(name)


def _together(
    adapter: Adapter, batch: Sequence[Module], options: ResizeOptions, backend: Backend
) -> Iterable[FactoredSource | None]:
    """Plain LoRAs measured; None for what is measured as its family asks."""
    if not is_plain(batch[0], _needed(adapter, batch[0], options)):
        return [None] * len(batch)

    def narrow(module: Module) -> bool:
        return module.delta is not None and dtype_of(module.delta, DTYPES.get(options.dtype, "keep")) in NARROW

    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is None
            return list(measured_together(batch, _needed(adapter, batch[0], options), narrow, backend))
    except NoRoomError as error:
        raise NoRoomError(f"{batch[0].name}: {error.message}", path=adapter.path, hint=error.hint) from error


def _needed(adapter: Adapter, module: Module, options: ResizeOptions) -> int | None:
    """How many singular values decide, at least one; None: all."""
    asked = rank_asked(module, kind_of(expected_shape(adapter.architecture, module.site)), options)
    return max(asked, 1) if options.is_fixed and asked is not None else None


def _subject(
    adapter: Adapter, module: Module, options: ResizeOptions, base: BaseModel | None, known: FactoredSource | None
) -> Subject:
    """The module measured; raises BrokenModuleError for NaN and infinity."""
    shape, needed = expected_shape(adapter.architecture, module.site), _needed(adapter, module, options)
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, with the module's name
            if module.magnitude is not None and base is not None:
                weight = base.weight(module.site)
                if options.dora == "fold":
                    return folded_subject(module, shape, needed, weight)
                return recomputed_subject(module, shape, needed, weight, as_lora=options.as_lora)
            dtype = DTYPES.get(options.dtype, "keep")
            return subject_of(module, shape, needed, as_lora=options.as_lora, measured=known, dtype=dtype)
    except ValueError as error:
        raise BrokenModuleError(
            f"{module.name}: {error}", key=module.name, path=adapter.path, hint="an earlier checkpoint of the training run"
        ) from error


def _core_bytes(adapter: Adapter, module: Module, options: ResizeOptions) -> int:
    """What the small matrices of a module take."""
    rank = 0 if module.delta is None else module.delta.rank or 0
    asked = rank_asked(module, kind_of(expected_shape(adapter.architecture, module.site)), options)
    needed = min(rank, asked) if options.is_fixed and asked is not None else rank
    return 8 * rank * needed


def result_bytes(adapter: Adapter, options: ResizeOptions) -> int:
    """What the results take together where the options name every rank."""
    total = 0
    for module in adapter.modules.values():
        if module.delta is not None and _stays(module, options) is None:
            shape = expected_shape(adapter.architecture, module.site)
            sides = (shape[0], prod(shape[1:]))
            limits = (rank_asked(module, kind_of(shape), options), module.delta.rank, *sides)
            rank = min(limit for limit in limits if limit is not None)
            total += rank * sum(sides) * BITS[dtype_of(module.delta, DTYPES.get(options.dtype, "keep"))] // 8
    return total


def workers_of(options: ResizeOptions) -> int:
    """How many threads work."""
    return options.workers or min(os.cpu_count() or 1, MOST_WORKERS)


def rank_asked(module: Module, kind: str, options: ResizeOptions) -> int | None:
    """The rank that the options name for a module of this kind: by its name, else by its kind; None: none.

    The options are those of :meth:`ResizeOptions.on` the module's architecture, here and in :func:`named_rank`.
    """
    for pattern, rank in options.ranks:
        if named(module, pattern):
            return rank
    conv = options.rank if options.conv_rank is None else options.conv_rank
    pointwise = conv if options.compat == KOHYA else options.rank
    return {
        LINEAR: options.rank,
        CONV: conv,
        POINTWISE: pointwise if options.pointwise_rank is None else options.pointwise_rank,
    }[kind]


def _stays(module: Module, options: ResizeOptions) -> str | None:
    """Why a module is left as it is; None if it is to be cut."""
    delta = module.delta
    encoder = module.site.component not in (DENOISER, SECOND_DENOISER)
    excluded = options.include and not any(named(module, p) for p in options.include)
    reasons = (
        (delta is None, "a bias has no rank"),
        (isinstance(delta, Opaque), f"{module.family} needs the base weight and has no rank"),
        (isinstance(delta, Full) and len(delta.shape) < 2, "a norm has no rank"),
        (bool(excluded) or any(named(module, p) for p in options.exclude), "excluded"),
        (isinstance(delta, Full) and not options.full, "a full difference"),
        (encoder and not options.text_encoders, "a text encoder's"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def _is_low_enough(adapter: Adapter, module: Module, options: ResizeOptions) -> str | None:
    """Why a DoRA that no base model is to say more about stays: its magnitude is right as long as nothing is cut."""
    rank = None if module.delta is None or module.magnitude is None or options.dora != "refuse" else module.delta.rank
    if rank is None or not (options.is_fixed or named_rank(module, options)):
        return None
    asked = rank_asked(module, kind_of(expected_shape(adapter.architecture, module.site)), options)
    return "a DoRA of no higher rank" if asked is not None and rank <= asked else None


def _refuse(adapter: Adapter, module: Module, options: ResizeOptions, base: BaseModel | None) -> None:
    """Raises for what needs the base model or another family."""
    if module.magnitude is not None and (options.dora == "refuse" or base is None):
        raise NotRepresentableError(
            f"{module.name}: its DoRA magnitude belongs to the change it has now; a smaller one needs another magnitude, "
            "which only the base model can give",
            module=module.name,
            path=adapter.path,
            hint="the base model with dora recompute or fold, or exclude these modules",
        )
    if module.family == "loha" and not options.as_lora and not (options.is_fixed or named_rank(module, options)):
        raise NotRepresentableError(
            f"{module.name}: a LoHa has no singular values of its own to choose a rank by",
            module=module.name,
            path=adapter.path,
            hint="as LoRA, or a fixed rank",
        )


def named_rank(module: Module, options: ResizeOptions) -> bool:
    """Whether :attr:`ResizeOptions.ranks` decides this module."""
    return any(named(module, pattern) for pattern, _ in options.ranks)
