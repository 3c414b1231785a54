"""The outcome of ``lorasurgery extract`` for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.alerts import bytes_text
from lorasurgery.cli.extract_progress import duration
from lorasurgery.cli.render import SHOWN, warning_lines
from lorasurgery.cli.resize_text import counts, histogram

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.inspection.spectrum import Spectrum
    from lorasurgery.verbs.extract import ExtractReport
    from lorasurgery.verbs.extract.compare import Families
    from lorasurgery.verbs.extract.dry import Planned

FEW = 12
"""Blocks shown without ``--verbose``."""


def report_lines(report: ExtractReport, *, verbose: bool) -> list[str]:
    """Totals, ranks, blocks, what is left out, warnings."""
    own = report
    matrices = [m for m in own.modules if m.rank is not None or m.values]
    worst = max(matrices, key=lambda m: m.relative_error, default=None)
    lines = [
        ("model", own.architecture),
        ("layout", f"{own.layouts[0]} and {own.layouts[1]} -> {own.layouts[2]}"),
        ("asked", own.operation),
        ("modules", counts(dict(Counter(m.family for m in own.modules)))),
        ("kept", f"{own.energy:.2%} of the squared change; error {own.relative_error:.4f} of the change"),
        ("left out", f"{len(own.left_out)} tensors with {own.share_left_out:.2%} of the squared change"),
        ("rounding", f"{own.losses.total():.1e}"),
        ("size", bytes_text(own.size or 0)),
        ("time", duration(own.seconds) + (f"; {own.resumed} tensors were finished before" if own.resumed else "")),
    ]
    if worst is not None:
        lines.insert(5, ("worst module", f"{worst.relative_error:.4f} {worst.name}"))
    shown = [f"{Path(own.tuned).name} - {Path(own.base).name} -> {own.output}"]
    shown += [f"  {label:<13}{text}" for label, text in lines]
    shown += histogram(own.ranks())
    shown += _blocks(report, verbose=verbose)
    shown += _left_out(report, verbose=verbose)
    if verbose:
        shown += _table(report)
    return shown + warning_lines(own.warnings)


def _blocks(report: ExtractReport, *, verbose: bool) -> list[str]:
    """Every block, or those with most of the change."""
    blocks = report.blocks()
    names = list(blocks)
    if not verbose and len(names) > FEW:
        names = sorted(names, key=lambda name: -blocks[name][1])[:FEW]
    width = max(map(len, names), default=0)
    lines = [f"  {'block':<{width}}  {'tensors':>7}  {'of change':>9}  {'kept':>8}"]
    lines += [f"  {n:<{width}}  {blocks[n][0]:>7}  {blocks[n][1]:>9.2%}  {blocks[n][2]:>8.2%}" for n in names]
    more = len(blocks) - len(names)
    return lines + ([f"  ... and {more} more blocks with less of the change (--verbose)"] if more else [])


def _left_out(report: ExtractReport, *, verbose: bool) -> list[str]:
    """By reason; with ``verbose`` each."""
    lines = []
    for reason, (count, share) in sorted(report.reasons().items(), key=lambda item: -item[1][1]):
        lines.append(f"  left out: {count} tensors, {share:.3%} of the squared change: {reason}")
    if verbose:
        total = report.squared or 1.0
        lines += [f"    {one.squared / total:9.3%}  {one.name} ({one.reason})" for one in report.left_out]
    named = [f"  left out: {key}: {reason}" for key, reason in report.dropped]
    return lines + (named if verbose else named[:SHOWN])


def _table(report: ExtractReport) -> list[str]:
    lines = [f"  {'rank':>5}  {'kept':>8}  {'error':>8}  {'change':>9}  {'kind':<9}  module"]
    for own in report.modules:
        rank = "-" if own.rank is None else own.rank
        lines.append(
            f"  {rank:>5}  {own.energy:8.2%}  {own.relative_error:8.4f}  {own.relative_change:9.3g}  {own.kind:<9}  {own.name}"
        )
    return [*lines, "  change: of the weight it belongs to, by Frobenius norms"]


def dry_lines(planned: Planned, *, verbose: bool) -> list[str]:
    """What would be extracted."""
    lines = [f"{planned.tuned} - {planned.base} (nothing written)", f"  {'model':<13}{planned.architecture}"]
    lines.append(f"  {'layout':<13}{planned.layouts[0]} and {planned.layouts[1]} -> {planned.layouts[2]}")
    lines.append(f"  {'asked':<13}{planned.operation}")
    lines.append(f"  {'tensors':<13}{counts(dict(Counter(planned.kinds.values())))}")
    if planned.size is not None:
        lines.append(f"  {'size':<13}{bytes_text(planned.size)} if everything changed")
    lines += [f"  left out: {count} tensors: {reason}" for reason, count in Counter(planned.left_out.values()).items()]
    for names, where in ((planned.only_base, "base"), (planned.only_tuned, "tuned")):
        if names:
            lines.append(f"  note: {len(names)} weights are in the {where} model only (first: {names[0]})")
    lines += warning_lines(planned.warnings)
    if verbose:
        lines += [f"    {kind:<9}  {name}" for name, kind in planned.kinds.items()]
    return lines


def family_lines(found: Families) -> list[str]:
    """Bytes against error, and what is best for as many bytes."""
    lines = [f"{found.matrices} of {found.of} changed matrices, {found.dtype}; error of their change, all together"]
    lines.append(f"  {'family':<22}  {'bytes':>10}  {'error':>8}  {'LoRA of as many bytes':>21}")
    for row in sorted(found.rows, key=lambda row: row.size):
        some = "" if row.matrices == found.matrices else f"  (of {row.matrices} of them)"
        lines.append(f"  {row.name:<22}  {bytes_text(row.size):>10}  {row.error:8.4f}  {row.as_lora:21.4f}{some}")
    return [*lines, f"  best per byte: {found.best}"]


def spectrum_of(report: ExtractReport) -> Spectrum:
    """The singular values of the change in the form that ``inspect`` shows."""
    from lorasurgery.inspection.spectrum import Spectrum
    from lorasurgery.verbs.extract.spectra import module_spectra

    return Spectrum(module_spectra(report), energies(report), (), ())


def energies(report: ExtractReport) -> tuple[tuple[int, float], ...]:
    """(rank, share of the squared change kept when every matrix is cut to it), as far as singular values are known."""
    own: Sequence[tuple[tuple[float, ...], float]] = [(m.values, m.squared) for m in report.modules if m.values]
    total, most = sum(squared for _, squared in own), max((len(values) for values, _ in own), default=0)
    ranks = [rank for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if rank <= most]
    return tuple((rank, sum(sum(v * v for v in values[:rank]) for values, _ in own) / total) for rank in ranks if total)
