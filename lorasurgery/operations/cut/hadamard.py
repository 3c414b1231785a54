"""A LoHa that stays one: each arm cut to the best of its rank on its own.

The best Hadamard product of two rank-k arms has no closed form (it is a weighted low-rank approximation), so this is not
the best LoHa of its rank, and a LoRA with as many parameters (twice the rank) is usually nearer. The error is measured.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.io.tensors import computed
from lorasurgery.linalg.hadamard import khatri_rao
from lorasurgery.linalg.low_rank import relative_error
from lorasurgery.operations.cut.core import wide
from lorasurgery.operations.cut.sources import FactoredSource, Slot
from lorasurgery.operations.cut.subject import Cut, Subject, low_rank_factors

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64, Shape, Tensor
    from lorasurgery.linalg.factors import AnyArray

EACH_ARM = "each arm cut on its own, not the best LoHa: conversion to that rank comes nearer, as LoRA there is a best one"


def loha_subject(module: Module, delta: Hadamard, shape: Shape, needed: int | None) -> Subject:
    """The LoHa with its two arms as sources; only a fixed rank makes sense for it."""
    slots = Slot(), Slot()
    sides = (shape[0], prod(shape[1:]))
    wanted = None if needed is None else min(needed, delta.rank, *sides)
    arms = [
        FactoredSource.of(*_arm(a, b, core), wanted, slot, narrow=False)
        for a, b, core, slot in ((delta.w1_a, delta.w1_b, delta.t1, slots[0]), (delta.w2_a, delta.w2_b, delta.t2, slots[1]))
    ]

    def build(cut: Cut) -> Delta:
        """The factor goes into the first arm."""
        w1 = low_rank_factors(arms[0], cut, (sides[0], cut.rank), (cut.rank, sides[1]))
        w2 = low_rank_factors(arms[1], replace(cut, factor=1.0), (sides[0], cut.rank), (cut.rank, sides[1]))
        return Hadamard(*w1, *w2)

    def error(cut: Cut) -> float:
        return _error(arms, cut)

    for arm in arms:
        arm.forget()
    limit = min(delta.rank, *sides)
    doubled = (2 * sides[0], 2 * sides[1])
    product = _Product(arms)
    return Subject(
        module, product, "loha", delta.rank, limit, doubled, build, shape, note=EACH_ARM, reported=error
    )  # fmt: skip


class _Product:
    """Stands for the product in a subject: its norm is known, its singular values are not computed."""

    def __init__(self, arms: list[FactoredSource]) -> None:
        up, down = khatri_rao(*(part for arm in arms for part in (wide(arm.up), wide(arm.down))))
        self.values = np.full(min(len(arm.values) for arm in arms), 0.0)
        self.residual = float(np.sum((up.T @ up) * (down @ down.T)))

    def left(self, kept: object, weights: object) -> AnyArray:
        """Never asked for: the arms are."""
        raise NotImplementedError

    right = left


def _arm(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, rank) and (rank, in*k*k); a Tucker core is multiplied into the second."""
    if core is None:
        return a, b
    width = b.shape[1] * prod(core.shape[2:])

    def right() -> Float64:
        product: Float64 = np.einsum("ij...,jr->ir...", core.f64(), b.f64())
        return product.reshape(core.shape[0], width)

    return computed("F64", a.shape[::-1], lambda: a.f64().T), computed("F64", (core.shape[0], width), right)


def _error(arms: list[FactoredSource], cut: Cut) -> float:
    """``||P * Q - P' * Q'|| / ||P * Q||`` by the Khatri-Rao factors of both."""
    whole = khatri_rao(*(part for arm in arms for part in (wide(arm.up), wide(arm.down))))
    kept = []
    for arm in arms:
        root = np.sqrt(arm.values[cut.kept])
        kept += [arm.left(cut.kept, root), arm.right(cut.kept, root)]
    return relative_error(*whole, *khatri_rao(*kept))
