"""Diffusers' video pipelines: Wan, HunyuanVideo, LTX-Video and LTX-2 (``lora_conversion_utils.py`` of 0.42)."""

from __future__ import annotations

from dataclasses import replace

from lorasurgery.checking.diffusers_plain import DORA, NEEDS_LORA, PLAIN, plain, refuse
from lorasurgery.checking.rules import (
    AB,
    ALPHA,
    DIFFUSERS,
    KOHYA,
    NOTHING,
    SD_SCRIPTS,
    VECTOR,
    Has,
    Needs,
    Note,
    Route,
    Spelling,
    Together,
)

WAN_BLOCK = tuple(f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo")
IN_BLOCKS = r"^blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.([qkvo]|[kv]_img)|ffn\.[02])$"
AROUND = r"(time_projection\.1|head\.head|(text|time)_embedding\.[02]|img_emb\.proj\.[13])"
LEFT = r"\.diff"
"""What may be left over at the end of the converter: keys with ``.diff`` in them, wherever."""


def _wan_dotted(words: frozenset[str], which: Has) -> Route:
    """``_convert_non_diffusers_wan_lora_to_diffusers``: names popped one by one, and what is left must be differences."""
    down, up = (frozenset({word}) for word in sorted(words))
    factors, bias = (down, up), frozenset({".diff_b"})
    return Route(
        (Spelling("diffusion_model.", only=f"{IN_BLOCKS}|{AROUND}"),),
        words | ALPHA | bias,
        (Has(r"^diffusion_model\.blocks\."), which),
        ignores_names=LEFT,
        ignores_words=LEFT,
        words=((r"head\.head$", words | bias | {".diff"}), (AROUND, words | bias)),
        needs=(
            Needs(r"\.blocks\.", r"^\.alpha$", factors, "KeyError"),
            Needs(r"(text|time)_embedding\.[02]$", "", factors, "KeyError"),
            Needs(r"head\.head$", r"^\.diff$", (bias,), "KeyError"),
            Needs(r"img_emb\.proj", r"^\.diff_b$", (up,)),
        ),
        together=(
            Together(r"cross_attn\.[kv]_img$", "k_img", LEFT),
            Together(r"cross_attn\.[kv]_img$", "v_img", LEFT),
            Together(r"time_projection", r"time_projection.*\.weight$", ""),
        ),
        because=(Note(r"\.modulation$|norm", "the converter passes over differences of norms and bare parameters"),),
    )


WAN_DOTTED = (_wan_dotted(AB, Has("lora_A")), _wan_dotted(KOHYA, Has("lora_A", "none")))
MUSUBI_NAMES = tuple(f"lora_unet_blocks_{{i}}_{n.replace('.', '_')}" for n in (*WAN_BLOCK, "ffn.0", "ffn.2"))
WAN_MUSUBI = Route(
    (Spelling("lora_unet_", flat=True, only=IN_BLOCKS),),
    KOHYA | ALPHA,
    (Has("^lora_unet_"),),
    ignores_names=NOTHING,
    ignores_words=NOTHING,
    needs=(Needs("", "", tuple(frozenset({word}) for word in KOHYA | ALPHA), "KeyError"),),
    together=(Together(r"cross_attn_[kv]_img$", "k_img"), Together(r"cross_attn_[kv]_img$", "v_img")),
    complete=MUSUBI_NAMES,
    error="KeyError or ValueError",
)
WAN = (*WAN_DOTTED, refuse(r"^diffusion_model\."), WAN_MUSUBI, PLAIN)

QKV = Has("img_attn_qkv")
HUNYUAN = (
    Route(
        tuple(Spelling(p, SD_SCRIPTS) for p in ("transformer.", "diffusion_model.", "")),
        AB | VECTOR | {".lora_B.bias"},
        (QKV,),
        deletes=DORA,
        keeps_words=True,
        ignores_names=NEEDS_LORA,
        ignores_words=NEEDS_LORA,
        wrong=(
            Note(r"final_layer\.adaLN_modulation", "the converter exchanges the halves of lora_A too, which mixes up the rank"),
        ),
        refuses=r"self_attn_qkv\.lora|_attn_qkv\.(alpha|lora_down|lora_up)",
    ),
    PLAIN,
)

LTX = (
    Route(
        (Spelling("diffusion_model.", DIFFUSERS),),
        PLAIN.reads,
        (Has(r"^diffusion_model\."), Has(r"^diffusion_model\.", "all")),
        deletes=DORA,
        keeps_words=True,
        ignores_names=NEEDS_LORA,
        ignores_words=NEEDS_LORA,
        because=(
            Note(
                r"patchify_proj|adaln_single", "the converter changes the prefix only, and Diffusers has other names for these"
            ),
        ),
    ),
    refuse(r"^diffusion_model\."),
    PLAIN,
)
CONNECTORS, PROJECTION = r"_embeddings_connector|^text_embedding_projection|^connectors", r"^text_embedding_projection\."
LTX2 = (
    plain(
        names=(
            Spelling("diffusion_model.", without=CONNECTORS),
            Spelling("diffusion_model.", DIFFUSERS, without=CONNECTORS),
            Spelling("", only=PROJECTION),
        ),
        when=(Has(r"^diffusion_model\."),),
    ),
    replace(PLAIN, names=(*PLAIN.names, Spelling("", only=PROJECTION))),
)
