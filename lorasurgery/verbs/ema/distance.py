"""How far the average of the tensors is from the average of the changes: ``mean(up) mean(down)`` has cross terms."""

from __future__ import annotations

import os
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.files.opened import together
from lorasurgery.files.taken import Unparsed
from lorasurgery.io.header import RawFile
from lorasurgery.linalg.threads import map_threads
from lorasurgery.operations.effect.forms import product_of
from lorasurgery.operations.effect.products import Product, measure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.operations.effect.products import Measured


def distance_from_changes(files: Sequence[RawFile], weights: Sequence[float], averaged: Mapping[str, Tensor]) -> float:
    """``||A - B|| / max(||A||, ||B||)`` of the average A of the tensors and B of the changes, over all factored modules.

    ``averaged`` are the tensors that :func:`lorasurgery.ema` made of ``files``. DoRA magnitudes are left out.
    """
    pairs = [(file, weight) for file, weight in zip(files, weights, strict=True) if weight]
    made = RawFile(files[0].path, averaged, files[-1].metadata)
    result, *sources = together([Unparsed(own) for own in (made, *(file for file, _ in pairs))])
    shares = [weight for _, weight in pairs]
    groups = [(module, [source.modules[site] for source in sources]) for site, module in result]
    wanted = [group for group in groups if group[0].delta is not None and not isinstance(group[0].delta, (Full, Opaque))]
    found = map_threads(lambda group: _one(*group, shares), wanted, min(os.cpu_count() or 1, 8))
    largest = max(sum(m.norm_a**2 for m in found), sum(m.norm_b**2 for m in found)) if found else 0.0
    return sqrt(sum(m.difference**2 for m in found) / largest) if largest else 0.0


def _one(result: Module, sources: Sequence[Module], shares: Sequence[float]) -> Measured:
    assert result.delta is not None  # noqa: S101  the caller has looked
    scale = result.scale.value
    products = [product_of(module.delta, 1.0) for module in sources if module.delta is not None]
    ups = np.hstack([share * own.up for share, own in zip(shares, products, strict=True)])
    changes = Product(ups, np.vstack([own.down for own in products]), scale)
    return measure(product_of(result.delta, scale), changes, directions=False)
