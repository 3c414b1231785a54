"""The one model that all files of a merge are for: a variant of it, with the sizes that any of the files gives its weights."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.architectures import named
from lorasurgery.architectures.from_base import CUSTOM, resized
from lorasurgery.architectures.table import DENOISERS, ORIGINAL
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import RequestError
from lorasurgery.io.tensors import computed
from lorasurgery.layouts.detect import expected_shape, fits
from lorasurgery.layouts.emit import reshape_weight

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.verbs.merge.source import Source

WIDE = ".reshape_weight"
"""The suffix of the tensor that says how wide the base weight is to be made."""


def architecture_for(sources: Sequence[Source]) -> Architecture:
    """The variant that has every module of every file with its shape; raises RequestError when none does.

    A weight that one file makes wider (``reshape_weight``) is that wide for all: their changes are of its first columns.
    """
    every = list(_candidates(list(dict.fromkeys(source.adapter.architecture for source in sources))))
    misfit = None
    for arch in every:
        found = next(((s, m) for s in sources for m in s.adapter.modules.values() if not _has(arch, m)), None)
        if found is None:
            return arch
        misfit = misfit or found
    source, module = misfit if misfit is not None else (sources[0], next(iter(sources[0].adapter.modules.values())))
    weight, shape = module.site.spans[0].weight, () if module.delta is None else module.delta.shape
    has = f"{list(every[0].shapes[weight])}" if weight in every[0].shapes else "none"
    raise RequestError(
        f"{source.name}: {module.name} is {list(shape)} and does not fit {every[0].name}, the model of "
        f"{sources[0].name}, which has {has} there",
        hint="files for one size of the model",
    )


def _candidates(own: Sequence[Architecture]) -> Iterator[Architecture]:
    """The tables of the files, the variants of the model, and its table with the sizes of all files."""
    yield from own
    first = own[0]
    if len(own) == 1 or first.id == CUSTOM:
        return
    yield from (arch.with_own(first.own) for arch in named(first.id))
    yield from (_joined(one, own) for one in own)


def _joined(first: Architecture, others: Sequence[Architecture]) -> Architecture:
    """The table with the sizes that the others give to weights that their own table has otherwise."""
    published = {arch.key: arch.shapes for arch in named(first.id)}
    alike = [arch for arch in others if arch.key.startswith(first.key) or first.key.startswith(arch.key)]
    found = dict(first.shapes)
    for arch in alike:
        plain = published.get(arch.key.removesuffix("-custom"), first.shapes)
        found |= {name: shape for name, shape in arch.shapes.items() if plain.get(name, shape) != shape}
    joined = resized(first, ORIGINAL, found)
    widened = dict.fromkeys(name for arch in (first, *alike) for name in arch.widened)
    return replace(joined, variant=first.variant, own=first.own, widened=tuple(widened))


def _has(arch: Architecture, module: Module) -> bool:
    try:
        expected = expected_shape(arch, module.site)
    except KeyError:
        return False
    return all(span.stop <= arch.shapes.get(span.weight, (span.stop,))[0] for span in module.site.spans) and (
        module.delta is None or fits(module.delta.shape, expected) or _columns(module, arch, expected) is not None
    )


def _columns(module: Module, arch: Architecture, expected: Shape) -> int | None:
    """The input channels of a change of fewer than a weight has that an adapter made wider; None for any other module."""
    delta = module.delta
    wide = module.site.component in DENOISERS and module.site.spans[0].weight in arch.widened
    if not wide or not isinstance(delta, (LowRank, Full)) or len(delta.shape) < 2 or delta.shape[0] != expected[0]:
        return None
    if isinstance(delta, LowRank) and delta.mid is not None:
        return None
    columns, rest = divmod(prod(delta.shape[1:]), prod(expected[2:]))
    return columns if not rest and columns < expected[1] else None


def in_shape(module: Module, arch: Architecture) -> Module:
    """A LoRA's factors and a full difference with as many axes and columns as the layer: files have flat convolutions, too."""
    shape, delta = expected_shape(arch, module.site), module.delta
    if delta is None or len(shape) < 2 or delta.shape == shape:
        return module
    if WIDE in module.extras:  # of another width than that of another file
        module = replace(module, extras={**module.extras, WIDE: reshape_weight(shape)})
    columns = _columns(module, arch, shape) or shape[1]
    ones = tuple(1 for _ in shape[2:])
    if isinstance(delta, LowRank) and delta.mid is None:
        up = delta.up.reshape(shape[0], delta.rank, *ones)
        down = _widened(delta.down.reshape(delta.rank, columns, *shape[2:]), shape[1])
        return replace(module, delta=LowRank(up, down))
    if isinstance(delta, Full):
        return replace(module, delta=replace(delta, diff=_widened(delta.diff.reshape(shape[0], columns, *shape[2:]), shape[1])))
    return module


def _widened(tensor: Tensor, columns: int) -> Tensor:
    """``tensor`` with zeros for the columns that it lacks: exact."""
    have = tensor.shape[1]
    if have == columns:
        return tensor
    before = [(0, columns - have if axis == 1 else 0) for axis in range(len(tensor.shape))]
    shape = (tensor.shape[0], columns, *tensor.shape[2:])
    return computed(tensor.dtype, shape, lambda: np.pad(tensor.array(), before))
