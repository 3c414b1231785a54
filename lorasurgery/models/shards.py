"""The index of a sharded model: which file holds which key.

Format: ``{"metadata": {"total_size": bytes}, "weight_map": {key: file name}}``. Source: Hugging Face
``huggingface_hub/serialization/_torch.py`` 1.0, which writes it.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from lorasurgery.errors import FileFormatError

if TYPE_CHECKING:
    from pathlib import Path

INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")
"""With a variant also ``.index.fp16.json`` (transformers); Diffusers puts it before."""


def shards_of(index: Path) -> dict[str, list[str]]:
    """File name -> the keys it holds, in the order of the file names.

    Raises FileFormatError when the index is damaged, names a file outside its folder or one that is missing.
    """
    try:
        content = json.loads(index.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the index is not JSON ({error})", path=index, hint="download it again") from error
    mapped = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise FileFormatError(
            "no weight_map of keys to file names is in it", path=index, hint="the .index.json of a sharded model"
        )
    found: dict[str, list[str]] = {}
    for key, name in sorted(mapped.items(), key=lambda item: item[1]):
        found.setdefault(name, []).append(key)
    for name, keys in found.items():
        if name in {"", ".", ".."} or "/" in name or "\\" in name:
            raise FileFormatError(f"{keys[0]} is said to be in {name!r}, not in this folder", path=index, hint="another copy")
        if not (index.parent / name).is_file():
            raise FileFormatError(
                f"the shard {name} is missing; {len(keys)} of {len(mapped)} weights are in it, first {keys[0]}", path=index,
                hint="download the rest of the model",
            )  # fmt: skip
    return found
