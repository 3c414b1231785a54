"""Compare two adapters: are they the same, and if not, where and by how much.

>>> from lorasurgery.verbs.compare import compare
>>> found = compare(lorasurgery.load("a.safetensors"), lorasurgery.load("b.safetensors"))   # doctest: +SKIP
>>> found.same, found.verdict(), found.distance()                                           # doctest: +SKIP
"""

from lorasurgery.verbs.compare.engine import CompareOptions, compare
from lorasurgery.verbs.compare.files import open_both
from lorasurgery.verbs.compare.report import TOLERANCES, Comparison, Half, ModulePair

__all__ = ["TOLERANCES", "CompareOptions", "Comparison", "Half", "ModulePair", "compare", "open_both"]
