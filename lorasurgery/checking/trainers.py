"""sd-scripts, musubi-tuner, OneTrainer, PEFT and LyCORIS: what each loads as a network or merges."""

from __future__ import annotations

from dataclasses import replace

from lorasurgery.checking.rules import (
    AB,
    ALPHA,
    DEFAULT_AB,
    DIFFUSERS,
    DORA_SCALE,
    GLORA,
    KOHYA,
    LOHA,
    LOKR,
    MAGNITUDE,
    MID,
    OFT,
    OLD,
    ORIGINAL,
    SD_SCRIPTS,
    TUCKER,
    VECTOR,
    Consumer,
    EncoderSpelling,
    Has,
    Note,
    Route,
    Spelling,
    table,
)
from lorasurgery.layouts.names import PEFT_ENCODER
from lorasurgery.layouts.sd_scripts_oft import PREFIX as OFT_PREFIX

NETWORK = Route(
    (Spelling("lora_unet_", SD_SCRIPTS, flat=True),),
    KOHYA | ALPHA,
    encoders=(EncoderSpelling("{sd_scripts}_", flat=True),),
)
PRODUCTS = KOHYA | ALPHA | LOHA | LOKR | TUCKER
"""``networks/loha.py`` and ``lokr.py`` read them beside LoRA, for SDXL and Anima."""
WITH_PRODUCTS = Route(NETWORK.names, PRODUCTS, encoders=NETWORK.encoders)
SDXL = Route((*NETWORK.names, Spelling("lora_unet_", DIFFUSERS, flat=True)), PRODUCTS, encoders=NETWORK.encoders)
OFT_NETWORK = Route(
    (Spelling(OFT_PREFIX, SD_SCRIPTS, flat=True),), frozenset({".oft_blocks"}) | ALPHA, (Has(f"^{OFT_PREFIX}"),), alike=True
)
"""``networks/oft.py``, chosen by ``--network_module``; it passes over every other key."""
OFT_LISTS = replace(OFT_NETWORK, reads=frozenset(f".oft_blocks.{i}" for i in range(4)) | ALPHA)
ONE_CLIP = Route(NETWORK.names, NETWORK.reads, encoders=(EncoderSpelling("lora_te_", flat=True),))

SD_SCRIPTS_TOOLS = Consumer(
    "sd-scripts",
    "sd-scripts",
    "2026-02",
    "kohya-ss/sd-scripts networks/*.py (48d368f, 2026-02; loha.py and lokr.py: feat-support-lokr-loha): --network_weights, "
    "gen_img.py and the minimal inference scripts",
    table(
        ("sd1 sd2", (OFT_NETWORK, ONE_CLIP)),
        ("sdxl", (OFT_NETWORK, SDXL)),
        ("anima", (WITH_PRODUCTS,)),
        ("flux1", (OFT_LISTS, NETWORK)),
        ("chroma sd3 lumina2 hunyuan-image", (NETWORK,)),
    ),
    facts=("Diffusers', ComfyUI's and PEFT's keys go through lorasurgery convert first",),
    layout="sd-scripts",
)

MUSUBI = Consumer(
    "musubi",
    "musubi-tuner",
    "2026-06",
    "kohya-ss/musubi-tuner networks/lora*.py, utils/lora_utils.py (2026-06)",
    table(
        (
            "hunyuan-video hunyuan-video-1.5 framepack wan flux1 flux2 qwen-image z-image kandinsky5",
            (Route(NETWORK.names, KOHYA | ALPHA | LOHA | LOKR),),
        ),
    ),
    facts=("text encoders are not trained there, so their modules are never read",),
    layout="sd-scripts",
)

