"""Forge and SD.Next, read in their loaders.

Forge (``dfdcbab``, June 2025, the last of the original project): ``packages_3rdparty/comfyui_lora_collection/lora.py``, a
ComfyUI of 2024 with the aliases of SD and FLUX.1 only, and ``extensions-builtin/sd_forge_lora/networks.py``, which drops a
file with more than 12 unmatched keys. SD.Next (``058a7f0``, July 2026): ``modules/lora/lora_overrides.py`` sends the models
it has no loader for to Diffusers; the others go through ``lora_load.py`` or a loader of their own in ``pipelines/``.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from lorasurgery.checking.comfyui import CONTROL, NATIVE, UNET
from lorasurgery.checking.diffusers import DIFFUSERS_LIBRARY
from lorasurgery.checking.rules import (
    AB,
    ALPHA,
    ANYTHING,
    DIFF,
    DIFFUSERS,
    DORA_SCALE,
    GLORA,
    KOHYA,
    LINEAR,
    LOHA,
    LOKR,
    MAGNITUDE,
    MID,
    NOTHING,
    OFT,
    OLD,
    ORIGINAL,
    PROCESSOR,
    SD_SCRIPTS,
    TUCKER,
    VECTOR,
    Consumer,
    EncoderSpelling,
    Has,
    Needs,
    Note,
    Route,
    Spelling,
    table,
)

# Forge ------------------------------------------------------------------------------------------------------------------

FORGE_WORDS = frozenset(
    {*KOHYA, *MID, *PROCESSOR, *AB, *OLD, *LINEAR, *ALPHA, *DORA_SCALE, *LOHA, *LOKR, *TUCKER, *GLORA, *DIFF}
)
UNMATCHED = 12
LAYERS = r"\.(self_attn\.([qkv]|out)_proj|mlp\.fc[12])$"
FIRST, SECOND, T5 = ("clip_l", "clip_h"), ("clip_g",), ("t5_xxl",)
FORGE_ENCODERS = (
    *(EncoderSpelling(p, FIRST, flat=True, only=LAYERS) for p in ("lora_te_", "lora_te1_")),
    EncoderSpelling("text_encoder.", FIRST, only=LAYERS),
    EncoderSpelling("lora_te2_", SECOND, flat=True, only=LAYERS + r"|^text_projection$"),
    EncoderSpelling("text_encoder_2.", SECOND, only=LAYERS),
    EncoderSpelling("text_encoder.", SECOND, only=r"^text_projection$"),
    *(EncoderSpelling(p, T5, flat=True) for p in ("lora_te1_", "lora_te2_", "lora_te3_")),
)
NO_SPLIT = Note(r"^(transformer\.|lycoris_|lora_transformer_)", "Forge knows Diffusers' names for SD, SDXL and FLUX.1 only")


def _forge(*names: Spelling, when: tuple[Has, ...] = (), reads: frozenset[str] = FORGE_WORDS) -> Route:
    return Route(
        names, reads, when, FORGE_ENCODERS, tolerates=UNMATCHED, error="KeyError",
        because=(NO_SPLIT, Note(r"\.to_[qkv]$", "Forge knows SD's attention in Diffusers' dotted names as processor.to_q")),
    )  # fmt: skip


GAINS = r"(query|key)_norm$|norm_(added_)?[qk]$"
"""FLUX.1's norms are called ``scale`` there, so a name without it is no weight's."""
FLUX_NAMES = (
    *(spelling._replace(without=GAINS) for spelling in NATIVE),
    *(Spelling(p, DIFFUSERS, p.endswith("_"), without=GAINS) for p in ("transformer.", "lycoris_", "lora_transformer_")),
)
FORGE_UNET = (_forge(*NATIVE, *UNET),)
FORGE_FLUX = (
    _forge(Spelling(""), *NATIVE, when=CONTROL, reads=FORGE_WORDS | {".lora_B.bias", ".scale"}),
    _forge(*FLUX_NAMES),
)
FORGE = Consumer(
    "forge",
    "Forge",
    "2025-06",
    "lllyasviel/stable-diffusion-webui-forge (dfdcbab, 2025-06) comfyui_lora_collection/lora.py, sd_forge_lora/networks.py",
    table(("sd1 sd2 sdxl", FORGE_UNET), ("sd3 chroma", (_forge(*NATIVE),)), ("flux1", FORGE_FLUX)),
    facts=("the forks of Forge (reForge, Forge Neo, Classic) have loaders of their own; these rules are the original's",),
    layout="sd-scripts",
    misfit="rejected",
    swaps=False,
    patches=True,
    slices_bias=False,
)

# SD.Next ----------------------------------------------------------------------------------------------------------------

NETWORK_WORDS = frozenset(
    {*KOHYA, *MID, *ALPHA, *DORA_SCALE, *LOHA, *LOKR, *TUCKER, *GLORA, *OFT, ".diff", ".diff_b", ".w_norm", ".b_norm",
     ".on_input", ".oft_diag"}
)  # fmt: skip
DOTTED_WORDS = KOHYA | ALPHA
"""Below ``unet.`` and ``transformer.`` it takes these words off a key and no others."""
AB_UNREAD = Note(r"^(unet|transformer)\.", "SD.Next's own loader takes only lora_down, lora_up and alpha off these names")
ONE_CLIP = (EncoderSpelling("lora_te_", flat=True),)
TWO_CLIPS = (EncoderSpelling("lora_te1_", FIRST, flat=True), EncoderSpelling("lora_te2_", SECOND, flat=True))
CLIP_AND_T5 = (EncoderSpelling("lora_te1_", FIRST, flat=True), EncoderSpelling("lora_te2_", T5, flat=True))
FLAT_UNET = (
    Spelling("lora_unet_", DIFFUSERS, flat=True),
    Spelling("lora_unet_", flat=True, without=r"^output_blocks\.2\.1\.conv$"),
)
DOTTED_UNET = (Spelling("unet.", DIFFUSERS), Spelling("unet.", without=FLAT_UNET[1].without))
FLAT_DIT = (Spelling("lora_transformer_", DIFFUSERS, flat=True), Spelling("lycoris_", DIFFUSERS, flat=True, only="transformer"))
FROM_UNET, FROM_DIT, KOHYA_FILE = Has(r"^unet\."), Has(r"^transformer\."), Has(r"^lora_unet_")
CLIP_LOST = Note(r"^lora_te", "SD.Next's converter of sd-scripts' files loses the denoiser when there is anything else")


def _own(*names: Spelling, encoders: tuple[EncoderSpelling, ...], reads: frozenset[str] = NETWORK_WORDS,
         when: tuple[Has, ...] = ()) -> Route:  # fmt: skip
    return Route(names, reads, when, encoders, because=(AB_UNREAD,))


ALPHAS = Needs(ANYTHING, r"^\.lora_", (ALPHA,), "KeyError")


def _kohya(only: str, *, wrong: tuple[Note, ...] = ()) -> Route:
    """sd-scripts' files of FLUX.1 and SD3: converted name by name; anything left over and the rest is lost."""
    return Route(
        (Spelling("lora_unet_", flat=True, only=only),), KOHYA | ALPHA, (KOHYA_FILE,), ignores_names=NOTHING,
        ignores_words=NOTHING, needs=(ALPHAS,), because=(CLIP_LOST,), wrong=wrong, error="nothing loads",
    )  # fmt: skip


