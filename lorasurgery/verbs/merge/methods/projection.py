"""What one file does apart from others: the part of its change that lies in their row and column spaces is taken out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import Scale
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.io.tensors import of_array
from lorasurgery.linalg.low_rank import factored_svd
from lorasurgery.operations.sum.add import refuse_nonlinear
from lorasurgery.verbs.merge.inputs import finite, times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.linalg.factors import Array
    from lorasurgery.operations.sum.adding import Adding
    from lorasurgery.site import Site
    from lorasurgery.verbs.merge.inputs import Weighted
    from lorasurgery.verbs.merge.merging import Merging
    from lorasurgery.verbs.merge.sums import Sums

NEGLIGIBLE = 1e-6
"""Directions of the others with singular values below this share of the largest do not count."""


def projected(run: Merging, sums: Sums, site: Site, members: Sequence[Weighted]) -> Module | None:
    """The first file's change A without what it has in common with B, the sum of the others; per module.

    With U and V orthonormal bases of B's column and row space, P = U U^T and Q = V V^T:
    ``orthogonal``: (1 - P) A (1 - Q), which reads nothing that B reads and writes nothing that B writes;
    ``remove``: A - P A Q, the nearest to A of which nothing is both. Modules of the other files alone are left out.
    The weights of the others do not matter, but for 0.
    """
    first = [m for m in members if m.source == 0]
    others = [m for m in members if m.source != 0 and m.module.delta is not None]
    if not first:
        return None
    if not others or first[0].module.delta is None:
        return sums(site, first, [run.options.factor])
    try:
        refuse_nonlinear([m.module for m in (*first, *others)])
        module = _apart(first[0].module, [m.module for m in others], keep_both=run.options.method == "orthogonal")
    except CannotError as reason:
        sums.refused(members, reason)
        return None
    assert module.delta is not None  # noqa: S101  it is a LoRA
    how = sums.adding(site, first)
    held = times(replace(module, delta=_held(module.delta, how)), run.options.factor)
    return sums.noted(members, held, run.options.method)


def _apart(module: Module, others: Sequence[Module], *, keep_both: bool) -> Module:
    """As a LoRA whose factors are float64; raises CannotError for full differences and vectors."""
    deltas = [m.delta for m in (module, *others) if m.delta is not None]
    if any(isinstance(delta, Full) for delta in deltas):
        raise CannotError("a full difference has every direction; make a LoRA of it first (resize --full)")
    own, rest = deltas[0].to_low_rank(), [(m.delta.to_low_rank(), m.scale.value) for m in others if m.delta is not None]
    up, down = (finite(factor.f64(), module.name) for factor in (own.up, own.down))
    up, down = up.reshape(len(up), -1), down.reshape(own.rank, -1)
    left, right = _bases(rest, module.name)
    if keep_both:
        up, down = up - left @ (left.T @ up), down - (down @ right.T) @ right
    else:
        up, down = np.hstack([up, -left @ (left.T @ up)]), np.vstack([down, (down @ right.T) @ right])
    ones = tuple(1 for _ in own.down.shape[2:])
    factors = up.reshape(*up.shape, *ones), down.reshape(len(down), *own.down.shape[1:])
    return replace(
        module,
        delta=LowRank(*(of_array(f, "F64") for f in factors)),
        scale=Scale(module.scale.value, module.scale.source),
        extras={},
    )


def _bases(terms: Sequence[tuple[LowRank, float]], name: str) -> tuple[Array, Array]:
    """Orthonormal columns (out, k) and rows (k, in) of the sum of the terms."""
    up = np.hstack([low.up.f64().reshape(low.up.shape[0], -1) * factor for low, factor in terms])
    down = np.vstack([low.down.f64().reshape(low.rank, -1) for low, _ in terms])
    left, values, right = factored_svd(finite(up, name), finite(down, name))
    count = int(np.sum(values > NEGLIGIBLE * values[0])) if values.size else 0
    return left[:, :count], right[:count]


def _held(delta: Delta, how: Adding) -> LowRank:
    """In the dtype of the result, computed now: it takes what the file takes, and the float64 factors are given up."""
    low = delta.to_low_rank().cast(how.dtype, how.record)
    return LowRank(of_array(low.up.array(), how.dtype), of_array(low.down.array(), how.dtype))
