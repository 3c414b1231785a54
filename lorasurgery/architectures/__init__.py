"""The known base models: every module of this folder that defines ``TABLES``, plus installed plug-ins.

A third party adds a model by an entry point of the group ``lorasurgery.architectures`` that loads to an
:class:`~lorasurgery.architectures.table.Architecture` or a sequence of them.
"""

from __future__ import annotations

import importlib
from functools import cache
from pkgutil import iter_modules
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture
from lorasurgery.errors import RequestError
from lorasurgery.nearest import one_of

if TYPE_CHECKING:
    from collections.abc import Mapping

ENTRY_POINT_GROUP = "lorasurgery.architectures"


@cache
def architectures() -> Mapping[str, Architecture]:
    """Every architecture of this package by its key (``flux1-dev``), the commonest first, then in the order of the files.

    Raises ValueError when two tables claim the same key.
    """
    found: dict[str, Architecture] = {}
    tables = [t for info in sorted(iter_modules(__path__), key=lambda m: m.name) for t in _tables_of(info.name)]
    for table in sorted(tables, key=lambda t: -t.usage):
        if table.key in found:
            raise ValueError(f"two architecture tables are called {table.key}")
        found[table.key] = table
    return MappingProxyType(found)


@cache
def plugins() -> tuple[Architecture, ...]:
    """The architectures that installed packages add. Looked up only when no table here explains a whole file."""
    from importlib import metadata

    found: list[Architecture] = []
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        loaded = entry.load()
        found.extend([loaded] if isinstance(loaded, Architecture) else loaded)
    return tuple(found)


def _tables_of(module: str) -> tuple[Architecture, ...]:
    found: tuple[Architecture, ...] = getattr(importlib.import_module(f"{__name__}.{module}"), "TABLES", ())
    return found


def named(name: str) -> tuple[Architecture, ...]:
    """The architectures that ``name`` means: one key, or every variant of a family (``flux1``).

    Raises RequestError for a name no table has.
    """
    found = tuple(t for t in architectures().values() if name in (t.key, t.id))
    found = found or tuple(t for t in plugins() if name in (t.key, t.id))
    if not found:
        every = (*architectures().values(), *plugins())
        also = {called: table.id for table in every for called in (table.key, *table.metadata_names)}
        hint = one_of(name, sorted({table.id for table in every}), also)
        raise RequestError(f"no architecture is called {name}", hint=f"{hint}, or a variant such as flux1-schnell")
    return found
