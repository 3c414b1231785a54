"""PEFT's types: which of them are read here, and what the others are.

``adapter_config.json`` names the type; its keys alone often do not (AdaLoRA's look like LoRA's). Source: PEFT 0.21
``utils/peft_types.py`` and the layers of each tuner.
"""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import NotAnAdapterError
from lorasurgery.layouts.peft_keys import BIAS, ROWS, role_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from lorasurgery.deltas.delta import Delta

LORA, LOHA, LOKR, MISS, OFT, BOFT, IA3 = "LORA", "LOHA", "LOKR", "MISS", "OFT", "BOFT", "IA3"
READ = (LORA, LOHA, LOKR, MISS, OFT, BOFT, IA3)
_OLD_NAMES = MappingProxyType({"": LORA, "BONE": MISS})
"""MiSS was called Bone until PEFT 0.17; a configuration without a type is one of the first LoRAs'."""

ONLY_PEFT = frozenset({".boft_R", ".boft_s", ".ia3_l", ".oft_r", ".oft_s", ".miss_block", ".bone_block"})
"""Slots of families that multiply the base, which no other program reads: LyCORIS' and sd-scripts' OFT and BOFT turn rows
where PEFT's turn columns, LyCORIS' (IA)^3 adds to 1 and leaves the bias."""
SHARED_OFT = ".oft_R.weight"
"""PEFT's OFT since 0.16. OneTrainer spells its own so too, which has no configuration."""

_RANDOM = "its change depends on {} that the file need not hold"
_PROMPT = "it prepends trained inputs and changes no weight"
_GATED = "how much it changes depends on the input"
_OTHER = "what it makes of a weight is not known here"
_SPLIT = "its strength is divided by a count of ranks that is no part of the file"


class Other(NamedTuple):
    """A type that is not read: what its authors call it, why, and whether PEFT can merge it into a model."""

    name: str
    reason: str
    merges: bool = True


OTHERS = MappingProxyType(
    {
        "ADALORA": Other("AdaLoRA", _SPLIT),
        "ADAMSS": Other("AdaMSS", _OTHER),
        "ADAPTION_PROMPT": Other("adaption prompt (LLaMA-Adapter)", _PROMPT, merges=False),
        "BEFT": Other("BEFT", "it trains biases only"),
        "C3A": Other("C3A", _OTHER),
        "CARTRIDGE": Other("Cartridge", _PROMPT, merges=False),
        "CPT": Other("CPT", _PROMPT, merges=False),
        "DEFT": Other("DEFT", _OTHER),
        "DELORA": Other("DeLoRA", "its factors are divided by their own norms"),
        "FOURIERFT": Other("FourierFT", _RANDOM.format("random frequencies")),
        "FROD": Other("FRoD", _RANDOM.format("bases of all layers")),
        "GLORA": Other("GLoRA", _OTHER),
        "GRALORA": Other("GraLoRA", _OTHER),
        "HIRA": Other("HiRA", "its factors multiply the base weight element by element"),
        "HRA": Other("HRA", "its reflections multiply the base weight, and how is not known here"),
        "LILY": Other("Lily", _GATED, merges=False),
        "LN_TUNING": Other("LN tuning", "it is the whole norms of a model"),
        "MULTITASK_PROMPT_TUNING": Other("multitask prompt tuning", _PROMPT, merges=False),
        "OSF": Other("OSF", "it is whole weights, decomposed"),
        "PEANUT": Other("PEANuT", "it is a small network of the base weight"),
        "POLY": Other("Poly", _GATED, merges=False),
        "PREFIX_TUNING": Other("prefix tuning", _PROMPT, merges=False),
        "PROMPT_TUNING": Other("prompt tuning", _PROMPT, merges=False),
        "PSOFT": Other("PSOFT", "it turns the principal directions of the base weight"),
        "PVERA": Other("PVeRA", _RANDOM.format("shared random matrices")),
        "P_TUNING": Other("P-tuning", _PROMPT, merges=False),
        "RANDLORA": Other("RandLoRA", _RANDOM.format("random bases")),
        "ROAD": Other("RoAd", "it turns outputs, biases included"),
        "SHADOW": Other("Shadow", _GATED, merges=False),
        "SHIRA": Other("SHiRA", _RANDOM.format("random places")),
        "SUPERTUNING": Other("SuperTuning", _OTHER),
        "TINYLORA": Other("TinyLoRA", _RANDOM.format("random projections and the base weight")),
        "TRAINABLE_TOKENS": Other("trainable tokens", "it is rows of an embedding, which replace the base's"),
        "UNILORA": Other("Uni-LoRA", _RANDOM.format("a random projection")),
        "VBLORA": Other("VB-LoRA", _RANDOM.format("a bank of vectors")),
        "VERA": Other("VeRA", _RANDOM.format("shared random matrices")),
        "WAVEFT": Other("WaveFT", _RANDOM.format("random places of wavelet coefficients")),
        "XLORA": Other("X-LoRA", _GATED, merges=False),
    }
)
"""Every type of PEFT 0.21 that is not in :data:`READ`."""

