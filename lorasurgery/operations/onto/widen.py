"""Weights that become wider: a control LoRA's input layer has more columns than the model it was made from.

ComfyUI pads the weight with zeros to the shape that ``reshape_weight`` says before it adds the change (2026-05
``comfy/weight_adapter``, ``pad_tensor_to_shape``); for files in BFL's own layout, which lack the key, it makes one. Diffusers
0.42 does the same where the factors are wider (``FluxLoraLoaderMixin``). Only input channels are added.
"""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING, Any

from lorasurgery.architectures import architectures
from lorasurgery.errors import RequestError
from lorasurgery.layouts.group import group
from lorasurgery.layouts.names import index
from lorasurgery.layouts.widened import wider_table
from lorasurgery.layouts.words import LORA
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture, Shape
    from lorasurgery.io.header import RawFile
    from lorasurgery.operations.onto.plan import Change, Plan
    from lorasurgery.operations.onto.source import Source

RESHAPE = ".reshape_weight"


def widened(raw: RawFile, architecture: Architecture) -> Architecture:
    """The model's table with the input channels that an adapter's LoRA modules have on weights that a variant has wider."""
    known = _known(architecture)
    if not known:
        return architecture
    wider: dict[str, Shape] = {}
    for stem, columns in _downs(raw):
        place = index(architecture).find(stem)
        if place is None or place.site.component != DENOISER or len(place.site.spans) != 1 or len(place.shape) == 1:
            continue
        weight = place.site.spans[0].weight
        channels, left = divmod(columns, prod(place.shape[2:]))
        if left or channels <= place.shape[1] or channels not in known.get(weight, ()):
            continue
        own = architecture.shapes[weight]
        wider[weight] = (own[0], channels, *own[2:])
    return wider_table(architecture, tuple(wider.items())) if wider else architecture


def _known(architecture: Architecture) -> dict[str, set[int]]:
    """Weight -> the input channels that variants of the model have it widened to."""
    found: dict[str, set[int]] = {}
    for other in architectures().values():
        for weight in other.widened if other.id == architecture.id else ():
            found.setdefault(weight, set()).add(other.shapes[weight][1])
    return found


def _downs(raw: RawFile) -> Iterator[tuple[str, int]]:
    """(module, columns of its down factor)."""
    for stem, own in group(raw)[0].items():
        down = own.entries.get((LORA, "down"))
        if down is not None and len(down.tensor.shape) > 1:
            yield stem, prod(down.tensor.shape[1:])


def check_width(plan: Plan, *, undo: bool) -> list[str]:
    """What to tell about weights that are wider now, or stay as wide as they are.

    Raises RequestError when an adapter is taken out of a model that is too narrow to have it in, and for a Diffusers model
    whose configuration has no number for the new width.
    """
    notes = []
    for change in plan.changes.values():
        old, new = change.weight.shape, change.shape
        if old != new and undo:
            raise RequestError(
                f"{change.weight.key} has {old[1]} input channels and the adapter {new[1]}: it is not in this model",
                path=change.weight.file.path, hint="the model that it was applied to",
            )  # fmt: skip
        if old != new:
            config = change.weight.file.path.parent / "config.json"
            if config.is_file() and _fields(config).get("in_channels") not in (None, old[1]):
                raise RequestError(
                    f"{change.weight.key} would have {new[1]} input channels, and nothing in config.json says {old[1]}",
                    path=config, hint="a model in a single file",
                )  # fmt: skip
            notes.append(f"{change.name} is {list(new)} now, it was {list(old)}: the new columns were zero before the change")
        elif undo and any(_was_widened(own.source, own.module) for own in change.placed):
            notes.append(f"{change.name} stays {list(old)}: no file says how wide it was before the adapter")
    return notes


def _was_widened(source: Source, module: Module) -> bool:
    return RESHAPE in module.extras or (
        source.adapter.layout == "bfl" and module.site.spans[0].weight in _known(source.adapter.architecture)
    )


def rewritten(path: Path, changes: Iterable[Change]) -> str | None:
    """The text of a file beside the weights that holds a number of the old width; None where it can be copied.

    ``config.json`` of the folder of a wider weight: ``in_channels``, and ``out_channels`` where it was the same by default.
    An index of shards: ``total_size``.
    """
    wider = [c for c in changes if c.shape != c.weight.shape and c.weight.file.path.parent.resolve() == path.parent.resolve()]
    if not wider or path.suffix != ".json" or not (path.name == "config.json" or ".index." in path.name):
        return None
    fields = _fields(path)
    if path.name == "config.json":
        return _config(fields, wider)
    metadata = fields.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("total_size"), int):
        return None
    metadata["total_size"] += sum(change.nbytes - change.weight.tensor.nbytes for change in wider)
    return json.dumps(fields, indent=2) + "\n"


def _config(fields: dict[str, Any], wider: Sequence[Change]) -> str | None:
    old, new = wider[0].weight.shape[1], wider[0].shape[1]
    if fields.get("in_channels") != old:
        return None
    fields["in_channels"] = new
    if fields.get("out_channels") is None:
        fields["out_channels"] = old
    return json.dumps(fields, indent=2) + "\n"


def _fields(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
