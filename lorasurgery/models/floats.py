"""Stored floating-point numbers as float32, or float64 where they are stored so."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from lorasurgery.io.dtypes import numpy_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Tensor

FP8 = ("F8_E4M3", "F8_E5M2")


def floats(tensor: Tensor) -> NDArray[Any]:
    """The values in the tensor's shape: exact, as float32 holds every 8 and 16 bit float."""
    import numpy as np

    if tensor.dtype == "F64":
        return tensor.f64()
    if tensor.dtype in FP8:  # a look-up is twice as fast as ml_dtypes' conversion
        return _values(tensor.dtype)[np.frombuffer(tensor.tobytes(), np.uint8)].reshape(tensor.shape)
    return tensor.f32()


@cache
def _values(dtype: str) -> NDArray[Any]:
    """What each of the 256 bytes stands for."""
    import numpy as np

    found: NDArray[Any] = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    return found
