"""Plain LoRAs of one shape measured together: a few long steps instead of many short ones.

Threads that take turns for the interpreter at each short step are no faster than one; in batches they are.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.operations.cut.core import batched_cores, exact_values, matrix
from lorasurgery.operations.cut.sources import FactoredSource, Slot
from lorasurgery.operations.route import is_dense_cheaper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.operations.cut.core import Cores


class Backend(Protocol):
    """What decomposes and multiplies: numpy here, torch on a device."""

    batch_bytes: int
    """Of the factors in float64 of the batches of all threads together."""

    def cores(self, up: Sequence[Tensor], down: Sequence[Tensor], needed: int | None) -> tuple[Cores, Factors | None]:
        """Cores of products of one shape, and their factors where these are to be used at once."""
        ...

    def exact(self, up: Tensor, down: Tensor, bound: float) -> Array:
        """All singular values of one product by QR."""
        ...

    def multiply(self, left: AnyArray, right: AnyArray) -> AnyArray:
        """``left @ right``, both of one dtype."""
        ...


Factors = tuple["AnyArray", "AnyArray"]
"""(n, out, rank) and (n, rank, in)."""


class Numpy:
    """On this thread."""

    batch_bytes = 16 << 20

    def cores(self, up: Sequence[Tensor], down: Sequence[Tensor], needed: int | None) -> tuple[Cores, Factors]:
        """As :class:`Backend`."""
        left, right = stacked(up), stacked(down)
        return batched_cores(left, right, needed), (left, right)

    def exact(self, up: Tensor, down: Tensor, bound: float) -> Array:
        """As :class:`Backend`."""
        return exact_values(matrix(up), matrix(down), bound)

    def multiply(self, left: AnyArray, right: AnyArray) -> AnyArray:
        """As :class:`Backend`."""
        product: AnyArray = left @ right
        return product


def stacked(tensors: Sequence[Tensor]) -> Array:
    """(n, rows, the rest) in float64."""
    whole = np.empty((len(tensors), tensors[0].shape[0], prod(tensors[0].shape[1:])))
    for own, tensor in zip(whole, tensors, strict=True):
        own[...] = matrix(tensor)
    return whole


def batches(modules: Sequence[Module], needed: Callable[[Module], int | None], room: int) -> list[list[Module]]:
    """Modules that :func:`measured_together` can take at once; each of the others alone. In the order of their first."""
    groups: dict[object, list[list[Module]]] = defaultdict(list)
    found: list[list[Module]] = []
    for module in modules:
        own = groups[_alike(module, needed)]
        if not own or not is_plain(module, needed(module)) or len(own[-1]) >= _most(module, room):
            own.append([])
            found.append(own[-1])
        own[-1].append(module)
    return found


def is_plain(module: Module, needed: int | None) -> bool:
    """Whether it is a LoRA without a Tucker core and without a magnitude that is best measured by its factors."""
    delta = module.delta
    if not isinstance(delta, LowRank) or delta.mid is not None or module.magnitude is not None:
        return False
    return not is_dense_cheaper(delta, needed)


def _alike(module: Module, needed: Callable[[Module], int | None]) -> object:
    delta = module.delta
    return (delta.up.shape, delta.down.shape, needed(module)) if isinstance(delta, LowRank) else None


def _most(module: Module, room: int) -> int:
    elements = 0 if module.delta is None else sum(tensor.size for tensor in module.delta.tensors.values())
    return max(room // max(8 * elements, 1), 1)


def measured_together(
    batch: Sequence[Module], needed: int | None, narrow: Callable[[Module], bool], backend: Backend
) -> Iterator[FactoredSource | None]:
    """The plain LoRAs of one batch; None for what is not finite.

    ``needed``: how many singular values must be accurate, None for all; ``narrow`` as in :meth:`Cores.core`.
    """
    deltas = [module.delta for module in batch if isinstance(module.delta, LowRank)]
    up, down = deltas[0].up, deltas[0].down
    most = min(up.shape[0], down.size // down.shape[0])
    asked = None if needed is None else min(needed, most)
    cores, factors = backend.cores([delta.up for delta in deltas], [delta.down for delta in deltas], asked)
    exactly = all(tensor.dtype != "F64" for delta in deltas for tensor in (delta.up, delta.down))
    if factors is not None and exactly and all(map(narrow, batch)):  # what most small matrices will be
        factors = factors[0].astype(np.float32), factors[1].astype(np.float32)
    for i, (module, delta) in enumerate(zip(batch, deltas, strict=True)):
        bound, small = float(cores.bounds[i]), narrow(module)
        if not np.isfinite(bound):
            yield None
            continue
        core = cores.core(i, narrow=small)
        values = cores.values[i] if core is not None else backend.exact(delta.up, delta.down, bound)
        source = FactoredSource(delta.up, delta.down, values, core, Slot(), small, accurate=core is not None)
        source.multiply = backend.multiply
        source.fresh = None if factors is None else (factors[0][i], factors[1][i])
        yield source
