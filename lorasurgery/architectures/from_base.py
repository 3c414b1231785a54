"""A table made from a checkpoint's own header, for a model no table knows or one that was changed."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import (
    DIFFUSERS,
    Architecture,
    Block,
    Names,
    Part,
    Row,
    Shape,
    row,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

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
        for naming in ("original", DIFFUSERS):
            known = arch.namings[naming]
            if known and sum(name in known for name in shapes) >= NEARLY * len(shapes):
                resized = _resized(arch, naming, shapes)
                if resized is not None:
                    return resized
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


def _resized(arch: Architecture, naming: str, shapes: Mapping[str, Shape]) -> Architecture | None:
    """``arch`` with the rows and shapes of a base that uses its names; None when a fused weight cannot be cut alike."""
    rows: list[Row | Block] = []
    parts_of: dict[str, list[tuple[int, int, str]]] = {}
    for name, spans in arch.namings[DIFFUSERS].items():
        parts_of.setdefault(spans[0].weight, []).append((min(s.start for s in spans), len(spans), name))
    trained = {spans[0].weight: name for name, spans in arch.namings["sd_scripts"].items()}
    for weight, full in arch.shapes.items():
        members = sorted(parts_of.get(weight, []))
        own = _base_shape(weight, full, naming, members, arch, shapes)
        if own is None:
            continue
        if own[0] % 1 or any((arch_rows * own[0]) % full[0] for arch_rows in _part_rows(arch, members)):
            return None
        rows.append(_resized_row(arch, weight, own, full, members, trained))
    return (
        replace(arch, rows=tuple(rows), variant=(arch.variant + "-" if arch.variant else "") + "custom")
        if rows
        else None
    )


def _part_rows(arch: Architecture, members: Sequence[tuple[int, int, str]]) -> list[int]:
    return [sum(s.stop - s.start for s in arch.namings[DIFFUSERS][name]) for *_, name in members]


def _base_shape(
    weight: str,
    full: Shape,
    naming: str,
    members: Sequence[tuple[int, int, str]],
    arch: Architecture,
    shapes: Mapping[str, Shape],
) -> Shape | None:
    """The shape the base has for an original weight, put together from its parts if the base is in Diffusers' names."""
    if naming != DIFFUSERS:
        return shapes.get(weight)
    own = [shapes.get(name) for *_, name in members]
    if not own or any(shape is None for shape in own):
        return None
    present = [shape for shape in own if shape is not None]
    return (sum(shape[0] for shape in present), *present[0][1:])


def _resized_row(
    arch: Architecture,
    weight: str,
    own: Shape,
    full: Shape,
    members: Sequence[tuple[int, int, str]],
    trained: Mapping[str, str],
) -> Row:
    def scaled(rows: int) -> int:
        return rows * own[0] // full[0]

    diffusers = None
    if members:
        sizes = _part_rows(arch, members)
        parts = tuple(Part(name, scaled(size)) for (*_, name), size in zip(members, sizes, strict=True))
        diffusers = Names(parts, swap_halves=any(spans > 1 for _, spans, _ in members))
    own_names = (
        [
            (s[0].start, n, s[0].stop - s[0].start)
            for n, s in arch.namings["sd_scripts"].items()
            if s[0].weight == weight
        ]
        if arch.sd_scripts == "sd_scripts"
        else []
    )
    sd_scripts = Names(tuple(Part(n, scaled(size)) for _, n, size in sorted(own_names))) if own_names else None
    if prod(own) == 0 or not trained:
        sd_scripts = None
    return Row(weight, own, diffusers, sd_scripts)
