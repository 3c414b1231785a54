"""Weights that an adapter makes wider: the table of the model it is for, with the input channels that its file says.

ComfyUI pads the base weight with zeros to the shape that ``reshape_weight`` says before it adds the change (2026-05
``comfy/weight_adapter``, ``pad_tensor_to_shape``). Only input channels are added.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from lorasurgery.architectures.from_base import resized
from lorasurgery.architectures.table import ORIGINAL
from lorasurgery.io.dtypes import INTEGERS
from lorasurgery.layouts.names import index
from lorasurgery.layouts.words import EXTRA
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.layouts.entry import Group


def as_wide(architectures: Iterable[Architecture], groups: Mapping[str, Group]) -> Architecture:
    """Of tables that fit equally well the first that is as wide as ``groups`` say; else the first one, widened."""
    first, *others = architectures
    if not any(own.modifier(EXTRA) for own in groups.values()):
        return first
    said = _said(first, groups)
    exact = (arch for arch in (first, *others) if all(arch.shapes.get(weight) == shape for weight, shape in said.items()))
    found = next(exact, first)
    wider = tuple((weight, shape) for weight, shape in said.items() if _is_wider(shape, found.shapes.get(weight, ())))
    return wider_table(found, wider) if wider else found


def _said(architecture: Architecture, groups: Mapping[str, Group]) -> dict[str, Shape]:
    """Weight -> the shape that the file says it has; weights that are whole modules only."""
    found: dict[str, Shape] = {}
    for stem, own in groups.items():
        entry, place = own.modifier(EXTRA), None
        if entry is not None and entry.tensor.dtype in INTEGERS and len(entry.tensor.shape) == 1:
            place = index(architecture).find(stem)
        if entry is None or place is None or place.site.component != DENOISER or len(place.site.spans) != 1:
            continue
        weight = place.site.spans[0].weight
        if place.shape == architecture.shapes[weight]:
            found[weight] = tuple(int(n) for n in entry.tensor.array())
    return found


def _is_wider(shape: Shape, own: Shape) -> bool:
    """Whether a weight of ``shape`` is one of shape ``own`` with more input channels."""
    return len(shape) == len(own) > 1 and shape[1] > own[1] and (shape[0], *shape[2:]) == (own[0], *own[2:])


@lru_cache(maxsize=32)
def wider_table(architecture: Architecture, shapes: tuple[tuple[str, Shape], ...]) -> Architecture:
    """The same model with these weights of other shapes: the same table for the same weights, as its names are cached."""
    found = resized(architecture, ORIGINAL, {**architecture.shapes, **dict(shapes)})
    names = tuple(name for name, _ in shapes if name not in architecture.widened)
    return replace(found, variant=architecture.variant, widened=(*architecture.widened, *names))
