"""The resize library's advice in the words of the command line."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.errors import SurgeryError

if TYPE_CHECKING:
    from collections.abc import Mapping

HINTS = MappingProxyType(
    {
        "a parameter": "--param X",
        "a rank, a policy, a size or a recipe": (
            "--rank 16, --policy sv_fro --param 0.9, --size 40MiB, --recipe, or --dry-run for a plan"
        ),
        "a fixed rank": "--rank N alone; --dry-run shows the size",
        "as LoRA": "--as lora",
        "as LoRA, or a fixed rank": "--as lora, or --rank alone",
        "no device: the CPU's threads do without torch": "no --device: the CPU's threads do without torch",
        "extracting a LoRA from the model with it applied": (
            "lorasurgery apply MODEL FILE -o TUNED, then lorasurgery extract MODEL TUNED OUT --rank N: what it does as a LoRA"
        ),
        "pip install torch, or no device": "pip install torch, or no --device",
        "the base model with dora recompute or fold, or exclude these modules": (
            "--base MODEL with --dora recompute or --dora fold, or --exclude for these modules"
        ),
        "the base model's file or folder": "--base MODEL, a file or a pipeline's folder",
        "text encoders, full differences, or other patterns": (
            "--te for text encoders, --full for full differences, or other patterns"
        ),
    }
)
"""Hint of the library -> hint with the options' names."""


class Advice:
    """A context whose errors say what to try in the words of the command line."""

    def __init__(self, hints: Mapping[str, str] = HINTS) -> None:
        self._hints = hints

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, SurgeryError) and error.hint is not None:
            error.hint = re.sub(r"\bmin rank (\d)", r"--min-rank \1", self._hints.get(error.hint, error.hint))
