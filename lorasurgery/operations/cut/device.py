"""The Gram matrices and small decompositions of many LoRAs at once on a torch device; torch is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.errors import NoRoomError, RequestError
from lorasurgery.linalg.halving import DeviceFullError, in_halves
from lorasurgery.operations.cut.core import NUMERICAL_ZERO, Cores, matrix

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array


class Device:
    """A torch device that measures modules and multiplies their factors.

    Its methods raise NoRoomError where its memory is too small for one module.
    """

    batch_bytes = 256 << 20

    def __init__(self, name: str) -> None:
        """Raises RequestError where torch is missing or has no such device."""
        try:
            from lorasurgery.linalg.factored_torch import checked_device
        except ImportError as error:
            raise RequestError(f"device {name} needs torch", hint="pip install torch, or no device") from error
        try:
            self._device = checked_device(name)
        except ValueError as error:
            raise RequestError(str(error), hint="no device: the CPU's threads do without torch") from error

    def cores(self, up: Sequence[Tensor], down: Sequence[Tensor], needed: int | None) -> tuple[Cores, None]:
        """Cores of products of one shape."""
        parts = self._fitting(list(zip(up, down, strict=True)), lambda some: [self._cores(some, needed)])
        return Cores(*(np.concatenate(same) for same in zip(*parts, strict=True))), None

    def _cores(self, pairs: Sequence[tuple[Tensor, Tensor]], needed: int | None) -> tuple[AnyArray, ...]:
        from lorasurgery.linalg.factored_torch import batched_cores

        up, down = (self._stacked(side) for side in zip(*pairs, strict=True))
        return tuple(part.cpu().numpy() for part in batched_cores(up, down, needed))

    def exact(self, up: Tensor, down: Tensor, bound: float) -> Array:
        """All singular values of one product by QR; those that are rounding only are zero."""
        (values,) = self._fitting([(up, down)], lambda some: [self._exact(*some[0])])
        return np.where(values > NUMERICAL_ZERO * bound, values, 0.0)

    def _exact(self, up: Tensor, down: Tensor) -> Array:
        from lorasurgery.linalg.factored_torch import batched_svd

        values: Array = batched_svd(self._stacked([up]), self._stacked([down]))[1][0].cpu().numpy()
        return values

    def multiply(self, left: AnyArray, right: AnyArray) -> AnyArray:
        """``left @ right``, both of one dtype; in float64 on a GPU, which may multiply float32 with three digits (TF32)."""
        (product,) = self._fitting([(left, right)], lambda some: [self._product(*some[0])])
        found: AnyArray = product
        return found

    def _product(self, left: AnyArray, right: AnyArray) -> AnyArray:
        import torch

        first, second = (torch.as_tensor(np.ascontiguousarray(side)).to(self._device) for side in (left, right))
        if self._device.type != "cpu":
            first, second = first.double(), second.double()
        product: AnyArray = torch.matmul(first, second).cpu().numpy()
        return product.astype(left.dtype, copy=False)

    def _fitting(self, pairs: Sequence[Any], work: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
        try:
            return in_halves(pairs, work)
        except DeviceFullError:
            pass
        sizes = " and ".join(" x ".join(map(str, side.shape)) for side in pairs[0])
        raise NoRoomError(
            f"{self._device} has too little memory left for factors of {sizes}",
            hint="no device: the CPU's threads do without torch",
        )

    def _stacked(self, tensors: Sequence[Tensor]) -> torch.Tensor:
        from lorasurgery.linalg.factored_torch import on_device

        return on_device(np.stack([matrix(tensor) for tensor in tensors]), self._device)
