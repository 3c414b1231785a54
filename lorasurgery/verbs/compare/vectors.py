"""What is compared as it stands: DoRA magnitudes, biases, and the tensors of families that multiply the base weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.base import CannotError
from lorasurgery.operations.effect.products import Measured

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasurgery.adapter import Module
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import Array
    from lorasurgery.operations.effect.pairs import Side

NEEDS_BASE = "--base MODEL tells what they do to its weights"


def measure_arrays(a: Array, b: Array) -> Measured:
    """Two arrays of one shape as vectors; an array of one element stands for all (zero, for nothing)."""
    a, b = np.broadcast_arrays(a, b)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    return Measured(*norms, float(np.sum(a * b)), float(np.linalg.norm(a - b)))


def beside(a: Side | None, b: Side | None, *, effective: bool) -> Iterator[tuple[str, float]]:
    """(what, distance) of the magnitudes and biases that either side has.

    ``effective``: the change was measured with the base model, the magnitude is in it. Raises CannotError for magnitudes
    that do not correspond.
    """
    if not effective:
        magnitude = _magnitudes(a, b)
        if magnitude is not None:
            yield "magnitude", magnitude
    biases = [None if side is None else _bias(side) for side in (a, b)]
    if any(bias is not None for bias in biases):
        zeros = next(np.zeros(bias.size) for bias in biases if bias is not None)
        first, second = (zeros if bias is None else bias.f64().ravel() for bias in biases)
        yield "bias", measure_arrays(first, second).distance


def _bias(side: Side) -> Tensor | None:
    return None if side.module.bias is None else side.module.bias.rows(side.ranges)


def _magnitudes(a: Side | None, b: Side | None) -> float | None:
    """The distance of two magnitudes, None where neither side has one, 1 where one side has none."""
    found = [None if side is None or side.module.magnitude is None else _magnitude(side) for side in (a, b)]
    if found == [None, None]:
        return None
    first, second = found
    if first is None or second is None:
        return 1.0
    if first[0] != second[0] or first[1].size != second[1].size:
        raise CannotError("one magnitude is per output row, the other per input column; " + NEEDS_BASE)
    return measure_arrays(first[1], second[1]).distance


def _magnitude(side: Side) -> tuple[str, Array]:
    """(axis, values) of these rows; one per input column goes with all rows of its module."""
    magnitude = side.module.magnitude
    assert magnitude is not None  # noqa: S101  the caller has looked
    cut = magnitude.rows(side.ranges, side.module.out)
    return cut.axis, cut.tensor.f64().ravel()


def measure_opaque(a: Side, b: Side) -> Measured:
    """Two modules of one family that multiplies the base weight, as one long vector of tensors each.

    Alpha counts where the family has one (it limits an OFT). Raises CannotError where they are not alike.
    """
    first, second = _tensors(a.module), _tensors(b.module)
    if a.module.family != b.module.family:
        raise CannotError(f"{a.module.family} beside {b.module.family}: " + NEEDS_BASE)
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        raise CannotError(f"their {a.module.family} tensors have other names or shapes: " + NEEDS_BASE)
    if not (a.whole and b.whole):
        raise CannotError(f"{a.module.family.upper()} couples the rows that the files cut differently")
    return measure_arrays(*(np.concatenate([own[name].ravel() for name in first]) for own in (first, second)))


def _tensors(module: Module) -> dict[str, Array]:
    delta = module.delta
    assert delta is not None  # noqa: S101  the caller has looked
    found = {slot: tensor.f64() for slot, tensor in delta.tensors.items()}
    if module.scale.alpha is not None:
        found["alpha"] = module.scale.alpha.f64().ravel()
    return found
