"""An adapter as PEFT's folders: each component's configuration, and what its tensors are called there."""

from __future__ import annotations

from functools import reduce
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.layouts.peft_config import PREFIX, TEXT_MODEL, WHOLE, adapter_config, components, flattened, model_names
from lorasurgery.layouts.peft_keys import BIAS, ROWS, plain_slot, role_of
from lorasurgery.layouts.scales import component_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lorasurgery.adapter import Adapter
    from lorasurgery.layouts.emit import Emitted, Written


class Part(NamedTuple):
    """One folder: ``adapter_config.json``, and PEFT's name of each tensor with the key that was emitted for it."""

    config: Mapping[str, Any]
    names: Mapping[str, str]


def peft_parts(adapter: Adapter, emitted: Emitted) -> dict[str, Part]:
    """Component -> its folder. Raises what :func:`adapter_config` raises."""
    arch = adapter.architecture
    modules = {key for one in emitted.written for key in one.keys}
    beside = [key for key in emitted.tensors if key not in modules]
    found = {}
    for component, own in components(emitted.written, arch).items():
        prefix = PREFIX if own[0].stem.startswith(PREFIX) else component + "."
        source = component_of(own[0].module.name, adapter.configs)[0]
        fields = {} if source is None else adapter.configs[source]
        root = _root(own, component, adapter)
        alone = f"text_encoder_{own[0].module.site.component}."  # how the reader calls a folder of one text encoder
        names = {
            PREFIX + plain_slot(key.removeprefix(prefix).removeprefix(alone).removeprefix(root)): key
            for one in own
            for key in one.keys
        }
        rest = {PREFIX + name: key for key in sorted(beside) if (name := _beside(key, source, adapter.configs)) is not None}
        config = adapter_config(own, model_names(component, arch, root), prefix, root, fields)
        config |= _whole(fields, own, (prefix, alone, root))
        found[component] = Part(config, names | rest)
    return found


def _root(own: list[Written], component: str, adapter: Adapter) -> str:
    """What is left out of a component's names: ``text_model.``, unless the source spelled it."""
    root = flattened(component, adapter.architecture)
    return "" if adapter.configs and any(f".{TEXT_MODEL}" in w.module.name for w in own) else root


def _beside(key: str, source: str | None, configs: Collection[str]) -> str | None:
    """PEFT's name of a key that is no module's, when it came with this source."""
    own, name = component_of(key, configs)
    if own is None or own != source:
        return None
    return plain_slot(name)


def _whole(fields: Mapping[str, Any], own: Collection[Written], before: Collection[str]) -> dict[str, Any]:
    """The fields that say which whole tensors stand beside the factors: the source's, of what is still there.

    ``before``: what is left out before a module's name.

    A module that is not listed PEFT reads all the same, into the model's own: it has to find every tensor of one that is.
    """
    found = {w.stem: w.module.delta for w in own if w.module.delta is not None and w.module.family == WHOLE}
    roles = {role_of(slot) for delta in found.values() for slot in delta.tensors}
    config = {field: fields[field] for field, role in _FIELDS.items() if role in roles and fields.get(field)}
    stems = [reduce(str.removeprefix, before, stem) for stem in found]
    listed = [one for one in _names(fields.get("modules_to_save")) if any(f".{one}." in f".{stem}." for stem in stems)]
    return {**config, "modules_to_save": listed} if listed else config


_FIELDS = MappingProxyType({"bias": BIAS, "trainable_token_indices": ROWS})
"""Field -> the role of the tensors that it is about."""


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, (list, tuple)) else []
