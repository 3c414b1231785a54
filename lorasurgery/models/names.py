"""What base model files call the weights of an architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS, Span
from lorasurgery.models.encoders import TURNED, in_encoder, within
from lorasurgery.site import DENOISER, SECOND_DENOISER

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
PARTS = ("first_stage_model.", "vae.", "cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder")
"""What stands beside the denoiser in an all-in-one file, or in a pipeline."""
WEIGHT, BIAS, NORM, PARAMETER, OTHER = "weight", "bias", "norm", "parameter", "other"
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
    listed: bool = True
    """Whether a table has the place; otherwise it is the key's own name in the denoiser."""


def located(key: str, shape: Shape, architecture: Architecture, naming: str = ORIGINAL, prefix: str = "") -> Located:
    """Where a base model's key of this shape belongs; no place for buffers and for what the tables do not have.

    ``naming`` is the file's own, looked at first; ``prefix`` stands before the denoiser's keys.
    """
    if not shape:
        return Located(None, OTHER)
    stem, role = _parted(key, shape)
    place = _in_denoiser(stem, architecture, naming)
    if place is None:
        found = (in_encoder(key, shape, own) for own in architecture.encoders)
        inside = next((f for f in found if f is not None), None)
        if inside is None:
            return unlisted(key, shape, prefix)
        place, role = Place(*inside[:2]), inside[2]
    held = sum(span.stop - span.start for span in place.spans)
    rows = shape[1] if role == TURNED else shape[0]
    return Located(place, PARAMETER if role == OTHER else role) if held == rows else Located(None, OTHER)


def in_lone_encoder(key: str, shape: Shape, table: str, prefix: str) -> Located:
    """The same for a model that is one text encoder; ``prefix`` stands before its keys."""
    found = within(key.removeprefix(prefix), shape, table) if shape else None
    rows = 0 if found is None else shape[1] if found[1] == TURNED else shape[0]
    if found is None or sum(span.stop - span.start for span in found[0]) != rows:
        return Located(None, OTHER)
    return Located(Place(table, found[0]), found[1])


def _parted(key: str, shape: Shape) -> tuple[str, str]:
    """(module name, role)."""
    for suffix, role in SUFFIXES:
        if key.endswith(suffix) and (role == WEIGHT or len(shape) == 1):
            return key.removesuffix(suffix), NORM if role == WEIGHT and len(shape) == 1 else role
    return key, OTHER


def unlisted(key: str, shape: Shape, prefix: str) -> Located:
    """The place of a denoiser's parameter that no table has: all its rows, under its own name without ``.weight``.

    ``prefix`` stands before the denoiser's keys. A bias is its weight's; a parameter that is neither (a modulation table, a
    learned token) has its whole name.
    """
    stem, role = _parted(key, shape)
    component, start = DENOISER, prefix
    if prefix == "transformer." and key.startswith("transformer_2."):
        component, start = SECOND_DENOISER, "transformer_2."
    if not shape or not key.startswith(start) or (not start and key.startswith(PARTS)):
        return Located(None, OTHER)
    place = Place(component, (Span(stem.removeprefix(start), 0, shape[0]),))
    return Located(place, PARAMETER if role == OTHER else role, listed=False)


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
