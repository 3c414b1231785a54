"""An adapter as PEFT's folders: each component's configuration, and what its tensors are called there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.layouts.peft_config import PREFIX, TEXT_MODEL, WHOLE, adapter_config, components, flattened, model_names
from lorasurgery.layouts.peft_keys import BIAS, ROWS, SAVED_IN, peft_key
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
            PREFIX + key.removeprefix(prefix).removeprefix(alone).removeprefix(root): key for one in own for key in one.keys
        }
        rest = {PREFIX + name: key for key in sorted(beside) if (name := _beside(key, source, adapter.configs)) is not None}
        config = adapter_config(own, model_names(component, arch, root), prefix, root, fields)
        saved = [w.stem.removeprefix(prefix).removeprefix(root) for w in own if w.module.family == WHOLE]
        config |= _whole(fields, [name.removeprefix(PREFIX) for name in rest], saved)
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
    return name.replace(f"{SAVED_IN}.default.", ".").replace(f"{SAVED_IN}.", ".")


def _whole(fields: Mapping[str, Any], beside: Collection[str], saved: Collection[str]) -> dict[str, Any]:
    """The fields that say which whole tensors stand beside the factors: the source's, of what is still there.

    A module that is not listed PEFT reads all the same, into the model's own: it has to find every tensor of one that is.
    """
    roles = {name: found.role for name in beside if (found := peft_key(PREFIX + name)) is not None}
    config: dict[str, Any] = {}
    if BIAS in roles.values() and fields.get("bias"):
        config["bias"] = fields["bias"]
    if ROWS in roles.values() and fields.get("trainable_token_indices"):
        config["trainable_token_indices"] = fields["trainable_token_indices"]
    listed = [name for name in _names(fields.get("modules_to_save")) if any(f".{name}." in f".{own}." for own in saved)]
    if listed:
        config["modules_to_save"] = listed
    return config


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, (list, tuple)) else []
