"""The formulas of methods that look at every element: arrays of one module in, one array out.

``deltas``: (files, out, ...), each already times its weight; ``weights``: (files,). Where a formula is that of a paper and
mergekit or PEFT have another, the docstring says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.linalg.factors import AnyArray

TINY = 1e-8
CHUNK = 1 << 17
"""Elements of all files together that are looked at at a time."""


def largest(delta: AnyArray, density: float) -> AnyArray:
    """A mask of the ``int(density * size)`` elements of largest size (at least one).

    Source: TIES (Yadav et al. 2023, section 3, "trim"); PEFT ``utils/merge_utils.py`` ``magnitude_based_pruning`` (2026).
    """
    return _top(np.abs(delta), max(int(density * delta.size), 1))


def _top(sizes: AnyArray, count: int) -> AnyArray:
    """A mask of the ``count`` largest of non-negative numbers; of equal ones the first."""
    if count >= sizes.size:
        return np.ones(sizes.shape, bool)
    if count == 0:
        return np.zeros(sizes.shape, bool)
    least = np.partition(sizes.ravel(), sizes.size - count)[sizes.size - count]
    kept: AnyArray = sizes > least
    equal = np.flatnonzero(sizes == least)[: count - int(np.count_nonzero(kept))]
    kept.reshape(-1)[equal] = True
    return kept


def in_blocks(formula: Callable[[AnyArray], AnyArray], deltas: AnyArray) -> AnyArray:
    """A formula of single elements, some rows at a time, so that what it makes on the way stays in the cache."""
    result = np.empty(deltas.shape[1:], deltas.dtype)
    rows = max(CHUNK // max(deltas[:, 0].size, 1), 1)
    for start in range(0, len(result), rows):
        result[start : start + rows] = formula(deltas[:, start : start + rows])
    return result


def drawn(delta: AnyArray, density: float, rng: np.random.Generator) -> AnyArray:
    """DARE: each element stays with probability ``density`` and is divided by it, so that the mean stays.

    Source: Yu et al. 2024, "Language Models are Super Mario", equation 3. mergekit rescales to the same L1 norm instead.
    """
    kept: AnyArray = np.where(rng.random(delta.shape, np.float32) < density, delta / density, 0.0)
    return kept


def drawn_by_size(delta: AnyArray, density: float, epsilon: float, rng: np.random.Generator) -> AnyArray:
    """DELLA's MagPrune: in each row the k-th smallest of n stays with ``density - epsilon/2 + epsilon k/(n-1)``, rescaled.

    Source: Deep et al. 2024, "DELLA-Merging", section 3.1, with each element divided by its own probability to stay.
    """
    rows = delta.reshape(len(delta), -1)
    order = np.argsort(np.argsort(np.abs(rows), axis=1, kind="stable"), axis=1, kind="stable")
    stays = density - epsilon / 2 + epsilon * order / max(rows.shape[1] - 1, 1)
    kept: AnyArray = np.where(rng.random(rows.shape, np.float32) < stays, rows / stays, 0.0)
    return kept.reshape(delta.shape)


def without_outliers(delta: AnyArray, density: float, gamma: float) -> AnyArray:
    """Breadcrumbs: a mask without the ``gamma`` largest, and of what is left the share ``density`` of all, largest first.

    Source: Davari and Belilovsky 2023, "Model Breadcrumbs"; mergekit ``sparsify.py`` ``magnitude_outliers`` (2026).
    """
    top, sizes = int(gamma * delta.size), np.abs(delta)
    count = min(max(int(density * delta.size), 1), delta.size - top)
    kept: AnyArray = _top(sizes, top + count) & ~_top(sizes, top)
    return kept


def agreeing(deltas: AnyArray, majority: str) -> AnyArray:
    """A mask of the elements whose sign is the elected one: that of the sum, or of the sum of signs; 0 counts as plus.

    Source: TIES, "elect"; the deltas are weighted, as in mergekit ``sparsify``/``get_mask`` (2026); PEFT's are not.
    """
    votes = deltas.sum(axis=0) if majority == "total" else np.sign(deltas).sum(axis=0)
    mask: AnyArray = np.where(votes >= 0.0, deltas > 0.0, deltas < 0.0)
    return mask


def disjoint(deltas: AnyArray, weights: AnyArray, mask: AnyArray) -> AnyArray:
    """``sum_i mask_i w_i d_i / sum_i mask_i w_i``: the mean over those that agree; ``deltas`` are ``w_i d_i``.

    Source: TIES, "disjoint merge"; mergekit ``generalized_task_arithmetic.py`` with ``normalize`` (2026). PEFT divides by
    the number of those that agree.
    """
    total = np.tensordot(weights, mask.astype(weights.dtype), 1)
    total[np.abs(total) < TINY] = 1.0
    merged: AnyArray = (deltas * mask).sum(axis=0)
    merged /= total
    return merged


def sce(deltas: AnyArray, density: float, majority: str) -> AnyArray:
    """Select by variance, calculate weights, erase minorities.

    The share ``density`` of elements with the largest variance over the files stays; each file's weight is the mean
    square of what it has there; elements against the elected sign go; weighted mean. Source: Wan et al. 2024, "FuseChat
    2.0"; mergekit ``merge_methods/sce.py`` (2026). One file alone is its own result.
    """
    if len(deltas) == 1:
        only: AnyArray = deltas[0]
        return only
    if density < 1.0:
        deltas = deltas * largest(in_blocks(lambda part: part.var(axis=0), deltas), density)
    energy = np.array([np.square(own, dtype=np.float64).sum() for own in deltas])
    total = energy.sum()
    shares = energy / total if total > 0.0 else np.full(len(deltas), 1.0 / len(deltas))
    shares = shares.reshape((-1,) + (1,) * (deltas.ndim - 1))

    def mean(part: AnyArray) -> AnyArray:
        weights = np.where(agreeing(part, majority), shares, 0.0)
        averaged: AnyArray = (part * weights).sum(axis=0) / np.maximum(weights.sum(axis=0), 1e-6)
        return averaged

    return in_blocks(mean, deltas)
