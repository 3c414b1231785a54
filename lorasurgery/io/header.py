"""The safetensors header: read, check and write, without numpy, torch or the safetensors package.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data.
Source: https://github.com/huggingface/safetensors#format and its ``validate`` in ``safetensors/src/tensor.rs`` (0.8).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError
from lorasurgery.io.dtypes import BITS
from lorasurgery.io.sniff import a_folder, explain
from lorasurgery.io.sources import FileSource, Region
from lorasurgery.io.tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_HEADER = 100_000_000
"""The longest header the safetensors library reads, in bytes."""

_AGAIN = "download it again, or save it again with the program that made it"

DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip
"""The serialiser writes tensors by dtype in this order, then by name (observed with safetensors 0.8.0)."""


@dataclass(frozen=True, slots=True)
class RawFile:
    """A file's tensors, still on disk, and its string metadata."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def read_safetensors(path: str | Path) -> RawFile:
    """The header of ``path``, checked, its tensors as regions of the open file.

    Raises FileFormatError, which says what the file is when it is something else, and OSError when it cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        raise a_folder(path)
    source = FileSource(path)
    size = source.size()
    header, start = _header(path, source, size)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFormatError(
            "__metadata__ in the header must map strings to strings", path=path, hint="saving it again with its program"
        )
    tensors = {name: _tensor(path, source, start, name, info) for name, info in header.items()}
    _check_layout(path, tensors, start, size)
    return RawFile(path, tensors, metadata)


def _header(path: Path, source: FileSource, size: int) -> tuple[dict[str, Any], int]:
    head = source.read(0, min(size, 512))
    other = explain(path, head, size)
    if other is not None:
        raise other
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > MAX_HEADER:
        raise FileFormatError(
            f"the header claims {length} bytes, more than the {MAX_HEADER} the format allows; this is no safetensors file",
            path=path,
            hint="download it again",
        )
    if 8 + length > size:
        raise FileFormatError(
            f"truncated: the header needs {8 + length} bytes, the file has {size}", path=path, hint="download it again"
        )
    try:
        text = source.read(8, length).decode()
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        if "\\ud" in text or "\\uD" in text:  # a lone surrogate has no UTF-8 form, so it could not be written again
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the header is not JSON ({error})", path=path, hint="download it again") from error
    if not isinstance(header, dict):
        raise FileFormatError("the header is not a JSON object", path=path, hint="download it again")
    return header, 8 + length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice} stands twice")
    return found


def _tensor(path: Path, source: FileSource, start: int, name: str, info: object) -> Tensor:
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]  # type: ignore[index]
        for number in (*shape, begin, end):
            if type(number) is not int or number < 0:
                raise ValueError("not a count")  # noqa: TRY301  the same answer as for a missing field
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"the header entry of {name} has no valid dtype, shape and data_offsets", path=path, hint=_AGAIN
        ) from error
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FileFormatError(
            f"{name} has dtype {dtype}, which the safetensors format does not have",
            path=path,
            hint="a version of the file in one of F32, F16, BF16",
        )
    bits = prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        needs = f"{bits // 8} bytes" if bits % 8 == 0 else f"{bits} bits, no whole number of bytes"
        raise FileFormatError(
            f"{name}: {dtype} {list(shape)} needs {needs}, data_offsets give {end - begin}", path=path, hint=_AGAIN
        )
    return Tensor(dtype, shape, (Region(source, start + begin, end - begin),))


def _check_layout(path: Path, tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    at = start
    for begin, length, name in sorted((t.regions[0].offset, t.regions[0].length, name) for name, t in tensors.items()):
        if begin != at:
            kind = "overlaps its neighbour" if begin < at else "leaves a hole before it"
            raise FileFormatError(f"the data of {name} {kind}: the header's data_offsets are wrong", path=path, hint=_AGAIN)
        at += length
    if at > size:
        raise FileFormatError(
            f"truncated: the header describes {at} bytes, the file has {size}", path=path, hint="download it again"
        )
    if at < size:
        raise FileFormatError(
            f"{size - at} bytes follow the last tensor; the header does not describe them", path=path, hint=_AGAIN
        )


def serialiser_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order the safetensors serialiser lays out their data."""
    rank = {dtype: i for i, dtype in enumerate(DTYPE_ORDER)}
    return sorted(tensors, key=lambda name: (rank.get(tensors[name].dtype, len(rank)), name.encode()))


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """Length prefix and padded JSON for ``tensors`` in serialiser order, as the safetensors library writes it."""
    text = header_text(tensors, metadata, serialiser_order(tensors))
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_text(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, names: Iterable[str]) -> bytes:
    """The JSON of the header alone, the tensors' data in the order of ``names``."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        tensor = tensors[name]
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
