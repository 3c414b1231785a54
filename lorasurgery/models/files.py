"""Which files a base model is made of: one file, shards with their index, a model's folder, or a whole pipeline's.

Source of the names: Diffusers ``utils/constants.py`` and ``models/model_loading_utils.py`` 0.42, transformers
``modeling_utils.py`` 5: ``diffusion_pytorch_model`` or ``model``, an optional variant before the suffix, ``.index.json``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.errors import FileFormatError, RequestError
from lorasurgery.io.header import read_safetensors
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.models.shards import INDEX, shards_of

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.io.header import RawFile

COMPONENTS = ("transformer", "transformer_2", "unet", *(f"text_encoder{n}" for n in ("", "_2", "_3", "_4")), "vae")
"""Subfolders of a Diffusers pipeline that hold weights; others are read after them."""
SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.[^/]+$)")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
SUFFIXES = (".safetensors", ".gguf", ".bin")
"""The first that a folder has."""
ADVICE = "the file, its .index.json, or a folder with model_index.json or config.json"


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model."""

    path: Path
    raw: RawFile
    prefix: str
    """What stands before its keys in the model: ``transformer.`` for a pipeline's subfolder, nothing otherwise."""

    @property
    def with_config(self) -> bool:
        """Whether it lies as Diffusers and transformers save it: in a pipeline's subfolder, or beside a ``config.json``."""
        return bool(self.prefix) or (self.path.parent / "config.json").is_file()

    @property
    def class_name(self) -> str:
        """The class of Diffusers that ``config.json`` beside it names; empty where there is none, as in transformers'."""
        try:
            fields = json.loads((self.path.parent / "config.json").read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return ""
        return str(fields.get("_class_name", "")) if isinstance(fields, dict) else ""


def model_files(path: Path) -> tuple[ModelFile, ...]:
    """The files of the model at ``path``; only their headers are read (a PyTorch file is read whole).

    Raises FileFormatError for missing shards and broken files, RequestError for a folder that is no model or several.
    """
    if path.is_dir():
        pipeline = (path / "model_index.json").is_file() or not _choices(path)[0]
        return _pipeline(path) if pipeline and _subfolders(path) else _folder(path, "")
    if path.suffix == ".json":
        return _indexed(path, "")
    found = SHARD.search(path.name)
    if found is not None and int(found[2]) > 1:
        raise RequestError(
            f"this is shard {int(found[1])} of {int(found[2])} of a model", path=path,
            hint=f"the folder {path.parent}, or the .index.json beside it",
        )  # fmt: skip
    return (ModelFile(path, raw_file(path), ""),)


def raw_file(path: Path) -> RawFile:
    """The tensors of one file: safetensors and GGUF stay on disk, PyTorch's formats are read into memory."""
    if path.suffix.lower() in TORCH_SUFFIXES:
        from lorasurgery.io.torchfile import read_torch

        return read_torch(path)
    if path.suffix.lower() == ".gguf":
        from lorasurgery.models.gguf import read_gguf

        return read_gguf(path)
    return read_safetensors(path)


def _subfolders(path: Path) -> list[Path]:
    """The subfolders with weights, a pipeline's well-known ones first."""
    own = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".") and _choices(p)[0]]
    return sorted(own, key=lambda p: COMPONENTS.index(p.name) if p.name in COMPONENTS else len(COMPONENTS))


def _pipeline(path: Path) -> tuple[ModelFile, ...]:
    return tuple(file for folder in _subfolders(path) for file in _folder(folder, f"{folder.name}."))


def _folder(folder: Path, prefix: str) -> tuple[ModelFile, ...]:
    """The one model in a folder, without a variant where there is a choice.

    Raises RequestError when there is none, or no way to tell which of several is meant.
    """
    choices, suffix = _choices(folder)
    plain = {name: files for name, files in choices.items() if name.rpartition(".")[0] not in choices}
    usual = next((stem for stem in STEMS if stem in choices), next(iter(plain)) if len(plain) == 1 else None)
    if usual is None:
        names = ", ".join(sorted(choices)[:4])
        what = f"several models are in this folder ({names})" if choices else "no model is in this folder"
        raise RequestError(what, path=folder, hint=ADVICE)
    index = next((file for file in choices[usual] if file.name.endswith(".json")), None)
    if index is not None:
        return _indexed(index, prefix)
    return tuple(ModelFile(file, raw_file(file), prefix) for file in _complete(choices[usual], folder, suffix))


def _choices(folder: Path) -> tuple[dict[str, list[Path]], str]:
    """(name with its variant -> index, shards or file; their suffix) of the models right in a folder."""
    for suffix in SUFFIXES:
        found: dict[str, list[Path]] = {}
        for file in sorted(folder.iterdir()):
            indexed = INDEX.search(file.name) is not None and suffix in file.name
            if (indexed or file.suffix == suffix) and file.is_file() and not file.name.startswith("."):
                found.setdefault(_name(file, suffix), []).append(file)
        if found:
            return found, suffix
    return {}, ""


def _name(file: Path, suffix: str) -> str:
    """``model.fp16`` of ``model.fp16-00001-of-00002.safetensors`` and of ``model.safetensors.index.fp16.json``."""
    skipped = {suffix[1:], "index", "json"}
    return ".".join(word for word in SHARD.sub("", file.name).split(".") if word not in skipped)


def _complete(files: list[Path], folder: Path, suffix: str) -> list[Path]:
    """A file, or all shards of a model that has no index; raises FileFormatError when one is missing."""
    shard = SHARD.search(files[0].name)
    if shard is None:
        return files[:1]
    present = {found[1] for file in files if (found := SHARD.search(file.name)) is not None}
    missing = next((i for i in range(1, int(shard[2]) + 1) if f"{i:05}" not in present), None)
    if missing is not None:
        raise FileFormatError(
            f"shard {missing} of {int(shard[2])} of {_name(files[0], suffix)} is missing", path=folder,
            hint="download the rest of the model",
        )  # fmt: skip
    return files


def _indexed(index: Path, prefix: str) -> tuple[ModelFile, ...]:
    """The shards that an index names, each checked to hold the keys that the index says it holds."""
    found = []
    for name, keys in shards_of(index).items():
        shard = index.parent / name
        raw = raw_file(shard)
        lacking = [key for key in keys if key not in raw.tensors]
        if lacking:
            raise FileFormatError(
                f"{index.name} says that {lacking[0]} is in it, and it is not ({len(lacking)} keys are missing)", path=shard,
                hint="download the shards and the index again, from the same revision",
            )  # fmt: skip
        found.append(ModelFile(shard, raw, prefix))
    return tuple(found)
