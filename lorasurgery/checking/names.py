"""The names a route looks up, enumerated from the architecture tables."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.table import Span, flat
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.site import DENOISER, Site

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorasurgery.architectures.table import Architecture, Spans
    from lorasurgery.checking.rules import EncoderSpelling, Route, Spelling


class Known(NamedTuple):
    """Every stem a route understands and what it stands for, and the prefixes among them."""

    sites: Mapping[str, Site]
    prefixes: tuple[str, ...]
    """Longest first."""
    architecture: str


@cache
def names_of(arch: Architecture, route: Route) -> Known:
    """The names a route looks up for one architecture."""
    sites: dict[str, Site] = {}
    for spelling in route.names:
        prefix = spelling.prefix.format(denoiser=arch.denoiser)
        roots = arch.diffusers_roots if spelling.prefix == "{denoiser}." else ()
        for name, spans in spelled(arch, spelling):
            root = next(((r, component) for r, component in roots if name.startswith(r)), None)
            stem = prefix + name if root is None else f"{root[1]}.{name[len(root[0]) :]}"
            sites.setdefault(stem, Site(DENOISER, spans))
    prefixes = {s.prefix.format(denoiser=arch.denoiser) for s in route.names}
    for encoder in route.encoders:
        for prefix, own in _encoder_names(arch, encoder):
            prefixes.add(prefix)
            sites.update(own)
    return Known(sites, tuple(sorted(prefixes, key=lambda p: -len(p))), arch.name)


def spelled(arch: Architecture, spelling: Spelling) -> Iterator[tuple[str, Spans]]:
    """(name without its prefix, rows) of one spelling."""
    names = arch.alias_names if spelling.naming == "alias" else arch.namings[spelling.naming]
    for name, spans in names.items():
        if not re.search(spelling.only, name) or re.search(spelling.without, name):
            continue
        dotted = name + "."
        for old, new in spelling.replace:
            dotted = dotted.replace(old, new)
        yield flat(dotted[:-1]) if spelling.flat else dotted[:-1], spans


def _encoder_names(arch: Architecture, spelling: EncoderSpelling) -> Iterator[tuple[str, dict[str, Site]]]:
    """(prefix, stem -> site) for each of the architecture's encoders that a spelling is for."""
    for own in arch.encoders:
        loaded = own.diffusers is not None and own.diffusers in arch.diffusers_encoders
        if (spelling.tables and own.table not in spelling.tables) or ("{diffusers}" in spelling.prefix and not loaded):
            continue
        prefix = spelling.prefix.format(
            table=own.table, sd_scripts=own.sd_scripts, comfyui=own.comfyui, diffusers=own.diffusers,
            onetrainer=own.onetrainer or own.sd_scripts,
        )  # fmt: skip
        yield (
            prefix,
            {
                prefix + (flat(spelt) if spelling.flat else spelt): Site(own.table, (Span(weight, 0, shape[0]),))
                for weight, shape in TEXT_ENCODERS[own.table].shapes.items()
                if re.search(spelling.only, weight)
                for spelt in {weight, weight.removeprefix(spelling.optional)}
            },
        )
