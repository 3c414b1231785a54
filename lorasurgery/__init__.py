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
    from lorasurgery.adapter import Adapter, Magnitude, Module, Scale
    from lorasurgery.api import SaveOptions, save
    from lorasurgery.errors import SurgeryError
    from lorasurgery.files.opened import load
    from lorasurgery.models import open_model
    from lorasurgery.operations.conversion.convert import Options, convert
    from lorasurgery.operations.cut import ResizeOptions, resize
    from lorasurgery.operations.select.parts import split
    from lorasurgery.report import Report
    from lorasurgery.site import Site
    from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
    from lorasurgery.verbs.compare import CompareOptions, Comparison, compare
    from lorasurgery.verbs.ema.ema import EmaOptions, ema
    from lorasurgery.verbs.extract import ExtractOptions, extract
    from lorasurgery.verbs.merge import MergeOptions, merge
    from lorasurgery.verbs.prune import PruneOptions, prune

_HOMES = {
    "Adapter": "adapter", "Magnitude": "adapter", "Module": "adapter", "Options": "surgery.convert",
    "Report": "report", "SaveOptions": "api", "Scale": "adapter", "Site": "adapter", "SurgeryError": "errors",
    "convert": "surgery.convert", "load": "files.opened", "save": "api",
    "MergeOptions": "surgery.merge", "merge": "surgery.merge",
    "CompareOptions": "surgery.compare", "Comparison": "surgery.compare", "compare": "surgery.compare",
    "EmaOptions": "surgery.ema", "ema": "surgery.ema", "split": "surgery.parts", "PruneOptions": "surgery.prune",
    "ApplyOptions": "surgery.apply", "apply": "surgery.apply", "read_source": "surgery.apply", "open_model": "models",
    "prune": "surgery.prune", "ExtractOptions": "surgery.extract", "extract": "surgery.extract",
    "ResizeOptions": "surgery.resize", "resize": "surgery.resize",
}  # fmt: skip

__all__ = [
    "Adapter", "ApplyOptions", "CompareOptions", "Comparison", "EmaOptions", "ExtractOptions", "Magnitude", "MergeOptions",
    "Module", "Options", "PruneOptions", "Report", "ResizeOptions", "SaveOptions", "Scale", "Site", "SurgeryError",
    "__version__", "apply", "compare", "convert", "ema", "extract", "load", "merge", "open_model", "prune", "read_source",
    "resize", "save", "split",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
