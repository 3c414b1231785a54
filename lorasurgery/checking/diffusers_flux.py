"""Diffusers' FLUX.1 (Chroma) and FLUX.2 pipelines: ``FluxLoraLoaderMixin`` and ``Flux2LoraLoaderMixin`` of 0.42."""

from __future__ import annotations

from dataclasses import replace

from lorasurgery.checking.diffusers_plain import DORA, ENCODERS, NEEDS_LORA, PLAIN, WHOLE_LOKR, WHOLE_OWN_LOKR, popped, refuse
from lorasurgery.checking.rules import (
    AB,
    ALPHA,
    ANYTHING,
    DIFFUSERS,
    KOHYA,
    LOKR,
    NOTHING,
    XLABS,
    EncoderSpelling,
    Has,
    Needs,
    Note,
    Route,
    Spelling,
)

DOWN = Has(r"\.lora_down\.weight")
LAYERS = r"\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])$"
BLOCKS = r"^(double|single)_blocks\."
EMBEDDERS = Note(
    r"^(lora_unet_|diffusion_model\.)(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)",
    "the converter forgets the prefix of embedders and the final layer, so they are dropped",
)
OTHERS = r"^(?!lora_unet_|diffusion_model\.)|position_embedding|text_projection|\.diff_b$"
"""What its kohya converter filters out; anything else it cannot name is refused."""
FINAL = r"(img_in|txt_in|(time|vector|guidance)_in[._](in|out)_layer|final_layer[._](linear|adaLN_modulation[._]1))"

NORMS = r"norm.*\.diff$"
UNET = r"^(lora_unet_|diffusion_model\.)(?!final_layer)"

DOTTED_KOHYA = Route(
    (Spelling("transformer.", DIFFUSERS),),
    KOHYA | PLAIN.reads,
    (DOWN, Has(r"^transformer\.")),
    deletes=DORA,
    keeps_words=True,
    words=((r"norm_(added_)?[qk]$", frozenset({".weight"})),),
    because=(Note(r"^(?!transformer\.)", "beside keys with transformer. all others are dropped"),),
)
MIXTURE = Route(
    (
        Spelling("lora_transformer_", DIFFUSERS, flat=True, only=r"\.attn\.(to|add)_"),
        Spelling(
            "lora_transformer_", DIFFUSERS, flat=True, only=r"^(context_embedder|norm_out|proj_out|x_embedder|time_text_embed)"
        ),
    ),
    KOHYA | ALPHA,
    (DOWN, Has(r"^lora_transformer_.*(lora_down|lora_up|alpha)")),
    (EncoderSpelling("lora_te1_", ("clip_l",), flat=True, only=LAYERS),),
    deletes=DORA,
    ignores_names=r"^(lora_te1_|lora_unet_)",
    ignores_words=NOTHING,
    needs=(Needs(ANYTHING, r"^\.lora_", (ALPHA,), "KeyError"),),
    because=(
        Note(
            r"^lora_transformer_",
            "the converter knows attention and embedders only, and PEFT makes no layer of the block that it names for the rest",
        ),
    ),
    error="AssertionError, KeyError or ValueError",
)
KOHYA_FILE = Route(
    tuple(Spelling(p, flat=f, only=BLOCKS) for p, f in (("lora_unet_", True), ("diffusion_model.", False))),
    KOHYA | ALPHA,
    (DOWN,),
    (
        EncoderSpelling("lora_te_", ("clip_l",), flat=True, only=LAYERS),
        EncoderSpelling("lora_te1_", ("clip_l",), flat=True, only=LAYERS),
        EncoderSpelling("text_encoders.clip_l.transformer.", ("clip_l",), only=LAYERS),
    ),
    deletes=DORA,
    ignores_names=f"{OTHERS}|{NORMS}|^(lora_unet_|diffusion_model\\.){FINAL}\\.(lora_down|lora_up|alpha)",
    ignores_words=f"{OTHERS}|{NORMS}",
    needs=tuple(need._replace(names=UNET, given="lora|alpha") for need in popped(KOHYA)),
    because=(EMBEDDERS,),
)
XLABS_FILE = Route(
    tuple(Spelling(p, "alias") for p in ("", "diffusion_model.")),
    XLABS,
    (Has("processor"),),
    deletes=DORA,
)
CONTROL = Route(
    (Spelling(""),),
    AB | {".lora_B.bias", ".scale"},
    (Has(r"query_norm\.scale"),),
    deletes=DORA,
    ignores_words=ANYTHING,
    complete=tuple(
        f"{s}_blocks.{{i}}.{n}"
        for s, names in (
            ("double", ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "img_mod.lin")),
            ("single", ("linear1", "linear2")),
        )
        for n in names
    ),
    every_block=True,
    wrong=(
        Note(r"^final_layer\.adaLN_modulation", "the converter exchanges the halves of lora_A too, which mixes up the rank"),
    ),
    error="KeyError",
)
FAL = Route(
    (Spelling("base_model.model.", without=r"adaLN|norm\."),),
    AB | {".lora_B.bias"},
    (Has("base_model"),),
    deletes=DORA,
    ignores_names=NOTHING,
    ignores_words=NOTHING,
    complete=tuple(f"base_model.model.{c}" for c in CONTROL.complete),
    every_block=True,
)
FLUX1_PLAIN = replace(
    PLAIN, reads=PLAIN.reads | ALPHA, ignores_names=ANYTHING, ignores_words=ANYTHING, shares_alpha=True,
    words=((r"norm_(added_)?[qk]$", frozenset({".weight"})),),
)  # fmt: skip
"""With the replaced norms of a control LoRA (``_control_lora_supported_norm_keys``)."""
FLUX1_LOKR = replace(
    FLUX1_PLAIN, reads=LOKR, when=(Has(r"^transformer\..*\.lokr_"), Has(NEEDS_LORA)), needs=WHOLE_OWN_LOKR, keeps_words=False
)
"""One LoKr module makes PEFT read the whole file as LoKr."""
NOTHING_LEFT = replace(
    refuse(DOWN.pattern), when=(DOWN, Has(r"^(lora_unet_|lora_te1?_|diffusion_model\.|text_encoders\.clip_l)", "none"))
)
NO_LORA = replace(refuse(NEEDS_LORA), when=(Has(NEEDS_LORA, "none"), Has(r"norm_(added_)?[qk]", "none")))
FLUX1 = (FLUX1_LOKR, DOTTED_KOHYA, MIXTURE, NOTHING_LEFT, KOHYA_FILE, XLABS_FILE, CONTROL, FAL, NO_LORA, FLUX1_PLAIN)

