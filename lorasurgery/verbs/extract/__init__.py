"""Extract an adapter from two models: what the tuned one is beyond its base, one weight at a time.

>>> from lorasurgery.verbs.extract import ExtractOptions, extract
>>> from lorasurgery.operations.cut import ResizeOptions
>>> report = extract("base.safetensors", "tuned.safetensors", "lora.safetensors")             # doctest: +SKIP
>>> options = ExtractOptions(cut=ResizeOptions(policy="energy", param=0.95, rank=128))
>>> report = extract("base.safetensors", "tuned.safetensors", "lora.safetensors", options)    # doctest: +SKIP
"""

from lorasurgery.verbs.extract.engine import Running, Step, extract
from lorasurgery.verbs.extract.options import ExtractOptions
from lorasurgery.verbs.extract.report import ExtractReport, LeftOut, ModuleResult

__all__ = ["ExtractOptions", "ExtractReport", "LeftOut", "ModuleResult", "Running", "Step", "extract"]
