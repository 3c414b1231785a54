"""The parameters of a model by their own names: what a table can be extended by."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.io.dtypes import FLOATS
from lorasurgery.models.names import PARTS
from lorasurgery.models.scales import is_number_of_another

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.io.tensors import Shape
    from lorasurgery.models.model import Model


def parameters(model: Model) -> Mapping[str, Shape]:
    """Name -> shape of every parameter of the denoiser, or of the text encoder that the model is, in the order of the files.

    Names are the files' own without what stands before all of them: ``blocks.0.self_attn.q.weight`` and ``.bias`` (there
    only where the layer has one), ``blocks.0.modulation``. Scales of fp8 weights and integers, which are buffers, are none.
    """
    found: dict[str, Shape] = {}
    for name, weight in model.weights.items():
        about = is_number_of_another(weight.key, weight.file.raw.tensors)
        part = not model.prefix and name.startswith(PARTS)
        if name.startswith(model.prefix) and not part and not about and weight.tensor.dtype in FLOATS:
            found[name[len(model.prefix) :]] = weight.shape
    return MappingProxyType(found)
