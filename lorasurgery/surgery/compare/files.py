"""Two files read as adapters of one model, where they can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.api import load, read_any
from lorasurgery.architectures.from_base import custom
from lorasurgery.errors import UnknownArchitectureError
from lorasurgery.layouts.foreign import named_modules
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.parse import parse
from lorasurgery.layouts.words import BIAS

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.adapter import Adapter
    from lorasurgery.io.header import RawFile


def open_both(a: Path, b: Path, *, arch: str | None = None, base: Path | None = None) -> tuple[Adapter, Adapter]:
    """The two adapters, for one model where both fit one.

    A file of a few modules fits several models: it is read as the other's. Files of a model that no table knows get
    their names from ``base``; without it they are compared by their names as spelled, which must then be alike.
    Raises what :func:`lorasurgery.load` raises.
    """
    try:
        first, second = load(a, arch=arch), load(b, arch=arch)
    except UnknownArchitectureError:
        if base is not None and arch is None:
            return load(a, base=base), load(b, base=base)
        if arch is not None or a.is_dir() or b.is_dir():
            raise
        first, second = by_names(read_any(a)), by_names(read_any(b))
        if not _names(first) & _names(second):  # spelled for two programs: that says nothing about what they do
            raise
        return first, second
    if first.architecture.id == second.architecture.id:
        return first, second
    shared = _shared(first, second)
    return (first, second) if shared is None else (load(a, arch=shared), load(b, arch=shared))


def _names(adapter: Adapter) -> set[str]:
    return {module.name for module in adapter.modules.values()}


def _shared(a: Adapter, b: Adapter) -> str | None:
    """A model whose table explains both as well as any does; their own first."""
    fits = [{adapter.architecture.key, *(key for key, _ in adapter.candidates)} for adapter in (a, b)]
    ordered = [a.architecture.key, b.architecture.key, *(key for key, _ in a.candidates)]
    return next((key for key in ordered if key in fits[0] & fits[1]), None)


def by_names(raw: RawFile) -> Adapter:
    """An adapter whose modules stand for themselves: no table is needed, and no other layout is understood."""
    raw = named_modules(raw)
    shapes = {}
    for stem, own in group(raw)[0].items():
        delta, bias = build(own, raw.path), own.modifier(BIAS)
        shapes[stem] = delta.shape if delta is not None else () if bias is None else bias.tensor.shape
    return parse(raw, among=(custom({stem: shape for stem, shape in shapes.items() if shape}, raw.path),))
