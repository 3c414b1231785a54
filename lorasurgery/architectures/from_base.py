"""A table made from a checkpoint's own header, for a model no table knows or one that was changed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import DIFFUSERS, NAMINGS, SD_SCRIPTS, Architecture, Names, Part, Row, row

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorasurgery.architectures.table import Base, Shape
    from lorasurgery.io.tensors import Tensor

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.")
NEARLY = 0.9
"""A known table is used for a base when it names at least this share of the base's weights."""


def from_base(tensors: Mapping[str, Tensor], path: Path) -> Architecture:
    """The architecture of a base model, from its names and shapes only.

    A known architecture whose names these are keeps its names for every layout, with the base's own shapes (a smaller
    or wider model); otherwise the base's names are taken as they are in every layout.
    """
    shapes = _module_shapes(tensors)
    for arch in architectures().values():
        for naming in NAMINGS:
            if sum(name in arch.namings[naming] for name in shapes) >= NEARLY * len(shapes):
                return _resized(arch, naming, shapes)
    return Architecture(
        id="custom",
        variant="",
        name=path.stem,
        source=path.name,
        rows=tuple(row(name, shape) for name, shape in shapes.items()),
    )


def _module_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Module name -> weight shape, a common prefix stripped; only the denoiser of an all-in-one checkpoint."""
    names = {name.removesuffix(".weight"): t.shape for name, t in tensors.items() if name.endswith(".weight")}
    for prefix in _PREFIXES:
        inside = {name[len(prefix) :]: shape for name, shape in names.items() if name.startswith(prefix)}
        if inside and (prefix == _PREFIXES[0] or len(inside) > len(names) // 2):
            return inside
    return names


def _resized(arch: Architecture, naming: str, shapes: Mapping[str, Shape]) -> Architecture:
    """``arch`` with the weights and shapes of a base in one of its namings; parts keep their share of the rows.

    When every shape is the table's own, the table itself is returned.
    """
    own = {base: _own_shape(base, naming, shapes) for base in arch.expanded()}
    if all(shape == base.shape for base, shape in own.items() if shape is not None):
        return arch
    rows = tuple(
        Row(base.name, shape, _scaled(base.in_naming(DIFFUSERS), shape[0]), _scaled(base.in_naming(SD_SCRIPTS), shape[0]))
        for base, shape in own.items()
        if shape is not None
    )
    return replace(arch, rows=rows, variant="-".join(filter(None, (arch.variant, "custom"))))


def _own_shape(base: Base, naming: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The base's shape of a weight, put together from its parts; None when one is missing."""
    parts = [shapes.get(part.name) for part in base.in_naming(naming).parts]
    present = [shape for shape in parts if shape is not None]
    if not present or len(present) < len(parts):
        return None
    return (sum(shape[0] for shape in present), *present[0][1:])


def _scaled(names: Names, rows: int) -> Names:
    total = sum(part.rows for part in names.parts)
    return Names(tuple(Part(part.name, part.rows * rows // total) for part in names.parts), names.swap_halves)
