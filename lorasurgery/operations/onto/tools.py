"""The inner loops: numpy's, or torch's where there is so much to do that importing torch pays.

Measured on one core of a Sapphire Rapids (2026-11), nanoseconds a value, numpy with ml_dtypes / torch 2.13: rounding to bf16
0.42 / 0.15, fp16 1.8 / 0.07, fp8 1.6 / 0.5; reading fp16 0.85 / 0.12; adding rank 32 0.75 / 0.42; of which torch's longer way
to each call takes some again. The import takes 1.2 s. Both round to nearest even; their matrix products differ in the last bit
of float32, so the choice depends on the model and the adapters only, and the same input gives the same bytes.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.operations.onto.numbers import FORMATS, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from numpy.typing import NDArray

    from lorasurgery.operations.onto.plan import Plan

    Work = NDArray[Any]


class Adder(Protocol):
    """Adds to a block, given where in the whole its first row and column are."""

    def __call__(self, block: Work, row: int, column: int = 0) -> None:
        """In place."""


SAVED = MappingProxyType({"BF16": 0.45e-9, "F16": 2.4e-9, "F8_E4M3": 1.2e-9, "F8_E5M2": 1.2e-9})
"""Seconds that torch saves for each value of a dtype, on one core."""
WORTH = 2.4
"""Seconds of one core that must be saved before torch is imported, which two cores wait for."""


class Tools:
    """numpy."""

    def decode(self, stored: Work, dtype: str, out: Work) -> None:
        """Stored values into ``out``, exactly."""
        if dtype.startswith("F8") and out.dtype == np.float32:
            np.take(_table(dtype), stored.view(np.uint8), out=out, mode="clip")
        else:
            np.copyto(out, stored)

    def encode(self, values: Work, dtype: str, out: Work) -> None:
        """Values rounded to nearest even into ``out``, of ``dtype``; out of range they become infinite or NaN.

        numpy warns of those, unless it is told not to. fp8 by a table of the upper 16 bits, the last of which says whether any
        bit below is set: with three bits to spare (four for E5M2) that decides every rounding.
        """
        if dtype.startswith("F8") and values.dtype == np.float32:
            bits = values.view(np.uint32)
            upper = bits >> np.uint32(16)
            upper |= (bits & np.uint32(0xFFFF)) != 0
            np.take(_rounded(dtype), upper, out=out.view(np.uint8), mode="clip")
        else:
            np.copyto(out, values, casting="unsafe")

    def adder(self, up: Work, down: Work) -> Adder:
        """A function that adds a part of ``up @ down`` to a block, in place; for one thread."""
        held = [np.empty(0, down.dtype)]

        def add(block: Work, row: int, column: int = 0) -> None:
            if held[0].size < block.size:
                held[0] = np.empty(block.size, down.dtype)
            product = held[0][: block.size].reshape(block.shape)
            block += np.matmul(up[row : row + len(block)], down[:, column : column + block.shape[1]], out=product)

        return add

    @contextmanager
    def running(self) -> Iterator[None]:
        """While several threads use it."""
        yield


class TorchTools(Tools):
    """torch on the CPU, one thread a call."""

    def decode(self, stored: Work, dtype: str, out: Work) -> None:
        """Stored values into ``out``, exactly; only of fp16 is torch the faster one."""
        if dtype == "F16":
            _tensor(out).copy_(_tensor(stored))
        else:
            super().decode(stored, dtype, out)

    def encode(self, values: Work, dtype: str, out: Work) -> None:
        """Values rounded to nearest even into ``out``, of ``dtype``; torch would cut off what is beyond fp8's range."""
        saturates = dtype == "F8_E4M3" and not float(np.abs(values).max(initial=0.0)) <= FORMATS[dtype].largest
        if dtype in SAVED and not saturates:
            bits = out.view(np.int16 if out.itemsize == 2 else np.int8)
            _tensor(bits).view(_dtype(dtype)).copy_(_tensor(values))
        else:
            super().encode(values, dtype, out)

    def adder(self, up: Work, down: Work) -> Adder:
        """A function that adds a part of ``up @ down`` to a block, in place."""
        left, right = _tensor(up), _tensor(down)

        def add(block: Work, row: int, column: int = 0) -> None:
            _tensor(block).addmm_(left[row : row + len(block)], right[:, column : column + block.shape[1]])

        return add

    @contextmanager
    def running(self) -> Iterator[None]:
        """With one thread of torch for each of ours."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def tools_for(plan: Plan) -> Tools:
    """torch where it saves more than its import takes, else numpy."""
    saved = sum(own.weight.tensor.size * SAVED.get(own.weight.tensor.dtype, 0.0) for own in plan.changes.values())
    return TorchTools() if saved > WORTH else Tools()


@lru_cache
def _table(dtype: str) -> Work:
    """The 256 numbers of an fp8 format."""
    values: Work = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float32)
    return values


@lru_cache
def _rounded(dtype: str) -> Work:
    """The fp8 number nearest to each float32 whose lower 16 bits are 0, as bits."""
    values = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    rounded: Work = nearest(values, dtype).view(np.uint8)
    return rounded


def _tensor(array: Work) -> torch.Tensor:
    import torch

    return torch.from_numpy(array)


def _dtype(dtype: str) -> torch.dtype:
    import torch

    return {
        "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }[dtype]  # fmt: skip
