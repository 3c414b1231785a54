"""A whole module in another dtype, and what that costs its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Magnitude
from lorasurgery.deltas.rounding import rounded

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.base import Record

MAGNITUDE, BIAS = "{} (magnitude)", "{} (bias)"
"""What the parts of a module beside its change are called in a list of errors: theirs are against their own norms."""


def cast_module(module: Module, dtype: str, recorder: Callable[[str], Record]) -> Module:
    """Every factor, magnitude and bias in ``dtype``; alphas keep theirs. ``recorder(name)`` gives where errors go."""
    name, magnitude, bias = module.name, module.magnitude, module.bias
    if magnitude is not None:
        magnitude = Magnitude(rounded(magnitude.tensor, dtype, recorder(MAGNITUDE.format(name))), magnitude.axis)
    return replace(
        module,
        delta=None if module.delta is None else module.delta.cast(dtype, recorder(name)),
        magnitude=magnitude,
        bias=None if bias is None else rounded(bias, dtype, recorder(BIAS.format(name))),
    )
