"""The files of a merge: one model for all of them, one granularity, and every module with its weight folded into its scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import SCALED, Adapter, Module, Scale
from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import multiplied
from lorasurgery.errors import BrokenModuleError, NotRepresentableError, RequestError
from lorasurgery.site import DENOISER, SECOND_DENOISER
from lorasurgery.verbs.merge.model import in_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.linalg.factors import AnyArray
    from lorasurgery.verbs.merge.source import Source


@dataclass(frozen=True, slots=True)
class Weighted:
    """A module of one file, and the number it is multiplied by, which its scale already contains."""

    module: Module
    weight: float
    source: int
    """Position of its file."""
    original: Module
    """As the file has it."""

    @property
    def linear(self) -> bool:
        """Whether its change is a matrix that can be scaled and added without the base weight."""
        return self.module.magnitude is None and not isinstance(self.module.delta, Opaque)


def leading(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose layout the result gets: the first that changes the diffusion model, else the first.

    Text encoders alone are spelled alike in several layouts.
    """
    return next(
        (own for own in adapters if {site.component for site in own.modules} & {DENOISER, SECOND_DENOISER}), adapters[0]
    )


def spelling_of(adapters: Sequence[Adapter]) -> tuple[Layout | None, dict[str, Adapter]]:
    """How a merge without a target spells its result: as the leading file does; and component -> the file whose keys it has.

    A component that the leading file has not is spelled as the first file of the same layout that has it.
    """
    first = leading(adapters)
    alike = [first, *(a for a in adapters if a is not first and a.layout == first.layout and a.spelling is not None)]
    homes: dict[str, Adapter] = {}
    for adapter in alike:
        for site in adapter.modules:
            homes.setdefault(site.component, adapter)
    if first.spelling is None:
        return None, homes
    prefixes = {c: p for a in reversed(alike) if a.spelling is not None for c, p in a.spelling.prefixes.items()}
    return replace(first.spelling, prefixes=prefixes), homes


def spelled_as(module: Module, first: Adapter | None) -> Module:
    """A module of the result with the keys that the file ``first`` has for it, none where it has not.

    Another file's alpha is not kept where the first file's is read by another rule (an rsLoRA flag, a LoKr with both factors
    whole): it is written anew.
    """
    own = None if first is None else first.modules.get(module.site)
    if own is not None and isinstance(own.delta, Full) and isinstance(module.delta, Full):
        module = module.with_delta(replace(module.delta, word=own.delta.word))
    if own is not None and own.name == module.name and own.keys == module.keys:
        return module
    rule = module.scale.stored is not None or (first is not None and first.spelling is not None and first.spelling.rslora)
    whole = isinstance(module.delta, Kronecker) and module.delta.rank is None
    scale = Scale(module.scale.value, module.scale.source) if rule or whole else module.scale
    keys, name, composed = ({}, module.name, module.composed) if own is None else (own.keys, own.name, own.composed)
    return replace(module, keys=keys, name=name, composed=composed, scale=scale, layer_bias=None)


def weighted(source: Source, index: int, arch: Architecture) -> list[Weighted]:
    """Every module of a file whose weight is not 0, with the weight in its scale and its bias.

    Raises RequestError for weights of what the architecture does not have.
    """
    try:
        weight = source.weight.of(arch)
    except RequestError as error:
        error.path = error.path or str(source.adapter.path or source.name)
        raise
    found = []
    for module in source.adapter.modules.values():
        value = weight(module)
        if value != 0.0:
            cut = module if source.weight.dyn is None else _first_ranks(module, source.weight.dyn, source)
            found.append(Weighted(times(in_shape(cut, arch), value), value, index, module))
    return found


def times(module: Module, value: float) -> Module:
    """The module with ``value`` in its scale and its bias, which is float64 then; the alpha tensor is forgotten."""
    if value == 1.0:
        return module
    scale = module.scale if module.delta is None else Scale(module.scale.value * value, SCALED)
    return replace(module, scale=scale, bias=None if module.bias is None else multiplied(module.bias.cast("F64"), value))


def finite(array: AnyArray, name: str) -> AnyArray:
    """``array``; raises BrokenModuleError for NaN and infinity, which masks and angles would hide."""
    if not np.isfinite(array).all():
        raise BrokenModuleError(f"{name} holds NaN or infinity in one of the files", key=name)
    return array


def _first_ranks(module: Module, count: int, source: Source) -> Module:
    """The web UIs' ``dyn``: the first ranks with the scale of all. Source: A1111 ``lyco_helpers.rebuild_conventional``."""
    delta = module.delta
    if delta is None or (isinstance(delta, LowRank) and delta.mid is None and delta.rank <= count):
        return module
    if not isinstance(delta, LowRank) or delta.mid is not None:
        raise NotRepresentableError(
            f"{module.name}: dyn takes the first {count} ranks, which only a LoRA's factors have",
            module=module.name, path=source.adapter.path, hint="no dyn for this file",
        )  # fmt: skip
    kept = [(0, count)]
    return replace(
        module,
        delta=LowRank(delta.up.columns(kept), delta.down.rows(kept)),
        scale=Scale(module.scale.value, module.scale.source),
    )
