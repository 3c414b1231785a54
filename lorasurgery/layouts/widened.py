"""Weights that an adapter makes wider: the table of the model it is for, with the input channels that its file says.

ComfyUI pads the base weight with zeros to the shape that ``reshape_weight`` says before it adds the change (2026-05
``comfy/weight_adapter``, ``pad_tensor_to_shape``). Only input channels are added.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from lorasurgery.adapter import DENOISER
from lorasurgery.architectures.from_base import resized
from lorasurgery.architectures.table import ORIGINAL
from lorasurgery.io.dtypes import INTEGERS
from lorasurgery.layouts.names import index
from lorasurgery.layouts.words import EXTRA

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.layouts.entry import Group


def as_wide(architectures: Iterable[Architecture], groups: Mapping[str, Group]) -> Architecture:
    """Of tables that fit equally well the first that is as wide as ``groups`` say; else the first one, widened."""
    first, *others = architectures
    found = widened(first, groups)
    return found if found is first else next((own for own in others if widened(own, groups) is own), found)


def widened(architecture: Architecture, groups: Mapping[str, Group]) -> Architecture:
    """``architecture`` with the weights as wide as ``groups`` say; itself where none says more than the table."""
    wider: dict[str, Shape] = {}
    for stem, own in groups.items():
        entry, place = own.modifier(EXTRA), None
        if entry is not None and entry.tensor.dtype in INTEGERS:
            place = index(architecture).find(stem)
        if entry is None or place is None or place.site.component != DENOISER or len(place.site.spans) != 1:
            continue
        weight = place.site.spans[0].weight
        shape = architecture.shapes[weight]
        if place.shape != shape or entry.tensor.shape != (len(shape),) or len(shape) < 2:
            continue
        told = tuple(int(n) for n in entry.tensor.array())
        if told[1] > shape[1] and (told[0], *told[2:]) == (shape[0], *shape[2:]):
            wider[weight] = told
    return wider_table(architecture, tuple(wider.items())) if wider else architecture


@lru_cache(maxsize=32)
def wider_table(architecture: Architecture, shapes: tuple[tuple[str, Shape], ...]) -> Architecture:
    """The same model with these weights of other shapes: the same table for the same weights, as its names are cached."""
    found = resized(architecture, ORIGINAL, {**architecture.shapes, **dict(shapes)})
    names = tuple(name for name, _ in shapes if name not in architecture.widened)
    return replace(found, variant=architecture.variant, widened=(*architecture.widened, *names))
