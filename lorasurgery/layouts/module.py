"""One module from its tensors: scale, magnitude and bias, checked against the base weight."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from lorasurgery.adapter import Composed, LayerBias, Magnitude, Module, Scale
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.miss import Miss
from lorasurgery.deltas.rounding import multiplied, rounded
from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.dtypes import wide
from lorasurgery.layouts.detect import fits
from lorasurgery.layouts.peft_keys import Turned
from lorasurgery.layouts.scales import ScaleRules
from lorasurgery.layouts.words import ALPHA, BIAS, EXTRA, LORA, MAGNITUDE, OPAQUE_FAMILIES, SET

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.group import Entry, Group
    from lorasurgery.layouts.names import Found
    from lorasurgery.layouts.scales import PeftConfig

ORIGINAL_FILE = "the file as its trainer wrote it, or without this key"
OTHER_BASE = "--base MODEL if the base was changed, or --arch NAME"
LARGEST_SCALE = 1e30
"""Nothing that was trained has such a strength, and float32 could not hold alpha = scale * rank."""
FACTOR = "lokr_factor"
FLAGS = ("use_rslora_flag", "use_dora_flag")
"""Top-level booleans of the musubi-tuner fork; they are read, and written only in sd-scripts layout."""
TOP_LEVEL = (FACTOR, *FLAGS)
"""Keys that say how a file was trained and stand for no weight."""
_NO_SCALE = Scale(1.0, "none (1.0)")


def scale_rules(raw: RawFile, configs: Mapping[str, PeftConfig], alpha: float | None = None) -> ScaleRules:
    """What the file says about scales, beside the alpha tensors; ``configs`` by component.

    ``alpha``: what the user says it was trained at, for modules of which nothing in the file says it.
    """
    rslora = raw.tensors.get(FLAGS[0])
    return ScaleRules(
        configs,
        rslora_flag=rslora is not None and bool(rslora.item()),
        whole_lokr_by_shape=FACTOR in raw.tensors,
        trained_alpha=alpha,
    )


def module_of(own: Group, delta: Delta | None, place: Found, arch: Architecture, rules: ScaleRules, path: Path) -> Module:
    """One module, put together from its tensors and its delta (None: only a bias).

    Raises BrokenModuleError when they do not fit together, or do not fit the base weight.
    """
    if isinstance(delta, Miss):
        try:
            delta = delta.over(place.shape)
        except CannotError as reason:
            raise _misfit(f"{own.stem}: {reason.message}", own, path) from reason
    scale = _scale(own, delta, rules, path)
    bias, extra = own.modifier(BIAS), own.modifier(EXTRA)
    read = None if bias is None else _bias(bias, scale)
    module = Module(
        place.site,
        own.spelled,
        delta,
        scale,
        _magnitude(own, delta, place.shape[0], path),
        read,
        {} if extra is None else {extra.suffix: extra.tensor},
        keys_of(own),
        LayerBias(bias.tensor, read, scale.value) if bias is not None and read is not None and is_layer(bias.key) else None,
        _composed(own, delta),
        "" if own.stem == own.spelled else own.stem,
    )
    expected = place.shape
    if delta is not None and not fits(delta.shape, expected):
        turned = ", which is turned over (PEFT's fan_in_fan_out: true)" if delta.shape == expected[::-1] else ""
        raise _misfit(f"{own.stem} is {list(delta.shape)}, {arch.name} expects {list(expected)}{turned}", own, path)
    if bias is not None and bias.tensor.size != expected[0]:
        text = f"the bias of {own.stem} has {bias.tensor.size} elements, {arch.name} expects {expected[0]}"
        raise _misfit(text, own, path)
    return module


def keys_of(own: Group) -> dict[str, str]:
    """Slot of the module -> key as the file spells it; see :attr:`Module.keys`."""
    found = {}
    for (family, slot), entry in own.entries.items():
        if family in (ALPHA, MAGNITUDE, BIAS):
            found[family] = entry.key
        elif family in (SET, EXTRA):
            found[entry.suffix] = entry.key
        else:
            found[f".{slot}" if family in OPAQUE_FAMILIES else slot] = entry.key
    return found


def _composed(own: Group, delta: Delta | None) -> Composed | None:
    """What the file has in place of factors and alpha, where its words are not theirs."""
    if not own.composed or delta is None:
        return None
    factors = {e.key: e.tensor for (family, _), e in own.entries.items() if family not in (ALPHA, MAGNITUDE, BIAS, EXTRA)}
    alpha = own.modifier(ALPHA)
    strength = None if alpha is None or alpha.stored is None else (alpha.key, alpha.stored)
    return Composed(delta, factors, strength)


def is_layer(key: str) -> bool:
    """Whether a bias is that of a layer, which readers scale like its weight: ``lora_B.bias``, ``lora_up.bias``."""
    return key.endswith(".bias")


def _misfit(message: str, own: Group, path: Path) -> BrokenModuleError:
    return BrokenModuleError(message, key=own.key(), path=path, hint=OTHER_BASE)


def _scale(own: Group, delta: Delta | None, rules: ScaleRules, path: Path) -> Scale:
    """What the delta is multiplied by; raises BrokenModuleError when that is no number."""
    alpha = own.modifier(ALPHA)
    if alpha is None:
        scale, value = _NO_SCALE if delta is None else rules.resolve(own.stem, delta, None), 0.0
    elif alpha.tensor.size != 1:
        raise BrokenModuleError(
            f"{alpha.key} has shape {list(alpha.tensor.shape)}, an alpha is one number",
            key=alpha.key,
            path=path,
            hint=ORIGINAL_FILE,
        )
    else:
        scale = _NO_SCALE if delta is None else rules.resolve(own.stem, delta, alpha.tensor)
        ignored = isinstance(delta, Kronecker) and delta.rank is None  # ai-toolkit's 1e10, inf in half precision
        value = 0.0 if ignored else alpha.tensor.item()
    if not abs(scale.value) < LARGEST_SCALE or not isfinite(value):
        strength = f"a scale of {scale.value}" if alpha is None else f"an alpha of {alpha.tensor.item()}"
        key = own.key() if alpha is None else alpha.key
        raise BrokenModuleError(
            f"{key} gives {strength}, which is no number to multiply by",
            key=key,
            path=path,
            hint="the original file; the strength cannot be recovered from this one",
        )
    return scale


def _bias(entry: Entry, scale: Scale) -> Tensor:
    """What is added to the base bias. ``lora_B`` and ``lora_up`` are layers: theirs is scaled like their weight.

    In float32: in 16 bits the product may be a number that rounding changes, and there is no report here to tell of it.
    """
    if not is_layer(entry.key) or scale.value == 1.0:
        return entry.tensor
    exact = entry.tensor if wide(entry.tensor.dtype) == "float64" else rounded(entry.tensor, "F32")
    return multiplied(exact, scale.value)


def is_turned(own: Group) -> bool:
    """Whether its factors are those that PEFT has for an embedding, which are the other way round."""
    up = own.entries.get((LORA, "up"))
    return up is not None and isinstance(up.tensor, Turned)


def _magnitude(own: Group, delta: Delta | None, out: int, path: Path) -> Magnitude | None:
    """The DoRA magnitude with its axis, from its shape; PEFT's and ai-toolkit's are always per output row."""
    entry = own.modifier(MAGNITUDE)
    if entry is None:
        return None
    tensor = entry.tensor
    if entry.key.endswith(".lora_magnitude_vector") and is_turned(own):
        axis = "in"  # a number for each of an embedding's dimensions
    elif entry.word.dialect in ("peft", "ai-toolkit") or entry.key.endswith(".dora_layer.weight"):
        axis = "out" if tensor.size == out else ""
    elif len(tensor.shape) > 1 and tensor.shape[0] == tensor.size == out:
        axis = "out"
    elif len(tensor.shape) > 1 and tensor.shape[0] == 1:
        axis = "in"
    else:
        axis = "out" if tensor.size == out else "in"
    columns = delta.shape[1] if delta is not None and len(delta.shape) > 1 else tensor.size
    if not axis or not tensor.size or (axis == "in" and columns % tensor.size):
        raise BrokenModuleError(
            f"{entry.key} has shape {list(tensor.shape)}, which fits neither {out} rows nor {columns} columns",
            key=entry.key,
            path=path,
            hint=ORIGINAL_FILE,
        )
    return Magnitude(tensor, axis)
