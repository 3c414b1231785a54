"""Which program wrote a file: signatures as a table, read from the programs' own saving code.

Sources: sd-scripts ``library/train_util.py`` and ``sai_model_spec.py``, musubi-tuner ``utils/sai_model_spec.py``, ai-toolkit
``toolkit/metadata.py``, OneTrainer ``BaseModelSaver``, SimpleTuner, LyCORIS ``wrapper.py`` and ``kohya.py``, Diffusers
``loaders/lora_base.py``, PEFT ``save_and_load.py``, x-flux, DiffSynth-Studio, VideoX-Fun (all 2026).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.inspection.description import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

METADATA, KEY, LAYOUT = "metadata", "key", "layout"


class Signature(NamedTuple):
    """What gives a program away: a pattern for ``key=value`` of the metadata, for a tensor's key, or for the layout."""

    program: str
    where: str
    pattern: str
    weight: int
    """How telling: 3 alone is certain, 1 is a habit that others share."""
    says: str
    part: str = ""
    """What every such key has, looked for first: far cheaper than the pattern on thousands of keys."""


_MUSUBI = r"lora_(?:wan|framepack|hv_1_5|qwen_image|zimage|kandinsky|flux_2|hidream_o1|ideogram4|krea2)"
_MUSUBI_MODELS = (
    r"hunyuan_video|wan|flux_kontext|flux_2_\w+|qwen_image\w*|kandinsky5|hunyuan_video_1_5|z_image|hidream_o1_image|krea2"
)
_FORK = "musubi-tuner (fork with native LoKr)"

SIGNATURES = (
    Signature("sd-scripts", METADATA, r"modelspec\.implementation_version=sd-scripts/", 4, "modelspec.implementation_version"),
    Signature("sd-scripts", METADATA, r"ss_network_module=networks\.(lora|lora_fa|dylora|oft|oft_flux|lora_flux|lora_sd3|"
              r"lora_lumina|lora_hunyuan_image|lora_anima|loha|lokr)$", 2, "ss_network_module"),
    Signature("sd-scripts", METADATA, r"ss_sd_scripts_commit_hash=", 2, "ss_sd_scripts_commit_hash"),
    Signature("sd-scripts", METADATA, r"ss_v2=", 1, "ss_v2"),
    Signature("sd-scripts with LyCORIS", METADATA, r"ss_network_module=lycoris\.kohya$", 4, "ss_network_module lycoris.kohya"),
    Signature("musubi-tuner", METADATA, rf"ss_network_module=networks\.{_MUSUBI}$", 4, "ss_network_module"),
    Signature("musubi-tuner", METADATA, rf"ss_base_model_version=({_MUSUBI_MODELS})$", 3, "ss_base_model_version"),
    Signature("musubi-tuner", METADATA, r"ss_num_train_items=", 2, "ss_num_train_items"),
    Signature(_FORK, METADATA, r"ss_(lokr_factor|rank_pattern|init_lora_weights)=", 5, "ss_lokr_factor or ss_rank_pattern"),
    Signature(_FORK, KEY, r"^(lokr_factor|use_rslora_flag|use_dora_flag)$", 5, "a lokr_factor or flag tensor"),
    Signature("ai-toolkit", METADATA, r"software=.*ai-toolkit", 6, "software"),
    Signature("ai-toolkit", METADATA, r"training_info=", 2, "training_info"),
    Signature("ai-toolkit", KEY, r"\.magnitude$", 3, "DoRA magnitude called .magnitude", ".magnitude"),
    Signature("OneTrainer", METADATA, r"ot_(config|branch|revision)=", 6, "ot_config or ot_revision"),
    Signature("OneTrainer", KEY, r"^bundle_emb\.", 4, "bundled embeddings", "bundle_emb."),
    Signature("OneTrainer", KEY, r"^lora_transformer_", 2, "lora_transformer_ names", "lora_transformer_"),
    Signature("OneTrainer", LAYOUT, r"^onetrainer$", 1, "its key layout"),
    Signature("SimpleTuner", METADATA, r"(?i)[^=]*simpletuner|[^=]*=.*simpletuner", 6, "metadata names it"),
    Signature("SimpleTuner (or LyCORIS alone)", METADATA, r"lycoris_config=", 4, "lycoris_config"),
    Signature("SimpleTuner (or LyCORIS alone)", KEY, r"^lycoris_", 2, "lycoris_ names", "lycoris_"),
    Signature("diffusion-pipe", METADATA, r"(?i)[^=]*diffusion[-_]pipe|[^=]*=.*diffusion-pipe", 6, "metadata names it"),
    Signature("Diffusers", METADATA, r"lora_adapter_metadata=", 2, "lora_adapter_metadata"),
    Signature("Diffusers (before 0.20)", KEY, r"\.processor\.to_\w+_lora\.(down|up)\.weight$", 4, "attention processor names",
              ".processor."),
    Signature("Diffusers", KEY, r"\.lora_linear_layer\.(down|up)\.weight$", 3, "lora_linear_layer names", "linear_layer"),
    Signature("Diffusers", KEY, r"^unet\..*\.lora\.(down|up)\.weight$", 3, "lora.down names", ".lora."),
    Signature("Diffusers", LAYOUT, r"^diffusers$", 1, "its key layout"),
    Signature("PEFT", KEY, r"^base_model\.model\.", 2, "base_model.model. names", "base_model.model."),
    Signature("DiffSynth-Studio", KEY, r"\.lora_[AB]\.default\.weight$", 2, "adapter name kept in the keys", ".default.weight"),
    Signature("XLabs x-flux", KEY, r"\.processor\.(qkv|proj)_lora\d?\.(down|up)\.weight$", 4, "processor names", ".processor."),
    Signature("Black Forest Labs", LAYOUT, r"^bfl$", 3, "its key layout"),
    Signature("VideoX-Fun", KEY, r"^lora_unet__", 4, "lora_unet__ names", "lora_unet__"),
    Signature("Mochi fine-tuner", KEY, r"\.lora_[AB]$", 4, "factors without .weight", ".lora_A\n"),
    Signature("cloneofsimo/lora", KEY, r"^(unet|text_encoder):\d+:(up|down)$", 5, "numbered modules", ":"),
    Signature("sd-scripts or a relative", LAYOUT, r"^sd-scripts$", 1, "its key layout"),
    Signature("ai-toolkit, diffusion-pipe or ComfyUI", LAYOUT, r"^comfyui$", 1, "its key layout"),
)  # fmt: skip

