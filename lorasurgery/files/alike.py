"""Several files for one model: one table for all of them, and one name for each weight that only files name."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Own, Span, flat
from lorasurgery.errors import BrokenModuleError, RequestError, UnknownArchitectureError
from lorasurgery.layouts.detect import fits
from lorasurgery.site import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lorasurgery.adapter import Adapter, Module

Place = tuple[str, str]
"""(component, name) of a weight that no table knows."""


def one_architecture(adapters: Sequence[Adapter], load: Callable[[int, str], Adapter]) -> list[Adapter]:
    """The adapters under one architecture; those that fit several models are read again as the one that fits all.

    ``load(i, arch)`` reads the i-th file as another architecture. Variants of one model (FLUX.1 dev and schnell) are kept
    as they are. Raises RequestError for files of different models.
    """
    if len({adapter.architecture.id for adapter in adapters}) == 1:
        return list(adapters)
    fitting = [[adapter.architecture.key, *(key for key, _ in adapter.candidates)] for adapter in adapters]
    for key in fitting[0]:
        if all(key in keys for keys in fitting):
            return [a if a.architecture.key == key else load(i, key) for i, a in enumerate(adapters)]
    first = adapters[0]
    other = next(a for a in adapters if a.architecture.id != first.architecture.id)
    raise RequestError(
        f"{first.path} is for {first.architecture.name}, {other.path} for {other.architecture.name}: their weights have "
        "nothing to do with each other",
        hint="files for one model; --arch NAME where a file was taken for the wrong one",
    )


def one_naming(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with one name for each weight that no table knows, all under a table that has every one of them.

    A name with underscores for dots is that of another file whose dots become those; where no other file has it, or none
    of the names of a file with its spelling, nothing tells whether it is called something else: UnknownArchitectureError.
    BrokenModuleError for a weight of another shape in another file.
    """
    if len(adapters) == 1 or not any(adapter.architecture.own for adapter in adapters):
        return list(adapters)
    dotted = _dotted(adapters)
    renamed = [_renamed(adapter, dotted, adapters) for adapter in adapters]
    shapes = _shapes(renamed)
    own: dict[Own, None] = {}
    for adapter in renamed:
        for weight in adapter.architecture.own:
            own[weight._replace(shape=shapes[weight.component, weight.name])] = None
    every = tuple(own)
    return [_sited(replace(a, architecture=replace(a.architecture, own=every)), shapes) for a in renamed]


def _sited(adapter: Adapter, shapes: Mapping[Place, tuple[int, ...]]) -> Adapter:
    """The adapter with every module on all the rows of its weight, which another file may be the one to tell."""

    def sited(module: Module) -> Module:
        weight = module.site.spans[0].weight
        shape = shapes.get((module.site.component, weight))
        if shape is None or len(module.site.spans) > 1:
            return module
        return replace(module, site=Site(module.site.component, (Span(weight, 0, shape[0]),)))

    modules = [sited(module) for module in adapter.modules.values()]
    return replace(adapter, modules={module.site: module for module in modules})


def _dotted(adapters: Sequence[Adapter]) -> dict[Place, set[str]]:
    """(component, name with underscores) -> the names with dots that it can stand for."""
    found: dict[Place, set[str]] = defaultdict(set)
    for adapter in adapters:
        for weight in adapter.architecture.own:
            if not weight.flat:
                found[weight.component, flat(weight.name)].add(weight.name)
    return found


def _renamed(adapter: Adapter, dotted: Mapping[Place, set[str]], adapters: Sequence[Adapter]) -> Adapter:
    """The adapter with its underscored names as the others have them with dots."""
    alike = [a for a in adapters if a is not adapter and _prefix(a) == _prefix(adapter)]
    others = [a for a in adapters if a is not adapter and a not in alike]
    if not others:
        return adapter
    new: dict[Place, str] = {}
    for weight in adapter.architecture.own:
        names = sorted(dotted.get((weight.component, weight.name), ())) if weight.flat else [weight.name]
        if len(names) > 1:
            raise UnknownArchitectureError(
                f"{_spelled(adapter, weight)} can be {names[0]} or {names[1]}: its underscores do not tell", path=adapter.path,
                hint="a file that spells it with dots",
            )  # fmt: skip
        if adapter.architecture.only_prefix is not None and not _somewhere(names or [weight.name], weight.component, others):
            _refuse_stranger(adapter, weight, adapters)
        new[weight.component, weight.name] = names[0] if names else weight.name
    return _with_names(adapter, {place: name for place, name in new.items() if place[1] != name})


def _spelled(adapter: Adapter, weight: Own) -> str:
    """The module of a weight as the file spells it."""
    return next(m.name for m in adapter.modules.values() if m.site.spans[0].weight == weight.name)


def _prefix(adapter: Adapter) -> object:
    return None if adapter.spelling is None else adapter.spelling.denoiser[:2]


def _somewhere(names: Sequence[str], component: str, others: Iterable[Adapter]) -> bool:
    """Whether another file, spelled otherwise, has a weight of one of these names."""
    wanted = {flat(name) for name in names}
    return any(w.component == component and flat(w.name) in wanted for other in others for w in other.architecture.own)


def _refuse_stranger(adapter: Adapter, weight: Own, adapters: Sequence[Adapter]) -> None:
    """Raises UnknownArchitectureError unless it is the first file, whose names are the others' measure."""
    first = adapters[0]
    if adapter is first or _prefix(adapter) == _prefix(first):
        return
    raise UnknownArchitectureError(
        f"no table knows its model, it is spelled otherwise than {first.path.name if first.path else 'the first file'}, and "
        f"{_spelled(adapter, weight)} is none of the modules there: whether it is called something else is not known",
        path=adapter.path, hint="--base MODEL, the checkpoint it was trained on (only its header is read)",
    )  # fmt: skip


def _with_names(adapter: Adapter, new: Mapping[Place, str]) -> Adapter:
    if not new:
        return adapter

    def named(module: Module) -> Module:
        site = module.site
        name = new.get((site.component, site.spans[0].weight))
        if name is None:
            return module
        return replace(module, site=Site(site.component, (Span(name, site.spans[0].start, site.spans[0].stop),)))

    modules = [named(module) for module in adapter.modules.values()]
    own = tuple(
        w if (w.component, w.name) not in new else w._replace(name=new[w.component, w.name], flat=False)
        for w in adapter.architecture.own
    )
    arch = replace(adapter.architecture, own=own)
    return replace(adapter, architecture=arch, modules={module.site: module for module in modules})


def _shapes(adapters: Sequence[Adapter]) -> dict[Place, tuple[int, ...]]:
    """The shape that says most of each weight; raises BrokenModuleError where two files have no one for it."""
    found: dict[Place, tuple[int, ...]] = {}
    whose: dict[Place, Adapter] = {}
    every = [(a, w) for a in adapters for w in a.architecture.own]
    for adapter, weight in sorted(every, key=lambda one: one[1].shape == (1,)):
        place, shape = (weight.component, weight.name), weight.shape
        known = found.get(place)
        if known is None or (len(shape) > len(known) and fits(known, shape)):
            found[place], whose[place] = shape, adapter
        elif shape != (1,) and not fits(shape, known) and not (len(shape) == 1 and shape[0] == known[0]):
            other, name = whose[place].path, _spelled(adapter, weight)
            raise BrokenModuleError(
                f"{name} is {list(shape)}, in {other.name if other else 'another file'} {list(known)}", key=name,
                path=adapter.path, hint="files for one model",
            )  # fmt: skip
    return found
