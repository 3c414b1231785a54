"""Which rows of which module make up a target module, on random partitions of a weight."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasurgery.adapter import Module, Scale
from lorasurgery.architectures.table import Span
from lorasurgery.operations.conversion.pieces import plan, targets_of
from lorasurgery.site import DENOISER, Site

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Spans

ROWS = 24
cuts = st.lists(st.integers(1, ROWS - 1), max_size=4, unique=True).map(lambda found: [0, *sorted(found), ROWS])


def module(name: str, spans: Spans) -> Module:
    return Module(Site(DENOISER, spans), name, None, Scale(1.0, "none"))


def partition(edges: list[int], *, swapped: bool) -> list[Spans]:
    """Modules between the edges; with ``swapped`` each holds its halves the other way round."""
    found: list[Spans] = []
    for start, stop in pairwise(edges):
        middle = (start + stop) // 2
        if swapped and start < middle:
            found.append((Span("w", middle, stop), Span("w", start, middle)))
        else:
            found.append((Span("w", start, stop),))
    return found


def labels(spans: Spans) -> list[int]:
    """The original rows of a module, in its own order."""
    return [row for span in spans for row in range(span.start, span.stop)]


@given(cuts, cuts, st.booleans(), st.booleans(), st.sets(st.integers(0, 4)))
def test_every_row_arrives_where_it_belongs(
    source: list[int], target: list[int], swap_source: bool, swap_target: bool, missing: set[int]
) -> None:
    sources = [m for i, m in enumerate(partition(source, swapped=swap_source)) if i not in missing]
    modules = [module(str(i), spans) for i, spans in enumerate(sources)]
    wanted = partition(target, swapped=swap_target)
    held = {row for spans in sources for row in labels(spans)}
    plans = plan(modules, targets_of({str(i): spans for i, spans in enumerate(wanted)}))
    assert {p.spans for p in plans} == {spans for spans in wanted if held & set(labels(spans))}
    for one in plans:
        rows: list[int | None] = []
        for piece in one.pieces:
            own = None if piece.source is None else labels(piece.source.site.spans)
            for start, stop in piece.ranges:
                rows += [None if own is None else own[i] for i in range(start, stop)]
        assert rows == [row if row in held else None for row in labels(one.spans)]
        assert one.is_rename == any(m.site.spans == one.spans for m in modules)
        assert {s.name for s in one.sources} == {m.name for m in modules if set(labels(m.site.spans)) & set(labels(one.spans))}


@given(cuts)
def test_the_same_partition_is_a_rename(edges: list[int]) -> None:
    spans = partition(edges, swapped=False)
    plans = plan([module(str(i), s) for i, s in enumerate(spans)], targets_of({str(i): s for i, s in enumerate(spans)}))
    assert [p.spans for p in plans] == spans
    assert all(p.is_rename for p in plans)


def test_halves_exchanged_are_one_piece_of_two_ranges() -> None:
    swapped = (Span("w", 12, 24), Span("w", 0, 12))
    (only,) = plan([module("a", (Span("w", 0, 24),))], targets_of({"b": swapped}))
    (piece,) = only.pieces
    assert piece.ranges == ((12, 24), (0, 12))
    assert not only.is_rename
    assert piece.rows == 24


def test_two_modules_with_one_row_are_refused() -> None:
    twice = [module("fused", (Span("w", 0, 24),)), module("part", (Span("w", 8, 16),))]
    with pytest.raises(ValueError, match="both hold rows of w"):
        plan(twice, targets_of({"w": (Span("w", 0, 24),)}))
