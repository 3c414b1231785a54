"""A file's metadata with types, and what it says about the training.

Keys and types: sd-scripts and musubi-tuner ``ss_*`` and ``modelspec.*``, ai-toolkit (``software``, ``training_info``),
OneTrainer (``ot_config``), SimpleTuner and LyCORIS (``lycoris_config``), Diffusers (``lora_adapter_metadata``); all 2026.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_INTEGER = re.compile(r"[+-]?\d{1,100}")
_NUMBER = re.compile(r"[+-]?(\d+\.\d*([eE][+-]?\d+)?|\.\d+|\d+[eE][+-]?\d+)")
_TEXTS = ("ss_output_name", "ss_training_comment", "ss_sd_model_name", "ss_vae_name", "name", "version", "format")
"""Names and comments stay text whatever they look like; so does every hash and every ``modelspec.`` field."""
DEEPEST, LONGEST = 64, 20_000_000


def unfolded(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Key -> ``{"type": ..., "value": ...}``; types: ``null bool int float string json``.

    ``lorasurgery`` never guesses beyond what Python's ``str`` and ``json.dumps`` write, so nothing is reinterpreted.
    """
    return {key: _typed(key, text) for key, text in metadata.items()}


def _typed(key: str, text: str) -> dict[str, Any]:
    if key in _TEXTS or "hash" in key or key.startswith("modelspec."):
        return {"type": "string", "value": text}
    plain: dict[str, Any] = {"None": None, "null": None, "True": True, "False": False, "true": True, "false": False}
    if text in plain:
        return {"type": "null" if plain[text] is None else "bool", "value": plain[text]}
    if _INTEGER.fullmatch(text):
        return {"type": "int", "value": int(text)}
    if _NUMBER.fullmatch(text) and abs(float(text)) < float("inf"):
        return {"type": "float", "value": float(text)}
    if text[:1] in ("{", "[") and len(text) <= LONGEST:
        try:
            value = json.loads(text, parse_constant=str)
        except (ValueError, RecursionError):
            pass
        else:
            if _depth(value) <= DEEPEST:
                return {"type": "json", "value": value}
    return {"type": "string", "value": text}


def _depth(value: Any) -> int:  # noqa: ANN401  any JSON
    """Levels of nesting, without recursion."""
    level, depth = [value], 0
    while level and depth <= DEEPEST + 1:
        level = [child for node in level if isinstance(node, dict | list)
                 for child in (node.values() if isinstance(node, dict) else node)]  # fmt: skip
        depth += 1
    return depth


_PLAIN = {
    "base_model": ("ss_base_model_version", "modelspec.architecture", "base_model"),
    "base_file": ("ss_sd_model_name",),
    "base_hash": ("ss_new_sd_model_hash", "ss_sd_model_hash", "ss_base_sha256"),
    "network_module": ("ss_network_module",),
    "network_dim": ("ss_network_dim",),
    "network_alpha": ("ss_network_alpha",),
    "network_dropout": ("ss_network_dropout",),
    "network_args": ("ss_network_args", "lycoris_config"),
    "steps": ("ss_steps",),
    "max_steps": ("ss_max_train_steps",),
    "epoch": ("ss_epoch",),
    "epochs": ("ss_num_epochs",),
    "images": ("ss_num_train_images", "ss_num_train_items"),
    "regularisation_images": ("ss_num_reg_images",),
    "batch_size": ("ss_total_batch_size", "ss_batch_size_per_device"),
    "gradient_accumulation": ("ss_gradient_accumulation_steps",),
    "optimizer": ("ss_optimizer",),
    "learning_rate": ("ss_learning_rate",),
    "unet_lr": ("ss_unet_lr",),
    "text_encoder_lr": ("ss_text_encoder_lr",),
    "scheduler": ("ss_lr_scheduler",),
    "warmup_steps": ("ss_lr_warmup_steps",),
    "resolution": ("ss_resolution", "modelspec.resolution"),
    "precision": ("ss_mixed_precision",),
    "clip_skip": ("ss_clip_skip",),
    "noise_offset": ("ss_noise_offset",),
    "min_snr_gamma": ("ss_min_snr_gamma",),
    "timestep_sampling": ("ss_timestep_sampling",),
    "flow_shift": ("ss_discrete_flow_shift",),
    "seed": ("ss_seed",),
    "comment": ("ss_training_comment",),
    "software": ("software", "modelspec.implementation_version"),
    "title": ("modelspec.title", "name"),
    "author": ("modelspec.author",),
    "license": ("modelspec.license",),
    "date": ("modelspec.date",),
}
"""Field of the summary -> metadata keys, the first that says something counts."""

_ONETRAINER = {
    "base_file": "base_model_name", "base_model": "model_type", "epochs": "epochs", "batch_size": "batch_size",
    "learning_rate": "learning_rate", "scheduler": "learning_rate_scheduler", "resolution": "resolution",
    "network_dim": "lora_rank", "network_alpha": "lora_alpha", "precision": "train_dtype",
}  # fmt: skip


