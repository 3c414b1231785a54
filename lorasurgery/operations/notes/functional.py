"""Header keys that change what a program does with a file's tensors; all others are words for people."""

from __future__ import annotations

from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.layouts.numbered import COMPONENTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REFERENCE, VERSION, PREDICTION = "how a reference is scaled", "which models it is shown for", "what the model predicts"
FUNCTIONAL: Mapping[str, str] = MappingProxyType(
    {
        # LTX IC-LoRA. Source: Lightricks ltx-pipelines ``ic_lora.py`` and ComfyUI-LTXVideo's IC-LoRA loader (2026); with
        # ``ss_`` before it, musubi-tuner forks.
        "reference_downscale_factor": REFERENCE,
        "reference_*_scale_factor": REFERENCE,
        "ss_reference_*_factor": REFERENCE,
        # Source: AUTOMATIC1111 ``extensions-builtin/Lora/network.py`` ``NetworkOnDisk.detect_version`` (1.10, 2024), which
        # hides what is for another model; Forge and SD.Next the same.
        "ss_v2": VERSION,
        "ss_base_model_version": VERSION,
        "modelspec.architecture": VERSION,
        # Source: SAI Model Spec 1.0.1; InvokeAI and SD.Next set the scheduler by it.
        "modelspec.prediction_type": PREDICTION,
        "modelspec.predict_key": PREDICTION,
    }
)
"""Key pattern -> what a program decides by it."""
NUMBERS: Mapping[str, str] = MappingProxyType(
    {**dict.fromkeys(COMPONENTS, "which layers the numbers in its keys count"), "<*>": "that a key is a learned token"}
)
"""The same for cloneofsimo/lora's files (:mod:`lorasurgery.layouts.numbered`), whose loader knows no tensor without them."""


def functional(metadata: Mapping[str, str]) -> dict[str, str]:
    """Those of a file."""
    return {key: value for key, value in metadata.items() if effect_of(key) is not None}


def effect_of(key: str) -> str | None:
    """What a program decides by a key; None for words."""
    return next((effect for pattern, effect in (*FUNCTIONAL.items(), *NUMBERS.items()) if fnmatchcase(key, pattern)), None)


def agreed(files: Sequence[tuple[str, Mapping[str, str]]]) -> tuple[dict[str, str], list[str]]:
    """Of (name, metadata): each functional key with the value of the first file that has it, and where others differ."""
    found: dict[str, tuple[str, str]] = {}
    warnings = []
    for name, metadata in files:
        for key, value in functional(metadata).items():
            first, said = found.setdefault(key, (name, value))
            if said != value:
                warnings.append(
                    f"{key} is {said} in {first} and {value} in {name}, and decides {effect_of(key)}: {said} was kept"
                )
    return {key: value for key, (_, value) in found.items()}, warnings
