"""Files read as adapters of one model: a table's, a base model's, or one that only their own names describe."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.api import load, read_unparsed
from lorasurgery.architectures.from_base import CUSTOM
from lorasurgery.errors import BrokenModuleError, RequestError, SurgeryError, UnknownArchitectureError
from lorasurgery.layouts.own_names import Unread, read_by_names
from lorasurgery.layouts.parse import parse

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorasurgery.adapter import Adapter, Site
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.io.header import RawFile


def open_one(path: Path, *, arch: str | None = None, base: Path | None = None) -> Adapter:
    """One adapter, read as :func:`open_together` reads several."""
    return open_together([path], arch=arch, base=base)[0]


def open_together(paths: Sequence[Path], *, arch: str | None = None, base: Path | None = None) -> list[Adapter]:
    """The adapters, under one table.

    Where no table knows the model its names come from ``base``, a checkpoint of which only the header is read; without
    one the modules are called as the files spell them, which the adapters' warnings say. Raises what
    :func:`lorasurgery.load` and :func:`read_by_names` raise, RequestError for files of different models.
    """
    read = [_told(path, arch, base) for path in paths]
    adapters = [one for one in read if not isinstance(one, SurgeryError)]
    why = next((one for one in read if isinstance(one, SurgeryError)), None)
    if why is not None:
        found = open_unknown(paths, base, why)
        return found if base is not None else _kin(found, {adapter.path: adapter for adapter in adapters})
    if len(adapters) == 1:
        return adapters
    from lorasurgery.surgery.merge.inputs import one_architecture

    return one_architecture(adapters, lambda i, key: load(paths[i], arch=key))


def _told(path: Path, arch: str | None, base: Path | None) -> Adapter | SurgeryError:
    """The file, or why no table has its modules; errors say which of several files it is."""
    try:
        return load(path, arch=arch)
    except SurgeryError as error:
        error.path = error.path or str(path)
        if not may_be_unknown(error, arch, base):
            raise
        return error


def may_be_unknown(error: SurgeryError, arch: str | None, base: Path | None) -> bool:
    """Whether a file that cannot be read with a table may be one of a model that none knows, or of a changed one."""
    changed = base is not None and isinstance(error, BrokenModuleError)
    return arch is None and (changed or isinstance(error, UnknownArchitectureError))


def _kin(found: list[Adapter], known: Mapping[Path | None, Adapter]) -> list[Adapter]:
    """The adapters, with a warning where nothing but their spelling says that they are for one model.

    Raises RequestError where a table knows the model of some of them, and the others have no module of those.
    """
    seen: set[Site] = set()
    told = []
    theirs = {site for adapter in found if adapter.path in known for site in adapter.modules}
    for adapter in found:
        own = set(adapter.modules)
        if theirs and adapter.path not in known and not theirs & own:
            other = next(iter(known.values()))
            raise RequestError(
                f"{other.path} is for {other.architecture.name}, and no table knows the model of {adapter.path}, "
                "which has none of its modules",
                hint="files for one model, and --base MODEL if it is one that no table knows",
            )
        apart = ("it has no module in common with the files before it",) if seen and not seen & own else ()
        told.append(replace(adapter, warnings=(*adapter.warnings, *apart)))
        seen |= own
    return told


def understood(raw: RawFile, base: Path | None = None) -> Adapter:
    """A file's tensors that are at hand, read as :func:`open_one` reads a file."""
    try:
        return parse(raw)
    except UnknownArchitectureError as error:
        return unknown([Unread(raw)], base, error)[0]


def open_unknown(paths: Sequence[Path], base: Path | None, why: SurgeryError) -> list[Adapter]:
    """Files of a model that no table knows; ``why`` says so."""
    return unknown([Unread(*read_unparsed(path)) for path in paths], base, why)


def unknown(files: Sequence[Unread], base: Path | None, why: SurgeryError) -> list[Adapter]:
    """The same for files that were read; where no base model has the names, the last adapter warns of that."""
    table = None if base is None else _table(base)
    if table is not None and table.id != CUSTOM:  # a known model with sizes or names of its own
        return [parse(file.raw, among=(table,), configs=file.configs) for file in files]
    found = read_by_names(files, table)
    if table is not None:
        return found
    told = f"no table knows the model{_closest(why)}: its modules are called as the files spell them"
    return [*found[:-1], replace(found[-1], warnings=(*found[-1].warnings, told))]


def _closest(why: SurgeryError) -> str:
    if not isinstance(why, UnknownArchitectureError) or not why.candidates:
        return ""
    name, share = why.candidates[0]
    return f" (closest: {name}, {f'{share:.0%} of them' if share else 'with other sizes'})"


def _table(base: Path) -> Architecture:
    from lorasurgery.models import open_model

    return open_model(base).architecture
