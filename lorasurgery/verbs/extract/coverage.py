"""Which rows of original weights a model holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Span
    from lorasurgery.models import Model
    from lorasurgery.site import Site

Held: TypeAlias = "dict[tuple[str, str], list[tuple[int, int]]]"
"""(component, original weight) -> (first row, last row + 1) of each piece, in order"""


def held_rows(model: Model) -> Held:
    """The rows a model has of each original weight."""
    found: Held = {}
    for component, spans in model.sites():
        for span in spans:
            found.setdefault((component, span.weight), []).append((span.start, span.stop))
    return {key: sorted(set(ranges)) for key, ranges in found.items()}


def total_rows(held: Held, site: Site) -> tuple[int, ...] | None:
    """How many rows each weight of a site has in all; None where one of them is not there."""
    found = [held.get((site.component, span.weight)) for span in site.spans]
    return None if None in found else tuple(max(stop for _, stop in own or ()) for own in found)


def covers(held: Held, site: Site) -> bool:
    """Whether every row of a site is there."""
    return all(_has_rows(held.get((site.component, span.weight), []), span) for span in site.spans)


def _has_rows(ranges: list[tuple[int, int]], span: Span) -> bool:
    at = span.start
    for start, stop in ranges:
        if start <= at < stop:
            at = stop
    return at >= span.stop