def training_summary(typed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a person wants to know first; only the fields that are said."""
    found: dict[str, Any] = {}
    for name, keys in _PLAIN.items():
        said = (typed[key]["value"] for key in keys if key in typed)
        value = next((v for v in said if v not in (None, "", "None", {}, [])), None)
        if value is not None:
            found[name] = value
    _other_programs(typed, found)
    times = [_value(typed, key) for key in ("ss_training_started_at", "ss_training_finished_at")]
    if all(isinstance(t, int | float) and 0 < t < 1e11 for t in times):
        found["started"] = datetime.fromtimestamp(times[0], timezone.utc).isoformat(timespec="seconds")
        found["seconds"] = round(max(times[1] - times[0], 0.0))
    datasets = _datasets(typed)
    if datasets:
        found["datasets"] = datasets
    buckets = _buckets(typed)
    if buckets:
        found["buckets"] = buckets
    return found


def _other_programs(typed: Mapping[str, Mapping[str, Any]], found: dict[str, Any]) -> None:
    """ai-toolkit's and OneTrainer's JSON."""
    software, info, config = (_value(typed, key) for key in ("software", "training_info", "ot_config"))
    if isinstance(software, dict):
        found["software"] = " ".join(str(software[k]) for k in ("name", "version") if k in software)
    if isinstance(info, dict):
        found |= {to: info[key] for to, key in (("steps", "step"), ("epoch", "epoch")) if key in info}
    if isinstance(config, dict):
        found |= {to: config[key] for to, key in _ONETRAINER.items() if config.get(key) is not None and to not in found}
        optimizer = config.get("optimizer")
        if isinstance(optimizer, dict) and "optimizer" in optimizer:
            found["optimizer"] = optimizer["optimizer"]


def _value(typed: Mapping[str, Mapping[str, Any]], key: str) -> Any:  # noqa: ANN401  any JSON
    return typed[key]["value"] if key in typed else None


def _datasets(typed: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Folders with image counts and repeats, from ``ss_dataset_dirs`` or the subsets of ``ss_datasets``."""
    found = []
    folders = _value(typed, "ss_dataset_dirs")
    for name, info in folders.items() if isinstance(folders, dict) else ():
        if isinstance(info, dict):
            found.append({"name": name, "images": info.get("img_count"), "repeats": info.get("n_repeats")})
    datasets = _value(typed, "ss_datasets")
    for dataset in datasets if isinstance(datasets, list) and not found else ():
        own = dataset if isinstance(dataset, dict) else {}
        parts = own.get("subsets")
        for part in parts if isinstance(parts, list) else [own]:
            if isinstance(part, dict):
                names = ("image_dir", "metadata_file", "image_directory", "video_directory", "image_jsonl_file")
                name = next((str(part[n]) for n in names if part.get(n)), "")
                entry = {"name": name, "images": part.get("img_count"), "repeats": part.get("num_repeats")}
                found.append(entry | {"resolution": own.get("resolution")})
    return found


def _buckets(typed: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Resolution -> number of images."""
    info = _value(typed, "ss_bucket_info")
    buckets = info.get("buckets") if isinstance(info, dict) else None
    found = {}
    for bucket in buckets.values() if isinstance(buckets, dict) else ():
        size = bucket.get("resolution") if isinstance(bucket, dict) else None
        if isinstance(size, list) and isinstance(bucket.get("count"), int):
            found["x".join(map(str, size))] = bucket["count"]
    return found


def tag_counts(typed: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Every training tag with its count over all datasets, the most frequent first."""
    counts: Counter[str] = Counter()
    folders = [_value(typed, "ss_tag_frequency")]
    datasets = _value(typed, "ss_datasets")
    if not folders[0] and isinstance(datasets, list):
        folders = [dataset.get("tag_frequency") for dataset in datasets if isinstance(dataset, dict)]
    for folder in folders:
        for tags in folder.values() if isinstance(folder, dict) else ():
            for tag, count in tags.items() if isinstance(tags, dict) else ():
                if isinstance(count, int):
                    counts[tag.strip()] += count
    return counts.most_common()


def trigger_words(typed: Mapping[str, Mapping[str, Any]], tags: list[tuple[str, int]], top: int = 12) -> dict[str, Any]:
    """The phrase the author gives, the output's name, and the tags that occur most often."""
    found: dict[str, Any] = {}
    for name, key in (("phrase", "modelspec.trigger_phrase"), ("output_name", "ss_output_name")):
        value = _value(typed, key)
        if value not in (None, "", "None"):
            found[name] = str(value)
    if tags:
        found["tags"] = [{"tag": tag, "count": count} for tag, count in tags[:top]]
    return found
