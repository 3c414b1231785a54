"""The Gram matrices and small decompositions of many LoRAs at once on a torch device; torch is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.errors import RequestError
from lorasurgery.surgery.resize.core import NUMERICAL_ZERO, Cores, matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array


class Device:
    """A torch device that measures modules and multiplies their factors."""

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
        """Cores of products of one shape; the factors stay on the device."""
        from lorasurgery.linalg.factored_torch import batched_cores

        found = batched_cores(self._stacked(up), self._stacked(down), needed)
        values, left, right, bounds = (_array(part) for part in found[:4])
        return Cores(values, left, right, bounds, found.accurate.cpu().numpy()), None

    def exact(self, up: Tensor, down: Tensor, bound: float) -> Array:
        """All singular values of one product by QR; those that are rounding only are zero."""
        from lorasurgery.linalg.factored_torch import batched_svd

        values = _array(batched_svd(self._stacked([up]), self._stacked([down]))[1][0])
        return np.where(values > NUMERICAL_ZERO * bound, values, 0.0)

    def multiply(self, left: AnyArray, right: AnyArray) -> AnyArray:
        """``left @ right``, both of one dtype."""
        import torch

        sides = (torch.as_tensor(np.ascontiguousarray(side)).to(self._device) for side in (left, right))
        product: AnyArray = torch.matmul(*sides).cpu().numpy()
        return product

    def _stacked(self, tensors: Sequence[Tensor]) -> torch.Tensor:
        from lorasurgery.linalg.factored_torch import on_device

        return on_device(np.stack([matrix(tensor) for tensor in tensors]), self._device)


def _array(part: torch.Tensor) -> Array:
    found: Array = part.cpu().numpy()
    return found
