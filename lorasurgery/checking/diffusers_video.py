"""Diffusers' video pipelines: Wan, HunyuanVideo, LTX-Video and LTX-2 (``lora_conversion_utils.py`` of 0.42)."""

from __future__ import annotations

from lorasurgery.checking.diffusers_plain import DORA, NEEDS_LORA, PLAIN, plain, refuse
from lorasurgery.checking.rules import AB, ALPHA, DIFFUSERS, KOHYA, NOTHING, SD_SCRIPTS, VECTOR, Has, Note, Route, Spelling

WAN_BLOCK = tuple(f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo")
IN_BLOCKS = r"^blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.([qkvo]|[kv]_img)|ffn\.[02])$"
AROUND = r"(time_projection\.1|head\.head|(text|time)_embedding\.[02]|img_emb\.proj\.[13])"
NORMS = r"norm.*\.diff(_b)?$"
PASSED = rf"{NORMS}|\.diff(_b)?$"
"""Norms are taken out first; of what is left at the end only ``.diff`` keys are passed over."""

WAN_DOTTED = tuple(
    Route(
        (Spelling("diffusion_model.", only=f"{IN_BLOCKS}|{AROUND}"),),
        words | ALPHA | {".diff_b"},
        (Has(r"^diffusion_model\.blocks\."), when),
        ignores_names=PASSED,
        ignores_words=PASSED,
        refuses=rf"{AROUND}\.alpha$",
    )
    for words, when in ((AB, Has("lora_A")), (KOHYA, Has("lora_A", "none")))
)
MUSUBI_NAMES = tuple(f"lora_unet_blocks_{{i}}_{n.replace('.', '_')}" for n in (*WAN_BLOCK, "ffn.0", "ffn.2"))
WAN_MUSUBI = Route(
    (Spelling("lora_unet_", flat=True, only=IN_BLOCKS),),
    KOHYA | ALPHA,
    (Has("^lora_unet_"),),
    ignores_names=NOTHING,
    ignores_words=NOTHING,
    needs_alpha=True,
    complete=MUSUBI_NAMES,
    error="KeyError or ValueError",
)
WAN = (*WAN_DOTTED, refuse(r"^diffusion_model\."), WAN_MUSUBI, PLAIN)

QKV = Has("img_attn_qkv")
HUNYUAN = (
    Route(
        tuple(Spelling(p, SD_SCRIPTS) for p in ("transformer.", "diffusion_model.", "")),
        AB | {".lora_B.bias"},
        (QKV,),
        deletes=DORA,
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
        AB | VECTOR | {".lora_B.bias"},
        (Has(r"^diffusion_model\."), Has(r"^diffusion_model\.", "all")),
        deletes=DORA,
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
    PLAIN,
)
