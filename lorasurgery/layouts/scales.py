"""Where a module's scale comes from: alpha tensor, PEFT configuration, header metadata, or nothing.

Rules: scale = alpha / rank; rsLoRA alpha / sqrt(rank); no alpha anywhere means 1 (ComfyUI, Diffusers, sd-scripts agree).
A LoKr with both factors whole: 1 in LyCORIS, sd-scripts and ComfyUI whatever alpha says; alpha / r in PEFT;
alpha / max(w2.shape) in the musubi-tuner fork that writes a ``lokr_factor`` buffer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Scale
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.errors import FileFormatError
from lorasurgery.layouts.peft_fields import check_fields
from lorasurgery.layouts.peft_types import LORA, type_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Tensor

HEADER_KEY = "lora_adapter_metadata"
"""Where Diffusers keeps the LoraConfig of each component in a file's header."""
PEFT_PREFIX = "base_model.model."
"""What PEFT's own keys begin with."""
SCALED = ("lora", "loha", "lokr")
"""Families that a configuration's alpha multiplies."""
UNKNOWN = "unknown (no adapter_config.json)"
"""PEFT keeps the scale beside its weights: without the configuration nothing says it, and 1 is a guess."""
GUESS = 1.0
GIVEN = "--trained-alpha"
LARGEST_ALPHA = 1e8
"""Above this an alpha is ai-toolkit's stand-in for infinity (1e10), which half precision turns into inf."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields of a PEFT configuration that decide a scale. Source: PEFT ``LoraConfig``, ``LoHaConfig``, ``LoKrConfig``."""

    source: str
    """``adapter_config.json`` or ``lora_adapter_metadata``."""
    rank: int = 8
    alpha: float = 8.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    """All of it as JSON."""

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], source: str) -> PeftConfig:
        """From the JSON object of ``adapter_config.json``; absent fields have PEFT's defaults.

        Raises FileFormatError for fields of another kind than PEFT writes and for those that change what the tensors mean,
        NotAnAdapterError for a type that is not read.
        """
        check_fields(fields, source)
        alpha = fields.get("lora_alpha" if type_of(fields) == LORA else "alpha", 8)
        try:
            ranks = {re.compile(key).pattern: int(rank) for key, rank in (fields.get("rank_pattern") or {}).items()}
            alphas = {re.compile(key).pattern: float(own) for key, own in (fields.get("alpha_pattern") or {}).items()}
            rank, value = int(fields.get("r") or 8), float(8 if alpha is None else alpha)
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise FileFormatError(
                f"{source} has a rank or alpha that is none ({error})",
                hint="the configuration PEFT wrote, with r, lora_alpha, rank_pattern and alpha_pattern",
            ) from error
        if rank < 1 or any(own < 1 for own in ranks.values()):
            raise FileFormatError(f"{source} has a rank below 1", hint="the configuration PEFT wrote")
        return cls(source, rank, value, ranks, alphas, bool(fields.get("use_rslora")), fields)

    def alpha_of(self, module: str) -> float:
        """The alpha of a module by its name in the wrapped model."""
        return float(_by_pattern(self.alpha_pattern, module, self.alpha))

    def rank_of(self, module: str) -> int:
        """The rank the configuration says; tensors decide the real one, but PEFT divides by this for LoKr."""
        return int(_by_pattern(self.rank_pattern, module, self.rank))


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:  # noqa: ANN401  int or float
    """PEFT's ``get_pattern_key``: the first pattern that matches the end of the name at a dot."""
    found = _finder(tuple(patterns))(module)
    return default if found is None else patterns[found]


@lru_cache(maxsize=32)
def _finder(patterns: tuple[str, ...]) -> Callable[[str], str | None]:
    """From a module's name to the first pattern that matches it.

    A file has a pattern for each of a thousand modules, nearly all plain names: those are looked up, not matched.
    """
    ends: dict[str, int] = {}
    whole: dict[str, int] = {}
    others: list[tuple[int, re.Pattern[str]]] = []
    for i, pattern in enumerate(patterns):
        text = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
        if pattern.removeprefix("^") == re.escape(text):
            (whole if pattern.startswith("^") else ends).setdefault(text, i)
        else:
            others.append((i, re.compile(rf"(.*\.)?({pattern})$")))

    def find(module: str) -> str | None:
        parts = module.split(".")
        hits = [ends[end] for n in range(len(parts)) if (end := ".".join(parts[n:])) in ends]
        first = min([*hits, whole.get(module, len(patterns))])
        match = next((i for i, other in others if i < first and other.match(module)), first)
        return patterns[match] if match < len(patterns) else None

    return find


