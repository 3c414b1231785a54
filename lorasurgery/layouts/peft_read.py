"""PEFT's folders as an adapter file has it: its configurations understood, a text encoder's modules named as such."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.errors import BrokenModuleError, SurgeryError
from lorasurgery.io.peft_folder import CONFIG, read_peft_folder
from lorasurgery.layouts.detect import fits
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.names import PEFT_ENCODER, encoder_names
from lorasurgery.layouts.peft_keys import PREFIX, SAVED_IN, peft_key
from lorasurgery.layouts.scales import PeftConfig
from lorasurgery.layouts.words import split_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Any

    from lorasurgery.architectures.table import Shape
    from lorasurgery.io.header import RawFile


def read_peft(path: Path) -> tuple[RawFile, dict[str, PeftConfig]]:
    """The tensors of a PEFT folder, and its configurations by component ("" for the whole).

    In a folder of several components (``transformer/``, ``text_encoder/``) keys begin with theirs. PEFT does not say that a
    folder is a text encoder's: one whose modules are all of one encoder that is known here is that one's.
    Raises FileFormatError for files that are missing or not readable and for fields that change what the tensors mean,
    NotAnAdapterError for a type that is not read.
    """
    raw, fields = read_peft_folder(path)
    configs = {component: _config(own, path / component / CONFIG) for component, own in fields.items()}
    if "" not in configs:
        return replace(raw, tensors={_marked(key, configs): tensor for key, tensor in raw.tensors.items()}), configs
    encoder = _encoder(raw)
    if encoder is None:
        return raw, configs
    own = f"{PEFT_ENCODER}{encoder}."
    name = own.removesuffix(".")
    tensors = {_marked(own + key.removeprefix(PREFIX), [name]): tensor for key, tensor in raw.tensors.items()}
    return replace(raw, tensors=tensors), {name: configs[""]}


def _config(fields: Mapping[str, Any], path: Path) -> PeftConfig:
    try:
        return PeftConfig.from_dict(fields, CONFIG)
    except SurgeryError as error:
        error.path = error.path or str(path)
        raise


def _marked(key: str, components: Iterable[str]) -> str:
    """A saved module's key under a component, where a plain ``weight`` would not tell that PEFT saved it."""
    found = None if split_key(key) is not None else peft_key(key, [f"{name}." for name in components])
    if found is None or found.slot not in (".weight", ".bias") or found.stem in components:
        return key
    return f"{found.stem}{SAVED_IN}{found.slot}"


def _encoder(raw: RawFile) -> str | None:
    """The one known text encoder that has all of a folder's modules, by names and, where factors say them, shapes."""
    try:
        told = {stem: own for stem, own in group(raw)[0].items() if not own.parameter}
        shapes = {stem: None if (delta := build(own, raw.path)) is None else delta.shape for stem, own in told.items()}
    except BrokenModuleError:  # the reader says it with all it knows
        return None
    own = {stem.removeprefix(PREFIX): shape for stem, shape in shapes.items() if stem.startswith(PREFIX)}
    if not own or len(own) < len(shapes):
        return None
    found = [table for table in TEXT_ENCODERS if _has(table, own)]
    return found[0] if len(found) == 1 else None


def _has(table: str, modules: Mapping[str, Shape | None]) -> bool:
    names, shapes = encoder_names(table), TEXT_ENCODERS[table].shapes
    return all(name in names and (shape is None or fits(shape, shapes[names[name]])) for name, shape in modules.items())
