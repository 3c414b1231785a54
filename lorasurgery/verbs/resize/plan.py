"""Size against error for several ranks, from one measurement and without writing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasurgery.operations.cut.choose import with_reserve
from lorasurgery.operations.cut.engine import resized_from
from lorasurgery.operations.cut.options import ResizeOptions
from lorasurgery.operations.cut.size import file_size
from lorasurgery.operations.cut.survey import survey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Adapter
    from lorasurgery.operations.cut.base import BaseModel

EVERY = 1 << 20
"""A rank that keeps every singular value."""
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One way to cut the file."""

    rank: int
    """Of every module."""
    size: int
    """Bytes of the file, in the layout of the options."""
    relative_error: float
    """Of all modules that can be cut together."""
    worst: float
    """Of the worst of them."""
    at_size: float | None = None
    """The relative error where the same number of bytes is spent where it counts most."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The rows by rising rank; the last one is the file as it is."""

    rows: tuple[PlanRow, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """A plain object for ``--json``."""
        names = ("rank", "size", "relative_error", "worst", "at_size")
        return [{name: getattr(row, name) for name in names} for row in self.rows]


def plan(
    adapter: Adapter, options: ResizeOptions | None = None, ranks: Sequence[int] = RANKS, base: BaseModel | None = None
) -> Plan:
    """What each of these ranks makes of the file, up to the first that cuts nothing.

    ``options``: which modules and how; what they say about ranks is not looked at. Raises as :func:`resize` does.
    """
    chosen = replace(
        options or ResizeOptions(), rank=EVERY, conv_rank=None, pointwise_rank=None, ranks=(), recipe=None, compat=None,
        policy=None, param=None, size=None,
    )  # fmt: skip
    chosen.check()
    found = survey(adapter, chosen, base)
    lohas = any(subject.form == "loha" for subject in found.subjects)
    rows = []
    for rank in sorted(ranks):
        result, report = resized_from(found, replace(chosen, rank=rank), base)
        size, worst = file_size(result, chosen.layout), report.worst()
        unchanged = set(report.actions()) == {"unchanged"}
        by_size = report.relative_error if unchanged else None
        if not lohas and not unchanged:
            _, spread = resized_from(found, replace(chosen, rank=None, size=with_reserve(size)), base)
            by_size = spread.relative_error
        assert worst is not None  # noqa: S101  there is a module
        rows.append(PlanRow(rank, size, report.relative_error, worst.relative_error, by_size))
        if unchanged:
            break
    return Plan(tuple(rows))
