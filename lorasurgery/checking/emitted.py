"""A file that was not written yet, as a subject of checks: its keys and shapes, without its numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.io.header import RawFile
from lorasurgery.io.tensors import Tensor

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.layouts.emit import Emitted
    from lorasurgery.layouts.scales import PeftConfig
    from lorasurgery.layouts.targets import Layout

READ = 16
"""Tensors of at most so many elements are read: alphas, flags, shapes. The others are taken for ones."""


def in_memory(emitted: Emitted, arch: Architecture, target: Layout) -> tuple[RawFile, dict[str, PeftConfig] | None]:
    """What would be written: keys and shapes, and a PEFT folder's configurations."""
    from lorasurgery.layouts.peft_config import PREFIX, adapter_config, components, flattened, model_names
    from lorasurgery.layouts.scales import PeftConfig

    raw = RawFile(Path("written.safetensors"), emitted.tensors, {})
    if not target.folder:
        return raw, None
    configs = {}
    for component, own in components(emitted.written, arch).items():
        prefix = PREFIX if own[0].stem.startswith(PREFIX) else component + "."
        root = flattened(component, arch)
        config = adapter_config(own, model_names(component, arch, root), prefix, root)
        configs[component] = PeftConfig.from_dict(config, "adapter_config.json")
    return raw, configs


def hollow(raw: RawFile) -> RawFile:
    """The file with ones for its large tensors, so that nothing is read or computed."""
    return replace(raw, tensors={key: _ones(tensor) for key, tensor in raw.tensors.items()})


def _ones(tensor: Tensor) -> Tensor:
    if tensor.size <= READ:
        return tensor

    def ones() -> object:
        import numpy as np

        return np.broadcast_to(np.float32(1.0), tensor.shape)

    return Tensor(tensor.dtype, tensor.shape, compute=ones)  # type: ignore[arg-type]  # an array
