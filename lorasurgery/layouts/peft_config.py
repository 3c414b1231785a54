"""PEFT's configuration of what was written: ``adapter_config.json``, and Diffusers' copy of it in a file's header.

Source: PEFT 0.21 ``LoraConfig``, ``LoHaConfig``, ``LoKrConfig``, ``MissConfig`` and ``get_pattern_key``; Diffusers 0.42
``loaders/peft.py`` (``lora_adapter_metadata``).
"""

from __future__ import annotations

import json
import re
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.deltas.factorization import pefts_factorization
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.errors import NotRepresentableError
from lorasurgery.layouts.emit import common
from lorasurgery.layouts.fit import is_misread
from lorasurgery.layouts.peft_fields import kept_fields
from lorasurgery.layouts.peft_own import boft, ia3, miss, oft
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.layouts.emit import Written

PREFIX, TEXT_MODEL = "base_model.model.", "text_model."
_TYPES = {
    "lora": "LORA", "dora": "LORA", "loha": "LOHA", "lokr": "LOKR", "miss": "MISS", "bat": "MISS", "oft": "OFT",
    "boft": "BOFT", "ia3": "IA3",
}  # fmt: skip
_SCALED = ("LORA", "LOHA", "LOKR")
WHOLE = "set"
"""The family of saved modules, which PEFT has beside any type."""
_UNTOLD = MappingProxyType({"task_type": None, "base_model_name_or_path": None, "inference_mode": True})


def components(written: Sequence[Written], arch: Architecture) -> dict[str, list[Written]]:
    """The modules by the Diffusers component they belong to (``transformer``, ``text_encoder``, ...)."""
    names = {DENOISER: arch.denoiser, SECOND_DENOISER: "transformer_2"}
    names |= {encoder.table: encoder.diffusers or encoder.table for encoder in arch.encoders}
    found: dict[str, list[Written]] = {}
    for one in written:
        own = next((c for _, c in arch.diffusers_roots if one.stem.startswith(c + ".")), None)
        found.setdefault(own or names[one.module.site.component], []).append(one)
    return found


def model_names(component: str, arch: Architecture, root: str = "") -> Collection[str]:
    """Every module of the Diffusers model behind a component, without ``root``: patterns must not match others."""
    encoder = next((e for e in arch.encoders if e.diffusers == component), None)
    names = arch.namings[DIFFUSERS] if encoder is None else TEXT_ENCODERS[encoder.table].shapes
    own = next((text for text, other in arch.diffusers_roots if other == component), None)
    if own is not None:
        return [name.removeprefix(own) for name in names if name.startswith(own)]
    return [name.removeprefix(root) for name in names]


def flattened(component: str, arch: Architecture) -> str:
    """``text_model.`` for a component whose class lost that name: CLIPTextModel in transformers 5.6.

    CLIPTextModelWithProjection, which is CLIP-G's class, kept it.
    """
    encoder = next((e for e in arch.encoders if e.diffusers == component), None)
    return TEXT_MODEL if encoder is not None and encoder.table in ("clip_l", "clip_h") else ""