PROCESSORS = (
    Signature("lorasurgery", METADATA, r"lorasurgery\.version=", 3, "lorasurgery.version"),
    Signature("a resize tool", METADATA, r"ss_training_comment=.*dimension is resized", 3, "ss_training_comment"),
    Signature("a merge tool", METADATA, r"modelspec\.merged_from=.", 3, "modelspec.merged_from"),
)


def key_signs(keys: Iterable[str]) -> tuple[Signature, ...]:
    """The signatures that a file's keys bear."""
    text = "\n".join((*keys, ""))
    return tuple(
        sign for sign in SIGNATURES
        if sign.where == KEY and sign.part in text and re.search(sign.pattern, text, re.MULTILINE)
    )  # fmt: skip


def trainer(metadata: Mapping[str, str], signs: tuple[Signature, ...], layout: str, *, peft_folder: bool) -> Trainer | None:
    """The program with the weightiest evidence, or None; ``signs`` are those of the keys."""
    entries = [f"{key}={value[:2000]}" for key, value in metadata.items()]
    scores: dict[str, int] = {"PEFT": 2} if peft_folder else {}
    evidence: dict[str, list[str]] = {"PEFT": ["adapter_config.json"]} if peft_folder else {}
    for sign in SIGNATURES:
        if sign in signs or _matches(sign, entries, layout):
            scores[sign.program] = scores.get(sign.program, 0) + sign.weight
            evidence.setdefault(sign.program, []).append(sign.says)
    if not scores:
        return None
    best = max(scores, key=lambda name: scores[name])
    after = tuple(sign.program for sign in PROCESSORS if _matches(sign, entries, layout))
    return Trainer(best, tuple(evidence[best]), after)


def _matches(sign: Signature, entries: list[str], layout: str) -> bool:
    """Whether the metadata or the layout bears a signature."""
    if sign.where == METADATA:
        return any(re.match(sign.pattern, entry) for entry in entries)
    return sign.where == LAYOUT and re.match(sign.pattern, layout) is not None
