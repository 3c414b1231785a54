"""Base models: every tensor of a checkpoint by the original weight whose rows it holds, read a few rows at a time.

A file, shards or a folder; original, ComfyUI, all-in-one or Diffusers names; plain floats, scaled fp8 or GGUF. The rest of
the program asks for rows of original weights and does not see the difference.
"""

from lorasurgery.models.files import ModelFile
from lorasurgery.models.model import Model, open_model
from lorasurgery.models.names import Place
from lorasurgery.models.parameters import parameters
from lorasurgery.models.reading import Reader
from lorasurgery.models.weights import Weight

__all__ = ["Model", "ModelFile", "Place", "Reader", "Weight", "open_model", "parameters"]