def header_configs(metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Component -> configuration from ``lora_adapter_metadata``; component "" when the entries have no prefix.

    An unreadable value counts as absent: Diffusers ignores nothing here, but no tensor is at stake.
    """
    try:
        entries = json.loads(metadata.get(HEADER_KEY, "{}"))
    except ValueError:
        return {}
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in entries.items() if isinstance(entries, dict) else ():
        component, _, name = key.rpartition(".")
        grouped.setdefault(component, {})[name] = value
    return {component: PeftConfig.from_dict(fields, HEADER_KEY) for component, fields in grouped.items()}


@dataclass(frozen=True, slots=True)
class ScaleRules:
    """What a whole file says about scales."""

    configs: Mapping[str, PeftConfig]
    """By component prefix; "" applies to every module."""
    rslora_flag: bool = False
    """The musubi-tuner fork's ``use_rslora_flag``."""
    whole_lokr_by_shape: bool = False
    """The same fork's rule for a LoKr with both factors whole: alpha / max(w2.shape)."""
    trained_alpha: float | None = None
    """The alpha that the user says a file without one was trained at."""

    def resolve(self, stem: str, delta: Delta, alpha: Tensor | None) -> Scale:
        """The scale of one module. ``stem`` is its name as the file spells it."""
        whole = isinstance(delta, Kronecker) and delta.rank is None
        if alpha is not None:
            return self._of_alpha(delta, alpha, whole=whole)
        if delta.family not in SCALED:
            return Scale(1.0, "none (1.0)")
        config, name = self._config(stem)
        if config is None and self.trained_alpha is not None and delta.rank is not None:
            return Scale(self.trained_alpha / delta.rank, GIVEN)
        if config is None:
            return Scale(GUESS, UNKNOWN if PEFT_PREFIX in stem else "none (1.0)")
        rank = config.rank_of(name) if delta.family == "lokr" else delta.rank or 1
        divisor = sqrt(rank) if config.use_rslora and delta.family == "lora" else rank
        return Scale(config.alpha_of(name) / divisor, config.source)

    def _of_alpha(self, delta: Delta, alpha: Tensor, *, whole: bool) -> Scale:
        value = alpha.item()
        if isinstance(delta, Kronecker) and whole:
            if self.whole_lokr_by_shape and abs(value) < LARGEST_ALPHA:
                return Scale(value / max(delta.inner), "alpha tensor (whole LoKr: alpha / max(w2.shape))", alpha)
            return Scale(1.0, "whole LoKr (alpha unused)", alpha)
        rank = delta.rank
        if rank is None:
            return Scale(1.0, "none (1.0)", alpha)
        if self.rslora_flag and delta.family == "lora":
            return Scale(value / sqrt(rank), "rsLoRA", stored=alpha)
        return Scale(value / rank, "alpha tensor", alpha)

    def _config(self, stem: str) -> tuple[PeftConfig | None, str]:
        """The configuration that covers a module, and the module's name in the model it describes."""
        component, name = component_of(stem, self.configs)
        return (None, stem) if component is None else (self.configs[component], name)


def component_of(stem: str, components: Collection[str]) -> tuple[str | None, str]:
    """The configured component that a module belongs to, and the module's name in the model of that component.

    "" is the whole file; (None, stem) where no component covers the module.
    """
    own = next((one for one in components if one and stem.startswith(one + ".")), None)
    if own is not None:
        return own, stem[len(own) + 1 :]
    return ("", stem.removeprefix(PEFT_PREFIX)) if "" in components else (None, stem)


def unknown_scales(modules: Iterable[Module]) -> list[str]:
    """The warning that no scale is known, for PEFT's weights without their configuration."""
    unknown = [module.name for module in modules if module.scale.source == UNKNOWN]
    if not unknown:
        return []
    where = "PEFT keeps it in adapter_config.json, which is not beside this file"
    cure = f"read the folder that PEFT saved, or say {GIVEN} N"
    return [
        f"the scale of {len(unknown)} modules (first: {unknown[0]}) is not known: {where}, and {GUESS:g} is a guess; {cure}"
    ]
