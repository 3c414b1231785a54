"""Whether it matters, for one file and one target, which of several models that its keys fit it is for."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from lorasurgery.adapter import Module, Scale
from lorasurgery.architectures import architectures, plugins
from lorasurgery.errors import RequestError, UnknownArchitectureError
from lorasurgery.layouts.evidence import one_of_each
from lorasurgery.layouts.names import index
from lorasurgery.layouts.targets import LAYOUTS, Speller, names_in, namings
from lorasurgery.operations.conversion.pieces import plan, targets_of
from lorasurgery.site import DENOISER, SECOND_DENOISER, Site

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from lorasurgery.adapter import Adapter
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.layouts.targets import Layout

Written = frozenset[tuple[object, ...]]
"""What a target module is called, and which rows of which of the file's modules it is made of."""
_NO_SCALE = Scale(1.0, "none (1.0)")


def settled(adapter: Adapter, target: Layout, prefix: str = "diffusion_model") -> None:
    """Raise UnknownArchitectureError, with the evidence, where models that the keys fit give different results in ``target``.

    Only the file's own keys count, and only models that can be written so. ``prefix``: the target's, where that is free.
    """
    known = {arch.key: arch for arch in (*architectures().values(), *plugins())} if len(adapter.candidates) > 1 else {}
    tied = [known[key] for key, _ in adapter.candidates if key in known]
    stems = [module.stem for module in adapter.modules.values()]
    others = differing(tied, stems, [target], prefix)
    if not others:
        return
    told = "".join(f". {sentence[0].upper()}{sentence[1:]}" for sentence in adapter.evidence[1:])
    raise UnknownArchitectureError(
        f"its keys fit {' and '.join((tied[0].key, *others))} equally well, and the results for {target.reader} differ{told}",
        path=adapter.path,
        hint=" or ".join(f"--arch {arch}" for arch in dict.fromkeys((tied[0].id, *(known[key].id for key in others)))),
        candidates=adapter.candidates,
    )


def differing(
    tied: Sequence[Architecture], stems: Collection[str], targets: Iterable[Layout], prefix: str = "diffusion_model"
) -> tuple[str, ...]:
    """The keys of those of ``tied``, one a family, with which a target would be written otherwise than with the first."""
    kin = one_of_each(tied)
    if len(kin) < 2:
        return ()
    known = [stem for stem in stems if any(index(arch).find(stem) is not None for arch in kin)]
    found: dict[str, None] = {}
    for target in targets:
        first, *rest = (written(arch, known, target, prefix) for arch in kin)
        for arch, own in zip(kin[1:], rest, strict=True):
            if first is not None and own is not None and own != first:
                found[arch.key] = None
    return tuple(found)


def undecided(tied: Sequence[Architecture], stems: Collection[str]) -> tuple[str, ...]:
    """The same for any layout that can be written."""
    return differing(tied, stems, LAYOUTS.values())


def written(arch: Architecture, stems: Iterable[str], target: Layout, prefix: str) -> Written | None:
    """What these modules become in ``target`` if ``arch`` is their model; None when they cannot be written so."""
    if target.id == "comfyui" and not arch.has_comfyui:
        return None
    by_component: dict[str, list[Module]] = defaultdict(list)
    for stem in stems:
        place = index(arch).find(stem)
        if place is None:
            return None
        by_component[place.site.component].append(Module(place.site, stem, None, _NO_SCALE))
    try:
        found = [_written(arch, component, own, target, prefix) for component, own in by_component.items()]
    except (RequestError, ValueError):  # a model with one program's names; two spellings of one weight
        return None
    return None if None in found else frozenset().union(*(own for own in found if own is not None))


def _written(arch: Architecture, component: str, modules: list[Module], target: Layout, prefix: str) -> Written | None:
    speller = Speller(target, arch, prefix)
    if component not in (DENOISER, SECOND_DENOISER):
        named = {module.name: speller.stem(module.site) for module in modules}
        return None if None in named.values() else frozenset(named.items())
    own, *more = namings(target, arch, prefix)
    made = plan(modules, targets_of(names_in(own, arch)))
    if sum(piece.rows for each in made for piece in each.pieces if piece.source) < sum(module.out for module in modules):
        return None
    if more and not all(each.is_rename for each in made):  # what cannot be fused keeps its split names
        made += [each for naming in more for each in plan(modules, targets_of(names_in(naming, arch)))]
    return frozenset(
        (
            speller.stem(Site(DENOISER, each.spans)),
            *((piece.source and piece.source.name, piece.ranges) for piece in each.pieces),
        )
        for each in made
    )
