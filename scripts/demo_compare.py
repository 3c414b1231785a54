"""Compares two adapter files tensor by tensor, byte by byte: ``demo_compare.py BEFORE AFTER``.

Reads with the safetensors library, not with this project's own reader, so that the comparison stands on its own.
Exits with 1 when a tensor is missing, new, or differs in dtype, shape or one byte.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from safetensors import deserialize


class Stored(NamedTuple):
    """One tensor as it stands in the file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by its key."""
    entries = deserialize(path.read_bytes())
    return {key: Stored(str(e["dtype"]), tuple(e["shape"]), bytes(e["data"])) for key, e in entries}


def difference(before: Stored | None, after: Stored | None) -> str | None:
    """What tells two tensors apart, or None."""
    if before is None:
        return "new"
    if after is None:
        return "missing"
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype} {list(before.shape)} became {after.dtype} {list(after.shape)}"
    return None if before.data == after.data else "other bytes"


def kind(key: str) -> str:
    """The last word of a key: ``lokr_w1``, ``alpha``."""
    return key.rsplit(".", 1)[-1]


def main(before_path: Path, after_path: Path) -> int:
    """Prints a row for each kind of tensor, then every tensor that differs; returns the exit code."""
    before, after = read(before_path), read(after_path)
    found = {key: difference(before.get(key), after.get(key)) for key in sorted({*before, *after})}
    by_kind: dict[str, list[str]] = defaultdict(list)
    for key in found:
        by_kind[kind(key)].append(key)

    table = Table(title=f"{before_path.name} and {after_path.name}, every byte")
    table.add_column("tensors called")
    for heading in ("tensors", "bytes", "identical", "different"):
        table.add_column(heading, justify="right")
    for name, keys in sorted(by_kind.items()):
        size = sum(len(before[key].data) for key in keys if key in before)
        different = sum(found[key] is not None for key in keys)
        table.add_row(name, str(len(keys)), f"{size:,}", str(len(keys) - different), str(different))
    console = Console()
    console.print(table)

    differing = {key: what for key, what in found.items() if what is not None}
    for key, what in differing.items():
        console.print(f"{key}: {what}", style="red", highlight=False, markup=False)
    if not differing:
        console.print(f"All {len(found)} tensors came back bit for bit.", style="green", highlight=False)
    return 1 if differing or not found else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
