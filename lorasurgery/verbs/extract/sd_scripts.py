"""Which layers the trainers' own extraction scripts take, as data.

sd-scripts ``networks/extract_lora_from_models.py`` takes what ``networks/lora.py`` trains: every Linear and 1x1 Conv2d in a
``Transformer2DModel``; with ``conv_dim`` every Linear and Conv2d in ``ResnetBlock2D``, ``Downsample2D`` and ``Upsample2D``,
too; of text encoders those in ``CLIPAttention`` and ``CLIPMLP``. Its ``networks/flux_extract_lora.py`` takes what has
``double_block`` or ``single_block`` in its name and no ``norm``, musubi-tuner's ``qwen_extract_lora.py`` the matrices of the
blocks, embedders and last layers (all three as of 2026). Models without such a script are extracted whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.site import Site

OTHER_LAYER = "a layer that sd-scripts does not extract"
CONV_ONLY = "a layer that sd-scripts extracts only with a rank for convolutions"


@dataclass(frozen=True, slots=True)
class Script:
    """The layers of one script: those with one of these words among the parts of their name."""

    naming: str
    """Of the denoiser's names."""
    always: frozenset[str]
    with_conv: frozenset[str] = frozenset()
    """Taken where convolutions with a kernel are."""
    encoders: frozenset[str] = frozenset()
    """In text encoders' names, which are Hugging Face's."""


UNET = Script(  # the Diffusers name of a part is that of the list it stands in: attentions has the Transformer2DModels
    DIFFUSERS, frozenset({"attentions"}), frozenset({"resnets", "downsamplers", "upsamplers"}), frozenset({"self_attn", "mlp"})
)
FLUX = Script(ORIGINAL, frozenset({"double_blocks", "single_blocks"}))
QWEN = Script(ORIGINAL, frozenset({"transformer_blocks", "img_in", "txt_in", "proj_out", "norm_out", "time_text_embed"}))
SCRIPTS: Mapping[str, Script] = MappingProxyType(
    {"sd1": UNET, "sd2": UNET, "sdxl": UNET, "flux1": FLUX, "chroma": FLUX, "qwen-image": QWEN}
)
"""Architecture -> the script that reads it."""


def left_to(arch: Architecture, *, conv: bool) -> Callable[[Site], str]:
    """A function that says why a script leaves a matrix or convolution out; empty for those that it takes.

    ``conv``: whether convolutions with a kernel are extracted.
    """
    script = SCRIPTS.get(arch.id)
    if script is None:
        return lambda _: ""
    words: dict[str, frozenset[str]] = {}
    for name, spans in arch.namings[script.naming].items():
        words.update(dict.fromkeys((span.weight for span in spans), frozenset(name.split("."))))

    def reason(site: Site) -> str:
        weight = site.spans[0].weight
        if site.component != DENOISER:
            return "" if script.encoders & set(weight.split(".")) else OTHER_LAYER
        own = words.get(weight, frozenset())
        if script.always & own or (conv and script.with_conv & own):
            return ""
        return CONV_ONLY if script.with_conv & own else OTHER_LAYER

    return reason
