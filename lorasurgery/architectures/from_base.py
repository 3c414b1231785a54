"""A table made from a checkpoint's own header, for a model no table knows or one that was changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import (
    DENOISERS,
    DIFFUSERS,
    NAMINGS,
    SD_SCRIPTS,
    Architecture,
    Names,
    Own,
    Part,
    Row,
    name_pattern,
    row,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lorasurgery.architectures.table import Base, Shape
    from lorasurgery.io.tensors import Tensor

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.")
CUSTOM = "custom"
"""The id of a table made of names."""
_SUFFIXES = (".weight", ".scale")
"""``.scale``: the RMS norms of FLUX and Chroma."""
NEARLY = 0.9
"""A known table is used for a base when it names at least this share of the base's weights, whatever their sizes."""
SAME = 0.5
"""It is also used, and extended by the base's other names, when it names this share of them and nearly all in the same size."""


def known_table(shapes: Mapping[str, Shape], among: Iterable[Architecture]) -> tuple[Architecture, str] | None:
    """The table of which a model with these weights is a size or a newer variant, and the naming; None where none is."""
    found = closest(shapes, among, SAME)
    if found is None:
        return None
    arch, naming = found
    known = {name: arch.module_shape(spans) for name, spans in arch.namings[naming].items() if name in shapes}
    alike = sum(shapes[name] == shape for name, shape in known.items())
    return found if len(known) >= NEARLY * len(shapes) or alike >= NEARLY * len(known) else None


def extended(arch: Architecture, naming: str, shapes: Mapping[str, Shape], bare: Mapping[str, Shape]) -> Architecture:
    """A table with the weights of a base that it has not, under the base's own names; ``bare`` are parameters of no module.

    Such a name is one of the naming that the base is in. It is another naming's too where the table has the modules beside
    it in the same place there, some under the same name.
    """
    known = arch.namings[naming]
    alike = {other: _alike(arch, naming, other) for other in NAMINGS if other != naming}
    own = []
    for name, shape in (*shapes.items(), *bare.items()):
        if name in known:
            continue
        parent = name.rpartition(".")[0]
        others = [other for other, parents in alike.items() if parent in parents]
        own += [Own(DENOISERS[0], name, shape, other) for other in (naming, *others)]
    return arch.with_own(own)


def _alike(arch: Architecture, naming: str, other: str) -> frozenset[str]:
    """The parts of a model whose modules stand in the same part in another naming, some of them under the same name."""
    theirs = {spans: name for name, spans in arch.namings[other].items()}
    same: set[str] = set()
    moved: set[str] = set()
    for name, spans in arch.namings[naming].items():
        parent, there = name.rpartition(".")[0], theirs.get(spans)
        if there == name:
            same.add(parent)
        elif there is None or there.rpartition(".")[0] != parent:
            moved.add(parent)
    return frozenset(same - moved)


def custom(shapes: Mapping[str, Shape], path: Path) -> Architecture:
    """A table of these modules, whose names are the same in every layout."""
    rows = tuple(row(name, shape) for name, shape in shapes.items())
    return Architecture(id=CUSTOM, variant="", name=path.stem, source=path.name, rows=rows)


def bare_parameters(tensors: Mapping[str, Tensor], prefix: str, modules: Mapping[str, Shape]) -> dict[str, Shape]:
    """The parameters under a prefix that are no weight, bias or scale of a module, by their whole names."""
    names = ((key[len(prefix) :], tensor.shape) for key, tensor in tensors.items() if key.startswith(prefix))
    return {
        name: shape
        for name, shape in names
        if shape and not name.endswith((*_SUFFIXES, ".bias")) and name.rpartition(".")[0] not in modules
    }


def module_shapes(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Shape]]:
    """A common prefix, and module name -> weight shape without it; only the denoiser of an all-in-one checkpoint."""
    names: dict[str, Shape] = {}
    for name, tensor in tensors.items():
        module = _module(name, tensor.shape)
        if module is not None and not (module in names and name.endswith(_SUFFIXES[1])):
            names[module] = tensor.shape
    for prefix in _PREFIXES:
        inside = {name[len(prefix) :]: shape for name, shape in names.items() if name.startswith(prefix)}
        if inside and (prefix == _PREFIXES[0] or len(inside) > len(names) // 2):
            return prefix, inside
    return "", names


def _module(key: str, shape: Shape) -> str | None:
    """The module whose weight a key is."""
    suffix = next((s for s in _SUFFIXES if key.endswith(s)), None)
    return None if suffix is None or not shape or (suffix == ".scale" and len(shape) > 1) else key.removesuffix(suffix)


def closest(shapes: Mapping[str, Shape], among: Iterable[Architecture], least: float) -> tuple[Architecture, str] | None:
    """The table that names most of these modules, and the naming; None when none names the share ``least`` of them.

    Of several the one with most equal shapes, then most equal numbers of axes, then fewest other modules; then the first.
    """
    patterns = Counter(name_pattern(name) for name in shapes)
    best: tuple[int, int, int, float] = (0, 0, 0, 0.0)
    found = None
    for arch in among:
        if sum(n for pattern, n in patterns.items() if pattern in arch.patterns) < least * len(shapes):
            continue
        for naming in NAMINGS:
            names = arch.namings[naming]
            known = {name: arch.module_shape(names[name]) for name in shapes if name in names}
            if len(known) < least * len(shapes):
                continue
            alike = sum(shapes[name] == shape for name, shape in known.items())
            axes = sum(len(shapes[name]) == len(shape) for name, shape in known.items())
            score = (len(known), alike, axes, len(known) / max(len(names), 1))
            if score > best:
                best, found = score, (arch, naming)
    return found


def resized(arch: Architecture, naming: str, shapes: Mapping[str, Shape]) -> Architecture:
    """``arch`` with the weights and shapes of a base in one of its namings; parts keep their share of the rows.

    When every shape is the table's own, the table itself is returned.
    """
    own = {base: _own_shape(base, naming, shapes) for base in arch.expanded}
    if all(shape == base.shape for base, shape in own.items() if shape is not None):
        return arch
    rows = tuple(
        Row(base.name, shape, *(_scaled(base.in_naming(other), shape[0], shapes) for other in (DIFFUSERS, SD_SCRIPTS)))
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


def _scaled(names: Names, rows: int, shapes: Mapping[str, Shape]) -> Names | None:
    """Names of parts that have ``rows`` rows together: the base's own where it has the parts, else the table's shares.

    None, so that the weight keeps its original name, when its rows do not divide so: nothing tells where a part begins.
    """
    own = [shapes[part.name][0] for part in names.parts if part.name in shapes]
    if len(own) < len(names.parts) or sum(own) != rows:
        total = sum(part.rows for part in names.parts)
        if any(part.rows * rows % total for part in names.parts):
            return None
        own = [part.rows * rows // total for part in names.parts]
    return Names(tuple(Part(part.name, n) for part, n in zip(names.parts, own, strict=True)), names.swap_halves)
