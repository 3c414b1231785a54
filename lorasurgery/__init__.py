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
    "Adapter": "adapter", "Magnitude": "adapter", "Module": "adapter", "Options": "operations.conversion.convert",
    "Report": "report", "SaveOptions": "api", "Scale": "adapter", "Site": "site", "SurgeryError": "errors",
    "convert": "operations.conversion.convert", "load": "files.opened", "save": "api",
    "MergeOptions": "verbs.merge", "merge": "verbs.merge",
    "CompareOptions": "verbs.compare", "Comparison": "verbs.compare", "compare": "verbs.compare",
    "EmaOptions": "verbs.ema.ema", "ema": "verbs.ema.ema", "split": "operations.select.parts", "PruneOptions": "verbs.prune",
    "ApplyOptions": "verbs.apply", "apply": "verbs.apply", "read_source": "verbs.apply", "open_model": "models",
    "prune": "verbs.prune", "ExtractOptions": "verbs.extract", "extract": "verbs.extract",
    "ResizeOptions": "operations.cut", "resize": "operations.cut",
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
