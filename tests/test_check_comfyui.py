"""ComfyUI's verdicts equal the names ComfyUI really accepts (its own key maps, read from the running program)."""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import NAMINGS, flat
from lorasurgery.checking.comfyui import COMFYUI
from lorasurgery.checking.engine import check
from lorasurgery.checking.names import names_of
from lorasurgery.checking.subject import subject_of
from lorasurgery.io.tensors import of_array
from lorasurgery.site import DENOISER
from tests.format_files import KOHYA, file, lora, some
from tests.oracle import REFERENCES

if TYPE_CHECKING:
    from lorasurgery.checking.names import Known
    from lorasurgery.checking.rules import Route

MAPS = Path(__file__).parent / "fixtures" / "reference" / "comfyui_key_maps.json.gz"
PREFIXES = (
    "lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_", "oft_unet_", "lora_prior_unet_", "diffusion_model.",
    "model.diffusion_model.", "transformer.", "transformer_2.", "unet.", "unet.base_model.model.", "base_model.model.",
    "base_model.model.transformer.", "net.", "",
)  # fmt: skip
NO_WEIGHT_HERE = {
    "flux1": r"(to_qkv_mlp_proj|single_transformer_blocks[._]\d+[._]attn[._]to_out|linear1_qkv|controlnet_x_embedder"
    r"|guidance_embedder[._]linear_\d)$",
    "flux2": r"linear1_qkv$|norm1|[._]net[._]|to_[qkv]$|proj_mlp$|norm[._]linear$|blocks[._]\d+[._]proj_out$|time_text_embed"
    r"|controlnet",
    "chroma": r"linear1_qkv$|norm1|linear_(in|out)$|norm[._]linear$|attn[._]to_out$|to_qkv_mlp|time_text_embed|norm_out"
    r"|controlnet",
    **dict.fromkeys(
        ("sd1", "sd2", "sdxl"), r"(class|add)_embedding[._]linear_\d$|conv_shortcut$|(down|up)samplers[._]\d[._]conv$"
    ),
    "sd3": r"attn2[._]|norm_|last|to_add_out|ff_context|pos_embed$|norm1_context",
    "z-image": r"context_refiner[._]\d[._]adaLN",
    "lumina2": r"attention[._](to_|norm_)|adaLN_modulation[._]0|all_|attention[._]to_out|2-1",
    "auraflow": r"positional_encoding$|register_tokens$",
}
"""Aliases whose weight the model does not have (ComfyUI lists them for the whole family), or that no trainer writes."""


@cache
def maps() -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = json.loads(gzip.decompress(MAPS.read_bytes()))
    for key in LATER_BARE:
        own = {name.removeprefix(OWN): to for name, to in found[key].items() if name.startswith(OWN)}
        found[key] |= {name: to for name, to in own.items() if not re.search(r"table|registers|\.bias$", name)}
    return found


OWN = "diffusion_model."
LATER_BARE = ("ltx_video", "ltx2")
"""Models whose own names ComfyUI takes without a prefix since the maps were read (``comfy/lora.py``, 2026-09)."""
MODELS = [key for key, reference in REFERENCES.items() if reference in maps()]


def usual(key: str) -> tuple[Route, Known]:
    arch = architectures()[key]
    route = COMFYUI.models.get(arch.id, COMFYUI.default)[-1]
    return route, names_of(arch, route)


@pytest.mark.parametrize("key", MODELS)
def test_every_name_of_the_tables_is_judged_as_comfyui_does(key: str) -> None:
    accepted, (route, known) = maps()[REFERENCES[key]], usual(key)
    arch = architectures()[key]
    names = {name for naming in NAMINGS for name in arch.namings[naming]} | set(arch.alias_names)
    stems = {prefix + form for name in names for prefix in PREFIXES for form in (name, flat(name))}
    judged = {stem for stem in stems if stem in known.sites or re.search(route.also, stem)}
    beside = {own for _, own in arch.beside}  # of the text encoder, which the fixture does not have
    assert judged - beside == stems & set(accepted)
    assert beside <= judged


@pytest.mark.parametrize("key", MODELS)
def test_every_key_comfyui_accepts_is_accepted(key: str) -> None:
    accepted, (route, known) = maps()[REFERENCES[key]], usual(key)
    arch = architectures()[key]
    without = NO_WEIGHT_HERE.get(arch.id, r"(?!)")
    unknown = {
        stem
        for stem in accepted
        if stem not in known.sites and not re.search(route.also, stem) and not stem.endswith(".bias")
        and not re.search(without, stem)
    }  # fmt: skip
    assert unknown == set()


@pytest.mark.parametrize("key", MODELS)
def test_rows_are_comfyuis(key: str) -> None:
    """A name stands for the rows that ComfyUI adds it to."""
    accepted, (_, known) = maps()[REFERENCES[key]], usual(key)
    shapes = architectures()[key].shapes
    for stem, site in known.sites.items():
        if stem not in accepted:
            continue
        target, offset, function = [*accepted[stem], None, None][:3]
        weight = site.spans[0].weight
        assert target == f"diffusion_model.{weight}.weight", stem
        start, count = (0, shapes[weight][0]) if offset is None else offset[1:]
        if key != "lumina2":
            assert sum(s.stop - s.start for s in site.spans) == count, stem
            assert (len(site.spans) > 1) == (function is not None), stem
            assert min(s.start for s in site.spans) == start, stem


ENCODERS = {
    "sd1": ("lora_te_", "lora_te1_", "text_encoder."),
    "sdxl": ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2."),
    "flux1-dev": ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder."),
    "sd3-medium": ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_encoder.", "text_encoder_2."),
    "chroma": ("lora_te1_",),
    "lumina2": ("lora_te_",),
    "anima": ("lora_te_",),
}
"""Prefixes of ``model_lora_keys_clip`` besides the encoders' own names."""


@pytest.mark.parametrize("key", ENCODERS)
def test_text_encoder_prefixes(key: str) -> None:
    _, known = usual(key)
    stems = [stem for stem, site in known.sites.items() if site.component != DENOISER]
    found = {m[0] for stem in stems if (m := re.match(r"lora_te\d?_|text_encoder(_\d)?\.", stem))}
    assert found == set(ENCODERS[key])
    assert all(stem.startswith(("text_encoders.", *ENCODERS[key])) for stem in stems)


def test_clip_aliases_are_attention_and_mlp_only() -> None:
    _, known = usual("sdxl")
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in known.sites
    assert "lora_te2_text_projection" in known.sites
    assert "lora_te1_text_model_embeddings_token_embedding" not in known.sites
    assert "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding" in known.sites
    assert "lora_te1_encoder_layers_0_self_attn_q_proj" not in known.sites


def test_a_sparse_residual_beside_a_lora_is_not_read() -> None:
    """Only the LoRA of the two is loaded; a residual alone is nothing to ComfyUI."""
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    numbers = {
        f"{stem}.bias_indices": of_array(np.array([[0, 5], [3, 300]]), "I64"), f"{stem}.bias_values": some(2),
        f"{stem}.bias_size": of_array(np.array([320, 320]), "I64"),
    }  # fmt: skip
    both = check(subject_of(file(lora(stem, 320, 320, words=KOHYA) | numbers)), COMFYUI)
    assert both.counts == {"changed": 1}
    assert check(subject_of(file(numbers)), COMFYUI).counts == {"ignored": 1}
