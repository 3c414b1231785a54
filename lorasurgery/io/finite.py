"""NaN and infinity: found by their exponent bits, a block at a time, so that a scan needs little memory.

The rule: what a conversion computes is always checked before it is written; bytes that only move are checked under
``--strict``; alphas are always checked (by the parser). A value that became infinite because the dtype is too narrow is
told apart from one that was so in the input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.errors import BrokenModuleError, ValueRangeError
from lorasurgery.io.dtypes import BLOCK, EXPONENTS, all_finite

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lorasurgery.io.tensors import Tensor


def blocks(tensor: Tensor) -> Iterator[bytes]:
    """A stored tensor's bytes, :data:`BLOCK` at most at a time."""
    for region in tensor.regions:
        for at in range(0, region.length, BLOCK):
            yield region.source.read(region.offset + at, min(BLOCK, region.length - at))


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if tensor.compute is not None:
        return all_finite(tensor.dtype, tensor.buffer())
    return tensor.dtype not in EXPONENTS or all(all_finite(tensor.dtype, block) for block in blocks(tensor))


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


def not_finite(key: str, path: Path | None) -> BrokenModuleError:
    """The error for a stored tensor with NaN or infinity."""
    return BrokenModuleError(
        f"{key} holds NaN or infinity; adapters hold finite numbers only (a training run that diverged?)",
        key=key,
        path=path,
        hint="an earlier checkpoint of the training run, or --drop REGEX to leave the module out",
    )
