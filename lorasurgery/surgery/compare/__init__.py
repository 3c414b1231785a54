"""Compare two adapters: are they the same, and if not, where and by how much.

>>> from lorasurgery.surgery.compare import compare
>>> found = compare(lorasurgery.load("a.safetensors"), lorasurgery.load("b.safetensors"))   # doctest: +SKIP
>>> found.same, found.verdict(), found.distance()                                           # doctest: +SKIP
"""

from lorasurgery.surgery.compare.engine import CompareOptions, compare
from lorasurgery.surgery.compare.files import open_both
from lorasurgery.surgery.compare.report import TOLERANCES, Comparison, Half, ModulePair

__all__ = ["TOLERANCES", "CompareOptions", "Comparison", "Half", "ModulePair", "compare", "open_both"]
