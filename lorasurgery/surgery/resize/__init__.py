"""Resize an adapter: other ranks, the same effect as nearly as that allows.

>>> from lorasurgery.surgery.resize import ResizeOptions, resize
>>> smaller, report = resize(lorasurgery.load("lora.safetensors"), ResizeOptions(rank=16))   # doctest: +SKIP
>>> lorasurgery.save(smaller, "small.safetensors")                                          # doctest: +SKIP
"""

from lorasurgery.surgery.resize.base import BaseModel, NormCache, open_base
from lorasurgery.surgery.resize.engine import resize
from lorasurgery.surgery.resize.options import ResizeOptions
from lorasurgery.surgery.resize.pick import block_ranks
from lorasurgery.surgery.resize.plan import Plan, PlanRow, plan
from lorasurgery.surgery.resize.rank_text import parse_rank, parse_ranks
from lorasurgery.surgery.resize.report import ModuleReport, ResizeReport

__all__ = [
    "BaseModel",
    "ModuleReport",
    "NormCache",
    "Plan",
    "PlanRow",
    "ResizeOptions",
    "ResizeReport",
    "block_ranks",
    "open_base",
    "parse_rank",
    "parse_ranks",
    "plan",
    "resize",
]
