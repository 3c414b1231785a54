"""Which model these files are, and whose names they have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures, named
from lorasurgery.architectures.from_base import (
    CUSTOM,
    bare_parameters,
    closest,
    custom,
    extended,
    known_table,
    module_shapes,
    resized,
)
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, Architecture
from lorasurgery.errors import RequestError
from lorasurgery.models.lone import lone_encoder, table_of
from lorasurgery.models.names import PARTS
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorasurgery.architectures.table import Shape
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.models.files import ModelFile

SUBFOLDERS = ("transformer.", "unet.")
COMFYUI = ("model.diffusion_model.", "diffusion_model.")
HALF = 0.5
"""A table that was asked for names at least this share of a model's weights."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a model is."""

    architecture: Architecture
    naming: str
    """Whose names the denoiser's weights have, as in :attr:`Architecture.namings`."""
    layout: str
    prefix: str = ""
    """What stands before the keys of the denoiser, or of the one text encoder that the model is."""
    component: str = DENOISER
    """The denoiser, or that encoder's table."""


def recognised(files: Sequence[ModelFile], path: Path, arch: str | Architecture | None) -> Recognised:
    """The architecture, its naming and the layout of a model's files.

    Raises RequestError when ``arch`` is no table's name, or none of its weights is there.
    """
    prefix, shapes = module_shapes(_denoiser(files))
    found = _table(shapes, arch)
    if found is None:
        lone = _encoder_alone(files, path, arch)
        if lone is not None:
            return lone
        found = _unknown(shapes, path, arch)
    table, naming = found
    if table.id == CUSTOM and arch is None and any("UNet" in file.class_name for file in files):
        table = replace(table, denoiser="unet")
    if prefix in COMFYUI:
        whole = any(key.startswith(PARTS) for file in files for key in file.raw.tensors)
        return Recognised(table, naming, "all-in-one" if whole else "comfyui", prefix)
    if naming == DIFFUSERS or (_one_naming(table) and any(file.with_config for file in files)):
        return Recognised(table, naming, "diffusers", prefix)
    return Recognised(table, naming, "unknown" if table.id == CUSTOM else "original", prefix)


def with_own_names(files: Sequence[ModelFile], architecture: Architecture, naming: str) -> Architecture:
    """A model's table with everything that the files have and it has not, under their own names."""
    tensors = _denoiser(files)
    prefix, shapes = module_shapes(tensors)
    return extended(architecture, naming, shapes, bare_parameters(tensors, prefix, shapes))


def _encoder_alone(files: Sequence[ModelFile], path: Path, arch: str | Architecture | None) -> Recognised | None:
    """A model that is one text encoder; raises RequestError for an ``arch`` that has no such encoder."""
    shapes = {file.prefix + key: tensor.shape for file in files for key, tensor in file.raw.tensors.items()}
    found = lone_encoder(shapes)
    if found is None:
        return None
    prefix, encoder = found
    among = None if arch is None else (arch,) if isinstance(arch, Architecture) else named(arch)
    table = table_of(encoder, among)
    if table is None:
        raise RequestError(
            f"it is the text encoder {encoder}, which {arch} does not have", path=path,
            hint="without --arch, or the family that the encoder belongs to",
        )  # fmt: skip
    layout = "diffusers" if any(file.with_config for file in files) else "original"
    return Recognised(table, ORIGINAL, layout, prefix, encoder)


def _one_naming(arch: Architecture) -> bool:
    """Whether Diffusers calls everything what the original does, so that names do not tell the layout."""
    return arch.namings[ORIGINAL].keys() == arch.namings[DIFFUSERS].keys()


def _denoiser(files: Sequence[ModelFile]) -> dict[str, Tensor]:
    """The tensors among which the denoiser's are."""
    own = [file for file in files if file.prefix in SUBFOLDERS] or files
    return {file.prefix + key: tensor for file in own for key, tensor in file.raw.tensors.items()}


def _table(shapes: Mapping[str, Shape], arch: str | Architecture | None) -> tuple[Architecture, str] | None:
    """The table that has these names, and the naming."""
    if isinstance(arch, Architecture):
        found = closest(shapes, (arch,), 0.0)
        return None if found is None else (arch, found[1])
    among = tuple(architectures().values()) if arch is None else named(arch)
    found = known_table(shapes, among) if arch is None else closest(shapes, among, HALF)
    return None if found is None else (resized(*found, shapes), found[1])


def _unknown(shapes: Mapping[str, Shape], path: Path, arch: str | Architecture | None) -> tuple[Architecture, str]:
    """For names that no table has."""
    if isinstance(arch, Architecture):
        return arch, ORIGINAL
    if arch is not None:
        raise RequestError(
            f"less than half of its weights have names of {arch}", path=path, hint="without --arch: the names tell what it is"
        )
    return custom(shapes, path), ORIGINAL
