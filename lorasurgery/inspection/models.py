"""What a file is when it is no adapter: which model, or which other kind of thing.

Markers: the key names of ComfyUI's ``model_detection.py``, ``controlnet.py`` and ``sd.py`` (2026-05), kohya's LLLite, nunchaku.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import NAMINGS, name_pattern
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.io.tensors import Tensor


class Model(NamedTuple):
    """What a file that is no adapter is."""

    kind: str
    title: str
    architecture: Architecture | None = None
    coverage: float = 0.0
    """Share of the denoiser's weights that the architecture's table names."""
    components: tuple[tuple[str, int], ...] = ()
    """(component, tensors)."""
    layout: str = "unknown"
    """``original`` or ``diffusers``: whose names the weights have."""


MARKERS = (
    ("lllite", "a ControlNet-LLLite", r"^lllite_"),
    ("control-lora", "a Control-LoRA, which carries whole layers of a ControlNet", r"^lora_controlnet$"),
    ("controlnet", "a ControlNet",
     r"^(control_model\.|controlnet_|input_hint_block|zero_convs|controlnet\.|control_add_embedding|controlnet_x_embedder)"),
    ("t2i-adapter", "a T2I-Adapter", r"^(adapter\.)?body\.\d+\.(block1|resnets)"),
    ("ip-adapter", "an IP-Adapter", r"^(ip_adapter|image_proj)\.|\.processor\.ip_adapter_|_ip\.weight$"),
    ("svdquant", "an SVDQuant (nunchaku) model", r"\.qweight$|\.svdq|smooth_factor|\.proj_down$"),
    ("embedding", "a textual inversion embedding", r"^(string_to_param|emb_params$|clip_[lg]$|t5$|qwen\w*$)|^<[^>]+>$"),
    ("motion-module", "an AnimateDiff motion module", r"\.motion_modules\.\d+\.temporal_transformer\."),
    ("upscaler", "an upscaling model", r"^(conv_first|model\.0)\.weight$|^body\.\d+\.rdb1\."),
)  # fmt: skip
"""(kind, title, a pattern that at least one key has); the first counts."""

WRAPPERS = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.", "model.", "")
COMPONENTS = (
    ("denoiser", ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")),
    ("vae", ("first_stage_model.", "vae.")),
    ("text encoders", ("cond_stage_model.", "conditioner.", "text_encoders.", "text_encoder.", "text_encoder_2.", "te.")),
)
_VAE = re.compile(r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|conv1|conv_out|mid|mid_block|up_blocks)\b")
_ENCODER_ROOTS = ("", "text_model.", "model.", "transformer.", "transformer.text_model.", "text_encoders.clip_l.transformer.")
ENOUGH = 0.5


def identify(tensors: Mapping[str, Tensor]) -> Model:
    """What these tensors are. Never raises: at worst ``unknown``."""
    if not tensors:
        return Model("empty", "a file without tensors")
    for kind, title, pattern in MARKERS:
        if any(re.search(pattern, key) for key in tensors):
            return Model(kind, title)
    shapes = {key[: -len(".weight")]: t.shape for key, t in tensors.items() if key.endswith(".weight")}
    components = _components(tensors)
    match = _denoiser(shapes)
    if match is not None:
        return _model(*match, components)
    return _part(tensors, shapes) or _unknown(tensors, shapes, components)


def _part(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> Model | None:
    """A VAE or a text encoder alone."""
    if sum(bool(_VAE.match(key)) for key in tensors) > 1:
        return Model("vae", "a VAE", components=(("vae", len(tensors)),))
    encoder = _encoder(shapes)
    if encoder is None:
        return None
    return Model("text-encoder", f"a text encoder ({encoder})", components=((encoder, len(tensors)),))


def _unknown(tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape], components: tuple[tuple[str, int], ...]) -> Model:
    if len(components) > 1:
        return Model("checkpoint", "a whole checkpoint of a model no table knows", components=components)
    if len(shapes) * 2 >= len(tensors):
        return Model("model", "the weights of a model no table knows", components=components)
    return Model("unknown", "no kind of file that lorasurgery knows", components=components)


def _model(arch: Architecture, naming: str, share: float, components: tuple[tuple[str, int], ...]) -> Model:
    whole = len(components) > 1
    what = f"a whole checkpoint of {arch.name}" if whole else f"the denoiser of {arch.name}"
    return Model("checkpoint" if whole else "denoiser", what, arch, share, components, naming)


def _components(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, int], ...]:
    """The parts of an all-in-one file and how many tensors each has."""
    counts: Counter[str] = Counter()
    for key in tensors:
        counts[next((name for name, prefixes in COMPONENTS if key.startswith(prefixes)), "other")] += 1
    return tuple(counts.most_common())


def _denoiser(shapes: Mapping[str, Shape]) -> tuple[Architecture, str, float] | None:
    """The table that names most of the denoiser's weights with their shapes, the naming, and the share of them."""
    for wrapper in WRAPPERS:
        own = {name[len(wrapper) :]: shape for name, shape in shapes.items() if name.startswith(wrapper)}
        if len(own) * 10 < len(shapes) or not own:
            continue
        ranked = [_score(arch, own) for arch in _near(own)]
        best = max(ranked, key=lambda found: found[1], default=None)
        if best is not None and best[1] >= ENOUGH:
            return best[2], best[3], best[0]
    return None


def _near(shapes: Mapping[str, Shape]) -> Iterable[Architecture]:
    """The tables whose name patterns cover a good part of the names."""
    patterns = Counter(name_pattern(name) for name in shapes)
    for arch in architectures().values():
        if sum(count for pattern, count in patterns.items() if pattern in arch.patterns) >= ENOUGH * len(shapes):
            yield arch


def _score(arch: Architecture, shapes: Mapping[str, Shape]) -> tuple[float, float, Architecture, str]:
    """(share of the file's weights named and shaped alike, the same of the table's too, table, naming)."""
    found = []
    for naming in NAMINGS:
        names = arch.namings[naming]
        fitting = sum(name in names and arch.module_shape(names[name])[:2] == shape[:2] for name, shape in shapes.items())
        share = fitting / len(shapes)
        found.append((share, share * fitting / max(len(names), 1), arch, naming))
    return max(found, key=lambda item: item[1])


def _encoder(shapes: Mapping[str, Shape]) -> str | None:
    """The text encoder whose weights these are."""
    for root in _ENCODER_ROOTS:
        own = {name[len(root) :]: shape for name, shape in shapes.items() if name.startswith(root)}
        for table in TEXT_ENCODERS.values():
            known = sum(table.shapes.get(n, table.shapes.get(f"text_model.{n}")) == shape for n, shape in own.items())
            if known >= ENOUGH * len(table.shapes):
                return table.id
    return None
