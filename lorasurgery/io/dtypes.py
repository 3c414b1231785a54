"""safetensors' dtypes: their sizes, numpy's names for them, and values from one to another.

numpy is imported only when it is needed.
"""

from __future__ import annotations

from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import SurgeryError, ValueRangeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]

BITS = MappingProxyType(
    {
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
        **dict.fromkeys(("F32", "U32", "I32"), 32),
        **dict.fromkeys(("BF16", "F16", "U16", "I16"), 16),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        "F4": 4,
    }
)
"""Bits per element of every safetensors dtype. Source: ``Dtype`` in ``safetensors/src/tensor.rs`` (0.8)."""

FLOATS = frozenset({"F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"})
INTEGERS = frozenset({"I64", "I32", "I16"})
"""What shapes and places in a matrix are saved in."""
CARRIED = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""Floating-point types that no adapter is trained in: their bytes are moved, their values are never computed with."""

_NUMPY_NAMES = MappingProxyType(
    {
        "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32",
        "I32": "int32", "F16": "float16", "U16": "uint16", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    }
)  # fmt: skip
_STRUCT_CODES = MappingProxyType(
    {
        "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "U64": "<Q", "I32": "<i", "U32": "<I", "I16": "<h", "U16": "<H",
        "I8": "<b", "U8": "<B", "BOOL": "<?",
    }
)  # fmt: skip
_ML_NAMES = MappingProxyType(
    {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
)

BLOCK = 1 << 20
"""Bytes looked at together: they stay in the processor's cache."""

EXPONENTS = MappingProxyType(
    {
        "F64": ("<u8", 0x7FF0_0000_0000_0000),
        "F32": ("<u4", 0x7F80_0000),
        "BF16": ("<u2", 0x7F80),
        "F16": ("<u2", 0x7C00),
        "F8_E5M2": ("u1", 0x7C),
        "F8_E4M3": ("u1", 0x7F),  # no infinity, and one NaN: all bits set
    }
)
"""dtype -> the unsigned integer of its size, and the bits that are all set in a NaN or an infinity only."""


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """numpy's dtype of a safetensors dtype name; raises SurgeryError for those of :data:`CARRIED`."""
    import numpy as np

    if dtype in CARRIED:
        raise SurgeryError(
            f"{dtype} values are carried as bytes, not computed with", hint="a version of the file in F32, F16 or BF16"
        )

    if dtype in _NUMPY_NAMES:
        return np.dtype(_NUMPY_NAMES[dtype])
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_NAMES[dtype]))
    return found


def cast_array(array: Array, dtype: str) -> Array:
    """The values in ``dtype``, rounded to nearest even; raises ValueRangeError when a finite one becomes infinite or NaN."""
    import numpy as np

    wanted = numpy_dtype(dtype)
    if array.dtype == wanted:
        return array
    if array.dtype.isbuiltin == wanted.isbuiltin == 1:  # numpy's own types tell of an overflow
        with suppress(FloatingPointError), np.errstate(over="raise", invalid="ignore"):
            whole: Array = array.astype(wanted)
            return whole
    with np.errstate(over="ignore", invalid="ignore"):
        cast: Array = array.astype(wanted)
    if dtype in FLOATS and not all_finite(dtype, np.ascontiguousarray(cast).view(np.uint8).reshape(-1).data):
        lost = ~np.isfinite(cast) & np.isfinite(array)
        if lost.any():
            largest = float(np.abs(array[lost].astype(np.float64)).max())
            raise ValueRangeError(
                f"a value of {largest:.3g} is beyond the range of {dtype}", hint="--dtype fp32 or --dtype bf16"
            )
    return cast


def all_finite(dtype: str, data: bytes | memoryview) -> bool:
    """Whether little-endian values of ``dtype`` hold neither NaN nor infinity (integers never do)."""
    import numpy as np

    if dtype not in EXPONENTS:
        return True
    code, mask = EXPONENTS[dtype]
    values = np.frombuffer(data, code)
    step = BLOCK // values.itemsize
    bits = values.dtype.type(mask)
    return all(not ((values[at : at + step] & bits) == bits).any() for at in range(0, values.size, step))


def scalar_value(dtype: str, data: bytes) -> float:
    """One element's value without numpy, for alphas and counters."""
    import struct

    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    code = _STRUCT_CODES.get(dtype)
    if code is None:
        import numpy as np

        return float(np.frombuffer(data, numpy_dtype(dtype)).astype(np.float64)[0])
    return float(struct.unpack(code, data)[0])


def widest(dtypes: Sequence[str]) -> str:
    """The dtype that holds every value of the given ones: the common one, or float32 (float64 if one is)."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "F64" if distinct & {"F64", "I64", "U64", "I32", "U32"} else "F32"


def wide(dtype: str) -> str:
    """The dtype to calculate in: float32 holds every 16 and 8 bit value exactly."""
    return "float64" if dtype in ("F32", "F64") else "float32"
