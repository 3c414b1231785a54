"""The files that a path of the command line means, for every command."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.io.sniff import TORCH_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = "adapter_config.json"
ADAPTERS = frozenset({".safetensors", *TORCH_SUFFIXES})
MODELS = ADAPTERS | {".sft", ".gguf"}
"""Of files in a folder; a file that is named itself may have any suffix."""
COMPONENTS = ("transformer", "unet", "text_encoder")


class Found(NamedTuple):
    """An input, and its place below the folder it was found in."""

    path: Path
    relative: Path


def expanded(path: Path) -> list[Path]:
    """A file or PEFT folder itself, every model file below another folder, or what a glob matches."""
    return [found.path for found in found_in(path, MODELS)]


def found_in(path: Path, suffixes: frozenset[str], *, peft: bool = True, results: Path | None = None) -> Iterator[Found]:
    """What ``path`` means: itself; of a folder, the files below it; of a glob that the shell left alone, its matches.

    Below folders, and among the matches of a glob that names no suffix itself, only files with one of ``suffixes`` count.
    A PEFT folder is one input where ``peft``. Hidden files, linked folders and earlier results in the folder ``results``
    are passed over.
    """
    if path.is_dir():
        if peft and is_adapter(path):
            yield Found(path, Path(path.name))
            return
        below = _below(path, suffixes, peft=peft, results=None if results is None else results.absolute())
        yield from (Found(own, own.relative_to(path)) for own in sorted(below))
    elif not path.exists() and glob.has_magic(str(path)):
        for text in sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207  may be absolute
            match = Path(text)
            if match.is_dir() or match.suffix.lower() in {*suffixes, path.suffix.lower()}:
                yield from found_in(match, suffixes, peft=peft, results=results)
    else:
        yield Found(path, Path(path.name))


def means_several(path: Path, *, peft: bool = True) -> bool:
    """Whether ``path`` asks for any number of files: a folder of them, or a glob."""
    if path.is_dir():
        return not (peft and is_adapter(path))
    return not path.exists() and glob.has_magic(str(path))


def is_adapter(folder: Path) -> bool:
    """A PEFT folder, or one with a PEFT folder for each component of a pipeline; not a collection of adapters."""
    if (folder / CONFIG).is_file():
        return True
    parts = [child.name for child in folder.iterdir() if (child / CONFIG).is_file()]
    return bool(parts) and all(name.startswith(COMPONENTS) for name in parts)


def _below(folder: Path, suffixes: frozenset[str], *, peft: bool, results: Path | None) -> Iterator[Path]:
    for child in folder.iterdir():
        if child.name.startswith(".") or child.absolute() == results:
            continue
        if child.is_dir():
            if peft and is_adapter(child):
                yield child
            elif not child.is_symlink():
                yield from _below(child, suffixes, peft=peft, results=results)
        elif child.suffix.lower() in suffixes:
            yield child
