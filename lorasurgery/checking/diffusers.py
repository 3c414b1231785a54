"""Diffusers: ``loaders/lora_pipeline.py``, ``lora_conversion_utils.py`` and ``peft.py`` of 0.42.

Every pipeline loads its own names; files of other trainers go through a converter chosen by a word in any key. Only LoRA
loads, for FLUX.2 and Z-Image LoKr too. What is left with neither ``lora`` nor a component's prefix in its key makes it
refuse the file; what has ``lora`` in its key and another prefix is passed over with a warning.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.checking.diffusers_flux import FLUX1, FLUX2
from lorasurgery.checking.diffusers_plain import (
    DORA,
    ENCODERS,
    NEEDS_LORA,
    PLAIN,
    WHOLE_LOKR,
    WHOLE_OWN_LOKR,
    plain,
    popped,
    refuse,
)
from lorasurgery.checking.diffusers_video import HUNYUAN, LTX, LTX2, WAN
from lorasurgery.checking.rules import (
    AB,
    ALPHA,
    ANYTHING,
    DEFAULT_AB,
    DIFFUSERS,
    KOHYA,
    LINEAR,
    LOKR,
    NOTHING,
    OLD,
    ORIGINAL,
    PROCESSOR,
    VECTOR,
    Consumer,
    EncoderSpelling,
    Has,
    Note,
    Route,
    Spelling,
    table,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

UNET_PREFIX = r"^lora_(te|te1|te2|unet)_"
LAYERS = r"\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])$"
KOHYA_CLIP = (
    EncoderSpelling("lora_te_", ("clip_l", "clip_h"), flat=True, only=LAYERS),
    EncoderSpelling("lora_te1_", ("clip_l", "clip_h"), flat=True, only=LAYERS),
    EncoderSpelling("lora_te2_", ("clip_g",), flat=True, only=LAYERS),
)
UNET = plain(
    names=(
        Spelling("unet.", DIFFUSERS),
        Spelling("unet.", DIFFUSERS, replace=((".to_", ".processor.to_"), (".to_out.0.", ".to_out."))),
    ),
    reads=AB | OLD | PROCESSOR | LINEAR | VECTOR | {".lora_B.bias"},
)


def _unet(*names: Spelling, when: tuple[Has, ...] = ()) -> Route:
    """sd-scripts' SD files: only factors and alphas; any further key is refused."""
    return Route(
        names,
        KOHYA | ALPHA,
        (Has(UNET_PREFIX, "all"), *when),
        KOHYA_CLIP,
        deletes=DORA,
        ignores_words=NOTHING,
        needs=popped(KOHYA),
        shares_alpha=True,
        because=(
            Note(
                r"_(input|output)_blocks_|_middle_block_",
                "the original block names load in SDXL's pipelines only, and not beside Diffusers' names",
            ),
        ),
    )


NAMES = Spelling("lora_unet_", DIFFUSERS, flat=True, without=r"^add_embedding")
ORIGINAL_NAMES = Spelling("lora_unet_", flat=True)
AROUND = Spelling("lora_unet_", ORIGINAL, flat=True, only=r"^(time_embed\.|label_emb\.|input_blocks\.0\.0$|out\.2$)")
SGM = Has(r"_(input|output)_blocks_|_middle_block_")
NO_DOWN = Has(r"_(down|up)_blocks_|_mid_block_", "none")
DOWN_UP = Has(r"\.lora_(down|up)\.weight$")


def _renamed(
    prefix: str, *, naming: str = DIFFUSERS, when: tuple[Has, ...], words: frozenset[str], flat: bool = False
) -> Route:
    """Qwen-Image's and Z-Image's converters: one prefix taken off, alphas folded, nothing else accepted."""
    doubled = Note(r"^transformer\.", "the converter, started by an alpha or `default.`, makes the prefix transformer. twice")
    return Route(
        (Spelling(prefix, naming, flat),),
        words | ALPHA,
        when,
        deletes=DORA,
        ignores_words=NOTHING,
        because=(doubled,),
        needs=popped(words),
    )


def _dotted(names_with_prefix: tuple[str, ...]) -> tuple[Route, ...]:
    """The dotted files those converters take: with any of these triggers."""
    triggers = Has(r"\.alpha$|^diffusion_model\.|default\.")
    kohya = (triggers, Has("^lora_unet_", "none"), DOWN_UP)
    peft = (triggers, Has("^lora_unet_", "none"), Has(DOWN_UP.pattern, "none"))
    names = tuple(Spelling(p, DIFFUSERS) for p in names_with_prefix)
    first = _renamed("", when=kohya, words=KOHYA)
    second = _renamed("", when=peft, words=AB | DEFAULT_AB)
    return tuple(replace(route, names=names) for route in (first, second))


