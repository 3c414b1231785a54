"""Tensors that belong to a module although their keys do not say so in the way of all others."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import flat
from lorasurgery.io.tensors import computed
from lorasurgery.layouts.entry import Entry, Group
from lorasurgery.layouts.words import ALPHA, LORA, MAGNITUDE, SET, Word

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.tensors import Float64, Tensor

WEIGHT = ".weight"


def adopt(groups: dict[str, Group], others: dict[str, Tensor], inside: Mapping[str, str]) -> None:
    """Give every such tensor of ``groups`` and ``others`` to its module, in place.

    ``inside``: name as spelled -> name without what stands around it.
    """
    _strengths(groups)
    _vectors(groups, others)
    _magnitudes(groups)
    _norms(groups, others, inside)


def _strengths(groups: Mapping[str, Group]) -> None:
    """LongCat-Video keeps alpha / rank; every other file alpha, which is exact in float64.

    Source: ``longcat_video/modules/lora_utils.py`` (``alpha_scale``).
    """
    for own in groups.values():
        entry, down = own.entries.get((ALPHA, "scale")), own.entries.get((LORA, "down"))
        if entry is None or down is None or entry.tensor.size != 1 or (ALPHA, "alpha") in own.entries:
            continue
        alpha = computed("F64", (), partial(_times, entry.tensor, down.tensor.shape[0]))
        del own.entries[ALPHA, "scale"]
        own.entries[ALPHA, "alpha"] = entry._replace(tensor=alpha, stored=entry.tensor)


def _times(scale: Tensor, rank: int) -> Float64:
    product: Float64 = scale.f64().reshape(()) * rank
    return product


def _vectors(groups: Mapping[str, Group], others: dict[str, Tensor]) -> None:
    """LyCORIS' (IA)^3 calls its vector plain ``weight``; it is one only beside ``on_input``."""
    for own in groups.values():
        key = own.spelled + WEIGHT
        if ("ia3", "on_input") in own.entries and key in others:
            entry = own.entries["ia3", "on_input"]
            own.entries["ia3", "weight"] = entry._replace(
                key=key, word=Word("ia3", "weight", "kohya"), tensor=others.pop(key), suffix=WEIGHT
            )


def _magnitudes(groups: dict[str, Group]) -> None:
    """A DoRA magnitude whose name keeps dots that its factors' name has as underscores.

    Source: Diffusers ``utils/state_dict_utils.py`` (``convert_state_dict_to_kohya``), which renames the factors only.
    """
    alone = [stem for stem, own in groups.items() if {family for family, _ in own.entries} == {MAGNITUDE} and "." in stem]
    if not alone:
        return
    whole: dict[str, list[Group]] = {}
    for own in groups.values():
        if own.families():
            whole.setdefault(flat(own.stem), []).append(own)
    for stem in alone:
        its = whole.get(flat(stem), [])
        if len(its) == 1 and (MAGNITUDE, "magnitude") not in its[0].entries:
            its[0].entries.update(groups.pop(stem).entries)


def _norms(groups: dict[str, Group], others: dict[str, Tensor], inside: Mapping[str, str]) -> None:
    """A whole norm beside LoRA modules, under its own name, is what replaces the model's.

    Source: Diffusers ``FluxLoraLoaderMixin`` (``_control_lora_supported_norm_keys``).
    """
    modules = sum((LORA, "down") in own.entries for own in groups.values())
    norms = [key for key, tensor in others.items() if is_norm(key.removesuffix(WEIGHT)) and len(tensor.shape) == 1
             and key.endswith(WEIGHT)]  # fmt: skip
    if not modules or len(norms) > len(groups):  # a model's own weights
        return
    for key in norms:
        spelled = key.removesuffix(WEIGHT)
        stem = _named_inside(spelled, inside)
        if stem not in groups:
            groups[stem] = _new(stem, spelled, key, others.pop(key))


def is_norm(name: str) -> bool:
    """Whether a module's name is a norm's (``norm_q``, ``query_norm``, ``layer_norm1``)."""
    return "norm" in name.rpartition(".")[2]


def _named_inside(spelled: str, inside: Mapping[str, str]) -> str:
    """The name inside of a module that only stands in ``others``: as much is taken away as from the modules there."""
    for outer, inner in inside.items():
        if outer.endswith(inner) and spelled.startswith(wrapper := outer.removesuffix(inner)):
            return spelled.removeprefix(wrapper)
    return spelled


def _new(stem: str, spelled: str, key: str, tensor: Tensor) -> Group:
    return Group(stem, spelled, {(SET, "set_weight"): Entry(key, Word(SET, "set_weight", "diffusers"), tensor, WEIGHT)})
