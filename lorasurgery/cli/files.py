"""The model files that a path of the command line means."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = "adapter_config.json"
SUFFIXES = frozenset({".safetensors", ".sft", ".pt", ".pth", ".ckpt", ".bin", ".gguf"})
"""Of files in a folder; a file that is named itself may have any."""
COMPONENTS = ("transformer", "unet", "text_encoder")


def expanded(path: Path) -> list[Path]:
    """A file or PEFT folder itself, every model file below another folder, or a glob that the shell left alone."""
    if path.is_dir():
        return [path] if is_adapter(path) else sorted(_below(path))
    if not path.exists() and glob.has_magic(str(path)):
        return [Path(found) for found in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  may be absolute
    return [path]


def is_adapter(folder: Path) -> bool:
    """A PEFT folder, or one with a PEFT folder for each component of a pipeline; not a collection of adapters."""
    if (folder / CONFIG).is_file():
        return True
    parts = [child.name for child in folder.iterdir() if (child / CONFIG).is_file()]
    return bool(parts) and all(name.startswith(COMPONENTS) for name in parts)


def _below(folder: Path) -> Iterator[Path]:
    """Model files and PEFT folders, hidden ones aside."""
    for child in folder.iterdir():
        if child.name.startswith("."):
            continue
        if child.is_dir():
            if is_adapter(child):
                yield child
            elif not child.is_symlink():
                yield from _below(child)
        elif child.suffix.lower() in SUFFIXES:
            yield child
