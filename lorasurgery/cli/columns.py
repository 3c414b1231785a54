"""Plain tables that fit the terminal. rich draws prettier ones, but importing it takes longer than reading a header."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.cli.render import data, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GAP = "  "
PIPE_WIDTH = 120
"""Columns when the output is no terminal and COLUMNS is not set."""
LEAST = 24
"""A first column narrower than this gets lines of its own."""
BOLD, CYAN, YELLOW = "1", "36", "33"
"""Codes of the terminal's colours (ECMA-48, select graphic rendition)."""


class Column(NamedTuple):
    """How a column's cells are laid out."""

    header: str = ""
    right: bool = False
    wraps: bool = False
    """Whether long cells continue on the next line; others are never narrower than their longest cell."""


class Screen(NamedTuple):
    """Where tables go: its width, its height, and whether it has colours."""

    width: int
    height: int
    colours: bool
    terminal: bool

    def painted(self, text: str, code: str) -> str:
        """``text`` in a colour (nothing: as it is), where there are any."""
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours and code else text


def screen() -> Screen:
    """Standard output as it is now. NO_COLOR and FORCE_COLOR are obeyed."""
    terminal = sys.stdout.isatty()
    width, height = shutil.get_terminal_size((PIPE_WIDTH if not terminal else 80, 25))
    if not terminal and "COLUMNS" not in os.environ:
        width = PIPE_WIDTH
    able = terminal and os.environ.get("TERM") != "dumb" and (os.name != "nt" or "WT_SESSION" in os.environ)
    colours = "NO_COLOR" not in os.environ and (able or "FORCE_COLOR" in os.environ)
    return Screen(width, height, colours, terminal)


def show_table(own: Screen, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table: title, headers, rows. Cells are printed as text, whatever they hold."""
    cells = [[plain(cell) for cell in row] for row in rows]
    headers = [column.header for column in columns]
    widths = [max((_width(row[i]) for row in (headers, *cells)), default=0) for i in range(len(columns))]
    if title:
        data(own.painted(title, BOLD))
    longest = widths[0]
    stacked = _fit(own.width, columns, widths) < min(LEAST, longest)
    if any(headers):
        for line in _lines(headers, columns, widths, own.width, stacked=stacked):
            data(own.painted(line, CYAN))
    for row in cells:
        for line in _lines(row, columns, widths, own.width, stacked=stacked):
            data(line)


def show_pairs(own: Screen, rows: Sequence[tuple[str, str, str]]) -> None:
    """Print labels with their texts beside them; the third is the colour of a row, or nothing."""
    width = max((len(label) for label, _, _ in rows), default=0)
    for label, text, code in rows:
        for i, line in enumerate(wrapped(plain(text), max(own.width - width - len(GAP), 10))):
            head = (label if i == 0 else "").ljust(width)
            data(f"{own.painted(head, code or CYAN)}{GAP}{own.painted(line, code)}")


def _fit(width: int, columns: Sequence[Column], widths: list[int]) -> int:
    """Narrow the columns that wrap until the table fits, the widest first; the first column's width."""
    wraps = [i for i, column in enumerate(columns) if column.wraps]
    over = sum(widths) + len(GAP) * (len(widths) - 1) - width
    while over > 0 and wraps:
        widest = max(wraps, key=lambda i: widths[i])
        if widths[widest] <= 1:
            break
        widths[widest] -= 1
        over -= 1
    return widths[0]


def _lines(
    cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int], width: int, *, stacked: bool
) -> Iterator[str]:
    """A row's lines. ``stacked``: the first cell stands above the others."""
    if stacked:
        yield from wrapped(cells[0], width)
        yield from (GAP + line for line in _lines(cells[1:], columns[1:], widths[1:], width - len(GAP), stacked=False))
        return
    parts = [wrapped(cell, own) if column.wraps else [cell] for cell, column, own in zip(cells, columns, widths, strict=True)]
    for i in range(max(map(len, parts))):
        line = [
            _padded(part[i] if i < len(part) else "", own, right=column.right)
            for part, column, own in zip(parts, columns, widths, strict=True)
        ]
        yield GAP.join(line).rstrip()


def wrapped(text: str, width: int) -> list[str]:
    """``text`` cut at spaces into lines of ``width`` columns; a word that is longer is cut anywhere.

    >>> wrapped("one two three", 8), wrapped("abcdef", 4)
    (['one two', 'three'], ['abcd', 'ef'])
    """
    if _width(text) <= width:
        return [text]
    lines = [""]
    for word in text.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if _width(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        rest = word
        while _width(rest) > width:
            cut = _cut(rest, width)
            lines[-1], rest = rest[:cut], rest[cut:]
            lines.append("")
        lines[-1] = rest
    return lines


def _cut(text: str, width: int) -> int:
    """How many characters fit into ``width`` columns, one at least."""
    used = 0
    for i, character in enumerate(text):
        used += _width(character)
        if used > width:
            return max(i, 1)
    return len(text)


def _padded(text: str, width: int, *, right: bool) -> str:
    gap = " " * (width - _width(text))
    return gap + text if right else text + gap


def _width(text: str) -> int:
    """Columns a text takes on the terminal: East Asian wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)
