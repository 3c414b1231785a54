"""A description in the terminal: summary, metadata, modules, keys, tags."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lorasurgery.cli.render import console, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from lorasurgery.inspection.description import Description, ModuleInfo, Numbers

PIPE_WIDTH = 120
"""Columns when the output is no terminal and COLUMNS is not set."""
MOST = 6
"""Values of a histogram that are shown."""
LONGEST = 300
"""Characters of a metadata value that are shown."""


def show(description: Description, *, modules: bool) -> None:
    """Everything that was asked for, on stdout."""
    screen = console()
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = PIPE_WIDTH
    _summary(screen, description)
    if description.metadata:
        screen.print(_metadata(description.metadata))
    if description.tags is not None:
        screen.print(_table("tags", ("tag", "count"), [(tag, str(count)) for tag, count in description.tags], right=(1,)))
    if modules and description.modules:
        screen.print(_modules(screen, description.modules))
    if description.keys is not None:
        rows = [(key.key, key.dtype, _shape(key.shape)) for key in description.keys]
        screen.print(_table("keys", ("key", "dtype", "shape"), rows))
    if description.spectrum is not None:
        from lorasurgery.cli.heat_map import show_spectrum

        show_spectrum(screen, description.spectrum)


def one_line(description: Description) -> str:
    """A file in one line."""
    text = f"{description.path}: {description.summary}"
    if description.rank.histogram:
        text += f", rank {_values(description.rank, ' / ')}"
    text += f", {size(description.size)}"
    if description.warnings:
        count = len(description.warnings)
        text += f", {count} warning{'s' if count > 1 else ''}: {description.warnings[0].message}"
    return plain(text)


def size(count: float) -> str:
    """Bytes as people say them.

    >>> size(512), size(8_300_000), size(23_800_000_000)
    ('512 B', '8.3 MB', '23.8 GB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _summary(screen: Console, own: Description) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, value in [*_what(own), *_adapter(own), *_training(own)]:
        grid.add_row(label, Text(plain(value)))
    for warning in own.warnings:
        grid.add_row(Text("warning", "yellow"), Text(plain(warning.message), "yellow"))
    screen.print(Text(plain(Path(own.path).name), "bold"))
    screen.print(grid)


def _what(own: Description) -> list[tuple[str, str]]:
    rows = [("what", own.summary), ("file", f"{own.container}, {size(own.size)}, {own.tensors} tensors")]
    if own.parameters:
        dtypes = ", ".join(f"{count:,} {name}" for name, count in own.dtype.items())
        rows.append(("parameters", f"{own.parameters:,}" if len(own.dtype) > 1 else dtypes))
        if len(own.dtype) > 1:
            rows.append(("dtypes", dtypes))
    if own.architecture != "unknown":
        key = f"{own.architecture}-{own.variant}" if own.variant else own.architecture
        rows.append(("model", f"{own.architecture_name} ({key}), {own.coverage:.0%} explained"))
    others = [key for key, _ in own.candidates[1:]] if own.architecture != "unknown" else [
        f"{key} ({share:.0%})" for key, share in own.candidates
    ]  # fmt: skip
    if others:
        rows.append(("also fits" if own.architecture != "unknown" else "closest", ", ".join(others)))
    if own.components:
        rows.append(("components", _counts(own.components)))
    return rows


def _adapter(own: Description) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if own.kind == "adapter":
        rows.append(("layout", own.layout))
    if own.trainer is not None:
        after = f", then {', '.join(own.trainer.processed_by)}" if own.trainer.processed_by else ""
        rows.append(("written by", f"{own.trainer.name}{after} (by {', '.join(dict.fromkeys(own.trainer.evidence))})"))
    for label, numbers in (("rank", own.rank), ("alpha", own.alpha), ("scale", own.scale)):
        if numbers.histogram:
            sources = ", ".join(f"{name} ({count}x)" for name, count in own.scale_sources.items())
            source = f"; from {sources}" if label == "scale" else ""
            rows.append((label, _values(numbers) + source))
    if own.dora:
        rows.append(("DoRA", ", ".join(f"{count} per {_AXES[axis]}" for axis, count in own.dora.items())))
    if own.kernels:
        rows.append(("convolutions", _counts(own.kernels) + (f"; {own.tucker} Tucker" if own.tucker else "")))
    if own.qkv is not None:
        rows.append(("qkv", own.qkv))
    if own.lokr_factor is not None:
        rows.append(("LoKr factor", _factor(own)))
    if own.embeddings:
        rows.append(("embeddings", ", ".join(own.embeddings[:MOST])))
    return rows


_AXES = {"out": "output row", "in": "input column"}


def _factor(own: Description) -> str:
    factor = own.lokr_factor
    if factor is None:
        return ""
    places = {"buffer": factor.buffer, "metadata": factor.metadata}
    said = [f"{name} {value}" for name, value in places.items() if value is not None]
    implied = " or ".join(map(str, factor.implied)) or "nothing known"
    verdict = {True: "; they agree", False: "; they disagree", None: ""}[factor.agree]
    return f"{', '.join(said) or 'not said'}; shapes imply {implied}{verdict}; w1 {_counts(factor.outer)}"


def _training(own: Description) -> list[tuple[str, str]]:
    rows = []
    for name, value in own.training.items():
        if name == "datasets":
            text = "; ".join(f"{d['name']} ({d['images']} images x {d['repeats']})" for d in value[:MOST])
        elif isinstance(value, dict | list):
            text = json.dumps(value)
        else:
            text = str(value)
        rows.append((name.replace("_", " "), _cut(text)))
    for name, value in own.triggers.items():
        text = ", ".join(f"{t['tag']} ({t['count']})" for t in value) if name == "tags" else str(value)
        rows.append((f"trigger {name}".replace("_", " "), _cut(text)))
    return rows


def _metadata(metadata: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for key, entry in metadata.items():
        value = entry["value"]
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append((key, entry["type"], _cut(text)))
    return _table("metadata", ("key", "type", "value"), rows)


def _modules(screen: Console, modules: Sequence[ModuleInfo]) -> Table:
    """A row a module; a row a block where the terminal is too short for that."""
    if screen.is_terminal and len(modules) > screen.height - 4:
        return _blocks(modules)
    rows = [
        [m.name, m.family, _text(m.rank), _text(m.alpha), _text(m.scale), _shape(m.shape), m.dtype, size(m.bytes)]
        for m in modules
    ]
    headers = ["module", "family", "rank", "alpha", "scale", "shape", "dtype", "size"]
    if any(m.problem for m in modules):
        headers.append("problem")
        rows = [[*row, m.problem or ""] for row, m in zip(rows, modules, strict=True)]
    return _table("modules", headers, rows, right=(2, 3, 4, 7))


def _blocks(modules: Sequence[ModuleInfo]) -> Table:
    blocks: dict[tuple[str, str], list[ModuleInfo]] = {}
    for module in modules:
        blocks.setdefault((module.component, module.block), []).append(module)
    rows = [
        (
            component, block or "(outside)", str(len(own)), _counts(Counter(m.family for m in own)),
            _few(m.rank for m in own), _few(m.alpha for m in own), _few(m.scale for m in own), size(sum(m.bytes for m in own)),
        )
        for (component, block), own in blocks.items()
    ]  # fmt: skip
    headers = ("component", "block", "modules", "families", "rank", "alpha", "scale", "size")
    if len({component for component, _ in blocks}) > 1:
        return _table("modules by block", headers, rows, right=(2, 4, 5, 6, 7))
    return _table("modules by block", headers[1:], [row[1:] for row in rows], right=(1, 3, 4, 5, 6))


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="cyan", box=None, padding=(0, 2, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i in right else "left", overflow="fold" if i == 0 else "ellipsis",
                         no_wrap=i != 0 and header not in ("value", "problem", "families"))  # fmt: skip
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    return table


def _values(numbers: Numbers, joint: str = ", ") -> str:
    """A histogram: the value, or the most common ones with their counts."""
    counts = sorted(numbers.histogram.items(), key=lambda item: -item[1])
    if len(counts) == 1:
        return counts[0][0]
    shown = joint.join(f"{value} ({count}x)" for value, count in counts[:MOST])
    return shown if len(counts) <= MOST else f"{shown} and {len(counts) - MOST} more from {numbers.min:g} to {numbers.max:g}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _few(values: Iterable[float | None]) -> str:
    distinct = sorted({value for value in values if value is not None})
    return ", ".join(f"{value:g}" for value in distinct) if len(distinct) < 4 else f"{distinct[0]:g} to {distinct[-1]:g}"


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"
