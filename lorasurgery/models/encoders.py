"""What base model files call the weights of text encoders: Hugging Face's names, OpenCLIP's, and their prefixes."""

from __future__ import annotations

import re
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Span
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasurgery.architectures.table import Encoder, Shape, Spans

ALL_IN_ONE = MappingProxyType(
    {
        "clip_l": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
        "clip_h": ("cond_stage_model.model.",),
        "clip_g": ("conditioner.embedders.1.model.",),
    }
)
"""Prefixes in Stability's checkpoints of SD 1, 2 and XL; CLIP-H and CLIP-G with OpenCLIP's names."""
WRAPPERS = (("", ""), ("", "text_model."), ("model.", ""))
"""(taken off, put before): transformers leaves ``text_model.`` out from 5.6 on; language models stand under ``model.``."""
LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
IN_LAYER = MappingProxyType(
    {
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
    }
)
OUTSIDE = MappingProxyType(
    {"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm"}
)
POSITIONS = "positional_embedding", "text_model.embeddings.position_embedding"
"""OpenCLIP's bare parameter."""
PROJECTION, TURNED = "text_projection", "turned"
"""OpenCLIP multiplies by its projection from the right: it is stored turned over, (in, out), without ``.weight``."""


def in_encoder(key: str, shape: Shape, encoder: Encoder) -> tuple[str, Spans, str] | None:
    """(component, rows of Hugging Face's weights, role) of a key of a text encoder; None when it is not the encoder's."""
    prefixes = [f"{encoder.comfyui}.", *ALL_IN_ONE.get(encoder.table, ())]
    if encoder.diffusers is not None:
        prefixes.append(f"{encoder.diffusers}.")
    for prefix in prefixes:
        found = within(key[len(prefix) :], shape, encoder.table) if key.startswith(prefix) else None
        if found is not None:
            return encoder.table, *found
    return None


def within(name: str, shape: Shape, table: str) -> tuple[Spans, str] | None:
    """(rows of Hugging Face's weights, role) of a key without the encoder's prefix; None when the encoder has no such key."""
    for module, role in _hugging_face(name, shape):
        names = module.split("+")
        if all(_known(table, own, role) for own in names):
            rows = shape[1] if role == TURNED else shape[0] // len(names)
            return tuple(Span(own, 0, rows) for own in names), role
    return None


def _hugging_face(name: str, shape: Shape) -> Iterator[tuple[str, str]]:
    """(Hugging Face's module or, joined by ``+``, modules, role): what the name can mean."""
    weight = "norm" if len(shape) == 1 else "weight"
    for suffix, role in ((".weight", weight), (".bias", "bias")):
        if name.endswith(suffix):
            module = name.removesuffix(suffix)
            yield from _open_clip(module, role)
            for off, on in WRAPPERS:
                if module.startswith(off):
                    yield on + module[len(off) :], role
            return
    if name == POSITIONS[0]:
        yield POSITIONS[1], "weight"
    if name == PROJECTION and len(shape) == 2:
        yield PROJECTION, TURNED
    found = LAYER.fullmatch(name)
    if found is not None and found[2] in {"attn.in_proj_weight", "attn.in_proj_bias"}:
        layer = f"text_model.encoder.layers.{found[1]}.self_attn"  # q, k and v are one there, in this order
        yield "+".join(f"{layer}.{part}_proj" for part in "qkv"), "weight" if len(shape) > 1 else "bias"


def _open_clip(module: str, role: str) -> Iterator[tuple[str, str]]:
    found = LAYER.fullmatch(module)
    if found is not None and found[2] in IN_LAYER:
        yield f"text_model.encoder.layers.{found[1]}.{IN_LAYER[found[2]]}", role
    elif module in OUTSIDE:
        yield OUTSIDE[module], role


def _known(table: str, name: str, role: str) -> bool:
    """Whether an encoder has such a module; of norms that are not in the tables, the layers are."""
    return name in TEXT_ENCODERS[table].shapes or (role != "weight" and name.rpartition(".")[0] in _parents(table))


@cache
def _parents(table: str) -> frozenset[str]:
    """Every part of the encoder that holds one of its table's modules; the empty name for the encoder itself."""
    found = {""}
    for name in TEXT_ENCODERS[table].shapes:
        while name := name.rpartition(".")[0]:
            found.add(name)
    return frozenset(found)
