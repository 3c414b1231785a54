"""What base model files call the weights of an architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.adapter import DENOISER
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, Span
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Architecture, Encoder, Spans
    from lorasurgery.io.tensors import Tensor

DENOISERS = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.", "")
ALL_IN_ONE = {
    "clip_l": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    "clip_h": ("cond_stage_model.model.",),
    "clip_g": ("conditioner.embedders.1.model.",),
}
"""Prefixes of text encoders in Stability's checkpoints of SD 1, 2 and XL; CLIP-H and CLIP-G with OpenCLIP's names."""
OPEN_CLIP = re.compile(r"transformer\.resblocks\.(\d+)\.(attn\.in_proj_weight|attn\.out_proj|mlp\.c_fc|mlp\.c_proj)")
OPEN_CLIP_NAMES = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


class Place(NamedTuple):
    """The component and the rows of its original weights that a tensor holds."""

    component: str
    spans: Spans


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``start:stop`` of an original weight are the rows of ``tensor`` from ``offset`` on, times ``scale``."""

    start: int
    stop: int
    tensor: Tensor
    offset: int
    scale: float


def located(key: str, architecture: Architecture) -> Place | None:
    """Where a base model's key belongs; None for biases, norms' biases, and what the tables do not have."""
    if not key.endswith((".weight", "in_proj_weight")):
        return None
    stem = key.removesuffix(".weight")
    for prefix in DENOISERS:
        inner = stem.removeprefix(prefix)
        if not stem.startswith(prefix):
            continue
        for naming in (ORIGINAL, DIFFUSERS):
            spans = architecture.namings[naming].get(inner)
            if spans is not None:
                return Place(DENOISER, spans)
    return next((place for own in architecture.encoders if (place := _in_encoder(stem, own)) is not None), None)


def _in_encoder(stem: str, encoder: Encoder) -> Place | None:
    prefixes = [f"{encoder.comfyui}.", *ALL_IN_ONE.get(encoder.table, ())]
    if encoder.diffusers is not None:
        prefixes.append(f"{encoder.diffusers}.")
    shapes = TEXT_ENCODERS[encoder.table].shapes
    for prefix in prefixes:
        if not stem.startswith(prefix):
            continue
        inner = stem.removeprefix(prefix)
        if inner in shapes:
            return Place(encoder.table, (Span(inner, 0, shapes[inner][0]),))
        spans = _open_clip(inner)
        if spans and all(name in shapes for name in spans):
            return Place(encoder.table, tuple(Span(name, 0, shapes[name][0]) for name in spans))
    return None


def _open_clip(name: str) -> tuple[str, ...]:
    """Hugging Face's names for an OpenCLIP weight; q, k and v are one there, in this order."""
    found = OPEN_CLIP.fullmatch(name)
    if found is None:
        return ()
    layer = f"text_model.encoder.layers.{found[1]}"
    if found[2] == "attn.in_proj_weight":
        return tuple(f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v"))
    return (f"{layer}.{OPEN_CLIP_NAMES[found[2]]}",)
