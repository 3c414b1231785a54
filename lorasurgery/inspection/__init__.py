"""What a file is, from its header and its few scalar tensors: no torch, and numpy only for spectra.

>>> from lorasurgery.inspection import describe
>>> describe("lora.safetensors").architecture              # doctest: +SKIP
'flux1'
"""

from lorasurgery.inspection.describe import describe
from lorasurgery.inspection.description import SCHEMA, Description

__all__ = ["SCHEMA", "Description", "describe"]
