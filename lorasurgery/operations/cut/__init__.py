"""Resize an adapter: other ranks, the same effect as nearly as that allows.

>>> from lorasurgery.operations.cut import ResizeOptions, resize
>>> smaller, report = resize(lorasurgery.load("lora.safetensors"), ResizeOptions(rank=16))   # doctest: +SKIP
>>> lorasurgery.save(smaller, "small.safetensors")                                          # doctest: +SKIP
"""

from lorasurgery.operations.cut.base import BaseModel, NormCache, open_base
from lorasurgery.operations.cut.engine import resize
from lorasurgery.operations.cut.options import ResizeOptions
from lorasurgery.operations.cut.pick import block_ranks
from lorasurgery.operations.cut.rank_text import parse_rank, parse_ranks
from lorasurgery.operations.cut.report import ModuleReport, ResizeReport

__all__ = [
    "BaseModel",
    "ModuleReport",
    "NormCache",
    "ResizeOptions",
    "ResizeReport",
    "block_ranks",
    "open_base",
    "parse_rank",
    "parse_ranks",
    "resize",
]