FLAT = (Has("^lora_unet_"),)
QWEN_CONVERTED = (
    _renamed("lora_unet_", when=(*FLAT, DOWN_UP), words=KOHYA, flat=True),
    _renamed("lora_unet_", when=FLAT, words=AB | DEFAULT_AB, flat=True),
    *_dotted(("diffusion_model.", "")),
)
QWEN = (*(replace(r, needs=tuple(need._replace(given=r"^\.lora") for need in r.needs)) for r in QWEN_CONVERTED), PLAIN)
"""Its converter takes every alpha out first, with a module or without."""
QKV = Note(r"attention\.(qkv|out)$", "the converter splits a fused qkv (and renames out) only under lora_unet_")
Z_FLAT = Route(
    (
        Spelling("lora_unet_", DIFFUSERS, flat=True, without=r"norm_[qk]$"),
        Spelling("lora_unet_", ORIGINAL, flat=True, only=r"attention\.(qkv|out)$"),
    ),
    KOHYA | OLD | ALPHA,
    (Has("lokr_", "none"), *FLAT),
    deletes=DORA,
    ignores_words=NOTHING,
    needs=popped(KOHYA | OLD),
)
Z_LOKR = Route(
    (Spelling("diffusion_model.", DIFFUSERS), Spelling("", DIFFUSERS)), LOKR | ALPHA,
    (Has(r"\.lokr_"), Has(r"^diffusion_model\.|\.alpha$")), deletes=DORA, ignores_words=NOTHING, because=(QKV,),
    needs=WHOLE_LOKR,
)  # fmt: skip
Z_LOKR_PLAIN = Route(
    (Spelling("transformer.", DIFFUSERS),),
    LOKR,
    (Has(r"\.lokr_"),),
    deletes=DORA,
    ignores_words="lora|lokr",
    needs=WHOLE_OWN_LOKR,
)


def _z_dotted() -> tuple[Route, ...]:
    kohya, peft = (
        replace(route, reads=route.reads | OLD, needs=popped(route.reads | OLD)) for route in _dotted(("diffusion_model.", ""))
    )
    out = tuple(Spelling(p, ORIGINAL, only=r"attention\.out$") for p in ("diffusion_model.", ""))
    with_out = replace(kohya, names=(*kohya.names, *out), because=(*kohya.because, QKV))
    return with_out, replace(peft, because=(*peft.because, QKV), refuses=r"attention\.out\.alpha$")


LUMINA_BLOCK = tuple(f"attention.{n}" for n in ("qkv", "out")) + tuple(f"feed_forward.w{i}" for i in (1, 2, 3))
LUMINA = Route(
    (
        Spelling(
            "diffusion_model.",
            only=r"^(layers|noise_refiner|context_refiner)\..*(attention\.(qkv|out)|w\d|adaLN_modulation\.1)$",
        ),
    ),
    AB,
    (Has(r"^diffusion_model\."),),
    deletes=DORA,
    ignores_names=NOTHING,
    ignores_words=NOTHING,
    needs=popped(AB),
    complete=(
        *(f"diffusion_model.{s}.{{i}}.{n}" for s in ("layers", "noise_refiner", "context_refiner") for n in LUMINA_BLOCK),
        *(f"diffusion_model.{s}.{{i}}.adaLN_modulation.1" for s in ("layers", "noise_refiner")),
    ),
)
HIDREAM = Route(
    (Spelling("diffusion_model.", DIFFUSERS),),
    PLAIN.reads,
    (Has("diffusion_model"), Has("^diffusion_model", "all")),
    deletes=DORA,
    ignores_words=NEEDS_LORA,
    ignores_names=NEEDS_LORA,
    keeps_words=True,
)
ANIMA_AROUND = Spelling("diffusion_model.", DIFFUSERS, without=r"blocks\.|^text_conditioner")
ANIMA = plain(names=(Spelling("diffusion_model."), ANIMA_AROUND, *PLAIN.names), when=(Has(r"^diffusion_model\."),))
MODEL_ONLY = plain(note="its pipeline has no load_lora_weights: use pipe.transformer.load_lora_adapter(FILE)")


def _layers(*rows: tuple[str, tuple[Route, ...]]) -> Mapping[str, tuple[Route, ...]]:
    """The table of a program that hands everything to PEFT's layers."""
    return table(*((ids, tuple(replace(route, layers=True) for route in routes)) for ids, routes in rows))


DIFFUSERS_LIBRARY = Consumer(
    "diffusers",
    "Diffusers",
    "0.42",
    "diffusers/loaders/lora_pipeline.py, lora_conversion_utils.py, peft.py (0.42.1)",
    _layers(
        ("sd1 sd2", (_unet(NAMES, AROUND), UNET)),
        ("sdxl", (_unet(ORIGINAL_NAMES, when=(SGM, NO_DOWN)), _unet(NAMES, AROUND), UNET)),
        ("sd3 auraflow kandinsky5 cosmos-predict2 mochi", (PLAIN,)),
        ("pixart", ()),
        ("flux1 chroma", FLUX1),
        ("flux2", FLUX2),
        ("z-image", (Z_LOKR, Z_LOKR_PLAIN, Z_FLAT, *_z_dotted(), PLAIN)),
        ("qwen-image", QWEN),
        ("lumina2", (LUMINA, PLAIN)),
        ("hidream", (HIDREAM, refuse("diffusion_model"), PLAIN)),
        ("wan", WAN),
        ("hunyuan-video", HUNYUAN),
        ("framepack", (PLAIN,)),
        ("hunyuan-video-1.5 hunyuan-image", (MODEL_ONLY,)),
        ("ltx-video", LTX),
        ("ltx2", LTX2),
        ("anima", (ANIMA, PLAIN)),
    ),
    unknown=True,
    layout="diffusers",
    header=True,
    misfit="rejected",
)
__all__ = ["ANYTHING", "DIFFUSERS_LIBRARY", "ENCODERS"]
