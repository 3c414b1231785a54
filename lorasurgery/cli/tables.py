"""A description in the terminal: summary, metadata, modules, keys, tags."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.cli.columns import BOLD, YELLOW, Column, Screen, screen, show_pairs, show_table
from lorasurgery.cli.render import data, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorasurgery.inspection.description import Description, ModuleInfo, Numbers

MOST = 6
"""Values of a histogram that are shown."""
LONGEST = 300
"""Characters of a metadata value that are shown."""


def show(description: Description, *, modules: bool) -> None:
    """Everything that was asked for, on stdout."""
    own = screen()
    _summary(own, description)
    if description.metadata:
        _metadata(own, description.metadata)
    if description.tags is not None:
        rows = [(tag, str(count)) for tag, count in description.tags]
        show_table(own, (Column("tag", wraps=True), Column("count", right=True)), rows, "tags")
    if modules and description.modules:
        _modules(own, description.modules)
    if description.keys is not None:
        keys = [(key.key, key.dtype, _shape(key.shape)) for key in description.keys]
        show_table(own, (Column("key", wraps=True), Column("dtype"), Column("shape")), keys, "keys")
    if description.spectrum is not None:
        from lorasurgery.cli.heat_map import show_spectrum
        from lorasurgery.cli.render import console

        drawn = console()
        drawn.width = own.width
        show_spectrum(drawn, description.spectrum)


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


def _summary(own: Screen, description: Description) -> None:
    rows = [(*row, "") for row in (*_what(description), *_adapter(description), *_training(description))]
    data(own.painted(plain(Path(description.path).name), BOLD))
    show_pairs(own, [*rows, *(("warning", warning.message, YELLOW) for warning in description.warnings)])


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
    rows += [("because", sentence) for sentence in own.evidence[1:]]
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


def _metadata(own: Screen, metadata: Mapping[str, Mapping[str, Any]]) -> None:
    rows = []
    for key, entry in metadata.items():
        value = entry["value"]
        rows.append((key, entry["type"], _cut(value if isinstance(value, str) else json.dumps(value))))
    show_table(own, (Column("key", wraps=True), Column("type"), Column("value", wraps=True)), rows, "metadata")


def _modules(own: Screen, modules: Sequence[ModuleInfo]) -> None:
    """A row a module; a row a block where the terminal is too short for that."""
    if own.terminal and len(modules) > own.height - 4:
        _blocks(own, modules)
        return
    rows = [
        (m.name, m.family, _text(m.rank), _text(m.alpha), _text(m.scale), _shape(m.shape), m.dtype, size(m.bytes),
         m.problem or "") for m in modules
    ]  # fmt: skip
    columns = [Column("module", wraps=True), Column("family"), *(Column(h, right=True) for h in ("rank", "alpha", "scale")),
               Column("shape"), Column("dtype"), Column("size", right=True), Column("problem", wraps=True)]  # fmt: skip
    shown = len(columns) if any(m.problem for m in modules) else -1
    show_table(own, columns[:shown], [row[:shown] for row in rows], "modules")


def _blocks(own: Screen, modules: Sequence[ModuleInfo]) -> None:
    blocks: dict[tuple[str, str], list[ModuleInfo]] = {}
    for module in modules:
        blocks.setdefault((module.component, module.block), []).append(module)
    rows = [
        [
            block or "(outside)", component, str(len(inner)), _counts(Counter(m.family for m in inner)),
            _few(m.rank for m in inner), _few(m.alpha for m in inner), _few(m.scale for m in inner),
            size(sum(m.bytes for m in inner)),
        ]
        for (component, block), inner in blocks.items()
    ]  # fmt: skip
    columns = [Column("block", wraps=True), Column("component"), Column("modules", right=True), Column("families", wraps=True),
               *(Column(h, right=True) for h in ("rank", "alpha", "scale", "size"))]  # fmt: skip
    if len({component for component, _ in blocks}) == 1:
        columns, rows = [columns[0], *columns[2:]], [[row[0], *row[2:]] for row in rows]
    show_table(own, columns, rows, "modules by block")


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
