"""Which rows of one file stand for the same rows of the model as which rows of the other.

A fused qkv beside q, k and v becomes three pairs, each at the finer side's granularity; rows in another order (the scale and
shift halves that Diffusers swaps) stay one pair with the rows listed in the order of the original weight.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import BrokenModuleError
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from lorasurgery.adapter import Adapter, Module

Ranges = tuple[tuple[int, int], ...]


class Side(NamedTuple):
    """Rows of one file's module, in the order of the original weight."""

    module: Module
    ranges: Ranges

    @property
    def whole(self) -> bool:
        """Whether they are all rows of the module, in its own order."""
        return self.ranges == ((0, self.module.out),)


class Pair(NamedTuple):
    """The same rows of the model in both files; None where a file has no module for them."""

    component: str
    weight: str
    rows: Ranges
    """Of the original weight."""
    a: Side | None
    b: Side | None

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.rows)


class _Held(NamedTuple):
    """Rows start:stop of a weight are rows offset: of a module."""

    start: int
    stop: int
    offset: int
    module: Module


def pairs_of(a: Adapter, b: Adapter) -> list[Pair]:
    """Every row that either file changes, once, in the order of the first file.

    Wan 2.2's second expert alone in one file is taken for the denoiser of the other, as a conversion writes it.
    Raises BrokenModuleError when a file has two modules for one row.
    """
    first, second = _held(a, alone=only_second(a)), _held(b, alone=only_second(b))
    found: list[Pair] = []
    for place in {**first, **second}:
        found += _in_weight(place, first.get(place, ()), second.get(place, ()))
    return _joined(found)


def only_second(adapter: Adapter) -> bool:
    """Whether the file has Wan's second expert without the first."""
    components = {site.component for site in adapter.modules}
    return SECOND_DENOISER in components and DENOISER not in components


def _held(adapter: Adapter, *, alone: bool) -> dict[tuple[str, str], list[_Held]]:
    found: dict[tuple[str, str], list[_Held]] = defaultdict(list)
    for site, module in adapter:
        component = DENOISER if alone and site.component == SECOND_DENOISER else site.component
        offset = 0
        for span in site.spans:
            found[component, span.weight].append(_Held(span.start, span.stop, offset, module))
            offset += span.stop - span.start
    for own in found.values():
        own.sort(key=lambda held: held.start)
        _refuse_overlap(own, adapter.path)
    return found


def _refuse_overlap(held: Sequence[_Held], path: Path | None) -> None:
    for first, second in pairwise(held):
        if second.start < first.stop:
            raise BrokenModuleError(
                f"{first.module.name} and {second.module.name} both hold the same rows; programs add them up or pick one",
                key=second.module.name, path=path, hint="lorasurgery prune --drop REGEX for one of them",
            )  # fmt: skip


def _in_weight(place: tuple[str, str], a: Sequence[_Held], b: Sequence[_Held]) -> list[Pair]:
    """The rows of one weight, cut wherever either file cuts them."""
    edges = sorted({edge for held in (*a, *b) for edge in (held.start, held.stop)})
    found = []
    for start, stop in pairwise(edges):
        sides = tuple(_side(held, start, stop) for held in (a, b))
        if sides != (None, None):
            found.append(Pair(*place, ((start, stop),), *sides))
    return found


def _side(held: Iterable[_Held], start: int, stop: int) -> Side | None:
    for own in held:
        if own.start <= start and stop <= own.stop:
            at = own.offset + start - own.start
            return Side(own.module, ((at, at + stop - start),))
    return None


def _joined(pieces: Iterable[Pair]) -> list[Pair]:
    """Pieces of the same two modules as one pair."""
    groups: Mapping[tuple[int, int], list[Pair]] = defaultdict(list)
    for piece in pieces:
        groups[id(piece.a and piece.a.module), id(piece.b and piece.b.module)].append(piece)
    return [_one(group) if len(group) > 1 else group[0] for group in groups.values()]


def _one(group: Sequence[Pair]) -> Pair:
    head = group[0]
    sides = [
        None if side is None else Side(side.module, _touching([getattr(piece, name).ranges[0] for piece in group]))
        for name, side in (("a", head.a), ("b", head.b))
    ]
    return head._replace(rows=_touching([piece.rows[0] for piece in group]), a=sides[0], b=sides[1])


def _touching(ranges: Sequence[tuple[int, int]]) -> Ranges:
    """Ranges with those joined that follow each other."""
    found = [ranges[0]]
    for start, stop in ranges[1:]:
        if found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)
