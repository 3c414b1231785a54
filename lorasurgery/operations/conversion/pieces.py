"""Fusing, splitting and permuting as one question: which rows of which source module make up a target module."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Spans


class Piece(NamedTuple):
    """Rows ``ranges`` of ``source``, or that many rows of nothing."""

    source: Module | None
    ranges: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True, slots=True)
class Target:
    """A module to build: its rows of the original weights, and where each run of them comes from."""

    spans: Spans
    pieces: tuple[Piece, ...]

    @property
    def sources(self) -> tuple[Module, ...]:
        """The modules it takes rows from, each once."""
        return tuple({id(p.source): p.source for p in self.pieces if p.source is not None}.values())

    @property
    def is_rename(self) -> bool:
        """Whether it is one source, whole and in order."""
        piece = self.pieces[0]
        return len(self.pieces) == 1 and piece.source is not None and piece.ranges == ((0, piece.source.out),)


def targets_of(names: Mapping[str, Spans]) -> dict[str, list[Spans]]:
    """Original weight -> the modules of a naming that hold rows of it."""
    found: dict[str, list[Spans]] = defaultdict(list)
    for spans in names.values():
        for weight in dict.fromkeys(span.weight for span in spans):
            found[weight].append(spans)
    return found


def plan(modules: Sequence[Module], by_weight: Mapping[str, Iterable[Spans]]) -> list[Target]:
    """Every target module that takes a row of ``modules`` (all of one component), in the order first met.

    Raises ValueError when two modules hold the same row.
    """
    rows = _row_index(modules)
    wanted = dict.fromkeys(
        spans
        for module in modules
        for span in module.site.spans
        for spans in by_weight.get(span.weight, ())
        if any(s.weight == span.weight and s.start < span.stop and span.start < s.stop for s in spans)
    )
    return [Target(spans, _pieces(spans, rows)) for spans in wanted]


class _Held(NamedTuple):
    """Rows start:stop of a weight are rows offset: of a module."""

    start: int
    stop: int
    offset: int
    module: Module


def _row_index(modules: Iterable[Module]) -> dict[str, list[_Held]]:
    found: dict[str, list[_Held]] = defaultdict(list)
    for module in modules:
        offset = 0
        for span in module.site.spans:
            found[span.weight].append(_Held(span.start, span.stop, offset, module))
            offset += span.stop - span.start
    for weight, held in found.items():
        held.sort(key=lambda h: (h.start, h.stop))
        for first, second in pairwise(held):
            if second.start < first.stop:
                raise ValueError(f"{first.module.name} and {second.module.name} both hold rows of {weight}")
    return found


def _pieces(spans: Spans, rows: Mapping[str, list[_Held]]) -> tuple[Piece, ...]:
    runs: list[tuple[Module | None, int, int]] = []
    for span in spans:
        at = span.start
        for held in rows.get(span.weight, ()):
            low, high = max(at, held.start), min(span.stop, held.stop)
            if low >= high:
                continue
            if low > at:
                runs.append((None, 0, low - at))
            start = held.offset + low - held.start
            runs.append((held.module, start, start + high - low))
            at = high
        if at < span.stop:
            runs.append((None, 0, span.stop - at))
    return _joined(runs)


def _joined(runs: Sequence[tuple[Module | None, int, int]]) -> tuple[Piece, ...]:
    """Neighbouring runs of one source become one piece; touching ranges become one."""
    pieces: list[Piece] = []
    for module, start, stop in runs:
        last = pieces[-1] if pieces else None
        if last is None or last.source is not module:
            pieces.append(Piece(module, ((start, stop),)))
            continue
        ranges = last.ranges
        if module is None or ranges[-1][1] == start:
            merged = (ranges[-1][0], ranges[-1][1] + stop - start)
            ranges = (*ranges[:-1], merged)
        else:
            ranges = (*ranges, (start, stop))
        pieces[-1] = Piece(module, ranges)
    return tuple(pieces)
