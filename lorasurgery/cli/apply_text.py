"""The outcome of ``lorasurgery apply`` for people."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.alerts import bytes_text
from lorasurgery.cli.render import SHOWN, warning_lines
from lorasurgery.cli.resize_text import counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasurgery.verbs.apply import ApplyReport
    from lorasurgery.verbs.apply.tally import Norms

LEAST = 0.9
"""The part of the change below which what rounding keeps of it is worth advice."""
BAR = 24


def apply_lines(report: ApplyReport, *, verbose: bool) -> list[str]:
    """What was applied, how much it changed, what rounding took, and what was not used."""
    sign = "-" if report.undone else "+"
    names = f" {sign} ".join(Path(own.path).name for own in report.used)
    written = report.output if report.written else f"{report.output} (not written)"
    lines = [f"{Path(report.model).name} {sign} {names} -> {written}"]
    lines += [f"  {label:<13}{value}" for label, value in _facts(report)]
    lines += _blocks(report.blocks(), verbose=verbose)
    lines += _listed("not used", [f"{key}: {reason} ({Path(path).name})" for path, key, reason in report.unmatched])
    lines += _listed("left out", [f"{name}: {reason}" for name, reason in report.left_out])
    return lines + warning_lines(_notes(report))


def _facts(report: ApplyReport) -> Iterator[tuple[str, str]]:
    total, worst = report.total, report.worst()
    yield "model", f"{report.architecture}, {report.layout} names"
    for own in report.used:
        zero = f", {own.left_out} at weight 0" if own.left_out else ""
        yield "adapter", f"{Path(own.path).name} x {own.weight}: {own.modules} modules ({counts(own.families)}){zero}"
    yield "tensors", f"{len(report.tensors)} changed, {report.untouched} copied byte for byte"
    yield "change", f"{total.relative_change:.4f} of the changed weights (norms)"
    yield "rounding", f"{report.rounding}, an error of {total.relative_loss:.2%} of the change; {total.kept:.1%} of it kept"
    if worst is not None:
        yield "worst", f"{worst.norms.relative_loss:.2%} {worst.name}"
    if report.undone:
        yield "restored", f"to {total.relative_restored:.1e} of the weights that were there, expected"
    if report.verified:
        yield "verified", _verified(report)
    if report.lycoris:
        most = max(report.lycoris, key=lambda own: own.difference)
        yield "LyCORIS", f"{len(report.lycoris)} modules, largest difference {most.difference:.1e} ({most.module})"
    if report.copied:
        yield "other files", f"{len(report.copied)} copied"
    speed = f" for {bytes_text(report.bytes)}, {bytes_text(int(report.bytes / report.seconds))}/s" if report.written else ""
    yield "time", f"{report.seconds:.2f} s{speed}"


def _verified(report: ApplyReport) -> str:
    worst = max(report.verified, key=lambda own: own.difference)
    values, wrong = sum(own.values for own in report.verified), sum(own.wrong for own in report.verified)
    what = "all the nearest to the exact ones" if not wrong else f"{wrong} NOT the nearest to the exact ones"
    if report.rounding != "nearest" and not wrong:
        what = "all next to the exact ones"
    most = f"largest difference {worst.difference:.1e} ({worst.tensor})"
    return f"{values} values of {len(report.verified)} tensors, {what}; {most}"


def _blocks(blocks: dict[str, Norms], *, verbose: bool) -> list[str]:
    """Change by block: each, or the spread over each run of blocks."""
    if not verbose:
        blocks = _runs(blocks)
    most = max((own.relative_change for own in blocks.values()), default=0.0)
    wide = max(28, *(len(name) for name in blocks)) if blocks else 28
    lines = [f"  {'block':<{wide}}  {'change':>8}  {'rounding':>8}"] if blocks else []
    for name, own in blocks.items():
        bar = "#" * round(own.relative_change / most * BAR) if most else ""
        lines.append(f"  {name:<{wide}}  {own.relative_change:8.4f}  {own.relative_loss:8.2%}  {bar}".rstrip())
    return lines


def _runs(blocks: dict[str, Norms]) -> dict[str, Norms]:
    """The blocks of each run together: ``double_blocks 0-18``."""
    runs: dict[str, list[tuple[str, Norms]]] = defaultdict(list)
    for name, own in blocks.items():
        run, _, number = name.rpartition(".")
        runs[run if number.isdigit() else name].append((number, own))
    return {_run_name(run, own): type(own[0][1]).together(norms for _, norms in own) for run, own in runs.items()}


def _run_name(run: str, own: Sequence[tuple[str, Norms]]) -> str:
    numbers = sorted(int(number) for number, _ in own if number.isdigit())
    if not numbers:
        return run
    return f"{run} {numbers[0]}" if len(numbers) == 1 else f"{run} {numbers[0]}-{numbers[-1]}"


def _listed(label: str, lines: Sequence[str]) -> list[str]:
    shown = [f"  {label}: {line}" for line in lines[:SHOWN]]
    more = len(lines) - SHOWN
    return shown + ([f"  {label}: ... and {more} more (--json lists all)"] if more > 0 else [])


def _notes(report: ApplyReport) -> Iterator[str]:
    from lorasurgery.verbs.apply.report import NOTHING

    yield from (*report.warnings, *report.alerts())
    total = report.total
    if report.new_scales():
        yield f"{report.new_scales()} fp8 scales are new: values lie beyond the old ones, or --scales new asked for them"
    if total.kept < LEAST and total.relative_change > NOTHING and report.rounding == "nearest" and not report.undone:
        yield "rounding took part of the change back; --rounding stochastic keeps it on average, a wider dtype keeps it"
    if report.dropped_metadata:
        yield f"left out of the metadata, as it is of the old weights: {', '.join(report.dropped_metadata)}"
    if report.undone:
        yield f"taking out rounds again: {total.relative_rounding:.1e} of the weights"
