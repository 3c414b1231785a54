"""Rows and blocks, what tables are written in, and how they expand into every weight's names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Shape = tuple[int, ...]

ORIGINAL, DIFFUSERS, SD_SCRIPTS = "original", "diffusers", "sd_scripts"
NAMINGS = (ORIGINAL, DIFFUSERS, SD_SCRIPTS)


class Span(NamedTuple):
    """Rows ``start:stop`` (output axis) of the original weight ``weight``."""

    weight: str
    start: int
    stop: int


Spans = tuple[Span, ...]


class Part(NamedTuple):
    """One module stacked into a fused weight: its name and its number of rows."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Names:
    """What one naming calls a base weight: one module, or several stacked in this order."""

    parts: tuple[Part, ...]
    swap_halves: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One base weight. ``shape`` is (out, in[, k...]), or (dim,) for a norm; names are relative to the block."""

    name: str
    shape: Shape
    diffusers: Names | None
    sd_scripts: Names | None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows repeated ``count`` times from index ``start``; ``{i}`` in the prefixes is the index.

    A prefix of None in another naming means: the same as the original.
    """

    name: str
    rows: tuple[Row | Block, ...]
    count: int = 1
    start: int = 0
    diffusers: str | None = None
    sd_scripts: str | None = None


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
        return _join(self.prefixes[0], self.row.name)

    @property
    def shape(self) -> Shape:
        """(out, in[, k...]) or (dim,)."""
        return self.row.shape

    def in_naming(self, naming: str) -> Names:
        """Its names in one naming; a row without names of its own keeps the original one under that naming's prefix."""
        if naming == ORIGINAL:
            return Names((Part(self.name, self.shape[0]),))
        own = self.row.diffusers if naming == DIFFUSERS else self.row.sd_scripts
        prefix = self.prefixes[1 if naming == DIFFUSERS else 2]
        if own is None or not own.parts:
            swap = own is not None and own.swap_halves
            return Names((Part(_join(prefix, self.row.name), self.shape[0]),), swap)
        return Names(tuple(Part(_join(prefix, p.name), p.rows) for p in own.parts), own.swap_halves)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def expand(rows: Sequence[Row | Block], prefixes: tuple[str, str, str] = ("", "", ""), *, once: bool = False) -> Iterator[Base]:
    """Every base weight under its block prefixes; ``once``: only the first of each repeated block."""
    for item in rows:
        if isinstance(item, Row):
            yield Base(item, prefixes)
            continue
        names = (item.name, item.name if item.diffusers is None else item.diffusers,
                 item.name if item.sd_scripts is None else item.sd_scripts)  # fmt: skip
        for i in range(item.start, item.start + (1 if once else item.count)):
            original, diffusers, trained = (_join(p, n.format(i=i)) for p, n in zip(prefixes, names, strict=True))
            yield from expand(item.rows, (original, diffusers, trained), once=once)