def adapter_config(
    written: Sequence[Written], names: Collection[str], prefix: str, root: str = "", source: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration of one component's modules.

    ``prefix`` is what stands before a module's name in its stem, ``root`` what is left out of the name itself. What
    ``source``, the configuration that the modules came with, says beside them is kept where it is as true of the result.

    Raises NotRepresentableError for modules of several PEFT types, for a LoKr whose factors PEFT would shape otherwise,
    for MiSS blocks of several sizes, and for what multiplies the base without a configuration that says how.
    """
    source = source or {}
    factored = [w for w in written if w.module.family != WHOLE]
    kind = _kind(factored or written)
    modules = {w.stem.removeprefix(prefix).removeprefix(root): w for w in factored}
    config: dict[str, Any] = {
        **_UNTOLD, **_TRAINING[kind], **kept_fields(source, kind),
        "peft_type": kind, "target_modules": _targets(modules, names),
    }  # fmt: skip
    config |= _scales(modules, names, "lora_alpha" if kind == "LORA" else "alpha") if kind in _SCALED else {}
    return config | _SPECIFIC[kind](modules, source)


def _kind(written: Sequence[Written]) -> str:
    """PEFT's one type of all these modules."""
    kinds = {w.module.family: _TYPES.get(w.module.family, "") for w in written}
    first = kinds[written[0].module.family]
    odd = next((w.module for w in written if kinds[w.module.family] in {"", *kinds.values()} - {first} or not first), None)
    if odd is None:
        return first
    what = f"this one would be {' and '.join(sorted(set(kinds.values())))}" if all(kinds.values()) else "and has none for this"
    raise NotRepresentableError(f"{odd.name}: a PEFT adapter is of one type, {what}", module=odd.name, hint="--as lora")


def _scales(modules: Mapping[str, Written], names: Collection[str], word: str) -> dict[str, Any]:
    rank = int(common([w.rank for w in modules.values()]))
    alpha = common([w.alpha for w in modules.values()])
    return {
        "r": rank,
        word: _plain(alpha),
        "rank_pattern": {_pattern(n, names): w.rank for n, w in modules.items() if w.rank != rank},
        "alpha_pattern": {_pattern(n, names): _plain(w.alpha) for n, w in modules.items() if w.alpha != alpha},
    }


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _pattern(name: str, names: Collection[str]) -> str:
    """A pattern for one module: PEFT matches the end of a name at a dot, so one that is another's end is anchored."""
    ambiguous = any(other.endswith("." + name) for other in names)
    return ("^" if ambiguous else "") + re.escape(name)


def _targets(modules: Mapping[str, Written], names: Collection[str]) -> list[str] | str:
    """The module names, or one regular expression where a list would also match modules that are not meant."""
    extra = any(other not in modules and other.endswith(tuple("." + n for n in modules)) for other in names)
    if not extra:
        return sorted(modules)
    return "|".join(re.escape(name) for name in sorted(modules))


def _lora(modules: Mapping[str, Written], source: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001  the builders' signature
    return {
        "lora_bias": any(w.module.bias is not None for w in modules.values()),
        "use_rslora": False,
        "use_dora": any(w.module.magnitude is not None for w in modules.values()),
        "init_lora_weights": True,
    }


def _loha(modules: Mapping[str, Written], source: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001  the builders' signature
    found = [(w.module, w.module.delta, w.shape) for w in modules.values()]
    kernels = [(module, delta.t1) for module, delta, shape in found if isinstance(delta, Hadamard) and prod(shape[2:]) > 1]
    tucker = any(core is not None for _, core in kernels)
    flat = next((module for module, core in kernels if core is None), None)
    if tucker and flat is not None:
        raise NotRepresentableError(
            f"{flat.name}: PEFT gives every convolution of a LoHa a Tucker core or none", module=flat.name, hint="--as lora"
        )
    return {"use_effective_conv2d": tucker, "init_weights": True}


def _lokr(modules: Mapping[str, Written], source: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001  the builders' signature
    """PEFT derives the factors' shapes from the layer's, ``decompose_factor`` and r: find the factor that gives ours."""
    deltas = [(w, w.module.delta) for w in modules.values() if isinstance(w.module.delta, Kronecker)]
    both = any(delta.w1 is None for _, delta in deltas)
    tucker = any(delta.t2 is not None for _, delta in deltas)
    factors = [-1, *sorted({n for _, delta in deltas for n in delta.outer})]
    best = next((f for f in factors if all(_same_shapes(w, d, f, both=both, tucker=tucker) for w, d in deltas)), None)
    if best is None:
        odd = next(w.module for w, d in deltas if not _same_shapes(w, d, -1, both=both, tucker=tucker))
        raise NotRepresentableError(
            f"{odd.name}: PEFT would shape the factors of this LoKr otherwise", module=odd.name, hint="--as lora"
        )
    return {
        "use_effective_conv2d": tucker, "decompose_both": both, "decompose_factor": best, "init_weights": True,
    }  # fmt: skip


_SPECIFIC = {"LORA": _lora, "LOHA": _loha, "LOKR": _lokr, "MISS": miss, "OFT": oft, "BOFT": boft, "IA3": ia3}
_BIASED = {"bias": "none", "modules_to_save": None}
_DROPOUT = {"rank_dropout": 0.0, "module_dropout": 0.0, "modules_to_save": None}
_TRAINING: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "LORA": {"lora_dropout": 0.0, "fan_in_fan_out": False, **_BIASED},
        "LOHA": _DROPOUT,
        "LOKR": {**_DROPOUT, "rank_dropout_scale": False},
        "MISS": {"miss_dropout": 0.0, **_BIASED},
        "OFT": _BIASED,
        "BOFT": _BIASED,
        "IA3": {"modules_to_save": None},
    }
)
"""What a configuration says that the modules do not, where no source says it otherwise."""


def _same_shapes(written: Written, delta: Kronecker, factor: int, *, both: bool, tucker: bool) -> bool:
    """Whether PEFT's LoKr layer with this factor and rank has our factors' shapes.

    Source: PEFT ``tuners/lokr/layer.py`` (``update_layer``, ``create_adapter_parameters``).
    """
    out, inputs, *kernel = written.shape
    (out_l, out_k), (in_m, in_n) = pefts_factorization(out, factor), pefts_factorization(inputs, factor)
    rank = written.rank
    if delta.outer != (out_l, in_m) or (delta.w1 is not None) == (both and rank < max(out_l, in_m) / 2):
        return False
    if (delta.w2 is not None) != (rank >= max(out_k, in_n) / 2):
        return False
    if delta.w2 is None and prod(kernel) > 1 and tucker != (delta.t2 is not None):
        return False
    if is_misread(delta):
        return False
    whole = delta.w2 is not None or delta.t2 is not None
    return delta.inner == ((out_k, in_n, *kernel) if whole else (out_k, in_n * prod(kernel)))


def header_metadata(
    written: Sequence[Written], arch: Architecture, sources: Mapping[str, Mapping[str, Any]] | None = None
) -> str:
    """``lora_adapter_metadata`` for a Diffusers file: every component's configuration, its keys prefixed."""
    entries: dict[str, Any] = {}
    for component, own in components(written, arch).items():
        # Names are matched at their end, so without CLIP's "text_model." they fit every release of transformers.
        root = TEXT_MODEL if component.startswith("text_encoder") else ""
        config = adapter_config(own, model_names(component, arch, root), f"{component}.", root, (sources or {}).get(component))
        entries |= {f"{component}.{key}": value for key, value in config.items()}
    return json.dumps(entries, indent=2, sort_keys=True)
