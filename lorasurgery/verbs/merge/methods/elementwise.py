"""Methods that look at every element: one module at a time is made dense, and made again when it is written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from lorasurgery.adapter import Scale
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import rounded
from lorasurgery.io.tensors import computed
from lorasurgery.operations.sum.add import added, refuse_nonlinear
from lorasurgery.verbs.merge.inputs import finite, times
from lorasurgery.verbs.merge.methods import arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.linalg.factors import AnyArray
    from lorasurgery.site import Site
    from lorasurgery.verbs.merge.inputs import Weighted
    from lorasurgery.verbs.merge.merging import Merging
    from lorasurgery.verbs.merge.options import MergeOptions
    from lorasurgery.verbs.merge.sums import Sums

    Draw = Callable[[int], np.random.Generator]
    Formula = Callable[[AnyArray, AnyArray, MergeOptions, Draw], AnyArray]


def elementwise(run: Merging, sums: Sums, site: Site, members: Sequence[Weighted]) -> Module | None:
    """The method's result for one site; modules that have no matrix (norms, biases alone) are added.

    A file without the module has no say. The random numbers depend on the seed, the site and the file, and on nothing else.
    """
    own = [m for m in members if m.module.delta is not None]
    how = sums.adding(site, members)
    if len(how.shape) < 2 or not own or (len(own) == 1 and not own[0].linear):
        return sums(site, members, [run.options.factor] * len(members))
    try:
        refuse_nonlinear([m.module for m in own])
        vectors = [times(replace(m.module, delta=None), run.options.factor) for m in members]
        bias = (added(vectors, how).module or vectors[0]).bias
    except CannotError as reason:
        sums.refused(members, reason)
        return None
    options, formula = run.options, FORMULAS[run.options.method]
    weights = np.array([m.weight for m in own], np.float32)

    def draw(index: int) -> np.random.Generator:
        return np.random.default_rng((options.seed, crc32(str(site).encode()), own[index].source))

    def values() -> AnyArray:
        deltas = finite(np.stack([_dense(m.module).reshape(how.shape) for m in own]), own[0].original.name)
        merged: AnyArray = formula(deltas, weights, options, draw) * options.factor
        return merged

    diff = rounded(computed("F32", how.shape, values), how.dtype, how.record)
    module = replace(own[0].module, delta=Full(diff), scale=Scale(1.0, "merged"), bias=bias, extras={})
    return sums.noted(members, module, options.method)


def _dense(module: Module) -> AnyArray:
    """The scaled change in float32, which is what masks and means need."""
    delta = module.delta
    if isinstance(delta, LowRank) and delta.mid is None:
        up, down = delta.up.f32().reshape(delta.up.shape[0], -1), delta.down.f32().reshape(delta.rank, -1)
        product: AnyArray = (up * np.float32(module.scale.value)) @ down
        return product
    return module.dense().astype(np.float32)


def _ties(deltas: AnyArray, weights: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    """TIES: trim each file to its largest elements, elect the sign, mean of those that agree. Yadav et al. 2023."""
    del draw
    for i, delta in enumerate(deltas):
        deltas[i] *= arrays.largest(delta, options.density)
    return _mean_of_agreeing(deltas, weights, options)


def _mean_of_agreeing(kept: AnyArray, weights: AnyArray, options: MergeOptions) -> AnyArray:
    return arrays.in_blocks(lambda part: arrays.disjoint(part, weights, arrays.agreeing(part, options.majority)), kept)


def _dare(deltas: AnyArray, weights: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    """DARE, then the sum. Yu et al. 2024."""
    del weights
    summed: AnyArray = _drawn(deltas, options, draw).sum(axis=0)
    return summed


def _dare_ties(deltas: AnyArray, weights: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    """DARE in place of the trimming, then TIES' election; the sum of those that agree.

    Source: mergekit ``dare_ties`` (2026), which does not normalise.
    """
    del weights
    kept = _drawn(deltas, options, draw)
    return arrays.in_blocks(lambda part: np.where(arrays.agreeing(part, options.majority), part, 0.0).sum(axis=0), kept)


def _della(deltas: AnyArray, weights: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    """DELLA: MagPrune, election, mean of those that agree. Deep et al. 2024; mergekit ``della`` (2026)."""
    kept = np.stack([arrays.drawn_by_size(d, options.density, options.epsilon, draw(i)) for i, d in enumerate(deltas)])
    return _mean_of_agreeing(kept, weights, options)


def _breadcrumbs(deltas: AnyArray, weights: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    """Breadcrumbs: neither the largest nor the smallest elements, then the sum. Davari and Belilovsky 2023."""
    del weights, draw
    kept = [np.where(arrays.without_outliers(d, options.density, options.gamma), d, 0.0) for d in deltas]
    summed: AnyArray = np.sum(kept, axis=0)
    return summed


def _magnitude_prune(deltas: AnyArray, weights: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    """The largest elements of each file, then the sum. Source: PEFT ``utils/merge_utils.py`` (2026), on whole changes."""
    del weights, draw
    summed: AnyArray = np.sum([np.where(arrays.largest(d, options.density), d, 0.0) for d in deltas], axis=0)
    return summed


def _sce(deltas: AnyArray, weights: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    """See :func:`lorasurgery.verbs.merge.methods.arrays.sce`."""
    del weights, draw
    return arrays.sce(deltas, options.density, options.majority)


def _drawn(deltas: AnyArray, options: MergeOptions, draw: Draw) -> AnyArray:
    return np.stack([arrays.drawn(delta, options.density, draw(i)) for i, delta in enumerate(deltas)])


FORMULAS: Mapping[str, Formula] = {
    "ties": _ties, "dare": _dare, "dare-ties": _dare_ties, "della": _della, "breadcrumbs": _breadcrumbs,
    "magnitude-prune": _magnitude_prune, "sce": _sce,
}  # fmt: skip
