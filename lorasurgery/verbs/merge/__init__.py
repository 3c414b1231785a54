"""Merge adapters: the sum of what they really do, whatever their ranks, alphas, families and layouts.

>>> import lorasurgery
>>> a, b = (lorasurgery.load(path) for path in ("a.safetensors", "b.safetensors"))   # doctest: +SKIP
>>> merged, report = lorasurgery.merge([(a, 0.7), (b, "-0.4:te=0")])                 # doctest: +SKIP
>>> lorasurgery.save(merged, "merged.safetensors")                                 # doctest: +SKIP
"""

from lorasurgery.verbs.merge.engine import merge
from lorasurgery.verbs.merge.options import MergeOptions
from lorasurgery.verbs.merge.report import MergedModule, MergeReport, SourceReport
from lorasurgery.verbs.merge.source import Source
from lorasurgery.verbs.merge.spec import Wanted, parse_source, parse_weight
from lorasurgery.verbs.merge.weights import Weight

__all__ = [
    "MergeOptions", "MergeReport", "MergedModule", "Source", "SourceReport", "Wanted", "Weight", "merge",
    "parse_source", "parse_weight",
]  # fmt: skip
