"""The outcome of ``lorasurgery merge`` for people."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorasurgery.alerts import bytes_text
from lorasurgery.cli.merge_choices import choice_text
from lorasurgery.cli.render import warning_lines
from lorasurgery.cli.resize_text import counts, dropped_lines

if TYPE_CHECKING:
    from lorasurgery.cli.merge_run import Outcome
    from lorasurgery.verbs.merge import MergedModule, SourceReport


def merge_lines(found: Outcome, *, verbose: bool) -> list[str]:
    """Files, what became of the modules, how exact that is, and with ``verbose`` every module."""
    report, writing = found.report, found.writing
    written = str(found.out) if writing.written else f"{found.out} (not written)"
    files = "1 file" if len(report.sources) == 1 else f"{len(report.sources)} files"
    lines = [f"{report.method} of {files} -> {written}"]
    rows = [("model", report.architecture), ("layout", writing.target_layout)]
    rows += [("file" if i == 0 else "", _file(source)) for i, source in enumerate(report.sources)]
    rows += [("modules", f"{len(report.modules)}: {counts(report.actions())}"), ("families", counts(_families(found)))]
    rows += [("rank", _span(found.ranks)), *_exactness(found)]
    rows.append(("size", bytes_text(found.size)))
    rows += [("or" if i == 0 else "", choice_text(choice)) for i, choice in enumerate(found.choices)]
    rows.append(("time", f"{report.seconds:.2f} s"))
    lines += [f"  {label:<13}{value}" for label, value in rows]
    if verbose:
        lines += _table(report.modules)
    lines += dropped_lines(found.dropped)
    return lines + warning_lines(found.warnings)


def _file(source: SourceReport) -> str:
    used = "" if source.used == source.modules else f", {source.used} of them used"
    return f"{source.weight} x {source.name}: {source.layout}, {counts(source.families)}{used}"


def _families(found: Outcome) -> Counter[str]:
    return found.writing.families()


def _exactness(found: Outcome) -> list[tuple[str, str]]:
    report = found.report
    rounding = f"exact but for rounding, {found.rounding:.1e}" if found.rounding else "exact"
    if report.lost:
        rounding = f"without {len(report.lost)} keys, first {report.lost[0][0]} ({report.lost[0][1]}); the others {rounding}"
    if report.deviation is not None:
        return [
            ("result", f"{report.deviation:.4f} away from the sum of what the files do"),
            *(("fault", text) for text in report.faults),
        ]
    if found.nearest:
        return [("nearest LoKr", f"{found.rounding:.4f} away from the sum of what the files do")]
    rows = [("sum" if report.method == "sum" else "result", rounding)]
    if report.resize is not None:
        worst = report.resize.worst()
        cut = f"rank {_span(report.resize.histogram())}; error {report.resize.relative_error:.4f} of the result; "
        rows.append(("cut to", f"{cut}energy kept {report.resize.energy:.2%}"))
        kept = Counter(reason for _, reason in report.resize.kept)
        if kept:
            rows.append(("not cut", counts(kept)))
        if worst is not None:
            rows.append(("worst module", f"{worst.relative_error:.4f} {worst.name}"))
    return rows


def _span(ranks: dict[int, int]) -> str:
    known = list(ranks)
    return "none" if not known else str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]}"


def _table(modules: list[MergedModule]) -> list[str]:
    lines = [f"  {'rank':>5}  {'action':<22}  {'weights':<20}  module"]
    for own in modules:
        rank = "-" if own.rank is None else own.rank
        weights = ", ".join(f"{weight:g}" for weight in own.weights)
        lines.append(f"  {rank:>5}  {own.action:<22}  {weights:<20}  {own.name}")
    return lines
