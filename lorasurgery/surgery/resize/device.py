"""The Gram matrices and small decompositions of many LoRAs at once on a torch device; torch is imported when it is used."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import RequestError
from lorasurgery.surgery.resize.core import NUMERICAL_ZERO, STEEP, Core, matrix
from lorasurgery.surgery.resize.sources import NARROW, FactoredSource, Slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from lorasurgery.adapter import Module, Site
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array

BATCH_BYTES = 256 << 20
"""Of the factors of one batch in float64."""


class Device:
    """A torch device that measures modules and multiplies their factors."""

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

    def sources(self, modules: Iterable[Module], needed: Callable[[Module], int | None]) -> Mapping[Site, FactoredSource]:
        """Every plain LoRA among them, those of one shape together; what is not finite is left to :func:`measure`.

        ``needed``: how many singular values of a module must be accurate, None for all.
        """
        groups: dict[tuple[object, ...], list[Module]] = defaultdict(list)
        for module in modules:
            delta = module.delta
            if isinstance(delta, LowRank) and delta.mid is None:
                groups[delta.up.shape, delta.down.shape, needed(module)].append(module)
        found: dict[Site, FactoredSource] = {}
        for own in groups.values():
            size = _batch_size(own[0])
            for start in range(0, len(own), size):
                found.update(self._measured(own[start : start + size], needed(own[0])))
        return found

    def multiply(self, left: AnyArray, right: AnyArray) -> AnyArray:
        """``left @ right``, both of one dtype."""
        import torch

        sides = (torch.as_tensor(np.ascontiguousarray(side)).to(self._device) for side in (left, right))
        product: AnyArray = torch.matmul(*sides).cpu().numpy()
        return product

    def _measured(self, batch: Sequence[Module], needed: int | None) -> Iterator[tuple[Site, FactoredSource]]:
        from lorasurgery.linalg.factored_torch import batched_cores, batched_svd, on_device

        deltas = [module.delta for module in batch if isinstance(module.delta, LowRank)]
        up, down = (on_device(np.stack([matrix(tensor) for tensor in side]), self._device) for side in _sides(deltas))
        cores = batched_cores(up, down, None if needed is None else min(needed, up.shape[1], down.shape[2]))
        for i, (module, delta) in enumerate(zip(batch, deltas, strict=True)):
            bound, core = float(cores.bounds[i]), None
            values, left, right = (_array(part[i]) for part in (cores.values, cores.left, cores.right))
            narrow = all(tensor.dtype in NARROW for tensor in delta.tensors.values())
            if not np.isfinite(bound):
                continue
            if bool(cores.accurate[i]):
                kind = np.float32 if narrow and values[: left.shape[1]][-1] > STEEP * bound else np.float64
                core = Core(left.astype(kind), right.astype(kind))
            else:
                values = _array(batched_svd(up[i : i + 1], down[i : i + 1])[1][0])
                values = np.where(values > NUMERICAL_ZERO * bound, values, 0.0)
            source = FactoredSource(delta.up, delta.down, values, core, Slot(), narrow, accurate=core is not None)
            source.multiply = self.multiply
            yield module.site, source


def _batch_size(module: Module) -> int:
    elements = 0 if module.delta is None else sum(tensor.size for tensor in module.delta.tensors.values())
    return max(BATCH_BYTES // max(8 * elements, 1), 1)


def _sides(deltas: Sequence[LowRank]) -> tuple[list[Tensor], list[Tensor]]:
    return [delta.up for delta in deltas], [delta.down for delta in deltas]


def _array(part: torch.Tensor) -> Array:
    found: Array = part.cpu().numpy()
    return found