_KINDS = MappingProxyType({kind.lower(): kind for kind in OTHERS})
_PARAMETER = re.compile(rf"\.({'|'.join(_KINDS)})_\w+(?:\.\w+)?$")
"""The end of a key whose parameter begins with a type's name."""

MERGED = "merge_and_unload() of PEFT, and lorasurgery extract for an adapter of the difference"
PEFT_ALONE = "PEFT, which is the only program that runs it"


def type_of(fields: Mapping[str, Any]) -> str:
    """The type that a configuration names, in today's spelling."""
    kind = str(fields.get("peft_type") or "").rpartition(".")[2].upper()
    return _OLD_NAMES.get(kind, kind)


def refuse_other_types(fields: Mapping[str, Any], path: object = None) -> None:
    """Raises NotAnAdapterError, with the type's name, for a configuration of a type that is not read."""
    if type_of(fields) not in READ:
        raise _refusal(type_of(fields), path)


def refuse_other_keys(keys: Iterable[str], path: object = None) -> None:
    """Raises NotAnAdapterError for the weights of such a type alone: its parameters are named by it (``vera_lambda_d``)."""
    found = next((match for key in keys if (match := _PARAMETER.search(key))), None)
    if found is not None:
        raise _refusal(_KINDS[found[1]], path)


def _refusal(kind: str, path: object) -> NotAnAdapterError:
    other = OTHERS.get(kind, Other(kind.lower(), _OTHER))
    return NotAnAdapterError(
        f"this is an adapter of another kind, {other.name} ({kind} of PEFT): {other.reason}",
        path=None if path is None else str(path),
        hint=MERGED if other.merges else PEFT_ALONE,
    )


def is_pefts(delta: Delta | None, configs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether PEFT alone reads a module, under any name: its own OFT, BOFT, (IA)^3, MiSS' ``bat``.

    ``configs``: the file's configurations, which tell PEFT's OFT from OneTrainer's.
    """
    slots = () if delta is None else delta.tensors
    if SHARED_OFT in slots:
        return any(type_of(fields) == OFT for fields in configs.values())
    return not ONLY_PEFT.isdisjoint(slots)


def is_saved(delta: Delta | None) -> bool:
    """Whether a module is one that PEFT saved whole (``modules_to_save``), which it takes back beside any type."""
    return delta is not None and delta.family == "set" and any(role_of(slot) is not None for slot in delta.tensors)


def is_parameter(delta: Delta | None) -> bool:
    """Whether a module is a whole bias or whole rows of an embedding that PEFT saved, which no other program reads.

    ComfyUI's keys are of weights (its denoisers' biases, too, but under the names of the original model alone), sd-scripts and
    LyCORIS have none for a bias that replaces; which rows they are PEFT's configuration alone says.
    """
    return delta is not None and delta.family == "set" and any(role_of(slot) in (BIAS, ROWS) for slot in delta.tensors)
