"""Surgery on LoRA-family adapter files: convert between layouts, and know what every result is worth.

>>> import lorasurgery
>>> adapter = lorasurgery.load("lora.safetensors")          # doctest: +SKIP
>>> for site, module in adapter:                            # doctest: +SKIP
...     print(site, module.family, module.delta.rank)
>>> converted, report = lorasurgery.convert(adapter, "comfyui")   # doctest: +SKIP
>>> lorasurgery.save(converted, "out.safetensors", report=report) # doctest: +SKIP

Names are loaded when they are used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lorasurgery.version import __version__

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter, Magnitude, Module, Scale, Site
    from lorasurgery.api import SaveOptions, load, save
    from lorasurgery.errors import SurgeryError
    from lorasurgery.report import Report
    from lorasurgery.surgery.convert import Options, convert

_HOMES = {
    "Adapter": "adapter", "Magnitude": "adapter", "Module": "adapter", "Options": "surgery.convert",
    "Report": "report", "SaveOptions": "api", "Scale": "adapter", "Site": "adapter", "SurgeryError": "errors",
    "convert": "surgery.convert", "load": "api", "save": "api",
}  # fmt: skip

__all__ = [
    "Adapter", "Magnitude", "Module", "Options", "Report", "SaveOptions", "Scale", "Site", "SurgeryError",
    "__version__", "convert", "load", "save",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
