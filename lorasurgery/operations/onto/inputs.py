"""The adapters of one run, read with the model's own table, and the keys that say what of them was not used."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from lorasurgery.architectures.from_base import CUSTOM
from lorasurgery.errors import RequestError, SurgeryError, UnknownArchitectureError
from lorasurgery.files.opened import read_any
from lorasurgery.files.read import parse, parse_for
from lorasurgery.files.taken import Unparsed
from lorasurgery.io.peft_folder import is_peft_folder, whole_folder
from lorasurgery.layouts.group import group
from lorasurgery.layouts.peft_read import read_peft
from lorasurgery.operations.onto.rules import PEFT_PREFIX, Rules
from lorasurgery.operations.onto.source import Source
from lorasurgery.operations.onto.widen import widened

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.scales import PeftConfig
    from lorasurgery.models import Model


def source_of(adapter: Adapter) -> Source:
    """An adapter that was read at weight 1; how its OFT and (IA)^3 modules are meant is read from where it came from."""
    rules = {component: Rules.from_dict(fields) for component, fields in adapter.configs.items()}
    rules = rules or {"": Rules(backwards=adapter.layout != "peft")}
    return Source(adapter, lambda _: 1.0, "1", {}, rules)


ADAPTERS = (
    ".lora_down.weight", ".lora_A.weight", ".hada_w1_a", ".lokr_w1", ".lokr_w1_a", ".oft_blocks", ".oft_R.weight", ".boft_R",
    ".ia3_l", ".on_input", ".miss_block", ".bone_block",
)  # fmt: skip
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
    path: Path, architecture: Architecture, strength: Callable[[Module], float] | float = 1.0, text: str = "",
    *, alpha: float | None = None,
) -> Source:  # fmt: skip
    """An adapter whose modules are the model's, at a strength, or one for each module.

    For a text encoder alone (an ``architecture`` of no other weights) it may be of any model that has the encoder.
    ``path``: a file, or PEFT's folder; its weights alone stand for the folder. ``alpha``: what it was trained at, where
    nothing in it says so.
    Raises what :func:`lorasurgery.load` raises; UnknownArchitectureError when it is for another model.
    """
    scales, rules, path = None, {}, whole_folder(path)
    if path.is_dir() and is_peft_folder(path):
        raw, scales = read_peft(path)
        _refuse_turned(scales, architecture, path)
        rules = {component: Rules.from_dict(config.fields) for component, config in scales.items()}
    else:
        raw = read_any(path)
        rules = {"": Rules(backwards=not any(key.startswith(PEFT_PREFIX) for key in raw.tensors))}
    try:
        adapter = _parsed(Unparsed(raw, scales, alpha), architecture)
    except UnknownArchitectureError as error:
        raise UnknownArchitectureError(
            _whose(raw, scales, architecture, error), path=path, candidates=error.candidates,
            hint="the model it was trained on (lorasurgery inspect shows which), or --arch if the model is taken for another",
        ) from error  # fmt: skip
    groups, others = group(raw)
    keys = {stem: [entry.key for entry in own.entries.values()] for stem, own in groups.items()} | {
        key: [key] for key in others
    }
    if callable(strength):
        return Source(adapter, strength, text or "by block", keys, rules)
    value = strength
    return Source(adapter, lambda _: value, text or f"{value:g}", keys, rules)


def _parsed(file: Unparsed, architecture: Architecture) -> Adapter:
    """The adapter under the model's table; for a text encoder alone under that of its own model, if any is known."""
    if not architecture.rows:
        with suppress(UnknownArchitectureError):
            return parse(file.raw, configs=file.configs, alpha=file.alpha)
    return parse_for(file.raw, widened(file.raw, architecture), configs=file.configs, alpha=file.alpha)


def _refuse_turned(configs: Mapping[str, PeftConfig], architecture: Architecture, path: Path) -> None:
    """Raises RequestError for layers that store their weights as (in, out), as GPT-2's Conv1D does.

    The models that have a table here have none, and PEFT does not heed the field there.
    """
    if architecture.id == CUSTOM and any(config.fields.get("fan_in_fan_out") is True for config in configs.values()):
        raise RequestError(
            "adapter_config.json has fan_in_fan_out: true: the model's layers hold their weights turned over, which a product"
            " of this adapter is not", path=path, hint="merge_and_unload() of PEFT",
        )  # fmt: skip


def _whose(raw: RawFile, scales: Mapping[str, PeftConfig] | None, model: Architecture, error: UnknownArchitectureError) -> str:
    """What model a file is for that has no module of this one."""
    try:
        other = parse(raw, configs=scales).architecture
    except SurgeryError:
        return f"it is for another model than {model.name}: {error.message}"
    return f"it is for {other.name}, and the model is {model.name}"
