"""A comparison in the terminal as a map: a row for each block, a column for each kind of module, darker where they differ."""

from __future__ import annotations

import re
from math import log10
from typing import TYPE_CHECKING

from rich.style import Style
from rich.text import Text

from lorasurgery.cli.heat_map import LETTERS, SMOOTH
from lorasurgery.cli.render import plain
from lorasurgery.operations.select.blocks import block_and_kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.verbs.compare import ModulePair

IDENTICAL, SAME, ONLY_A, ONLY_B, UNKNOWN = "=", "~", "A", "B", "?"
STEPS = "123456789"
"""Distances from the tolerance to 1 and beyond."""
NEAR, FAR = (60, 90, 60), (220, 40, 30)
LEGEND = "= identical  ~ within tolerance  1-9 up to 1  A, B only there  ? unknown"
_INDEX = re.compile(r"^\d+[._]")
_DEEPER = re.compile(r"(blocks?|layers)[._]\d+")


def show_map(screen: Console, pairs: Sequence[ModulePair], arch: Architecture) -> None:
    """One map for each component with more than one block; a cell with several modules shows the worst."""
    shown = False
    for component in dict.fromkeys(pair.component for pair in pairs):
        own = [(*_place(pair, arch), pair) for pair in pairs if pair.component == component]
        blocks = list(dict.fromkeys(block for block, _, _ in own if block))
        kinds = list(dict.fromkeys(kind for block, kind, _ in own if block))
        if len(blocks) < 2 or len(kinds) > len(LETTERS):
            continue
        cells = {(block, kind): pair for block, kind, pair in sorted(own, key=lambda one: one[2].worst)}
        _grid(screen, component, blocks, kinds, cells)
        shown = True
    if shown:
        screen.print(Text(LEGEND, "dim"))


def _grid(
    screen: Console, component: str, blocks: Sequence[str], kinds: Sequence[str], cells: dict[tuple[str, str], ModulePair]
) -> None:
    width = max(map(len, blocks))
    screen.print(Text(f"{component}: distance of each module", "bold"))
    screen.print(Text(" " * (width + 1) + " ".join(LETTERS[: len(kinds)])), no_wrap=True, crop=True)
    for block in blocks:
        line = Text(plain(block.ljust(width)) + " ")
        for kind in kinds:
            line.append_text(_cell(cells.get((block, kind)), colours=screen.color_system in SMOOTH))
        screen.print(line, no_wrap=True, crop=True)
    for letter, kind in zip(LETTERS, kinds, strict=False):
        screen.print(Text(plain(f"  {letter} {kind}"), "dim"), no_wrap=True, crop=True)


def _cell(pair: ModulePair | None, *, colours: bool) -> Text:
    if pair is None:
        return Text("  ")
    sign = {"identical": IDENTICAL, "same": SAME, "only a": ONLY_A, "only b": ONLY_B, "unknown": UNKNOWN}.get(pair.status)
    if sign is not None:
        return Text(f"{sign} ")
    share = _share(pair)
    text = f"{STEPS[round(share * (len(STEPS) - 1))]} "
    if not colours:
        return Text(text)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(NEAR, FAR, strict=True))
    return Text(text, Style(color="#ffffff", bgcolor=f"#{red:02x}{green:02x}{blue:02x}"))


def _share(pair: ModulePair) -> float:
    """Where its distance lies between the tolerance (0) and 1 (1), on a logarithmic scale."""
    low, value = log10(max(pair.tolerance, 1e-9)), log10(max(min(pair.worst, 1.0), 1e-9))
    return min(max((value - low) / -low, 0.0), 1.0) if low < 0.0 else 1.0


def _place(pair: ModulePair, arch: Architecture) -> tuple[str, str]:
    """(block, kind) of a pair, for its row and column.

    Blocks within blocks share a column, and so do the members of a UNet's block; rows of a weight that only one file divides
    have columns of their own.
    """
    block, kind = block_and_kind(pair.weight)
    shape = arch.shapes.get(pair.weight)
    whole = shape is None or sum(stop - start for start, stop in pair.rows) == shape[0]
    kind = _DEEPER.sub(r"\1.*", _INDEX.sub("", kind))
    return block, kind if whole else f"{kind} [{pair.rows[0][0]}:{pair.rows[0][1]}]"
