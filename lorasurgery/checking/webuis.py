"""Forge and SD.Next, as far as their loaders were read: where they were not, nothing is claimed."""

from __future__ import annotations

from lorasurgery.checking.rules import (
    AB,
    ALPHA,
    DIFF,
    DIFFUSERS,
    DORA_SCALE,
    GLORA,
    KOHYA,
    LOHA,
    LOKR,
    MAGNITUDE,
    OFT,
    ORIGINAL,
    SD_SCRIPTS,
    VECTOR,
    Consumer,
    Note,
    Route,
    Spelling,
    table,
)

FORGE = Consumer(
    "forge",
    "Forge",
    "unknown",
    "lllyasviel/stable-diffusion-webui-forge issue 838",
    table(),
    unknown=True,
    facts=("Forge drops a whole file with more than 12 keys it does not match",),
)

_PREFIXES = ("diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_", "lycoris_", "base_model.model.", "")
NATIVE = Route(
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
SDNEXT = Consumer(
    "sdnext",
    "SD.Next",
    "2026-07",
    "vladmandic/sdnext native loaders (058a7f0, 2026-07)",
    table(("flux2 z-image chroma anima", (NATIVE,))),
    unknown=True,
)
