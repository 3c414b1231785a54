"""DoRA with the base weight: ``V = W + s D``, ``W1 = m V / ||V||``, the norm per output row or per input column.

Norms are over all other axes, kernel included, as PEFT and LyCORIS take them. What a weight (strength) t means differs:

- ``interpolate``: ``W' = W + t (W1 - W)``, ComfyUI's and SD.Next's; the default;
- ``peft``: ``W' = m (W + t s D) / ||W + t s D||``, what Diffusers' adapter weights do;
- ``comfyui``: as interpolate, with ``||W||`` in place of ``||V||`` for magnitudes per output row.

All three agree at t = 1 but for the last. Sources: PEFT ``tuners/lora/dora.py`` 0.21, LyCORIS 4.1 ``functional/general.py``,
ComfyUI ``weight_adapter/base.py`` (2026-05).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Shape

    Work = NDArray[Any]

INTERPOLATE, PEFT, COMFYUI = "interpolate", "peft", "comfyui"
MODES = (INTERPOLATE, PEFT, COMFYUI)
TINY = 1e-12
"""The least a norm counts as."""


def magnitude_shape(size: int, axis: str, axes: int, *, peft: bool) -> Shape:
    """The shape that a magnitude of ``size`` numbers per ``out`` row or ``in`` column is written in.

    ``axes``: how many the weight has. dora_scale is (out, 1, 1...) or (1, in, 1...); PEFT has (out,) for a linear layer and
    (1, out, 1...) for a convolution. Sources: LyCORIS 4.1 ``modules/lokr.py``, PEFT 0.21 ``tuners/lora/dora.py``.
    """
    if peft and axes < 3:
        return (size,)
    first = (1, size) if peft or axis == "in" else (size, 1)
    return (*first, *(1 for _ in range(axes - 2)))


def row_squares(values: Work) -> Work:
    """Squared norms of rows, (rows,), added up in float64."""
    import numpy as np

    squares: Work = np.einsum("ij,ij->i", values, values, dtype=np.float64)
    return squares


def column_squares(values: Work, channels: int) -> Work:
    """Squared norms of input columns over rows and kernel, (channels,), added up in float64."""
    import numpy as np

    squares = np.einsum("ij,ij->j", values, values, dtype=np.float64)
    sums: Work = squares.reshape(channels, -1).sum(axis=1)
    return sums


def ratios(magnitude: Work, squares: Work) -> Work:
    """``m / norm``."""
    import numpy as np

    found: Work = magnitude / np.maximum(np.sqrt(squares), TINY)
    return found


def recomposed(weight: Work, added: Work, factors: Work, strength: float, mode: str) -> None:
    """In place: rows of ``weight`` become the DoRA's; ``added`` is s D (t s D for ``peft``) and is used up.

    ``factors``: m over the norm, (rows, 1) or (1, columns), of the same dtype.
    """
    added += weight
    added *= factors
    if mode == PEFT or strength == 1.0:
        weight[...] = added
        return
    added -= weight
    added *= weight.dtype.type(strength)
    weight += added
