"""The lines and JSON objects of ``lorasurgery meta``."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from lorasurgery.cli.meta_files import SCHEMA, Shown
from lorasurgery.operations.notes.hashes import NOTHING
from lorasurgery.verbs.meta.values import Value, typed

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.io.in_place import Header
    from lorasurgery.operations.notes.hashes import Verified
    from lorasurgery.verbs.meta.meta import Edited

NESTED_LINES, TEXT_LENGTH = 12, 300
"""How much of a nested or long value is shown without ``--full``."""
_TIMES = ("ss_training_started_at", "ss_training_finished_at")


def show(header: Header, *, full: bool) -> Shown:
    """A file's metadata, every value with its type, nested JSON unfolded."""
    values = {key: typed(key, text) for key, text in header.metadata.items()}
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "file": str(header.path),
        "size": header.size,
        "header_bytes": header.start,
        "tensors": len(header.entries),
        "metadata": {key: value.value for key, value in values.items()},
        "types": {key: value.kind for key, value in values.items()},
    }
    count = f"{len(values)} keys" if values else "no metadata"
    lines = [f"{header.path}  {count}, header {size(header.start)}, {len(header.entries)} tensors, file {size(header.size)}"]
    width = min(max(map(len, values), default=0), 40)
    for key in sorted(values, key=_order):
        lines += _value_lines(key, values[key], width, full=full)
    return Shown(found, lines)


def _order(key: str) -> tuple[int, str]:
    groups = ("modelspec.", "ss_", "sshs_")
    return next((i for i, start in enumerate(groups) if key.startswith(start)), len(groups)), key


def _value_lines(key: str, value: Value, width: int, *, full: bool) -> list[str]:
    head = f"  {key:<{width}}  {value.kind:<5} "
    if value.kind == "json":
        lines = json.dumps(value.value, indent=2, ensure_ascii=False).splitlines()
        shown = lines if full else lines[:NESTED_LINES]
        more = [f"      ... and {len(lines) - len(shown)} more lines (--full shows all)"] if len(lines) > len(shown) else []
        return [head + shown[0], *("      " + line for line in shown[1:]), *more]
    if value.kind == "image" and not full:
        return [head + f"{value.value[5:].partition(';')[0]}, {size(len(value.value))} of text"]
    text = str(value.value)
    if not full and len(text) > TEXT_LENGTH:
        text = f"{text[:TEXT_LENGTH]}... ({len(text):,} characters, --full shows all)"
    if key in _TIMES and value.kind in ("int", "float") and 0 < value.value < 1e11:
        text += f"  ({datetime.fromtimestamp(value.value, tz=timezone.utc):%Y-%m-%d %H:%M} UTC)"
    lines = text.splitlines() or [""]
    return [head + lines[0], *("      " + line for line in lines[1:])]


def verified(path: Path, found: Verified, *, one_line: bool, strict: bool) -> Shown:
    """Whether a file's hashes are true."""
    result = {"schema": SCHEMA, "file": str(path), **found.to_json()}
    failed = strict and found.verdict == "stale"
    if one_line:
        known = [f"{one.key} {one.verdict}" for one in found.stored if one.value is not None] or ["no hash in the metadata"]
        line = f"{path}: {', '.join(known)}; AutoV2 {found.sha256[:10]}, AutoV3 {found.data_sha256[:12]}"
        return Shown(result, [line], failed)
    small = "  the hash of nothing: it starts at 1 MiB and the file is smaller; every such file has it"
    rows = [
        ("sha256", found.sha256),
        ("AutoV1", found.autov1 + (small if NOTHING.startswith(found.autov1) else "")),
        ("AutoV2", f"{found.sha256[:10]}  first digits of the sha256"),
        ("AutoV3", f"{found.data_sha256[:12]}  first digits of the sha256 of the data, what LoRAs are known by"),
    ]
    for one in found.stored:
        text = one.verdict if one.value is None else f"{one.verdict}  {one.value}"
        if one.verdict == "stale":
            text += f", should be {one.expected}"
        rows.append((one.key, text))
        if one.note and one.value is not None:
            rows.append(("", one.note))
    lines = [f"{path}  {size(found.size)}", *(f"  {label:<23}{text}" for label, text in rows)]
    if not found.serialiser_order:
        lines += ["  note: the tensors lie in another order than the safetensors library writes, and sd-scripts hashes them in"]
        lines += ["        the library's order; so its sshs_model_hash differs from the sha256 of the data as it lies here"]
    return Shown(result, lines, failed)


def edit(path: Path, done: Edited, out: Path | None, how: str) -> Shown:
    """What an edit changed, and how it was written."""
    changes = done.changes()
    target = out or path
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "file": str(path),
        "output": str(target),
        "written": how not in ("dry run", "unchanged"),
        "method": how,
        **changes,
        "notes": list(done.notes),
    }
    lines = [f"{path}: {how}" if out is None else f"{path} -> {out}: {how}"]
    lines += [f"  {what:<8} {', '.join(keys)}" for what, keys in changes.items() if keys]
    lines += [f"  note: {note}" for note in done.notes]
    return Shown(result, lines)


def size(number: int) -> str:
    """Bytes for people."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= step:
            return f"{number / step:.1f} {unit}"
    return f"{number} bytes"
