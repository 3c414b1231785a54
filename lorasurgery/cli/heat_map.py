"""A file's spectra in the terminal: a heat map of norms over blocks and module kinds, and small bars."""

from __future__ import annotations

from math import log
from statistics import fmean
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING

from rich.style import Style
from rich.table import Table
from rich.text import Text

from lorasurgery.cli.render import plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from lorasurgery.inspection.spectrum import ModuleSpectrum, Spectrum

SHADES, BARS = " .:-=+*#%@", "▁▂▃▄▅▆▇█"
DEAD, NOT_FINITE = "x", "!"
COLD, HOT = (48, 18, 92), (252, 206, 37)
"""Colours of the weakest and the strongest module."""
SMOOTH = ("256", "truecolor")
"""Terminals with enough colours; the others get shades of characters."""
LONGEST, SHORT, NARROW = 24, 10, 90
"""Bars of one sparkline, and on a terminal narrower than NARROW columns."""
LETTERS = ascii_lowercase + ascii_uppercase


def show_spectrum(screen: Console, own: Spectrum) -> None:
    """The heat map, one row of bars for each kind of module, and what is dead or not finite."""
    for component in dict.fromkeys(m.component for m in own.modules):
        modules = [m for m in own.modules if m.component == component]
        _heat_map(screen, component, modules)
        screen.print(_kinds(modules, LONGEST if screen.width >= NARROW else SHORT))
    if own.energy:
        words = ", ".join(f"rank {rank}: {share:.1%}" for rank, share in own.energy)
        screen.print(Text(f"energy kept when every module is cut to  {words}"))
    for label, names in (("dead (all zero)", own.dead), ("not finite", own.not_finite)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            screen.print(Text(plain(f"{len(names)} modules are {label}: {', '.join(names[:5])}{more}"), "red"))


def _heat_map(screen: Console, component: str, modules: Sequence[ModuleSpectrum]) -> None:
    """Rows are blocks, columns are kinds; brightness is the logarithm of the root mean square."""
    kinds = _letters(modules)
    blocks = list(dict.fromkeys(m.block for m in modules if m.block))
    if len(blocks) < 2 or len(kinds) > len(LETTERS):
        return
    cells = {(m.block, m.kind): m for m in modules}
    known = [m.relative for m in modules if m.relative]
    low, high = (log(min(known)), log(max(known))) if known else (0.0, 0.0)
    width = max(map(len, blocks))
    screen.print(Text(f"{component}: strength of each module, from {_short(low)} to {_short(high)} (root mean square)", "bold"))
    screen.print(Text(" " * (width + 1) + " ".join(kinds.values())), no_wrap=True, crop=True)
    for block in blocks:
        line = Text(plain(block.ljust(width)) + " ")
        for kind in kinds:
            line.append_text(_cell(cells.get((block, kind)), low, high, colours=screen.color_system in SMOOTH))
        screen.print(line, no_wrap=True, crop=True)


def _short(value: float) -> str:
    return f"{2.718281828459045**value:.2g}"


def _cell(own: ModuleSpectrum | None, low: float, high: float, *, colours: bool) -> Text:
    if own is None or own.state == "unknown":
        return Text("  ")
    if own.state != "ok" or not own.relative:
        return Text((NOT_FINITE if own.state == "nan" else DEAD) + " ", "red")
    share = (log(own.relative) - low) / (high - low) if high > low else 1.0
    if not colours:
        return Text(SHADES[1 + round(share * (len(SHADES) - 2))] * 2)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(COLD, HOT, strict=True))
    return Text("  ", Style(bgcolor=f"#{red:02x}{green:02x}{blue:02x}"))


def _letters(modules: Sequence[ModuleSpectrum]) -> dict[str, str]:
    """The kinds that stand in blocks, each with its column's letter."""
    kinds = list(dict.fromkeys(m.kind for m in modules if m.block))
    return dict(zip(kinds, LETTERS + "?" * len(kinds), strict=False))


def _kinds(modules: Sequence[ModuleSpectrum], bars: int) -> Table:
    """One row a kind: mean norm, effective rank, rank for 90 % of the energy, and the mean spectrum as bars."""
    letters = _letters(modules)
    table = Table(box=None, header_style="cyan", padding=(0, 2, 0, 0))
    for header, justify in (("", "left"), ("module", "left"), ("count", "right"), ("norm", "right"),
                            ("eff. rank", "right"), ("90 % rank", "right"), ("singular values", "left")):  # fmt: skip
        table.add_column(header, justify="right" if justify == "right" else "left", overflow="fold",
                         no_wrap=header in ("", "singular values"))  # fmt: skip
    for kind in dict.fromkeys(m.kind for m in modules):
        own = [m for m in modules if m.kind == kind and m.state == "ok"]
        if not own:
            continue
        ranks = [rank for m in own for share, rank in m.ranks if share == 0.9]
        table.add_row(
            letters.get(kind, ""), Text(plain(kind)), str(len(own)), f"{fmean(m.norm or 0.0 for m in own):.3g}",
            f"{fmean(m.effective_rank or 0.0 for m in own):.1f}", f"{fmean(ranks):.0f}" if ranks else "", _bars(own, bars),
        )  # fmt: skip
    return table


def _bars(modules: Sequence[ModuleSpectrum], most: int) -> str:
    """The mean of the spectra, each over its largest value; bars are evenly spread over the ranks."""
    length = max(len(m.singular_values) for m in modules)
    columns = min(length, most)
    text = ""
    for column in range(columns):
        at = column * length // columns
        heights = [m.singular_values[at] / m.singular_values[0] for m in modules if at < len(m.singular_values)]
        text += BARS[min(int(fmean(heights) * len(BARS)), len(BARS) - 1)]
    return text
