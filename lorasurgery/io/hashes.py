"""sd-scripts' ``sshs_model_hash`` and ``sshs_legacy_hash``, byte for byte, streamed.

sd-scripts serialises the tensors with only the ``ss_*`` metadata and hashes that. The model hash is the sha256 of the
data region, which does not depend on the metadata; the legacy hash is the first 8 hex digits of the sha256 of bytes
0x100000:0x110000 of that serialisation, header included, as the safetensors library of the day wrote it (:class:`Era`).
Source: ``precalculate_safetensors_hashes`` and ``addnet_hash_legacy`` in sd-scripts ``library/train_util.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.io.header import header_text, serialiser_order

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorasurgery.io.tensors import Tensor

LEGACY_START, LEGACY_LENGTH = 0x100000, 0x10000


class Era(NamedTuple):
    """How the safetensors library serialised at a time."""

    versions: str
    order: Callable[[Mapping[str, Tensor]], Sequence[str]]
    """Of the tensors' data."""
    padding: Callable[[int], int]
    """Spaces after a header of so many bytes."""


NOW = Era("0.3.1 and later", serialiser_order, lambda size: -size % 8)
OLDER = (
    Era("0.3.0", serialiser_order, lambda size: size % 8),  # the alignment that #235 corrected
    Era("0.2", sorted, lambda _: 0),
)
"""Source: ``prepare`` in safetensors ``src/tensor.rs`` at v0.3.1 (2023-04), v0.3.0 (2023-03) and v0.2.8 (2023-01)."""


def legacy_window(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], era: Era = NOW) -> tuple[bytes, int, int]:
    """What the legacy hash covers: (header bytes in the window, first data byte, data bytes) of the serialisation.

    The data bytes count from the start of the data region, which is in the era's order; both counts are cut at its end.
    """
    text = header_text(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")}, era.order(tensors))
    text += b" " * era.padding(len(text))
    header = len(text).to_bytes(8, "little") + text
    data = sum(t.nbytes for t in tensors.values())
    start = max(LEGACY_START - len(header), 0)
    stop = max(LEGACY_START + LEGACY_LENGTH - len(header), 0)
    return header[LEGACY_START : LEGACY_START + LEGACY_LENGTH], min(start, data), min(stop, data)


def legacy_hash(header_part: bytes, data_part: bytes) -> str:
    """8 hex digits."""
    import hashlib

    return hashlib.sha256(header_part + data_part).hexdigest()[:8]
