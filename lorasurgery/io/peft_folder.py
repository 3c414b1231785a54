"""PEFT folders: ``adapter_config.json`` beside ``adapter_model.safetensors``, one folder a model."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError
from lorasurgery.io.blame import blamed_on
from lorasurgery.io.header import RawFile, read_safetensors
from lorasurgery.io.torchfile import read_torch
from lorasurgery.io.writer import umask, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.tensors import Tensor

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


_COMPLETE = "the complete folder as PEFT saved it"


def is_peft_folder(path: Path) -> bool:
    """Whether ``path`` holds a PEFT adapter, or folders that do (one a pipeline component)."""
    return (path / CONFIG).is_file() or any((child / CONFIG).is_file() for child in path.iterdir() if child.is_dir())


def whole_folder(path: Path) -> Path:
    """The folder of weights that PEFT saved beside their configuration, without which their scale is not known."""
    return path.parent if path.name in (WEIGHTS, OLD_WEIGHTS) and (path.parent / CONFIG).is_file() else path


def read_peft_folder(path: str | Path) -> tuple[RawFile, dict[str, dict[str, Any]]]:
    """The tensors of a PEFT folder, and the configuration by component ("" for a single adapter).

    In a folder of folders (``transformer/``, ``text_encoder/``) the component replaces ``base_model.model`` in the keys.
    Raises FileFormatError when a file is missing or unreadable.
    """
    path = Path(path)
    if (path / CONFIG).is_file():
        raw = _weights(path)
        return RawFile(path, raw.tensors, raw.metadata), {"": _config(path)}
    tensors: dict[str, Tensor] = {}
    configs: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    for child in sorted(c for c in path.iterdir() if (c / CONFIG).is_file()):
        configs[child.name] = _config(child)
        raw = _weights(child)
        metadata |= raw.metadata
        for key, tensor in raw.tensors.items():
            tensors[f"{child.name}.{key.removeprefix('base_model.model.')}"] = tensor
    if not configs:
        raise FileFormatError(f"this folder has no {CONFIG}", path=path, hint="the adapter file itself")
    return RawFile(path, tensors, metadata), configs


def _weights(folder: Path) -> RawFile:
    if (folder / WEIGHTS).is_file():
        return read_safetensors(folder / WEIGHTS)
    if (folder / OLD_WEIGHTS).is_file():
        return read_torch(folder / OLD_WEIGHTS)
    raise FileFormatError(f"{CONFIG} is here, but neither {WEIGHTS} nor {OLD_WEIGHTS}", path=folder, hint=_COMPLETE)


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FileFormatError(f"{CONFIG} is not readable JSON ({error})", path=folder, hint=_COMPLETE) from error
    if not isinstance(found, dict):
        raise FileFormatError(f"{CONFIG} is not a JSON object", path=folder, hint=_COMPLETE)
    return found


def write_peft_folder(
    path: Path, adapters: Mapping[str, tuple[dict[str, Any], Mapping[str, Tensor]]], metadata: Mapping[str, str]
) -> None:
    """Write one adapter into ``path``, or several into folders named by component; the folder appears when complete.

    ``adapters``: component -> (configuration, tensors); every file gets ``metadata``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with blamed_on(path):
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            for component, (config, tensors) in adapters.items():
                folder = staging / component if len(adapters) > 1 else staging
                folder.mkdir(exist_ok=True)
                write_safetensors(folder / WEIGHTS, tensors, metadata)
                (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            staging.chmod(0o777 & ~umask())
            if path.is_dir():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
                path.rename(old / "was")
                staging.rename(path)
                shutil.rmtree(old)
            else:
                path.unlink(missing_ok=True)
                staging.rename(path)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
