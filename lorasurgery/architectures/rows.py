"""Rows and blocks, what tables are written in, and how they expand into every weight's names."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

Shape = tuple[int, ...]

ORIGINAL, DIFFUSERS, SD_SCRIPTS = "original", "diffusers", "sd_scripts"
NAMINGS = (ORIGINAL, DIFFUSERS, SD_SCRIPTS)


class Span(NamedTuple):
    """Rows ``start:stop`` (output axis) of the original weight ``weight``."""

    weight: str
    start: int
    stop: int


Spans = tuple[Span, ...]

Alias = tuple[str, "str | tuple[str, tuple[int, int]]"]
"""(template of a further name, a name in any naming or (such a name, (first row, row after the last)) of its module)."""


def cut(spans: Spans, start: int, stop: int) -> Spans:
    """Rows ``start:stop`` of the module that stands for ``spans``."""
    found, at = [], 0
    for span in spans:
        low, high = max(start, at), min(stop, at + span.stop - span.start)
        if low < high:
            found.append(Span(span.weight, span.start + low - at, span.start + high - at))
        at += span.stop - span.start
    return tuple(found)


class Part(NamedTuple):
    """One module stacked into a fused weight: its name and its number of rows."""

    name: str
    rows: int


class Names(NamedTuple):
    """What one naming calls a base weight: one module, or several stacked in this order."""

    parts: tuple[Part, ...]
    swap_halves: bool = False


class Row(NamedTuple):
    """One base weight. ``shape`` is (out, in[, k...]), or (dim,) for a norm; names are relative to the block."""

    name: str
    shape: Shape
    diffusers: Names | None
    sd_scripts: Names | None

    def in_naming(self, naming: str) -> Names:
        """Its names in one naming, without the block's prefix."""
        own = self.diffusers if naming == DIFFUSERS else self.sd_scripts if naming == SD_SCRIPTS else None
        if own is None or not own.parts:
            return Names((Part(self.name, self.shape[0]),), own is not None and own.swap_halves)
        return own


class Block(NamedTuple):
    """Rows repeated ``repeats`` times from index ``start``; ``{i}`` in the prefixes is the index.

    A prefix of None in another naming means: the same as the original.
    """

    name: str
    rows: tuple[Row | Block, ...]
    repeats: int = 1
    start: int = 0
    diffusers: str | None = None
    sd_scripts: str | None = None

    @property
    def prefixes(self) -> tuple[str, str, str]:
        """The block's prefix in each naming, with ``{i}`` in it."""
        names = (self.name, self.diffusers, self.sd_scripts)
        original, diffusers, trained = (self.name if name is None else name for name in names)
        return original, diffusers, trained


def _names(spec: str | Sequence[str | tuple[str, int]] | None, rows: int, *, swap: bool) -> Names | None:
    if spec is None:
        return Names((), swap_halves=True) if swap else None
    if isinstance(spec, str):
        return Names((Part(spec, rows),), swap)
    equal = rows // len(spec)
    return Names(tuple(Part(p, equal) if isinstance(p, str) else Part(*p) for p in spec), swap)


def row(
    name: str,
    shape: Shape,
    diffusers: str | Sequence[str | tuple[str, int]] | None = None,
    *,
    sd_scripts: str | Sequence[str | tuple[str, int]] | None = None,
    swap_halves: bool = False,
) -> Row:
    """A row of a table.

    ``diffusers`` and ``sd_scripts`` are None where the name is the original one, a string where it differs, or a list
    of the modules stacked in this weight: a plain name has an equal share of the rows, ``(name, rows)`` its own.
    ``swap_halves``: Diffusers holds the two halves of the output axis the other way round (scale/shift).
    """
    return Row(name, shape, _names(diffusers, shape[0], swap=swap_halves), _names(sd_scripts, shape[0], swap=False))


def block(
    name: str,
    rows: Sequence[Row | Block],
    count: int = 1,
    *,
    start: int = 0,
    diffusers: str | None = None,
    sd_scripts: str | None = None,
) -> Block:
    """Rows under a common prefix, repeated ``count`` times with ``{i}`` running from ``start``."""
    return Block(name, tuple(rows), count, start, diffusers, sd_scripts)


_NUMBER = re.compile(r"\d+")


def flat(name: str) -> str:
    """A dotted module name as sd-scripts writes it: every dot an underscore."""
    return name.replace(".", "_")


def name_pattern(name: str) -> str:
    """``layers.3.attention.to_q`` -> ``layers_#_attention_to_q``."""
    return _NUMBER.sub("#", flat(name))


class Base(NamedTuple):
    """A row with its block prefixes, (original, Diffusers, sd-scripts); its names are put together when asked for."""

    row: Row
    prefixes: tuple[str, str, str]

    @property
    def name(self) -> str:
        """The original module name."""
        return join(self.prefixes[0], self.row.name)

    @property
    def shape(self) -> Shape:
        """(out, in[, k...]) or (dim,)."""
        return self.row.shape

    def in_naming(self, naming: str) -> Names:
        """Its names in one naming; a row without names of its own keeps the original one under that naming's prefix."""
        prefix, own = self.prefixes[NAMINGS.index(naming)], self.row.in_naming(naming)
        return Names(tuple([Part(join(prefix, name), rows) for name, rows in own.parts]), own.swap_halves)


def join(prefix: str, name: str) -> str:
    """A name under a prefix; either may be empty."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def expand(rows: Sequence[Row | Block]) -> list[Base]:
    """Every base weight under its block prefixes."""
    found: list[Base] = []
    _expand(rows, ("", "", ""), found)
    return found


def _expand(rows: Sequence[Row | Block], prefixes: tuple[str, str, str], found: list[Base]) -> None:
    for item in rows:
        if isinstance(item, Row):
            found.append(Base(item, prefixes))
            continue
        for i in range(item.start, item.start + item.repeats):
            own = zip(prefixes, item.prefixes, strict=True)
            original, diffusers, trained = (join(prefix, name.replace("{i}", str(i))) for prefix, name in own)
            _expand(item.rows, (original, diffusers, trained), found)


def patterns(rows: Sequence[Row | Block]) -> frozenset[str]:
    """The :func:`name_pattern` of every name in every naming, without expanding the blocks."""
    found: set[str] = set()
    _patterns(rows, ("", "", ""), found)
    return frozenset(found)


def _patterns(rows: Sequence[Row | Block], prefixes: Sequence[str], found: set[str]) -> None:
    for item in rows:
        if isinstance(item, Block):
            own = zip(prefixes, item.prefixes, strict=True)
            _patterns(item.rows, [prefix + _pattern(name and f"{name}.") for prefix, name in own], found)
            continue
        for naming, prefix in zip(NAMINGS, prefixes, strict=True):
            for part in item.in_naming(naming).parts:
                found.add(prefix + _pattern(part.name) if part.name else prefix[:-1])


@lru_cache(maxsize=1 << 12)
def _pattern(name: str) -> str:
    return name_pattern(name.replace("{i}", "0"))
