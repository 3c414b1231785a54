"""The suffix vocabulary: what may follow a module's name in a key, and which factor it is.

Sources: ComfyUI ``comfy/weight_adapter`` and ``comfy/lora.py`` (2026-05), PEFT ``save_and_load.py``, LyCORIS 3.3, Diffusers
``lora_conversion_utils.py``, sd-scripts and musubi-tuner ``networks``, ai-toolkit ``toolkit/network_mixins.py``.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import NamedTuple

LORA, LOHA, LOKR, FULL, NORM, SET, MISS = "lora", "loha", "lokr", "full", "norm", "set", "miss"
ALPHA, MAGNITUDE, BIAS, EXTRA = "alpha", "magnitude", "bias", "extra"
SPARSE = "sparse"
OPAQUE_FAMILIES = ("oft", "boft", "glora", "ia3")


class Word(NamedTuple):
    """A suffix: the family (or modifier) it belongs to, the slot it fills, and the dialect that spells it so."""

    family: str
    slot: str
    dialect: str


def _pairs(down: str, up: str, dialect: str) -> dict[str, Word]:
    return {down: Word(LORA, "down", dialect), up: Word(LORA, "up", dialect)}


_HADA = {f".hada_{s}": Word(LOHA, s, "kohya") for s in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_LOKR = {f".lokr_{s}": Word(LOKR, s, "kohya") for s in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
_OPAQUE = {
    **{f".{s}": Word("oft", s, "kohya") for s in ("oft_blocks", "oft_diag", "oft_R", "oft_R.weight", "rescale")},
    ".oft_R.scaled_oft": Word("oft", "oft_R.scaled_oft", "kohya"),  # OneTrainer's mark of rotations that it divides by a number
    **{f".{s}": Word("oft", s, "peft") for s in ("oft_r", "oft_s")},  # until PEFT 0.15
    **{f".{s}": Word("boft", s, "peft") for s in ("boft_R", "boft_s")},
    **{f".{s}.weight": Word("glora", f"{s}.weight", "kohya") for s in ("a1", "a2", "b1", "b2", "bm")},
    **{f".{s}": Word("ia3", s, "kohya") for s in ("on_input", "ia3_l")},
    **{f".{s}": Word(SPARSE, s, "kohya") for s in ("bias_indices", "bias_values", "bias_size")},
}  # fmt: skip

WORDS = MappingProxyType(
    {
        **_pairs(".lora_down.weight", ".lora_up.weight", "kohya"),
        **_pairs(".lora_A.weight", ".lora_B.weight", "peft"),
        **_pairs(".lora_A", ".lora_B", "mochi"),
        **_pairs(".lora.down.weight", ".lora.up.weight", "diffusers-old"),
        **_pairs(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight", "diffusers-old"),
        **_pairs("_lora.down.weight", "_lora.up.weight", "processor"),
        **_pairs(".down.weight", ".up.weight", "xlabs"),
        ".lora_mid.weight": Word(LORA, "mid", "kohya"),
        ".lora_E": Word(LORA, "diagonal", "peft"),
        ".lora_B.bias": Word(BIAS, "bias", "peft"),
        ".lora_up.bias": Word(BIAS, "bias", "kohya"),
        ".diff_b": Word(BIAS, "bias", "kohya"),
        ".b_norm": Word(BIAS, "bias", "kohya"),
        ".alpha": Word(ALPHA, "alpha", "kohya"),
        ".alpha_scale": Word(ALPHA, "scale", "longcat"),  # alpha / rank already
        ".dora_scale": Word(MAGNITUDE, "magnitude", "kohya"),
        ".lora_magnitude_vector": Word(MAGNITUDE, "magnitude", "peft"),
        ".lora_magnitude_vector.weight": Word(MAGNITUDE, "magnitude", "peft"),
        ".magnitude": Word(MAGNITUDE, "magnitude", "ai-toolkit"),
        ".dora_layer.weight": Word(MAGNITUDE, "magnitude", "kohya"),
        ".diff": Word(FULL, "diff", "kohya"),
        ".diff_m": Word(FULL, "diff", "lightx2v"),
        ".w_norm": Word(NORM, "w_norm", "kohya"),
        ".set_weight": Word(SET, "set_weight", "kohya"),
        ".miss_block": Word(MISS, "miss_block", "peft"),
        ".bone_block": Word(MISS, "miss_block", "peft"),  # its name until PEFT 0.17
        ".reshape_weight": Word(EXTRA, "reshape_weight", "kohya"),
        **_HADA,
        **_LOKR,
        **_OPAQUE,
    }
)
"""Suffix -> word. A key is split at its longest suffix in here."""

_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
"""What names begin with that have underscores for dots."""
_LISTS = re.compile(r"(?P<stem>.+)(?P<suffix>\.(?:oft_blocks\.(?P<rotation>\d+)|lora_up\.blocks\.(?P<up>\d+)\.weight))")
"""Lists of tensors for consecutive rows of one weight: sd-scripts' OFT of FLUX's fused layers (``networks/oft_flux.py``), and
LongCat-Video's up factors (``modules/lora_utils.py``, ``LoRAUPParallel``)."""

