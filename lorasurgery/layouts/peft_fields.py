"""Every field of PEFT's configurations: what is read of it, why it does no harm, or why it is refused.

A field that changes what the tensors mean and is not read would make a wrong result in silence, so there is no third way:
a field that this table does not have is a refusal that names it. Source: PEFT 0.21 ``tuners/*/config.py`` and the layers
that use each field (named where the reason is not evident).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import FileFormatError
from lorasurgery.layouts.peft_types import (
    BOFT,
    IA3,
    LOHA,
    LOKR,
    LORA,
    MERGED,
    MISS,
    OFT,
    PEFT_ALONE,
    refuse_other_types,
    type_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

READ, HARMLESS, REFUSED = "read", "harmless", "refused"
NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values that say nothing, whatever the field."""


class Field(NamedTuple):
    """One field: its status, the reason, and for a refusal the values that are none and what to do."""

    status: str
    reason: str
    allowed: tuple[Any, ...] = ()
    """Further values that change nothing; for a refusal only."""
    hint: str = MERGED
    kept: bool = False
    """Whether a result for PEFT has it as the source had it."""


def _read(reason: str) -> Field:
    return Field(READ, reason)


def _kept(reason: str) -> Field:
    return Field(HARMLESS, reason, kept=True)


def _how(reason: str) -> Field:
    return Field(READ, reason, kept=True)


def _dropped(reason: str) -> Field:
    return Field(HARMLESS, reason)


def _refused(reason: str, *allowed: object, hint: str = MERGED) -> Field:
    return Field(REFUSED, reason, allowed, hint)


_TRAINING = _kept("it matters in training only")
_START = "path_initial_model_for_weight_conversion of PEFT's save_pretrained, which makes it a plain LoRA; or " + MERGED

_COMMON = {
    "peft_type": _read("the family"),
    "task_type": _kept("which class PEFT wraps the model in"),
    "auto_mapping": _kept("which classes PEFT loads"),
    "peft_version": _dropped("who wrote it"),
    "base_model_name_or_path": _kept("which model it is for"),
    "revision": _kept("of that model"),
    "inference_mode": _kept("whether PEFT trains it on"),
    "target_modules": _read("the keys name them; a result lists its own"),
    "exclude_modules": _dropped("the keys name what is left; a result lists its own"),
    "layers_to_transform": _dropped("the keys name what is left; a result lists its own"),
    "layers_pattern": _dropped("the keys name what is left; a result lists its own"),
    "modules_to_save": _read("the modules that the keys hold whole"),
}
_BIAS = {"bias": _read("which biases the keys hold whole")}
_FAN = {
    # tuners/lora/layer.py: get_delta_weight turns the product for a layer that stores (in, out); the factors are the same
    "fan_in_fan_out": _kept("the layer's own storage: the factors are the same either way"),
}
_PATTERNS = {
    "r": _read("the rank"), "rank_pattern": _read("ranks"), "alpha_pattern": _read("scales"),
}  # fmt: skip
_LYCORIS = {
    **_PATTERNS,
    "alpha": _read("the scale"),
    "rank_dropout": _TRAINING,
    "module_dropout": _TRAINING,
    "use_effective_conv2d": _read("the keys have a Tucker core or none"),
    "init_weights": _dropped("it matters before training only"),
}

_STARTS = "PEFT subtracts what {} began with from the base when it loads this"
INITIALISATIONS = MappingProxyType(
    {
        "pissa": _STARTS.format("PiSSA"),
        "olora": _STARTS.format("OLoRA"),
        "corda": _STARTS.format("CorDA"),
        "loftq": "PEFT quantises the base anew when it loads this (LoftQ)",
        "lora_ga": "it was trained on a base from which LoRA-GA's start had been subtracted",
    }
)
"""``init_lora_weights`` that change the base (PEFT ``tuners/lora/layer.py``, ``*_init``), by what they begin with."""
PLAIN_STARTS = (True, "true", "false", "gaussian", "eva", "orthogonal", "mica")
"""Those that leave it alone: their tensors are in the file, and mean what a LoRA's do."""

