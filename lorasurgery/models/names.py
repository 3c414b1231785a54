"""What base model files call the weights of an architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.adapter import DENOISER, SECOND_DENOISER
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS
from lorasurgery.models.encoders import in_encoder

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Architecture, Shape, Spans

DENOISERS = (
    ("model.diffusion_model.", DENOISER),
    ("diffusion_model.", DENOISER),
    ("transformer_2.", SECOND_DENOISER),
    ("transformer.", DENOISER),
    ("unet.", DENOISER),
    ("net.", DENOISER),
    ("", DENOISER),
)
"""(prefix, component): all-in-one files and ComfyUI, pipeline folders, Cosmos and Anima, bare names."""
WEIGHT, BIAS, NORM, OTHER = "weight", "bias", "norm", "other"
SCALE = ".scale"
"""The weight of FLUX's and Chroma's RMS norms. Source: black-forest-labs/flux ``modules/layers.py``."""
SUFFIXES = ((".weight", WEIGHT), (".bias", BIAS), (SCALE, NORM))


class Place(NamedTuple):
    """The component and the rows of its original weights that a tensor holds, in the tensor's row order."""

    component: str
    spans: Spans


class Located(NamedTuple):
    """A key's place and role."""

    place: Place | None
    role: str


def located(key: str, shape: Shape, architecture: Architecture, naming: str = ORIGINAL) -> Located:
    """Where a base model's key of this shape belongs; no place for buffers and for what the tables do not have.

    ``naming`` is the file's own, looked at first.
    """
    if not shape:
        return Located(None, OTHER)
    stem, role = _parted(key, shape)
    place = _in_denoiser(stem, architecture, naming) if role != OTHER else None
    if place is None:
        found = (in_encoder(key, shape, own) for own in architecture.encoders)
        inside = next((f for f in found if f is not None), None)
        if inside is None:
            return Located(None, OTHER)
        place, role = Place(*inside[:2]), inside[2]
    held = sum(span.stop - span.start for span in place.spans)
    return Located(place, role) if held == shape[0] else Located(None, OTHER)


def _parted(key: str, shape: Shape) -> tuple[str, str]:
    """(module name, role)."""
    for suffix, role in SUFFIXES:
        if key.endswith(suffix) and (role == WEIGHT or len(shape) == 1):
            return key.removesuffix(suffix), NORM if role == WEIGHT and len(shape) == 1 else role
    return key, OTHER


def _in_denoiser(stem: str, architecture: Architecture, naming: str) -> Place | None:
    for prefix, component in DENOISERS:
        if not stem.startswith(prefix):
            continue
        inner = stem[len(prefix) :]
        for names in (naming, ORIGINAL, DIFFUSERS, SD_SCRIPTS):
            spans = architecture.namings[names].get(inner)
            if spans is not None:
                return Place(component, spans)
    return None
