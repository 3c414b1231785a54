"""The only place that prints: data to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.alerts import Alert

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from lorasurgery.report import Report

SHOWN = 8
"""Dropped keys, carried keys and warnings shown before '... and N more' (``--json`` has all)."""


def data(text: str) -> None:
    """To stdout, for other programs."""
    print(text)


def note(text: str) -> None:
    """A line about what was done, to stderr."""
    print(plain(text), file=sys.stderr)


def show_error(error: BaseException, path: Path | None = None) -> None:
    """One line on stderr: the file, what was found and expected, what to try."""
    print("stopped" if isinstance(error, KeyboardInterrupt) else f"error: {error_text(error, path)}", file=sys.stderr)


def error_text(error: BaseException, path: Path | None = None) -> str:
    """An error in one line; ``path`` is the file it is about when it does not say so itself."""
    from lorasurgery.errors import SurgeryError

    if isinstance(error, OSError) and error.strerror:
        where = error.filename if error.filename is not None else path
        return plain(f"{where}: {error.strerror}" if where is not None else error.strerror)
    if isinstance(error, SurgeryError) and error.path is None and path is not None:
        return plain(f"{path}: {error}")
    return plain(str(error))


def plain(text: str) -> str:
    """``text`` on one line, with escapes in place of what a terminal would obey: keys and paths are anybody's."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show_report(report: Report, *, one_line: bool = False) -> None:
    """The outcome of a conversion, as a table or (in a batch) one line."""
    verdict = _verdict(report)
    written = report.output if report.written else f"{report.output} (not written)"
    if one_line:
        print(plain(f"{report.input} -> {written}: {report.architecture}, {len(report.changes)} modules, {verdict}"))
        for line in warning_lines(report.warnings):
            print(plain(line))
        return
    print(plain(f"{Path(report.input).name} -> {written}"))
    for label, value in _lines(report, verdict):
        print(plain(f"  {label:<13}{value}"))
    _list("left out", [f"{key}: {reason}" for key, reason in report.dropped])
    _list("carried", [f"{key}: {reason}" for key, reason in report.carried])
    _list("note", [text for text in report.warnings if not isinstance(text, Alert)])
    for line in warning_lines([text for text in report.warnings if isinstance(text, Alert)]):
        print(plain(line))


def warning_lines(warnings: Iterable[str]) -> list[str]:
    """Notes as they come, and then what must be seen."""
    texts = list(dict.fromkeys(warnings))
    loud = [f"  WARNING: {text}" for text in texts if isinstance(text, Alert)]
    return [f"  note: {text}" for text in texts if not isinstance(text, Alert)] + loud


def announce(text: str) -> None:
    """Something to know before the work begins, to stderr."""
    note(f"warning: {text}")


def _verdict(report: Report) -> str:
    worst = report.worst()
    if worst is None:
        dead = 0 if report.ledger is None else len(report.ledger.lost.keys() & dict(report.carried).keys())
        unread = f"; {dead} keys have no effect in this layout" if dead else ""
        kept = "every module exact" if not report.dropped else f"kept modules exact, {len(report.dropped)} keys left out"
        return kept + unread
    count = len(report.losses.entries)
    return f"relative error {report.losses.total():.2e} over {count} modules, worst {worst[1]:.2e} ({worst[0]})"


def _lines(report: Report, verdict: str) -> list[tuple[str, str]]:
    others = [key for key, _ in report.candidates if key != report.architecture]
    arch = report.architecture + (f"  (the same keys fit {', '.join(others[:4])})" if others else "")
    return [
        ("architecture", arch),
        ("layout", f"{report.source_layout} -> {report.target_layout}"),
        ("modules", f"{report.modules} -> {len(report.changes)}: {_counts(report.actions())}"),
        ("families", _counts(report.families())),
        ("scale", f"from {_counts(report.scale_sources)}; written: {report.scale_written}"),
        ("result", verdict),
        ("time", f"{report.seconds:.2f} s"),
    ]


def _counts(counter: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items(), key=lambda item: -item[1])) or "none"


def _list(label: str, lines: list[str]) -> None:
    for line in lines[:SHOWN]:
        print(plain(f"  {label}: {line}"))
    if len(lines) > SHOWN:
        print(f"  {label}: ... and {len(lines) - SHOWN} more (--json lists all)")


def console() -> Console:
    """rich's console on stdout, for tables."""
    from rich.console import Console

    return Console()
