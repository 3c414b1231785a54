"""NaN and infinity: found by their exponent bits, a block at a time, so that a scan needs little memory.

The rule: what a conversion computes is always checked before it is written; bytes that only move are checked under
``--strict``; alphas are always checked (by the parser). A value that became infinite because the dtype is too narrow is
told apart from one that was so in the input.
"""

from __future__ import annotations

from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.errors import BrokenModuleError, SurgeryError, ValueRangeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lorasurgery.io.tensors import Tensor

BLOCK = 1 << 20
"""Bytes looked at together: they stay in the processor's cache."""

_EXPONENTS = MappingProxyType(
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


def all_finite(dtype: str, data: bytes | memoryview) -> bool:
    """Whether little-endian values of ``dtype`` hold neither NaN nor infinity (integers never do)."""
    import numpy as np

    if dtype not in _EXPONENTS:
        return True
    code, mask = _EXPONENTS[dtype]
    values = np.frombuffer(data, code)
    step = BLOCK // values.itemsize
    bits = values.dtype.type(mask)
    return all(not ((values[at : at + step] & bits) == bits).any() for at in range(0, values.size, step))


def blocks(tensor: Tensor) -> Iterator[bytes]:
    """A stored tensor's bytes, :data:`BLOCK` at most at a time."""
    for region in tensor.regions:
        for at in range(0, region.length, BLOCK):
            yield region.source.read(region.offset + at, min(BLOCK, region.length - at))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if tensor.compute is not None:
        return all_finite(tensor.dtype, tensor.buffer())
    return tensor.dtype not in _EXPONENTS or all(all_finite(tensor.dtype, block) for block in blocks(tensor))


def first_bad(tensors: Mapping[str, Tensor]) -> str | None:
    """The first stored tensor that holds NaN or infinity."""
    return next((name for name, tensor in tensors.items() if tensor.compute is None and not is_finite(tensor)), None)


def computed_bytes(name: str, tensor: Tensor) -> bytes | memoryview:
    """A computed tensor's bytes; raises BrokenModuleError when they hold NaN or infinity."""
    import numpy as np

    try:
        with np.errstate(over="ignore", invalid="ignore"):
            data = tensor.buffer()
    except ValueRangeError as error:
        raise BrokenModuleError(f"{name}: {error.message}", key=name, hint=error.hint) from error
    if not all_finite(tensor.dtype, data):
        raise BrokenModuleError(f"{name} comes out with NaN or infinity in {tensor.dtype}", key=name)
    return data


def blamed(error: BrokenModuleError, path: Path) -> SurgeryError:
    """The same error about the input: its first key with NaN or infinity, or the narrow dtype when it has none."""
    with suppress(SurgeryError, OSError):
        key = first_bad(_tensors(path))
        if key is not None:
            return not_finite(key, path)
    hint = error.hint or "--dtype fp32 or --dtype bf16, or --alpha keep where the target takes it"
    tail = "" if error.hint else ", though every value of the input is finite: the dtype is too narrow for the result"
    return BrokenModuleError(error.message + tail, key=error.key, path=path, hint=hint)


def not_finite(key: str, path: Path | None) -> BrokenModuleError:
    """The error for a stored tensor with NaN or infinity."""
    return BrokenModuleError(
        f"{key} holds NaN or infinity; adapters hold finite numbers only (a training run that diverged?)",
        key=key,
        path=path,
        hint="an earlier checkpoint of the training run, or --drop REGEX to leave the module out",
    )


def _tensors(path: Path) -> Mapping[str, Tensor]:
    from lorasurgery.io.header import read_safetensors
    from lorasurgery.io.peft_folder import read_peft_folder
    from lorasurgery.io.sniff import TORCH_SUFFIXES
    from lorasurgery.io.torchfile import read_torch

    if path.is_dir():
        return read_peft_folder(path)[0].tensors
    return (read_torch if path.suffix.lower() in TORCH_SUFFIXES else read_safetensors)(path).tensors