OFT_R = frozenset({".oft_R", ".oft_R.weight", ".oft_R.scaled_oft"})
ONETRAINER_WORDS = KOHYA | AB | DEFAULT_AB | OLD | ALPHA | DORA_SCALE | VECTOR | MAGNITUDE | LOHA | LOKR | TUCKER | OFT_R
_PREFIXES = ("lora_unet_", "lycoris_", "lora_{denoiser}_", "{denoiser}.", "diffusion_model.", "base_model.model.", "")
ONETRAINER_ROUTE = Route(
    tuple(Spelling(p, naming, p.endswith("_")) for p in _PREFIXES for naming in (DIFFUSERS, ORIGINAL)),
    ONETRAINER_WORDS,
    encoders=(
        EncoderSpelling("{sd_scripts}_", flat=True),
        EncoderSpelling("{onetrainer}_", flat=True),
        EncoderSpelling("{comfyui}."),
        EncoderSpelling("{diffusers}."),
        *(EncoderSpelling(p, ("clip_l", "clip_h"), flat=True) for p in ("lora_te_", "lora_te1_")),
    ),
    error="RuntimeError",
    ignores_words=r"^bundle_emb|\.lora_B\.bias$|_aux\.|^lokr_factor$",
    because=(Note(r"^transformer_2\.", "OneTrainer keeps the two experts in two files"),),
)
ONETRAINER = Consumer(
    "onetrainer",
    "OneTrainer",
    "2026-08",
    "OneTrainer convert_lora_util.py, load_lora_util.py (23df383, 2026-08)",
    table(
        (
            "sd1 sd2 sdxl sd3 flux1 flux2 chroma z-image qwen-image hidream hunyuan-video pixart anima",
            (ONETRAINER_ROUTE,),
        ),
    ),
    unknown=True,
    facts=("its loader takes every prefix and both namings; fused and split modules must be those its model trains",),
    layout="onetrainer",
)

PEFT_ROUTE = Route(
    (Spelling("base_model.model.", DIFFUSERS), Spelling("{denoiser}.", DIFFUSERS)),
    AB | VECTOR | LOHA | LOKR | TUCKER
    | {".lora_B.bias", ".oft_R", ".oft_R.weight", ".boft_R", ".boft_s", ".ia3_l", ".miss_block"}
    | {".lora_embedding_A", ".lora_embedding_B", ".weight"},
    encoders=(
        *(EncoderSpelling(p, optional="text_model.")
          for p in ("base_model.model.", "text_encoder.", "text_encoder_2.", "text_encoder_3.", PEFT_ENCODER + "{table}.")),
    ),
    because=(Note(r"^diffusion_model\.", "PEFT wraps the Diffusers model, whose modules have other names"),),
)  # fmt: skip
PEFT = Consumer(
    "peft",
    "PEFT",
    "0.21",
    "peft/utils/save_and_load.py (0.21)",
    table(),
    (PEFT_ROUTE,),
    layout="peft",
    header=True,
    folder=True,
    misfit="rejected",
)

LYCORIS_ROUTE = Route(
    (Spelling("lycoris_", DIFFUSERS, flat=True),),
    KOHYA
    | MID
    | ALPHA
    | DORA_SCALE
    | LOHA
    | LOKR
    | TUCKER
    | GLORA
    | OFT
    | {".diff", ".diff_b", ".w_norm", ".b_norm", ".on_input"},
    refuses=r"^lycoris_\w+\.(lora_A(\.default)?\.weight|lora\.down\.weight|(miss|bone)_block)$",
    error="AttributeError",
)
LYCORIS_KOHYA = Route(
    (Spelling("lora_unet_", SD_SCRIPTS, flat=True),),
    LYCORIS_ROUTE.reads,
    (Has(r"^lora_(unet|te\d?)_"), Has("^lycoris_", "none")),
    (EncoderSpelling("{sd_scripts}_", flat=True),),
    note="read by lycoris.kohya inside sd-scripts; create_lycoris_from_weights reads the prefix lycoris_",
)  # fmt: skip
LYCORIS = Consumer(
    "lycoris",
    "LyCORIS",
    "4.1",
    "lycoris/wrapper.py, lycoris/modules (4.1), around the Diffusers model",
    table(("sd1 sd2 sdxl flux1 chroma sd3 lumina2 hunyuan-image anima", (LYCORIS_KOHYA, LYCORIS_ROUTE))),
    (LYCORIS_ROUTE,),
    layout="lycoris",
)
