"""A table's stacks of numbered blocks, and what of a file stands in them.

A *stack* is a run of blocks under one prefix (``double_blocks.0`` to ``double_blocks.18``), a *submodule* what stands in
each block (``attn``, ``ff``), named as Diffusers names it. Names are compared with underscores for dots, as half of all
files spell them.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.rows import DIFFUSERS, NAMINGS, Block, Row, flat
from lorasurgery.layouts.names import index, prefixed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from lorasurgery.architectures.table import Architecture

DEEP = 6
"""Stacks of fewer blocks (token refiners, adapters of a text encoder) say little about a model."""
ATTENTION = re.compile("attn|attention|to_[qkv]$|qkv")
_NUMBER = re.compile(r"(\d+)_(.+)")


class Stack(NamedTuple):
    """One stack of a table."""

    name: str
    """The original prefix, flattened: ``double_blocks``."""
    starts: tuple[str, ...]
    """What a name in it begins with, in each naming: ``double_blocks_``, ``transformer_blocks_``."""
    depth: int
    """Number of blocks."""
    submodules: Mapping[str, str]
    """What a submodule is called, in each naming -> the submodule; longer names first."""
    wide: frozenset[str]
    """Submodules with a matrix; the others hold norms alone, which few adapters train."""

    def place(self, name: str) -> tuple[int, str] | None:
        """A flattened name's block and what follows; None when it stands elsewhere."""
        for start in self.starts:
            if name.startswith(start) and (match := _NUMBER.match(name, len(start))):
                return int(match[1]), match[2]
        return None

    def submodule(self, rest: str) -> str | None:
        """The submodule that a name within a block is of; None when the table has none such."""
        return next((own for called, own in self.submodules.items() if rest == called or rest.startswith(called + "_")), None)


class Part(NamedTuple):
    """What of a file stands in one stack."""

    stack: Stack
    blocks: frozenset[int]
    """The blocks in which something fits."""
    submodules: frozenset[str]
    """The submodules of which the file has something, whether it fits or not."""
    kinds: frozenset[str]
    """Names within a block, of what fits."""
    fitting: int
    """Modules that fit."""
    misfits: Mapping[str, frozenset[int]]
    """Names within a block of what is known and has another shape, and the blocks that have it."""
    foreign: Mapping[str, frozenset[int]]
    """Names within a block that the table lacks, and the blocks that have them; also those beyond its last block."""

    @property
    def touched(self) -> frozenset[int]:
        """The blocks in which the file has anything, known or not."""
        return self.blocks.union(*self.foreign.values(), *self.misfits.values())


@cache
def stacks(arch: Architecture) -> tuple[Stack, ...]:
    """The stacks of a table, read off its rows; a UNet's blocks are single ones, so it has none."""
    found: dict[str, list[Block]] = {}
    for item in arch.rows:
        if isinstance(item, Block) and "{i}" in item.name:
            found.setdefault(item.name.split("{i}")[0], []).append(item)
    return tuple(_stack(arch, start, own) for start, own in found.items())


def _stack(arch: Architecture, start: str, blocks: Sequence[Block]) -> Stack:
    own = DIFFUSERS if arch.has_diffusers else NAMINGS[0]
    names = [_in_namings(row, own) for item in blocks for row in _rows(item)]
    called: dict[str, str] = {}
    for which in range(len(NAMINGS)):
        firsts: dict[str, set[str]] = {}
        for submodule, parts, _ in names:
            firsts.setdefault(parts[which].split(".")[0], set()).add(submodule)
        for submodule, parts, _ in names:
            words = parts[which].split(".")
            called[flat(".".join(words[: 1 if len(firsts[words[0]]) == 1 else 2]))] = submodule
    starts = (prefix.split("{i}")[0] for item in blocks for prefix in item.prefixes)
    return Stack(
        flat(start.rstrip(".")),
        tuple(dict.fromkeys(flat(text) for text in starts if text)),
        max(item.start + item.repeats for item in blocks),
        {name: called[name] for name in sorted(called, key=lambda name: (-len(name), name))},
        frozenset(submodule for submodule, _, axes in names if axes > 1),
    )


def _in_namings(own: Row, naming: str) -> tuple[str, tuple[str, ...], int]:
    """A row's submodule, its first part's name in each naming, and its number of axes."""
    parts = tuple(own.in_naming(each).parts[0].name for each in NAMINGS)
    return parts[NAMINGS.index(naming)].split(".")[0], parts, len(own.shape)


def _rows(item: Block) -> Iterator[Row]:
    """The rows of a block with their names in it, whatever stands after its number included."""
    after = [prefix.split("{i}", 1)[-1].strip(".") if "{i}" in prefix else "" for prefix in item.prefixes]
    for own in item.rows:
        if isinstance(own, Row):
            yield own if not any(after) else _under(own, after)
        else:
            yield from (_under(inner, own.prefixes) for inner in _rows(own._replace(name="", diffusers=None, sd_scripts=None)))


def _under(own: Row, prefixes: Sequence[str]) -> Row:
    """A row with its names under a prefix in each naming."""
    names = [own.in_naming(each) for each in NAMINGS]
    original, diffusers, trained = (
        each._replace(parts=tuple(part._replace(name=f"{prefix}.{part.name}".strip(".")) for part in each.parts))
        for each, prefix in zip(names, prefixes, strict=True)
    )
    return Row(original.parts[0].name, own.shape, diffusers, trained)


def parts_of(arch: Architecture, stems: Iterable[str], misfits: Iterable[str]) -> list[Part]:
    """What of these modules stands in each stack of a table; ``misfits`` are those with another shape."""
    found, wrong = index(arch), set(misfits)
    own = [_Collected(stack) for stack in stacks(arch)]
    for stem in stems:
        place = found.find(stem)
        body = flat(prefixed(stem)[0][1])
        weight = body if place is None else flat(place.site.spans[0].weight)
        for each in own:
            at = each.stack.place(weight)
            if at is not None:
                each.add(at, (each.stack.place(body) or at)[1], known=place is not None, fits=stem not in wrong)
                break
    return [each.part() for each in own]


class _Collected:
    """A :class:`Part` while it is put together."""

    def __init__(self, stack: Stack) -> None:
        self.stack, self.fitting = stack, 0
        self.blocks: set[int] = set()
        self.submodules: set[str] = set()
        self.kinds: set[str] = set()
        self.misfits: dict[str, set[int]] = {}
        self.foreign: dict[str, set[int]] = {}

    def add(self, at: tuple[int, str], kind: str, *, known: bool, fits: bool) -> None:
        """A module in block ``at[0]`` called ``at[1]`` there by the table, ``kind`` by the file."""
        if not known:
            self.foreign.setdefault(kind, set()).add(at[0])
            return
        self.submodules.add(self.stack.submodule(at[1]) or kind)
        if not fits:
            self.misfits.setdefault(kind, set()).add(at[0])
            return
        self.fitting += 1
        self.blocks.add(at[0])
        self.kinds.add(kind)

    def part(self) -> Part:
        """As it is in the end."""
        wrong, foreign = ({kind: frozenset(at) for kind, at in own.items()} for own in (self.misfits, self.foreign))
        submodules, kinds = frozenset(self.submodules), frozenset(self.kinds)
        return Part(self.stack, frozenset(self.blocks), submodules, kinds, self.fitting, wrong, foreign)