_XLABS = (".qkv", ".proj")
"""What XLabs' processors of single blocks are for; Diffusers' are for ``to_q`` and the like."""
_NAMED = ("lora_A", "lora_B", "lora_magnitude_vector", "oft_R")
"""PEFT's parameters that carry an adapter's name in a raw state dict: ``lora_A.default.weight``."""
_NAMED_PREFIXES = ("hada_", "lokr_", "boft_", "oft_r", "oft_s", "ia3_", "miss_", "bone_")
_OWN_ENDS = ("weight", "bias", "scaled_oft")
"""What follows such a parameter's name in a key without an adapter's name."""


class Split(NamedTuple):
    """A key taken apart: the module's name as spelled, its word, and PEFT's adapter name where the key has one."""

    stem: str
    word: Word
    adapter: str
    suffix: str
    """What follows the name in the key, an adapter's name included."""


_PLAIN = MappingProxyType(
    {
        suffix[1:]: word
        for suffix, word in WORDS.items()
        if suffix[0] == "." and not suffix.endswith((".down.weight", ".up.weight")) and suffix != ".diff_m"
    }
)
"""Suffixes that are no end of a longer one, without their dot."""
_MAY_BE_NAMED = (*_NAMED, *_NAMED_PREFIXES)


def split_key(key: str) -> Split | None:
    """Take a key apart at its longest known suffix; None when it ends in none.

    ``a.b.lora_A.default.weight`` gives stem ``a.b``, the word of ``.lora_A.weight`` and adapter ``default``.
    """
    at = key.rfind(".", 0, -7) if key.endswith(".weight") else key.rfind(".")
    own = _PLAIN.get(key[at + 1 :]) if at > 0 else None
    if own is not None and not key.startswith(_MAY_BE_NAMED, key.rfind(".", 0, at) + 1):  # nearly every key
        return Split(key[:at], own, "", key[at:])
    split = _split_at_longest(key)
    if split is not None and split.suffix == ".diff_m":  # the difference of a block's bare parameter
        return split._replace(stem=f"{split.stem}{'_' if split.stem.startswith(_FLAT) else '.'}modulation")
    return split or _split_list(key)


def _split_list(key: str) -> Split | None:
    """One of a list of tensors: its slot has its number."""
    match = _LISTS.fullmatch(key)
    if match is None:
        return None
    rotation, up = match["rotation"], match["up"]
    word = Word(LORA, f"up.{up}", "longcat") if rotation is None else Word("oft", f"oft_blocks.{rotation}", "kohya")
    return Split(match["stem"], word, "", match["suffix"])


def _split_at_longest(key: str) -> Split | None:
    """The same by trying every suffix, adapter names and irregular words included."""
    tail = key.split(".")
    adapter = ""
    if len(tail) > 3 and tail[-3] in _NAMED and tail[-1] in ("weight", "bias"):
        adapter = tail.pop(-2)
    elif (len(tail) > 2 and tail[-2] in _NAMED and tail[-1] not in _OWN_ENDS) or (
        len(tail) > 2 and tail[-2].startswith(_NAMED_PREFIXES) and tail[-1] != "weight"
    ):
        adapter = tail.pop()
    plain = ".".join(tail)
    if plain.endswith(("_lora.down.weight", "_lora.up.weight")):
        suffix = plain[plain.rindex("_lora.") :]
        stem, word = plain[: -len(suffix)], WORDS[suffix]
        return _split(key, stem, word._replace(dialect="xlabs") if stem.endswith(_XLABS) else word, adapter)
    if plain.endswith("_norm.scale"):  # BFL's control files hold whole RMS norm gains
        return _split(key, plain[: -len(".scale")], Word(SET, "set_weight", "bfl"), adapter)
    for length in (3, 2, 1):
        if len(tail) > length:
            suffix = "." + ".".join(tail[-length:])
            if suffix in WORDS:
                return _split(key, plain[: -len(suffix)], WORDS[suffix], adapter)
    return None


def _split(key: str, stem: str, word: Word, adapter: str) -> Split:
    return Split(stem, word, adapter, key[len(stem) :])