def _unet(encoders: tuple[EncoderSpelling, ...]) -> tuple[Route, ...]:
    dotted = _own(*DOTTED_UNET, encoders=encoders, reads=DOTTED_WORDS, when=(FROM_UNET,))
    return (dotted, _own(*FLAT_UNET, encoders=encoders))


def _dit(kohya: Route, encoders: tuple[EncoderSpelling, ...]) -> tuple[Route, ...]:
    dotted = _own(Spelling("transformer.", DIFFUSERS), encoders=encoders, reads=DOTTED_WORDS, when=(FROM_DIT,))
    return (kohya, dotted, _own(*FLAT_DIT, encoders=encoders))


SD3_BLOCKS = r"^joint_blocks\.\d+\.\w+_block\.(attn\.(qkv|proj)|mlp\.fc[12]|adaLN_modulation\.1)$"
FLUX_BLOCKS = r"^(double|single)_blocks\.\d+\.(\w+_attn\.(qkv|proj)|\w+_mlp\.[02]|\w+_mod\.lin|linear[12]|modulation\.lin)$"
EXCHANGED = Note(r"_attn_qkv$", "SD.Next's converter exchanges the q, k and v of image and text")
_PREFIXES = ("diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.", "")
PIPELINE = Route(
    tuple(Spelling(p, n, p.endswith("_")) for p in _PREFIXES for n in (ORIGINAL, DIFFUSERS, SD_SCRIPTS)),
    KOHYA | AB | ALPHA | DORA_SCALE | VECTOR | MAGNITUDE | LOHA | LOKR | DIFF | OFT | GLORA | {".on_input", ".oft_diag"},
    wrong=(
        Note(
            r"final_layer[._]adaLN_modulation",
            "SD.Next does not exchange the halves of the final layer's scale and shift",
        ),
    ),
    note="SD.Next skips a LoHa or OFT of a fused qkv, with a warning",
)
HANDED_ON = "SD.Next has no loader of its own for this model and hands the file to Diffusers"
SDNEXT = Consumer(
    "sdnext",
    "SD.Next",
    "2026-07",
    "vladmandic/sdnext (058a7f0, 2026-07) modules/lora/lora_load.py, lora_convert.py, lora_overrides.py, pipelines/*_lora.py",
    MappingProxyType(
        {
            arch: tuple(replace(r, note=HANDED_ON, layout="diffusers", header=True) for r in routes)
            for arch, routes in DIFFUSERS_LIBRARY.models.items()
        }
        | dict(
            table(
                ("flux2 z-image chroma anima", (PIPELINE,)),
                ("sd1 sd2", _unet(ONE_CLIP)),
                ("sdxl", _unet(TWO_CLIPS)),
                ("sd3", _dit(_kohya(SD3_BLOCKS, wrong=(EXCHANGED,)), TWO_CLIPS)),
                ("flux1", _dit(_kohya(FLUX_BLOCKS), CLIP_AND_T5)),
            )
        )
    ),
    unknown=True,
    facts=("with the setting that forces Diffusers, the rules of Diffusers hold for every model",),
    layout="onetrainer",
)
