"""The adapters of one run, read with the model's own table, and the keys that say what of them was not used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.api import read_any
from lorasurgery.errors import NotRepresentableError, RequestError, UnknownArchitectureError
from lorasurgery.io.peft_folder import is_peft_folder, read_peft_folder
from lorasurgery.layouts.parse import FLAGS, parse
from lorasurgery.layouts.scales import PeftConfig
from lorasurgery.layouts.words import split_key
from lorasurgery.metadata import FACTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.models import Model

SCALED_OFT = ".scaled_oft"
"""Marks an OFT whose rotations OneTrainer (2026-08) divides by a number of its own."""
TOP_LEVEL = (FACTOR, *FLAGS)
"""Keys that say how a file was trained and stand for no weight."""


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter and what each of its modules is multiplied by."""

    adapter: Adapter
    strength: Callable[[Module], float]
    text: str
    """The weight as it was asked for."""
    keys: Mapping[str, Sequence[str]]
    """Module name -> the file's keys of it."""
    neumann: bool = True
    """Whether a PEFT OFT's rotations are the five terms of a series, PEFT's default, or Cayley's transform."""

    @property
    def path(self) -> str:
        """The file's path."""
        return str(self.adapter.path or "")

    def unexplained(self) -> list[tuple[str, str]]:
        """(key, reason) of what no table explains."""
        return [(left.key, left.reason) for left in self.adapter.leftovers if left.key not in TOP_LEVEL]


ADAPTERS = (".lora_down.weight", ".lora_A.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".oft_blocks", ".oft_R.weight")
"""Ends of keys that no model has."""


def check_model(model: Model) -> None:
    """Raises RequestError for an adapter in the model's place."""
    for file in model.files:
        key = next((key for key in file.raw.tensors if key.endswith(ADAPTERS)), None)
        if key is not None:
            raise RequestError(
                f"this is an adapter, not a model ({key})", path=file.path, hint="the model first, the adapters after it"
            )


def read_source(
    path: Path, architecture: Architecture, strength: Callable[[Module], float] | float = 1.0, text: str = ""
) -> Source:
    """An adapter whose modules are the model's, at a strength, or one for each module.

    Raises what :func:`lorasurgery.load` raises; UnknownArchitectureError when it is for another model, and
    NotRepresentableError for a kind of OFT whose meaning is not sure.
    """
    rules, neumann = None, True
    if path.is_dir() and is_peft_folder(path):
        raw, configs = read_peft_folder(path)
        rules = {component: PeftConfig.from_dict(fields, "adapter_config.json") for component, fields in configs.items()}
        neumann = all(fields.get("use_cayley_neumann", True) for fields in configs.values())
    else:
        raw = read_any(path)
    scaled = next((key for key in raw.tensors if key.endswith(SCALED_OFT)), None)
    if scaled is not None:
        raise NotRepresentableError(
            f"{scaled}: OneTrainer's scaled OFT is not applied", module=scaled, path=path, hint="loading it beside the model"
        )
    try:
        adapter = parse(raw, among=(architecture,), configs=rules)
    except UnknownArchitectureError as error:
        raise UnknownArchitectureError(
            f"it is for another model than {architecture.name}: {error.message}", path=path, candidates=error.candidates,
            hint="the model it was trained on (lorasurgery inspect shows which), or --arch if the model is taken for another",
        ) from error  # fmt: skip
    keys: dict[str, list[str]] = {}
    for key in raw.tensors:
        split = split_key(key)
        keys.setdefault(key if split is None else split.stem, []).append(key)
    if callable(strength):
        return Source(adapter, strength, text or "by block", keys, neumann)
    value = strength
    return Source(adapter, lambda _: value, text or f"{value:g}", keys, neumann)
