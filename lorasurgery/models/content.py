"""What a model's content is called, without reading all of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.tensors import Tensor

SAMPLES, SAMPLE = 64, 4096
"""Places and bytes looked at, beside names, dtypes and shapes."""


def content_id(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and evenly spaced samples of the data: how files divide it makes no difference."""
    digest = hashlib.sha256()
    names = sorted(tensors)
    for name in names:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
    for name in names[:: max(len(names) // SAMPLES, 1)]:
        for region in tensors[name].regions:
            middle = max((region.length - SAMPLE) // 2, 0)
            digest.update(region.source.read(region.offset + middle, min(SAMPLE, region.length)))
    return digest.hexdigest()
