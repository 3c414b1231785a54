"""Files that are no adapters, and adapters whose keys hold no names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorasurgery.errors import NotAnAdapterError
from lorasurgery.layouts.peft_keys import peft_key
from lorasurgery.layouts.peft_types import refuse_other_keys
from lorasurgery.layouts.words import split_key
from lorasurgery.layouts.wrappers import is_known

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.group import Group

_CHECKPOINT = r"^(model\.diffusion_model|cond_stage_model|conditioner|first_stage_model)\."
_MARKERS: tuple[tuple[str, str, str], ...] = (
    (r"^lllite_", "a ControlNet-LLLite, not a LoRA", "the LLLite nodes of your program"),
    (r"^(control_model\.|controlnet_|input_hint_block|zero_convs)", "a ControlNet, not a LoRA", "the ControlNet folder"),
    (r"^lora_controlnet$", "a Control-LoRA, which carries whole layers of a ControlNet", "the ControlNet folder"),
    (r"^(string_to_param|emb_params$|clip_[lg]$)", "a textual inversion embedding, not a LoRA", "the embeddings folder"),
    (_CHECKPOINT, "a whole checkpoint, not a LoRA", "a LoRA (this can be --base)"),
    (r"^(ip_adapter|image_proj)\.", "an IP-Adapter, not a LoRA", "the IP-Adapter nodes of your program"),
    (r"\.processor\.ip_adapter_|_ip\.weight$", "an IP-Adapter, not a LoRA", "the IP-Adapter nodes of your program"),
    (r"^(encoder\.conv_in|decoder\.conv_in|quant_conv)", "a VAE, not a LoRA", "the VAE folder"),
    (r"\.qweight$|\.svdq|smooth_factor", "an SVDQuant model, not a LoRA", "the LoRA it was made from"),
)  # fmt: skip

_TOKENS = re.compile(
    r"[._](lora[._](?:down|up|mid|A|B)|lora_linear_layer[._](?:down|up)|hada_w[12]_[ab]|lokr_(?:w[12](?:_[ab])?|t2))(?=[._]|$)"
)
"""An adapter's suffix words wherever they stand in a key: in a mangled one they are not at its end after a dot."""

_TWICE = re.compile(r"^(lora_unet_|lora_te\d?_|unet[._]|transformer[._])(?:(?:unet|transformer)[._](?!blocks[._])|\1)+")
"""A prefix put before a name that had one; ``transformer_blocks`` is one that many models have."""

_PACKED = re.compile(r"\.((to_|add_)?qkv_proj|to_qkv|out_proj|mlp(_context)?_fc[12])(_context)?\.(lora|proj)_(down|up)$")
"""Nunchaku's names for its fused layers. Source: nunchaku ``lora/flux/nunchaku_converter.py``."""


def refuse_other_models(raw: RawFile, groups: Mapping[str, Group]) -> None:
    """Raises NotAnAdapterError, saying what the file is, when most of its keys belong to no adapter.

    A checkpoint has a few keys that end like an adapter's (FLUX.1's ``query_norm.scale``, an audio decoder's ``alpha``).
    """
    _refuse_packed(raw)
    lllite = any(key.startswith("lllite_") for key in raw.tensors)
    known = sum(len(own.entries) for own in groups.values())
    if known:  # PEFT saves whole modules and biases beside its factors, more of them than factors where it was told to
        known += sum(peft_key(key) is not None for key in raw.tensors if split_key(key) is None)
    if 2 * known >= len(raw.tensors) and raw.tensors and not lllite:
        return
    if not raw.tensors:
        raise NotAnAdapterError("the file holds no tensors", path=raw.path, hint="the file it was meant to be")
    refuse_other_keys(raw.tensors, raw.path)
    _refuse_mangled(raw, known)
    for pattern, what, hint in _MARKERS:
        if any(re.search(pattern, key) for key in raw.tensors):
            raise NotAnAdapterError(f"this is {what}", path=raw.path, hint=hint)
    first = next(iter(raw.tensors))
    weights = sum(key.endswith((".weight", ".bias")) for key in raw.tensors)
    what = "a model's own weights" if 2 * weights >= len(raw.tensors) else "no LoRA-family adapter"
    count = f"only {known} end" if known else "none ends"
    raise NotAnAdapterError(
        f"this is {what}: of its {len(raw.tensors)} keys {count} like an adapter's (first: {first})",
        path=raw.path,
        hint="a file with keys such as lora_down.weight, lora_A.weight, hada_w1_a or lokr_w1",
    )


def _refuse_packed(raw: RawFile) -> None:
    """Raises NotAnAdapterError for factors in the order of a GPU's registers: their names are a LoRA's, their numbers not.

    Packed, a down factor is (in, rank), the other way round; ranks are multiples of 16 (``pack_lowrank_weight``).
    """
    for key, tensor in raw.tensors.items():
        if not key.endswith((".lora_down", ".lora_up", ".proj_down", ".proj_up")):
            continue
        shape = tensor.shape
        lies = len(shape) == 2 and key.endswith("_down") and shape[0] > shape[1] and shape[1] % 16 == 0
        if lies or _PACKED.search(key):
            raise NotAnAdapterError(
                f"this is a LoRA packed for Nunchaku: the numbers of {key} are in the order in which its kernels read them",
                path=raw.path, hint="the LoRA it was made from; new names would not bring the numbers into order",
            )  # fmt: skip


def _refuse_mangled(raw: RawFile, known: int) -> None:
    """Raises NotAnAdapterError when most keys have an adapter's words in the wrong place or form."""
    mangled = [key for key in raw.tensors if _TOKENS.search(key)]
    if 2 * len(mangled) < len(raw.tensors):
        return
    key = next((key for key in mangled if split_key(key) is None), mangled[0])
    raise NotAnAdapterError(
        f"these look like mangled adapter keys: {len(mangled) - known} of {len(raw.tensors)} have an adapter's words, but"
        f" not at the end after a dot; first {key}, expected {expected_key(key)}",
        path=raw.path,
        hint="the file as its trainer wrote it, or renaming the keys to that form",
    )


def unmangled(stem: str) -> str:
    """A module's name without a prefix that was put before it twice (``lora_unet_unet_``) and underscores at its end."""
    return _TWICE.sub(r"\1", stem).rstrip("_.")


def known_unmangled(stem: str) -> str:
    """The same where a table has such a name, else an empty string: an unknown model's names are not mangled."""
    found = unmangled(stem)
    return found if found != stem and is_known(found) else ""


def expected_key(key: str) -> str:
    """What a mangled key should have been: its module's name, a dot, and the suffix word as trainers write it.

    >>> expected_key("lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k_lora_down.weight")
    'lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight'
    """
    match = _TOKENS.search(key)
    if match is None:
        return "MODULE.lora_down.weight"
    stem = unmangled(key[: match.start()].rstrip("_"))
    if match[1].startswith(("hada", "lokr")):
        return f"{stem}.{match[1]}"
    return f"{stem}.lora_{re.split('[._]', match[1])[-1]}.weight"
