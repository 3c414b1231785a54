"""Other programs' results, faults included, for those who need the old numbers; each with what is wrong, and how far off.

The errors are measured against the exact sum with the same weights, module by module.
"""

from __future__ import annotations

from dataclasses import replace
from math import copysign, sqrt
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import Scale
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import NotRepresentableError
from lorasurgery.io.tensors import of_array
from lorasurgery.linalg.low_rank import difference_norm, factored_svd, product_norm
from lorasurgery.verbs.merge.inputs import finite
from lorasurgery.verbs.merge.methods.arrays import largest
from lorasurgery.verbs.merge.options import KOHYA_CONCAT, SUM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.site import Site
    from lorasurgery.verbs.merge.inputs import Weighted
    from lorasurgery.verbs.merge.merging import Merging
    from lorasurgery.verbs.merge.sums import Sums

    Factors = tuple[Array, Array]
    """up (out, r) and down (r, in*k*k) in float64, without scale."""

FAULTS = {
    "kohya": (
        "the weight acts squared, because it multiplies up and down both (0.5 gives a quarter of the effect)",
        "ups and downs are added apart from each other, which adds the products of one file's up and another's down",
        "the first file's alpha and rank are kept for every module",
    ),
    "kohya-concat": (
        "the weight acts squared, because it multiplies up and down both (0.5 gives a quarter of the effect)",
        "the first file's alpha is kept although the rank grows, so that the result is too weak by rank / sum of ranks",
    ),
    "peft": (
        "A and B are added apart from each other, which adds the products of one file's B and another's A",
        "a scale is split into two square roots, so that the effect of alpha is right only for one file alone",
    ),
    "peft svd": (
        "the scale alpha / rank acts squared: the deltas contain it already and are multiplied by it again",
        "PEFT 0.21 has put this right: its svd is the best of its rank, as a rank is here without --compat",
    ),
}
"""Sources: sd-scripts ``networks/merge_lora.py``; PEFT ``tuners/lora/model.py`` ``add_weighted_adapter`` (2026)."""


def as_kohya(run: Merging, sums: Sums, site: Site, members: Sequence[Weighted]) -> Module | None:
    """sd-scripts' ``merge_lora.py``: ``s_i = sqrt(alpha_i / alpha_0) w_i``, ``up = sum |s_i| u_i``, ``down = sum s_i d_i``.

    ``kohya-concat``: the same terms side by side. alpha is the first file's. Source: sd-scripts ``networks/merge_lora.py``
    ``merge_lora_models`` (2026). Raises NotRepresentableError for other families and, without concat, unequal ranks.
    """
    factors = _factors(run, members, same_rank=run.options.compat != KOHYA_CONCAT)
    alphas = [m.original.scale.value * low.shape[1] for m, (low, _) in zip(members, factors, strict=True)]
    shares = [_root(alpha, alphas[0], run, m) * m.weight for alpha, m in zip(alphas, members, strict=True)]
    ups = [abs(s) * up for s, (up, _) in zip(shares, factors, strict=True)]
    downs = [s * down for s, (_, down) in zip(shares, factors, strict=True)]
    concat = run.options.compat == KOHYA_CONCAT
    up, down = (np.hstack(ups), np.vstack(downs)) if concat else (np.sum(ups, axis=0), np.sum(downs, axis=0))
    return _told(run, sums, site, members, (up, down), alphas[0] / up.shape[1])


def _root(alpha: float, first: float, run: Merging, member: Weighted) -> float:
    """``sqrt(alpha / first)``; raises NotRepresentableError where sd-scripts stops, too."""
    if first == 0.0 or alpha / first < 0.0:
        raise _nothing(run, member, f"alphas of {first:g} and {alpha:g} have no root of their ratio")
    return sqrt(alpha / first)