_LORA = {
    **_PATTERNS,
    "lora_alpha": _read("the scale"),
    "use_rslora": _read("the scale is alpha / sqrt(r)"),
    "use_dora": _read("the keys have magnitudes or none"),
    "lora_bias": _read("the keys have lora_B.bias or none"),
    "lora_dropout": _TRAINING,
    "init_lora_weights": _refused("it is a way to begin that is not known here", *PLAIN_STARTS, hint=_START),
    "loftq_config": _dropped("it is used with init_lora_weights='loftq' only"),
    "eva_config": _dropped("it is used before training only"),
    "corda_config": _dropped("it is used with init_lora_weights='corda' only"),
    "lora_ga_config": _dropped("it is used with init_lora_weights='lora_ga' only"),
    "velora_config": _dropped("it compresses activations in training only; the forward pass is a LoRA's"),
    "monteclora_config": _dropped("it samples in training only; else it is a plain LoRA"),
    "megatron_config": _kept("how Megatron shares out the layers; the product is the same"),
    "megatron_core": _kept("a module's name"),
    "qalora_group_size": _dropped("it is used with use_qalora only"),
    "runtime_config": _dropped("PEFT does not save it"),
    "ensure_weight_tying": _kept("the keys hold both of two tied layers"),
    "trainable_token_indices": _read("which rows of an embedding the keys hold whole"),
    "use_bdlora": _refused("some of its factors are only the blocks of a block-diagonal matrix (BD-LoRA)"),
    "alora_invocation_tokens": _refused(
        "it acts only after these tokens of the input (aLoRA), which no weight can say", hint=PEFT_ALONE
    ),
    "arrow_config": _refused("it routes each input among several adapters (Arrow)", hint=PEFT_ALONE),
    "kasa_config": _refused("PEFT drops the smallest singular values of the base when it loads this (KaSA)"),
    "use_qalora": _refused("its lora_A acts on averages of groups of inputs (QA-LoRA)", hint=PEFT_ALONE),
    "layer_replication": _refused("its layers are copies of the base's, and have numbers of their own", hint=PEFT_ALONE),
    "target_parameters": _refused("its keys do not say which parameters of a module they change (a list of experts, for one)"),
    # fields that only older versions wrote
    "enable_lora": _refused("its factors are grouped (MergedLinear of PEFT 0.2)"),
    "merge_weights": _dropped("when PEFT 0.2 merged it"),
    "num_layers": _dropped("of the wrapped model"),
}  # fmt: skip
_OFT = {
    "r": _how("the number of blocks"),
    "oft_block_size": _how("the size of a block"),
    "module_dropout": _TRAINING,
    "init_weights": _dropped("it matters before training only"),
    "coft": _how("read where a weight is multiplied"),
    "eps": _how("read where a weight is multiplied"),
    "block_share": _how("one block for all"),
    "use_cayley_neumann": _how("read where a weight is multiplied"),
    "num_cayley_neumann_terms": _how("read where a weight is multiplied"),
    # until PEFT 0.15
    "alpha": _dropped("OFT has no scale"), "rank_pattern": _how("numbers of blocks"), "alpha_pattern": _dropped("no scale"),
    "rank_dropout": _TRAINING,
}  # fmt: skip
_BOFT = {
    "boft_block_size": _how("the size of a block"),
    "boft_block_num": _how("the number of blocks"),
    "boft_n_butterfly_factor": _how("the number of sets"),
    "boft_dropout": _TRAINING,
    "init_weights": _dropped("it matters before training only"),
}
_IA3 = {
    "feedforward_modules": _read("whose inputs are multiplied"),
    "init_ia3_weights": _dropped("it matters before training only"),
}
_MISS = {
    "r": _read("the keys have the size of a block"),
    "mini_r": _read("the keys have the width of a block"),
    "miss_dropout": _TRAINING,
    "init_weights": _read("'bat' and 'mini' are shapes of the block"),
}

FIELDS: Mapping[str, Mapping[str, Field]] = MappingProxyType(
    {
        LORA: {**_COMMON, **_BIAS, **_FAN, **_LORA},
        LOHA: {**_COMMON, **_LYCORIS},
        LOKR: {
            **_COMMON,
            **_LYCORIS,
            "decompose_both": _read("the keys have both factors decomposed or not"),
            "decompose_factor": _read("the keys have the factors' shapes"),
            "rank_dropout_scale": _TRAINING,
        },
        MISS: {**_COMMON, **_BIAS, **_MISS},
        OFT: {**_COMMON, **_BIAS, **_FAN, **_OFT},
        BOFT: {**_COMMON, **_BIAS, **_FAN, **_BOFT},
        IA3: {**_COMMON, **_FAN, **_IA3},
    }
)
"""Type -> field -> what becomes of it."""


def check_fields(fields: Mapping[str, Any], source: str) -> None:
    """Raises NotAnAdapterError for a type that is not read, FileFormatError for a field that changes what the tensors mean.

    ``source`` is where the fields stand: ``adapter_config.json`` or ``lora_adapter_metadata``.
    """
    refuse_other_types(fields)
    known = FIELDS[type_of(fields)]
    for name, value in fields.items():
        field = known.get(name)
        if _says_nothing(value) or (field is not None and (field.status != REFUSED or value in field.allowed)):
            continue
        if field is None:
            reason = "a field that is not known here, and may change what the tensors mean"
            hint = f"a newer lorasurgery, or the configuration without {name} if it changes nothing"
        else:
            reason, hint = _initialisation(name, value) or field.reason, field.hint
        raise FileFormatError(f"{source} has {name}: {shortened(value)}: {reason}", hint=hint)


def _says_nothing(value: object) -> bool:
    return any(type(value) is type(none) and value == none for none in NOTHING)


def _initialisation(name: str, value: object) -> str | None:
    """What a way to begin does to the base, where that is known."""
    if name != "init_lora_weights":
        return None
    return next((reason for start, reason in INITIALISATIONS.items() if str(value).lower().startswith(start)), None)


def shortened(value: object) -> str:
    """A value in a message."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def kept_fields(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of a source's configuration that are as true of a result of type ``kind``."""
    known = FIELDS[kind]
    same = type_of(fields) == kind
    return {
        name: value
        for name, value in fields.items()
        if name in known and known[name].kept and (same or name in _COMMON or name in _FAN)
    }
