"""Methods that are a sum with coefficients: what they need to know of the changes are inner products of their factors."""

from __future__ import annotations

from math import acos, sin, sqrt
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.verbs.merge.inputs import finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.deltas.delta import Delta
    from lorasurgery.linalg.factors import Array
    from lorasurgery.verbs.merge.inputs import Weighted
    from lorasurgery.verbs.merge.merging import Merging

PARALLEL = 0.9995
"""Above this cosine slerp is linear. Source: mergekit ``merge_methods/slerp.py`` (2026), ``DOT_THRESHOLD``."""


def average(run: Merging, members: Sequence[Weighted]) -> list[float]:
    """``sum_i w_i D_i / sum_i w_i``, over all files: one that lacks a module counts as no change of it.

    Source: mergekit ``merge_methods/linear.py`` (2026) with ``normalize``. Raises ZeroDivisionError never: weights that
    add up to 0 are taken as they are.
    """
    own = {member.source: member.weight for member in members}
    lacking = (i for i in range(len(run.sources)) if i not in own)
    total = sum(own.values()) + sum(run.sources[i].weight.of(run.arch)(members[0].original) for i in lacking)
    return [1.0 / total if total else 1.0] * len(members)


def slerp(run: Merging, members: Sequence[Weighted]) -> list[float]:
    """``sin((1-t) a) / sin(a) D_0 + sin(t a) / sin(a) D_1`` with a the angle between the two; per module.

    ``cos(a) = <D_0, D_1> / (||D_0|| ||D_1||)``. Source: mergekit ``merge_methods/slerp.py`` (2026), Shoemake 1985. Where
    they are nearly parallel, one is zero, or only one file has the module, it is ``(1-t) D_0 + t D_1``.
    """
    linear = (1.0 - run.options.t, run.options.t)
    shares = [linear[m.source] for m in members]
    if len(members) < 2 or not all(_has_matrix(m) for m in members):
        return shares
    (first, both), (_, second) = gram(members)
    cosine = both / sqrt(first * second) if first > 0.0 and second > 0.0 else 1.0
    if abs(cosine) > PARALLEL:
        return shares
    angle = acos(cosine)
    return [sin(share * angle) / sin(angle) for share in shares]


def model_stock(run: Merging, members: Sequence[Weighted]) -> list[float]:
    """``t mean_i D_i`` with ``t = N c / (1 + (N - 1) c)``, c the mean cosine between two of the N files; per module.

    Source: Jang et al. 2024, "Model Stock", equation 7; mergekit ``merge_methods/model_stock.py`` (2026). A module that one
    file has stays as it is. A negative c, for which the formula has no meaning, counts as 0.
    """
    del run
    count = len(members)
    if count < 2 or not all(_has_matrix(m) for m in members):
        return [1.0 / count] * count
    products = gram(members)
    norms = np.sqrt(np.diag(products))
    if not norms.all():
        return [1.0 / count] * count
    cosines = products / np.outer(norms, norms)
    mean = max((float(cosines.sum()) - count) / (count * (count - 1)), 0.0)
    return [mean / (1.0 + (count - 1) * mean)] * count  # t / N


def _has_matrix(member: Weighted) -> bool:
    return member.module.delta is not None and not isinstance(member.module.delta, Opaque)


def gram(members: Sequence[Weighted]) -> Array:
    """Inner products of the scaled changes, (N, N): from the factors, of dense ones element by element."""
    forms = [_form(m.module.delta) for m in members if m.module.delta is not None]
    scales = np.array([m.module.scale.value for m in members])
    found = np.zeros((len(forms), len(forms)))
    for i, first in enumerate(forms):
        for j in range(i, len(forms)):
            found[i, j] = found[j, i] = _inner(first, forms[j])
    products: Array = finite(found * np.outer(scales, scales), members[0].original.name)
    return products


def _form(delta: Delta) -> tuple[Array, Array] | Array:
    """(up, down) as matrices in float64, or the whole change, flat, where it has no small factors."""
    if isinstance(delta, Full):
        return delta.dense().ravel()
    low = delta.to_low_rank()
    if low.rank > min(delta.shape[0], low.down.size // low.rank):
        return delta.dense().ravel()
    return low.up.f64().reshape(low.up.shape[0], -1), low.down.f64().reshape(low.rank, -1)


def _inner(first: tuple[Array, Array] | Array, second: tuple[Array, Array] | Array) -> float:
    """``<u d, v e> = sum((u^T v) * (d e^T))``."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return float(((first[0].T @ second[0]) * (first[1] @ second[1].T)).sum())
    one, other = (form if not isinstance(form, tuple) else (form[0] @ form[1]).ravel() for form in (first, second))
    return float(one @ other)
