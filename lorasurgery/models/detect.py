"""Which model these files are, and whose names they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures, named
from lorasurgery.architectures.from_base import bare_parameters, closest, custom, extended, known_table, module_shapes, resized
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, Architecture
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorasurgery.architectures.table import Shape
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.models.files import ModelFile

SUBFOLDERS = ("transformer.", "unet.")
COMFYUI = ("model.diffusion_model.", "diffusion_model.")
PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.")
"""What stands beside the denoiser in an all-in-one file."""


HALF = 0.5
"""A table that was asked for names at least this share of a model's weights."""


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a model is."""

    architecture: Architecture
    naming: str
    """Whose names the denoiser's weights have, as in :attr:`Architecture.namings`."""
    layout: str


def recognised(files: Sequence[ModelFile], path: Path, arch: str | Architecture | None) -> Recognised:
    """The architecture, its naming and the layout of a model's files.

    Raises RequestError when ``arch`` is no table's name, or none of its weights is there.
    """
    tensors = _denoiser(files)
    prefix, shapes = module_shapes(tensors)
    found, naming = _architecture(shapes, path, arch)
    if not isinstance(arch, Architecture):
        found = extended(found, naming, shapes, bare_parameters(tensors, prefix, shapes))
    if prefix in COMFYUI:
        whole = any(key.startswith(PARTS) for file in files for key in file.raw.tensors)
        return Recognised(found, naming, "all-in-one" if whole else "comfyui")
    if naming == DIFFUSERS or (_one_naming(found) and any(_saved_by_diffusers(file) for file in files)):
        return Recognised(found, naming, "diffusers")
    return Recognised(found, naming, "unknown" if found.id == "custom" else "original")


def _one_naming(arch: Architecture) -> bool:
    """Whether Diffusers calls everything what the original does, so that names do not tell the layout."""
    return arch.namings[ORIGINAL].keys() == arch.namings[DIFFUSERS].keys()


def _saved_by_diffusers(file: ModelFile) -> bool:
    return bool(file.prefix) or (file.path.parent / "config.json").is_file()


def _denoiser(files: Sequence[ModelFile]) -> dict[str, Tensor]:
    """The tensors among which the denoiser's are."""
    own = [file for file in files if file.prefix in SUBFOLDERS] or files
    return {file.prefix + key: tensor for file in own for key, tensor in file.raw.tensors.items()}


def _architecture(shapes: Mapping[str, Shape], path: Path, arch: str | Architecture | None) -> tuple[Architecture, str]:
    """The table and the naming."""
    if isinstance(arch, Architecture):
        found = closest(shapes, (arch,), 0.0)
        return arch, ORIGINAL if found is None else found[1]
    among = tuple(architectures().values()) if arch is None else named(arch)
    found = known_table(shapes, among) if arch is None else closest(shapes, among, HALF)
    if found is not None:
        return resized(*found, shapes), found[1]
    if arch is not None:
        raise RequestError(
            f"less than half of its weights have names of {arch}", path=path, hint="without --arch: the names tell what it is"
        )
    return custom(shapes, path), ORIGINAL
