"""The beginning of a GGUF file: enough to say which model it is.

Format: magic, version, tensor count, entry count (little endian), then entries of key, type and value.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError
from lorasurgery.inspection.description import Description

if TYPE_CHECKING:
    from pathlib import Path

HEAD = 1 << 20
"""Bytes that are looked at; the entries about the model come first."""
_STRING = 8
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WANTED = ("general.", "split.")


def is_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's magic. Raises OSError when it cannot be read."""
    if path.is_dir():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def describe_gguf(path: Path) -> Description:
    """The description of a GGUF file. Raises FileFormatError for one that is cut off in its first 24 bytes."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if len(head) < 24:
        raise FileFormatError(f"truncated: a GGUF file of {len(head)} bytes", path=path, hint="download it again")
    version, tensors, entries = struct.unpack_from("<IQQ", head, 4)
    found = _entries(head, min(entries, 10_000))
    name = next((str(found[k]) for k in ("general.name", "general.architecture") if found.get(k)), "unknown")
    kind = "an adapter in GGUF form" if found.get("general.type") == "adapter" else f"a GGUF model ({name})"
    typed = {key: {"type": type(v).__name__.replace("str", "string"), "value": v} for key, v in found.items()}
    return Description(
        path=str(path), kind="gguf", summary=f"{kind}, version {version}", container="gguf", size=path.stat().st_size,
        tensors=tensors, metadata=typed,
    )  # fmt: skip


def _entries(head: bytes, count: int) -> dict[str, Any]:
    """The ``general.*`` entries as far as they lie in ``head``; arrays end the search."""
    found: dict[str, Any] = {}
    at = 24
    try:
        for _ in range(count):
            key, at = _text(head, at)
            (kind,) = struct.unpack_from("<I", head, at)
            at += 4
            value: Any
            if kind == _STRING:
                value, at = _text(head, at)
            elif kind in _NUMBERS:
                (value,) = struct.unpack_from(f"<{_NUMBERS[kind]}", head, at)
                at += struct.calcsize(f"<{_NUMBERS[kind]}")
            else:
                break
            if key.startswith(_WANTED):
                found[key] = value
    except (struct.error, ValueError):
        pass
    return found


def _text(head: bytes, at: int) -> tuple[str, int]:
    """A string and where it ends; raises ValueError when it lies outside of ``head``."""
    (length,) = struct.unpack_from("<Q", head, at)
    end = at + 8 + length
    if end > len(head):
        raise ValueError("outside")
    return head[at + 8 : end].decode("utf-8", "replace"), end
