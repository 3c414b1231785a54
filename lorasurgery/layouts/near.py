"""Which tables are worth comparing with a file in full: a cheap look at the patterns of their names and at one block's shapes.

Nothing here expands a table's names: that is done for the tables that pass, a handful of dozens.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures import architectures
from lorasurgery.architectures.rows import NAMINGS, Row, name_pattern
from lorasurgery.layouts.names import stem_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lorasurgery.architectures.rows import Block
    from lorasurgery.architectures.table import Architecture, Shape

NEAR = 0.8
"""Tables that cover, or can fit, at least this share of what the best one does are near."""
_ENCODERS = ("lora_te", "text_encoder")

Sized = tuple[int, int]
"""Rows and columns, a convolution's kernel among the columns."""


class Near(NamedTuple):
    """A table, and how many of a file's modules can fit it at most."""

    architecture: Architecture
    most: int


def near(stems: Mapping[str, Shape | None]) -> list[Near]:
    """The tables that cover or can fit about as many modules as the best one, the one that can fit most first.

    *Cover* counts names alone. Wider and narrower models fall out: those that can fit less than half as many modules as the
    best; a table that fits most of a file stays, however many more names a wider one knows.
    """
    counts = Counter((stem_pattern(stem), (shape[0], prod(shape[1:])) if shape else None) for stem, shape in stems.items())
    encoders = sum(n for (pattern, _), n in counts.items() if pattern.startswith(_ENCODERS))
    bounds = {arch: _bound(arch, counts) + encoders * bool(arch.encoders) for arch in architectures().values()}
    cover: dict[Architecture, int] = {}
    found: dict[Architecture, Near] = {}
    most = 0
    for arch in sorted(bounds, key=lambda own: -bounds[own]):
        if bounds[arch] < max(1, NEAR * most):
            break
        known = _patterns(arch)
        cover[arch] = sum(n for (pattern, _), n in counts.items() if pattern in known) + encoders * bool(arch.encoders)
        found[arch] = Near(arch, _fitting(arch, counts))
        most = max(most, found[arch].most)
    widest = max(cover.values(), default=0)
    kept = [found[a] for a in bounds if a in found and (cover[a] >= NEAR * widest or found[a].most >= NEAR * most)]
    few = 2 * most < len(stems)  # no model fits: then the nearest is also told by names
    return sorted((n for n in kept if cover[n.architecture] and (few or 2 * n.most >= most)), key=lambda n: -n.most)


def _bound(arch: Architecture, counts: Mapping[tuple[str, Sized | None], int]) -> int:
    """At most so many modules have a name of this table."""
    starts = _starts(arch)
    return sum(n for (pattern, _), n in counts.items() if pattern.startswith(starts))


def _fitting(arch: Architecture, counts: Mapping[tuple[str, Sized | None], int]) -> int:
    """At most so many modules have a name of this table and the size of a weight that is called so."""
    known, found = _patterns(arch), 0
    for (pattern, size), n in counts.items():
        sizes = known.get(pattern)
        if sizes is None:
            found += n if arch.encoders and pattern.startswith(_ENCODERS) else 0
        elif size is None or not sizes or size in sizes:
            found += n
    return found


@cache
def _starts(arch: Architecture) -> tuple[str, ...]:
    """What the patterns of a table's names begin with, read off its outermost blocks."""
    names = [name for item in arch.rows for name in _first_names(item)]
    names += [alias for alias, _ in arch.aliases]
    return tuple({name_pattern(name.split("{")[0]) for name in names})


def _first_names(item: Row | Block) -> Iterator[str]:
    """A row's names, or a block's prefixes, in every naming; a block without a prefix begins like its rows."""
    if isinstance(item, Row):
        yield from (part.name for naming in NAMINGS for part in item.in_naming(naming).parts)
        return
    yield from filter(None, item.prefixes)
    if not all(item.prefixes):
        yield from (name for row in item.rows for name in _first_names(row))


@cache
def _patterns(arch: Architecture) -> Mapping[str, frozenset[Sized]]:
    """The pattern of every name in every naming, and the sizes it occurs with (none: of an alias, not known here)."""
    found: dict[str, set[Sized]] = {name_pattern(alias.format(i=0)): set() for alias, _ in arch.aliases}
    _walk(arch.rows, ("", "", ""), found)
    return {pattern: frozenset(sizes) for pattern, sizes in found.items()}


def _walk(rows: Sequence[Row | Block], prefixes: Sequence[str], found: dict[str, set[Sized]]) -> None:
    for item in rows:
        if not isinstance(item, Row):
            inner = [prefix + (f"{name}." if name else "") for prefix, name in zip(prefixes, item.prefixes, strict=True)]
            _walk(item.rows, inner, found)
            continue
        columns = prod(item.shape[1:])
        for naming, prefix in zip(NAMINGS, prefixes, strict=True):
            for name, count in item.in_naming(naming).parts:
                pattern = name_pattern(f"{prefix}{name}".rstrip(".").replace("{i}", "0"))
                found.setdefault(pattern, set()).add((count, columns))
