"""Two files read as adapters of one model, where they can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.api import load
from lorasurgery.errors import BrokenModuleError, SurgeryError, UnknownArchitectureError
from lorasurgery.surgery.together import may_be_unknown, open_unknown

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.adapter import Adapter


def open_both(a: Path, b: Path, *, arch: str | None = None, base: Path | None = None) -> tuple[Adapter, Adapter]:
    """The two adapters, for one model where both fit one.

    A file of a few modules fits several models: it is read as the other's. Files of a model that no table knows get
    their names from ``base``; without it they are compared by their names as spelled, of which one file must then have all of
    the other's if they are spelled differently.
    Raises what :func:`lorasurgery.load` raises.
    """
    try:
        first, second = load(a, arch=arch), load(b, arch=arch)
    except SurgeryError as error:
        if not may_be_unknown(error, arch, base):
            raise
        return _unknown(a, b, base, error)
    if first.architecture.id == second.architecture.id:
        return first, second
    shared = _shared(first, second)
    return (first, second) if shared is None else (load(a, arch=shared), load(b, arch=shared))


def _unknown(a: Path, b: Path, base: Path | None, why: SurgeryError) -> tuple[Adapter, Adapter]:
    """Both by their own names or the base's; the file that has all of the other's modules may be the second."""
    try:
        first, second = open_unknown([a, b], base, why)
    except BrokenModuleError:  # modules of other sizes: that is a difference to be shown
        return open_unknown([a], base, why)[0], open_unknown([b], base, why)[0]
    except UnknownArchitectureError:
        if base is not None:
            raise
        second, first = open_unknown([b, a], None, why)
    return first, second


def _shared(a: Adapter, b: Adapter) -> str | None:
    """A model whose table explains both as well as any does; their own first."""
    fits = [{adapter.architecture.key, *(key for key, _ in adapter.candidates)} for adapter in (a, b)]
    ordered = [a.architecture.key, b.architecture.key, *(key for key, _ in a.candidates)]
    return next((key for key in ordered if key in fits[0] & fits[1]), None)
