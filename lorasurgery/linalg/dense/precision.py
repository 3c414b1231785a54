"""Products of float32 numbers that are as exact as float32."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def full_precision() -> Iterator[None]:
    """A context in which torch multiplies float32 matrices in float32; what was allowed before is again at the end.

    A program, or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE in NVIDIA's containers, may have allowed TF32 (three digits) on a GPU and
    bf16 on the CPU, whose rounding is above the errors that are told of a result. The setting belongs to the process.
    """
    restore = _raised()
    try:
        yield
    finally:
        restore()


def _raised() -> Callable[[], None]:
    """Allow float32 only; the way back."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set backend by backend, as torch can from 2.9 on; the two ways must not be mixed
        return _each_raised()
    if before == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return partial(torch.set_float32_matmul_precision, before)


def _each_raised() -> Callable[[], None]:
    backends: list[Any] = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    before = [own.fp32_precision for own in backends]

    def allow(values: list[str]) -> None:
        for own, value in zip(backends, values, strict=True):
            own.fp32_precision = value

    allow(["ieee"] * len(backends))
    return partial(allow, before)
