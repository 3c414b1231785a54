"""sd-scripts' ``sshs_model_hash`` and ``sshs_legacy_hash``, byte for byte, streamed.

sd-scripts serialises the tensors with only the ``ss_*`` metadata and hashes that. The model hash is the sha256 of the
data region, which does not depend on the metadata; the legacy hash is the first 8 hex digits of the sha256 of bytes
0x100000:0x110000 of that serialisation, header included.
Source: ``precalculate_safetensors_hashes`` and ``addnet_hash_legacy`` in sd-scripts ``library/train_util.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.io.header import header_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.tensors import Tensor

LEGACY_START, LEGACY_LENGTH = 0x100000, 0x10000


def legacy_window(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, int, int]:
    """What the legacy hash covers: (header bytes in the window, first data byte, data bytes) of the serialisation.

    The data bytes count from the start of the data region; both counts are cut at its end.
    """
    header = header_bytes(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    data = sum(t.nbytes for t in tensors.values())
    start = max(LEGACY_START - len(header), 0)
    stop = max(LEGACY_START + LEGACY_LENGTH - len(header), 0)
    return header[LEGACY_START : LEGACY_START + LEGACY_LENGTH], min(start, data), min(stop, data)


def legacy_hash(header_part: bytes, data_part: bytes) -> str:
    """8 hex digits."""
    import hashlib

    return hashlib.sha256(header_part + data_part).hexdigest()[:8]
