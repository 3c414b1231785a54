"""cloneofsimo/lora numbers its modules instead of naming them: ``unet:3:up`` is the fourth target in the order of the model.

The number counts the targets in the order of Stable Diffusion's module tree: in every attention block q, k, v, out of both
attentions and the GEGLU projection (down blocks, up blocks, middle block); CLIP's self-attention in the order k, v, q, out.
Where the GEGLU projection comes depends on the Diffusers of the day: between the attentions (in 0.9 ``attn1``, ``ff`` and
``attn2`` are made in this order) or after both (later). The shapes of the file tell.
Source: cloneofsimo/lora ``lora_diffusion/lora.py`` (``_find_modules_v2``), Diffusers ``BasicTransformerBlock``.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from lorasurgery.architectures import named
from lorasurgery.architectures.table import DIFFUSERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.io.tensors import Tensor

_INDEXED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
_ATTENTIONS = tuple(tuple(f"attn{n}.to_{x}" for x in ("q", "k", "v", "out.0")) for n in (1, 2))
_GEGLU = ("ff.net.0.proj",)
_ORDERS = ((*_ATTENTIONS[0], *_GEGLU, *_ATTENTIONS[1]), (*_ATTENTIONS[0], *_ATTENTIONS[1], *_GEGLU))
_MODELS = ("sd1", "sd2")
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
LAYOUT = "cloneofsimo"
"""What the layout of such a file is called."""
CLIP_LAYERS = 32
"""More than any of its text encoders has."""


def is_numbered(key: str) -> bool:
    """Whether a key numbers its module."""
    return _INDEXED.fullmatch(key) is not None


def named_keys(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Numbered key -> the key that names its module (``unet.<Diffusers' name>.lora.up.weight``); empty for other files."""
    found = {key: match for key in tensors if (match := _INDEXED.fullmatch(key)) is not None}
    if not found:
        return {}
    sides = [(int(m[2]), m[3], tensors[key].shape) for key, m in found.items() if m[1] == "unet"]
    ranked = [(_fitting(_unet(model, order), named(model)[0], sides), order) for order in _ORDERS for model in _MODELS]
    order = max(ranked, key=lambda one: one[0])[1]
    names = {"unet": _unet(_MODELS[0], order), "text_encoder": _clip()}
    return {
        key: f"{m[1]}.{names[m[1]][int(m[2])]}.lora.{m[3]}.weight"
        for key, m in found.items()
        if int(m[2]) < len(names[m[1]])
    }  # fmt: skip


def _fitting(names: Sequence[str], model: Architecture, sides: Sequence[tuple[int, str, Shape]]) -> int:
    """How many factors have the size that their module asks for."""
    spans = model.namings[DIFFUSERS]
    count = 0
    for number, side, shape in sides:
        if number < len(names) and len(shape) > 1:
            out, columns, *_ = model.module_shape(spans[names[number]])
            count += shape[0] == out if side == "up" else shape[1] == columns
    return count


@cache
def _unet(model: str, order: tuple[str, ...]) -> tuple[str, ...]:
    names = list(named(model)[0].namings[DIFFUSERS])
    blocks = list(dict.fromkeys(n.split(".transformer_blocks.0.")[0] for n in names if ".transformer_blocks.0." in n))
    stages = ("down_blocks", "up_blocks", "mid_block")
    blocks.sort(key=lambda b: (stages.index(b.split(".")[0]), [int(p) for p in b.split(".") if p.isdigit()]))
    return tuple(f"{block}.transformer_blocks.0.{leaf}" for block in blocks for leaf in order)


def _clip() -> tuple[str, ...]:
    return tuple(f"text_model.encoder.layers.{i}.self_attn.{side}" for i in range(CLIP_LAYERS) for side in _CLIP)
