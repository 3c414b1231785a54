"""The outcome of ``lorasurgery resize`` for people: totals, a histogram, tables, and a plan as a table and a curve."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorasurgery.alerts import bytes_text
from lorasurgery.cli.render import SHOWN, warning_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.operations.cut import ModuleReport, ResizeReport
    from lorasurgery.verbs.resize.plan import Plan, PlanRow

BAR = 40
WIDTH, HEIGHT = 56, 10
"""Columns and rows of the curve."""
RANK, SPREAD, BOTH = "o", "*", "@"
"""One rank for every module; the same bytes where they count most; both in one place."""


def counts(counter: dict[str, int]) -> str:
    """``3 resized, 1 unchanged``."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items(), key=lambda item: -item[1])) or "none"


def report_lines(report: ResizeReport, *, before: int, after: int, verbose: bool) -> list[str]:
    """Totals, the histogram of ranks, and with ``verbose`` every module."""
    worst = report.worst()
    old = sorted({m.old_rank for m in report.modules if m.old_rank is not None})
    new = list(report.histogram())
    lines = [
        ("modules", counts(report.actions())),
        ("kept as is", counts({f"({reason})": n for reason, n in Counter(why for _, why in report.kept).items()})),
        ("rank", f"{_span(old)} -> {_span(new)}"),
        ("size", f"{bytes_text(before)} -> {bytes_text(after)} ({after / before:.1%})" if before else bytes_text(after)),
        ("error", f"{report.relative_error:.4f} of the change; energy kept {report.energy:.2%}"),
    ]
    if worst is not None:
        lines.append(("worst module", f"{worst.relative_error:.4f} {worst.name}"))
    lines.append(("rounding", f"{report.losses.total():.1e}"))
    if report.threshold is not None:
        lines.append(("threshold", f"{report.threshold:.4g}"))
    lines.append(("time", f"{report.seconds:.2f} s"))
    shown = [f"  {label:<13}{value}" for label, value in lines if label != "kept as is" or report.kept]
    shown += histogram(report.histogram())
    if verbose:
        shown += _table(report.modules)
    for note, count in Counter(m.note for m in report.modules if m.note).items():
        shown.append(f"  note: {count} modules: {note}")
    return shown + warning_lines(report.warnings)


def dropped_lines(dropped: Sequence[tuple[str, str]]) -> list[str]:
    """What the target did not take."""
    lines = [f"  left out: {key}: {reason}" for key, reason in dropped[:SHOWN]]
    more = len(dropped) - SHOWN
    return lines + ([f"  left out: ... and {more} more (--json lists all)"] if more > 0 else [])


def _span(ranks: Sequence[int]) -> str:
    if not ranks:
        return "none"
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def histogram(ranks: dict[int, int]) -> list[str]:
    """Modules by new rank; more than 16 ranks are put together."""
    if len(ranks) < 2:
        return []
    step = -(-max(ranks) // 16) if len(ranks) > 16 else 1
    bins: Counter[int] = Counter()
    for rank, count in ranks.items():
        bins[-(-rank // step) if rank else 0] += count
    most = max(bins.values())
    lines = [f"  {'new rank':>9}  {'modules':>7}"]
    for place, count in sorted(bins.items()):
        last = place * step
        label = str(last) if step == 1 or not place else f"{last - step + 1}-{last}"
        lines.append(f"  {label:>9}  {count:>7}  {'#' * max(count * BAR // most, 1)}")
    return lines


def _table(modules: Sequence[ModuleReport]) -> list[str]:
    lines = [f"  {'old':>5} {'new':>5}  {'energy':>8}  {'error':>8}  {'sum kept':>8}  {'max ratio':>9}  {'':<9}  module"]
    for own in modules:
        old = "-" if own.old_rank is None else own.old_rank
        lines.append(
            f"  {old:>5} {own.new_rank:>5}  {own.energy:8.2%}  {own.relative_error:8.4f}  {own.sum_kept:8.2%}  "
            f"{own.max_ratio:9.4g}  {own.action:<9}  {own.name}"
        )
    return lines


def plan_lines(plan: Plan) -> list[str]:
    """The rows, and error over size."""
    lines = [f"  {'rank':>5}  {'size':>10}  {'error':>8}  {'worst':>8}  {'by --size':>9}"]
    for row in plan.rows:
        spread = "" if row.at_size is None else f"{row.at_size:.4f}"
        size = bytes_text(row.size)
        lines.append(f"  {row.rank:>5}  {size:>10}  {row.relative_error:8.4f}  {row.worst:8.4f}  {spread:>9}".rstrip())
    lines.append("  error: of the change, all modules together; by --size: as many bytes where they count most")
    return lines + _curve(plan.rows)


def _curve(rows: Sequence[PlanRow]) -> list[str]:
    """Relative error (upwards) over the size of the file (to the right)."""
    top = max(max(row.relative_error, row.at_size or 0.0) for row in rows)
    low, high = min(row.size for row in rows), max(row.size for row in rows)
    if len(rows) < 2 or top == 0.0 or low == high:
        return []
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]

    def put(size: int, error: float, mark: str) -> None:
        at = round((size - low) / (high - low) * (WIDTH - 1))
        line = grid[HEIGHT - 1 - round(error / top * (HEIGHT - 1))]
        line[at] = mark if line[at] in (" ", mark) else BOTH

    for row in rows:
        put(row.size, row.relative_error, RANK)
        if row.at_size is not None:
            put(row.size, row.at_size, SPREAD)
    lines = []
    for i, line in enumerate(grid):
        label = f"{top:.3f}" if i == 0 else "0.000" if i == HEIGHT - 1 else ""
        lines.append(f"  {label:>7} |{''.join(line)}".rstrip())
    left, right = bytes_text(low), bytes_text(high)
    lines += [f"  {'':>7} +{'-' * WIDTH}", f"  {'':>7}  {left}{right:>{WIDTH - len(left)}}"]
    return [*lines, f"  {RANK} one rank for every module   {SPREAD} by --size   {BOTH} both"]
