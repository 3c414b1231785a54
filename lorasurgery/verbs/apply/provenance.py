"""The metadata of a model with adapters in it: all of its own, but for hashes of what it was, and what was done."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH
from lorasurgery.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.operations.onto.source import Source

HASHES = (MODEL_HASH, LEGACY_HASH, "modelspec.hash_sha256")
APPLIED = "lorasurgery.applied"
"""A JSON list, in order: file name, weight, and whether it was applied or taken out."""


def marked(metadata: Mapping[str, str], sources: Sequence[Source], *, undone: bool) -> tuple[dict[str, str], list[str]]:
    """The new metadata, and the keys that are left out because they no longer hold."""
    history: list[Any] = []
    with suppress(ValueError):
        history = list(json.loads(metadata.get(APPLIED, "[]")))
    operation = "unapply" if undone else "apply"
    history += [{"file": Path(own.path).name, "weight": own.text, "operation": operation} for own in sources]
    kept = {key: value for key, value in metadata.items() if key not in HASHES}
    kept |= {
        "lorasurgery.version": __version__,
        "lorasurgery.operation": operation,
        APPLIED: json.dumps(history, ensure_ascii=False),
    }
    return kept, [key for key in metadata if key in HASHES]