def as_peft(run: Merging, sums: Sums, site: Site, members: Sequence[Weighted]) -> Module | None:
    """PEFT's ``add_weighted_adapter``: ``linear``, ``ties``, ``magnitude_prune`` on the factors; with a rank, ``svd``.

    With ``v_i = w_i s_i``: A is made of ``sign(v_i) sqrt|v_i| A_i``, B of ``sqrt|v_i| B_i``; ``svd`` decomposes
    ``sum v_i (s_i B_i A_i)`` as up to PEFT 0.20. alpha is the rank. Source: PEFT ``tuners/lora/model.py`` and
    ``utils/merge_utils.py`` (0.20 and 0.21, 2026).
    """
    asked = run.options.resize
    if asked is not None:
        factors = _factors(run, members, same_rank=False)
        twice = [m.weight * m.original.scale.value**2 for m in members]
        up = np.hstack([v * up for v, (up, _) in zip(twice, factors, strict=True)])
        left, values, right = factored_svd(up, np.vstack([down for _, down in factors]))
        rank = min(asked.rank or max(down.shape[0] for _, down in factors), len(values))
        return _told(run, sums, site, members, (left[:, :rank] * values[:rank], right[:rank]), 1.0)
    factors = _factors(run, members, same_rank=True)
    strengths = [m.weight * m.original.scale.value for m in members]
    ups = _combined(run, [up for up, _ in factors], [sqrt(abs(v)) for v in strengths])
    downs = _combined(run, [down for _, down in factors], [copysign(sqrt(abs(v)), v) for v in strengths])
    return _told(run, sums, site, members, (ups, downs), 1.0)


def _combined(run: Merging, tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    """One side of PEFT's factor-wise methods."""
    options = run.options
    if options.method != SUM:
        tensors = [np.where(largest(t, options.density), t, 0.0) for t in tensors]
    every = np.stack([t * w for t, w in zip(tensors, weights, strict=True)])
    if options.method != "ties":
        summed: Array = every.sum(axis=0)
        return summed
    plain = np.stack(list(tensors))  # signs are elected before the weights
    votes = plain.sum(axis=0) if options.majority == "total" else np.sign(plain).sum(axis=0)
    mask = np.sign(plain) == np.where(votes >= 0.0, 1.0, -1.0)
    merged: Array = (every * mask).sum(axis=0) / np.maximum(mask.sum(axis=0), 1.0)
    return merged


def _factors(run: Merging, members: Sequence[Weighted], *, same_rank: bool) -> list[Factors]:
    found: list[Factors] = []
    for member in members:
        delta = member.module.delta
        plain = isinstance(delta, LowRank) and delta.mid is None and member.module.magnitude is None
        if not isinstance(delta, LowRank) or not plain or (found and same_rank and delta.rank != found[0][0].shape[1]):
            reason = "it only adds plain LoRA modules" if not plain else "it only adds modules of equal rank"
            raise _nothing(run, member, reason)
        up, down = (finite(factor.f64(), member.original.name) for factor in (delta.up, delta.down))
        found.append((up.reshape(len(up), -1), down.reshape(delta.rank, -1)))
    return found


def _nothing(run: Merging, member: Weighted, reason: str) -> NotRepresentableError:
    """The error for what the other program does not merge."""
    return NotRepresentableError(
        f"{member.original.name}: no result of {run.options.compat} to reproduce: {reason}", hint="no --compat",
        module=member.original.name, path=run.sources[member.source].adapter.path,
    )  # fmt: skip


def _told(
    run: Merging, sums: Sums, site: Site, members: Sequence[Weighted], made: tuple[AnyArray, AnyArray], scale: float
) -> Module | None:
    """The module, and in the report how far it is from the sum."""
    up, down = made
    how = sums.adding(site, members)
    truth = [(m.module.delta.to_low_rank(), m.module.scale.value) for m in members if m.module.delta is not None]
    true_up = np.hstack([low.up.f64().reshape(how.shape[0], -1) * factor for low, factor in truth])
    true_down = np.vstack([low.down.f64().reshape(low.rank, -1) for low, _ in truth])
    norm, off = product_norm(true_up, true_down), difference_norm(true_up, true_down, up * scale, down)
    dtype = sums.dtype_of(members)
    ones = tuple(1 for _ in how.shape[2:])
    delta = LowRank(
        of_array(up.reshape(how.shape[0], len(down), *ones), dtype), of_array(down.reshape(len(down), *how.shape[1:]), dtype)
    )
    module = replace(members[0].module, delta=delta, scale=Scale(scale, "as the other program"), extras={})
    sums.noted(members, module, f"as {run.options.compat}")
    rows = run.report.modules
    rows[-1] = replace(rows[-1], error=off / norm if norm else float(off > 0.0), norm=norm**2)
    if not run.report.faults:
        run.report.faults += FAULTS[
            "peft svd" if run.options.compat == "peft" and run.options.resize else str(run.options.compat)
        ]
    return module
