"""The resize library's advice in the words of the command line."""

from __future__ import annotations

from types import MappingProxyType

from lorasurgery.errors import SurgeryError

HINTS = MappingProxyType(
    {
        "a rank, a policy, a size or a recipe": (
            "--rank 16, --policy sv_fro --param 0.9, --size 40MiB, --recipe, or --dry-run for a plan"
        ),
        "as LoRA": "--as lora",
        "as LoRA, or a fixed rank": "--as lora, or --rank alone",
        "min rank 0": "--min-rank 0",
        "no device: the CPU's threads do without torch": "no --device: the CPU's threads do without torch",
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

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, SurgeryError) and error.hint is not None:
            error.hint = HINTS.get(error.hint, error.hint)
