"""Which weights of the models have a bias, for programs that add to the one there is.

Read from ComfyUI's own models (the key maps of ``tests/fixtures/reference``, with which a test compares this), and for text
encoders from transformers' classes.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.adapter import DENOISER
from lorasurgery.checking.rules import ANYTHING

if TYPE_CHECKING:
    from lorasurgery.adapter import Site
    from lorasurgery.architectures.table import Architecture

_BFL_NORMS = r"\.(query|key)_norm$"
_LUMINA = r"^(?!x_embedder$|cap_embedder\.1$|t_embedder\.mlp|final_layer\.)(?!.*adaLN_modulation)"
WITHOUT = MappingProxyType(
    {
        **dict.fromkeys(("sd1", "sd2", "sdxl"), r"\.attn[12]\.to_[qkv]$"),
        **dict.fromkeys(("flux1", "hunyuan-video", "hunyuan-image", "framepack"), _BFL_NORMS),
        "hunyuan-video-1.5": rf"{_BFL_NORMS}|^cond_type_embedding$",
        "chroma": rf"{_BFL_NORMS}|^distilled_guidance_layer\.norms",
        **dict.fromkeys(("flux2", "cosmos-predict2"), ANYTHING),
        **dict.fromkeys(("z-image", "lumina2"), _LUMINA),
        "sd3": r"\.ln_[qk]$",
        "qwen-image": r"^txt_norm$|\.norm_(added_)?[qk]$",
        "wan": r"\.norm_(q|k|k_img)$",
        **dict.fromkeys(("ltx-video", "ltx2"), r"\.[qk]_norm$|^text_embedding_projection\."),
        "hidream": r"^caption_projection|_rms_norm(_t)?$|\.ff_[it]\.",
        "kandinsky5": r"\.(query|key)_norm$|\.feed_forward\.",
        "anima": r"^(?!llm_adapter\.(blocks\.\d+\.mlp\.|out_proj$))",
        "auraflow": r"^(?!t_embedder\.mlp\.|init_x_linear$)",
    }
)
"""Architecture -> the original names of weights without a bias. A name that the model has not is not asked for."""
ENCODERS_WITHOUT = MappingProxyType(
    {
        **dict.fromkeys(("clip_l", "clip_g", "clip_h"), r"embedding|^text_projection$"),
        **dict.fromkeys(("t5_xxl", "gemma2_2b", "qwen3_06b"), ANYTHING),
    }
)


def has_bias(arch: Architecture, site: Site) -> bool | None:
    """Whether the base has a bias beside this weight; None where nothing is recorded."""
    table, own = (WITHOUT, arch.id) if site.component == DENOISER else (ENCODERS_WITHOUT, site.component)
    pattern = table.get(own)
    return None if pattern is None else re.search(pattern, site.spans[0].weight) is None