SWAP = Note(
    r"final_layer[._]adaLN_modulation", "the converter does not exchange the halves of the final layer's scale and shift"
)
FLUX2_KOHYA = Route(
    (
        Spelling("lora_unet_", flat=True, only=BLOCKS),
        Spelling("lora_unet_", flat=True, only=r"^(img_in|txt_in|time_in\.|final_layer\.linear)"),
    ),
    KOHYA | ALPHA,
    (DOWN,),
    deletes=DORA,
    needs=(
        Needs("^lora_unet_", "lora_down", (frozenset({".lora_up.weight"}),), "KeyError"),
        Needs("^lora_unet_", "lora_up", (frozenset({".lora_down.weight"}),)),
    ),
    because=(Note(r"^(?!lora_unet_)", "a file with lora_down is read under lora_unet_ only"),),
)
BFL = tuple(Spelling(p) for p in ("diffusion_model.", "base_model.model."))
EXPANDED = tuple(Spelling(p, DIFFUSERS, only=r"transformer_blocks\.") for p in ("diffusion_model.", "base_model.model."))
LYCORIS = Route(
    (Spelling("lycoris_", DIFFUSERS, flat=True, only=r"transformer_blocks\.\d+\.(attn\.(to|add)_|ff)"),),
    LOKR | ALPHA,
    (Has(r"\.lokr_"), Has("^lycoris_")),
    deletes=DORA,
    needs=WHOLE_LOKR,
    ignores_names=NOTHING,
    ignores_words=NOTHING,
)
SPLIT = r"^transformer_blocks\..*\.(to_[qkv]|add_[qkv]_proj)$"


def _fusing(plain: Route) -> tuple[Route, Route]:
    """A route for LoKr under Diffusers' names: one fused module makes the loader fuse q, k and v in the whole model."""
    fused = tuple(
        made
        for own in plain.names
        for made in (own._replace(without=SPLIT), Spelling(own.prefix, "alias", only=r"\.to_(added_)?qkv$"))
    )
    note = Note(SPLIT, "a fused module in the file makes the loader fuse the model's q, k and v")
    return replace(plain, names=fused, when=(*plain.when, Has(r"\.to_(added_)?qkv\.lokr_")), because=(note,)), plain


FLUX2 = (
    FLUX2_KOHYA,
    LYCORIS,
    Route(
        BFL,
        LOKR | ALPHA,
        (Has(r"\.lokr_"), Has(r"^(diffusion_model|base_model\.model)\.")),
        deletes=DORA,
        needs=WHOLE_LOKR,
        ignores_names=NOTHING,
        ignores_words=NOTHING,
        wrong=(SWAP,),
    ),
    *_fusing(
        Route(
            (Spelling("", DIFFUSERS),),
            LOKR | ALPHA,
            (Has(r"\.lokr_"), Has(r"^transformer\.", "none")),
            deletes=DORA,
            needs=WHOLE_LOKR,
            ignores_words=NOTHING,
        )
    ),
    *_fusing(
        Route(
            (Spelling("transformer.", DIFFUSERS),),
            LOKR,
            (Has(r"\.lokr_"),),
            deletes=DORA,
            needs=WHOLE_OWN_LOKR,
            ignores_names="lora|lokr",
            ignores_words="lora|lokr",
        )
    ),
    Route(
        (*BFL, *EXPANDED),
        AB,
        (Has(r"^(diffusion_model|base_model\.model)\."),),
        deletes=DORA,
        ignores_names=NOTHING,
        ignores_words=NOTHING,
        wrong=(SWAP,),
    ),
    PLAIN,
)
__all__ = ["ENCODERS", "FLUX1", "FLUX2", "NEEDS_LORA"]
