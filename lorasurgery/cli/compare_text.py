"""A comparison for people: the verdict, totals, and the modules that differ most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.cli.render import SHOWN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lorasurgery.adapter import Adapter
    from lorasurgery.verbs.compare import Comparison, ModulePair


def total_lines(found: Comparison, paths: Sequence[Path], adapters: Sequence[Adapter]) -> list[str]:
    """The verdict, what the files are, and the totals."""
    lines = [found.verdict()]
    for name, path, own in zip("AB", paths, adapters, strict=True):
        lines.append(f"  {name:<10}{path.name}: {own.architecture.key}, {own.layout}, {len(own)} modules")
    if found.comparable:
        norms, cosine, overlaps = found.norms(), found.cosine(), found.overlaps()
        lines.append(f"  {'distance':<10}{found.distance():.3g} of the whole, cosine {_number(cosine, '.6f')}")
        lines.append(f"  {'norm':<10}{norms[0]:.5g} and {norms[1]:.5g}")
        if None not in overlaps:
            lines.append(f"  {'overlap':<10}{overlaps[0]:.3f} of the outputs' directions, {overlaps[1]:.3f} of the inputs'")
        counts = ", ".join(f"{number} {_state(state)}" for state, number in found.counts().items())
        lines.append(f"  {'modules':<10}{counts}")
    for name, keys in zip("AB", found.leftovers, strict=True):
        lines += _some([f"only in {name}: {key}, which no table explains" for key in keys])
    return lines + _some([f"note: {text}" for text in found.warnings])


def _some(lines: list[str]) -> list[str]:
    more = len(lines) - SHOWN
    shown = [f"  {line}" for line in lines[:SHOWN]]
    return [*shown, f"  ... and {more} more (--json lists all)"] if more > 0 else shown


def _state(state: str) -> str:
    return {"only a": "only in A", "only b": "only in B", "unknown": "not comparable"}.get(state, state)


def module_lines(found: Comparison, top: int | None) -> Iterator[str]:
    """The worst modules, one a line, without those that are identical; with None every module."""
    pairs = [pair for pair in found.worst_first()[:top] if pair.status != "identical" or top is None]
    if not pairs:
        return
    heads = ("distance", "cosine", "norm A", "norm B", "rank", "scale", "left", "right", "module")
    yield "  {:>8} {:>9} {:>8} {:>8} {:>9} {:>13} {:>5} {:>5}  {}".format(*heads)
    for pair in pairs:
        yield _line(pair)
    more = len(found.pairs) - len(pairs)
    if len(pairs) == top and more > 0:
        yield f"  ... and {more} more (--verbose shows all)"


def _line(pair: ModulePair) -> str:
    ranks = _two(*(("-" if half.rank is None else str(half.rank)) if half else "none" for half in (pair.a, pair.b)))
    scales = _two(*(f"{half.scale:.4g}" if half else "none" for half in (pair.a, pair.b)))
    families = _two(*(half.family if half else "none" for half in (pair.a, pair.b)))
    beside = "".join(f", {what} {value:.2g}" for what, value in pair.vectors)
    state = "" if pair.status in ("identical", "same", "different") else f", {_state(pair.status)}"
    note = f": {pair.note}" if pair.note else ""
    return (
        f"  {_number(pair.distance, '8.2e'):>8} {_number(pair.cosine, '9.6f'):>9} {pair.norm_a:>8.3g} {pair.norm_b:>8.3g} "
        f"{ranks:>9} {scales:>13} {_number(pair.left, '5.3f'):>5} {_number(pair.right, '5.3f'):>5}  "
        f"{pair.name}{_rows(pair)} ({families}{beside}{state}){note}"
    )


def _rows(pair: ModulePair) -> str:
    """Which rows of the weight, where a file has them in a module of more."""
    return f" [rows {', '.join(f'{start}:{stop}' for start, stop in pair.rows)}]" if pair.part else ""


def _two(a: str, b: str) -> str:
    """One word where both sides have the same."""
    return a if a == b else f"{a} / {b}"


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
