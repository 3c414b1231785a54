"""From paths to adapters: the one way in of every command that computes with adapters."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures import architectures, named
from lorasurgery.architectures.from_base import CUSTOM
from lorasurgery.architectures.table import flat
from lorasurgery.errors import RequestError, UnknownArchitectureError
from lorasurgery.files.alike import one_architecture, one_naming
from lorasurgery.files.read import BASE, adapter_of
from lorasurgery.files.taken import Unparsed, taken_apart
from lorasurgery.io.header import read_safetensors
from lorasurgery.io.peft_folder import is_peft_folder, whole_folder
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.layouts.detect import detect, score
from lorasurgery.layouts.names import index
from lorasurgery.layouts.peft_read import read_peft
from lorasurgery.layouts.scales import GIVEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorasurgery.adapter import Adapter
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.files.taken import Taken
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.detect import Match
    from lorasurgery.site import Site


NOTED = "lorasurgery.architecture"
"""Where a result of ours says what model it is for."""


def load(path: str | Path, *, arch: str | None = None, base: str | Path | None = None, alpha: float | None = None) -> Adapter:
    """Read an adapter: safetensors, a PyTorch file (weights only), or a PEFT folder.

    ``arch`` overrides detection (``flux1`` or a variant such as ``flux1-schnell``); ``base`` is a checkpoint whose header
    supplies names and shapes; ``alpha`` is what the file was trained at, where nothing in it says so. Modules that no table
    knows are called as the file calls them. Tensors stay on disk. Raises SurgeryError for anything that is no adapter.
    """
    (adapter,) = open_together([Path(path)], arch=arch, base=base, alpha=alpha)
    return adapter


def refuse_needless(alpha: float | None, adapters: Iterable[Adapter]) -> None:
    """Raises RequestError for an alpha that was given although every one of the files says its scales itself."""
    adapters = list(adapters)
    if alpha is None or any(module.scale.source == GIVEN for adapter in adapters for _, module in adapter):
        return
    raise RequestError(f"{GIVEN}: the file says its scales itself", path=adapters[0].path, hint=f"no {GIVEN}")


def open_together(
    paths: Sequence[Path], *, arch: str | None = None, base: str | Path | None = None, alpha: float | None = None
) -> list[Adapter]:
    """The adapters, for one model; see :func:`together`. Errors say which of several files they are about.

    ``alpha``: what those of them were trained at that do not say it. Raises RequestError for one that is no such number.
    """
    if alpha is not None and not (isfinite(alpha) and alpha):
        raise RequestError(f"{GIVEN} is a number other than 0, not {alpha:g}", path=paths[0])
    adapters = together([replace(read_unparsed(path), alpha=alpha) for path in paths], arch=arch, base=base)
    refuse_needless(alpha, adapters)
    return adapters


def together(files: Sequence[Unparsed], *, arch: str | None = None, base: str | Path | None = None) -> list[Adapter]:
    """The adapters of files that were read, under one table.

    A file of a few modules fits several models: it is read as the one that fits all. A module that no table knows is called
    what the files call it, and the same in all of them. Raises what taking a file apart raises, RequestError for files of
    different models, UnknownArchitectureError where the names of two files cannot be told to be the same or another.
    """
    table = None if base is None else _table(Path(base))
    among = None if arch is None else named(arch)
    read = [_read(file, among, table) for file in files]
    if table is None and any(own.best is None for own in read):
        return _unknown(read)
    adapters = [adapter_of(own.taken, own.best, own.ties) for own in read]
    adapters = one_architecture(adapters, lambda i, key: _again(read[i], named(key)))
    return one_naming(adapters)


class _Read(NamedTuple):
    """A file and the models that fit it; none where no table explains it, and why."""

    taken: Taken
    best: Match | None
    ties: Sequence[Match] = ()
    why: UnknownArchitectureError | None = None


def _read(file: Unparsed, among: Iterable[Architecture] | None, base: Architecture | None) -> _Read:
    taken = taken_apart(file)
    if base is not None:
        return _Read(taken, _in_base(taken, base))
    noted = None if among is not None else _noted(taken)
    if noted is not None:
        return _Read(taken, noted)
    try:
        return _Read(taken, *detect(taken.shapes, taken.raw.metadata, among=among, path=taken.raw.path))
    except UnknownArchitectureError as error:
        error.path = error.path or str(taken.raw.path)
        if among is not None:
            raise
        return _Read(taken, None, (), error)


def _noted(taken: Taken) -> Match | None:
    """The model that a result of ours notes, if all that its table names fits: a part of a file may have nothing that tells."""
    noted = architectures().get(taken.raw.metadata.get(NOTED, ""))
    found = None if noted is None else score(noted, taken.shapes)
    return found if found is not None and found.fitting == found.named else None


def _in_base(taken: Taken, base: Architecture) -> Match:
    """A base model's own table; raises UnknownArchitectureError where the base has not even half of the modules.

    Of a model that no table knows the base has to have every module: nothing else says what they are.
    """
    _refuse_two_meanings(taken, base)
    found = score(base, taken.shapes)
    missing = [stem for stem in taken.shapes if index(base).find(stem) is None]
    if missing and (base.id == CUSTOM or 2 * found.named < found.total):
        raise UnknownArchitectureError(
            f"{base.source} has no module for {missing[0]} ({len(missing)} of the {found.total} modules)",
            path=taken.raw.path, hint="the model it was trained on, or no --base where all files are spelled alike",
        )  # fmt: skip
    return found


def _refuse_two_meanings(taken: Taken, base: Architecture) -> None:
    """Raises UnknownArchitectureError for a name whose underscores stand for two modules of a base model."""
    meant: dict[str, list[str]] = {}
    for name in base.shapes:
        meant.setdefault(flat(name), []).append(name)
    two = {name: names for name, names in meant.items() if len(names) > 1}
    for stem in taken.groups if two else ():
        place = index(base).find(stem)
        names = two.get(stem[len(place.prefix) :]) if place is not None and place.flat else None
        if names:
            raise UnknownArchitectureError(
                f"{stem} can be {names[0]} or {names[1]}: its underscores do not tell", path=taken.raw.path,
                hint="the same adapter in a layout with dots",
            )  # fmt: skip


def _again(own: _Read, among: Iterable[Architecture]) -> Adapter:
    """The same file for another model."""
    raw = own.taken.raw
    return adapter_of(own.taken, *detect(own.taken.shapes, raw.metadata, among=among, path=raw.path))


def _unknown(read: Sequence[_Read]) -> list[Adapter]:
    """The files of a model that no table knows: all of them by their own names, which the warnings say."""
    why = next(own.why for own in read if own.why is not None)
    known = {id(own): adapter_of(own.taken, own.best) for own in read if own.best is not None}
    try:
        found = one_naming([adapter_of(own.taken, None) for own in read])
    except UnknownArchitectureError as error:
        if not known:
            raise
        raise _of_two_models(read, known) from error
    told = f"no table knows the model{_closest(why)}: its modules are called as the files spell them"
    found = _kin(read, [replace(own, unknown=why.message, candidates=why.candidates) for own in found], known)
    return [*found[:-1], replace(found[-1], warnings=(*found[-1].warnings, told))]


def _kin(read: Sequence[_Read], found: list[Adapter], known: dict[int, Adapter]) -> list[Adapter]:
    """The adapters, with a warning where nothing but their spelling says that they are for one model.

    Raises RequestError where a table knows the model of some of them, and the others have no module of those.
    """
    seen: set[Site] = set()
    told = []
    theirs = {site for own, adapter in zip(read, found, strict=True) if id(own) in known for site in adapter.modules}
    for own, adapter in zip(read, found, strict=True):
        mine = set(adapter.modules)
        if theirs and id(own) not in known and not theirs & mine:
            raise _of_two_models([own], known)
        apart = ("it has no module in common with the files before it",) if seen and not seen & mine else ()
        told.append(replace(adapter, warnings=(*adapter.warnings, *apart)))
        seen |= mine
    return told


def _of_two_models(read: Sequence[_Read], known: Mapping[int, Adapter]) -> RequestError:
    """The error for a file of a known model beside one of which no table knows the model."""
    other = next(iter(known.values()))
    own = next(file for file in read if id(file) not in known)
    near = next((key for key, share in own.why.candidates if share), None) if own.why is not None else None
    return RequestError(
        f"{other.path} is for {other.architecture.name}, and no table knows the model of {own.taken.raw.path}, which has none"
        " of its modules",
        hint="files for one model, and --base MODEL if it is one that no table knows"
        + (f", or --arch {near} if both are for that" if near else ""),
    )


def _closest(why: UnknownArchitectureError) -> str:
    if not why.candidates:
        return ""
    name, share = why.candidates[0]
    return f" (closest: {name}, {f'{share:.0%} of them' if share else 'with other sizes'})"


def _table(base: Path) -> Architecture:
    from lorasurgery.models import open_model

    return open_model(base).extended


def read_unparsed(path: Path) -> Unparsed:
    """The tensors of a file or a PEFT folder; the weights in a PEFT folder stand for the folder."""
    path = whole_folder(path)
    if path.is_dir() and is_peft_folder(path):
        return Unparsed(*read_peft(path))
    return Unparsed(read_any(path))


def read_any(path: Path) -> RawFile:
    """A file's tensors, still on disk for safetensors, in memory for PyTorch's formats."""
    if path.suffix.lower() in TORCH_SUFFIXES:
        from lorasurgery.io.torchfile import read_torch

        return read_torch(path)
    return read_safetensors(path)


__all__ = ["BASE", "load", "open_together", "read_any", "read_unparsed", "refuse_needless", "together"]
