"""The Rayleigh-Ritz problems of one or two blocks that need not be quite orthonormal, in float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasurgery.linalg.dense.products import float64, gram, times, turned, whitener

INDEPENDENT = 1e-2
"""The share of a direction of the older block that must lie outside the newer one: less of it is amplified rounding."""
ATTEMPTS = 4
"""How often dependent columns are made orthonormal, each time better; the last time what still depends is left out."""
PARALLEL = 1e-4
"""Directions with less than this share of the largest are left out then."""


@dataclass(frozen=True, slots=True)
class Block:
    """A basis and its image, for each matrix of a batch, and what they measure in float64."""

    basis: Tensor
    """(b, m, l), orthonormal but for rounding"""
    image: Tensor
    """(b, n, l): ``A^T basis``"""
    wide_basis: Tensor
    wide_image: Tensor
    basis_gram: Tensor
    """(b, l, l), on the CPU"""
    image_gram: Tensor
    """(b, l, l), on the CPU"""

    def only(self, members: list[int]) -> Block:
        """These matrices of the batch."""
        return Block(
            self.basis[members],
            self.image[members],
            self.wide_basis[members],
            self.wide_image[members],
            self.basis_gram[members],
            self.image_gram[members],
        )


def block_of(batch: Tensor, sketch: Tensor) -> Block:
    """A basis of the columns of ``sketch: (b, m, l)`` and its image under ``batch: (b, m, n)``."""
    basis = turned(sketch, whitener(gram(float64(sketch))))
    for attempt in range(ATTEMPTS + 1):
        wide = float64(basis)
        small = gram(wide)
        if attempt == ATTEMPTS or _is_orthonormal(small):
            break
        basis = turned(basis, whitener(small) if attempt < ATTEMPTS - 1 else _without_dependent(small))
    image = times(batch.mT, basis)
    wide_image = float64(image)
    return Block(basis, image, wide, wide_image, small, gram(wide_image))


def in_order(block: Block, turn: Tensor) -> Block:
    """In the basis of the Ritz vectors: columns of falling norm keep the small values out of the rounding of the large.

    Once is enough: Cholesky-QR keeps the order.
    """
    basis, image = turned(block.basis, turn), turned(block.image, turn)
    wide_basis, wide_image = float64(basis), float64(image)
    return Block(basis, image, wide_basis, wide_image, gram(wide_basis), gram(wide_image))


def _without_dependent(small: Tensor) -> Tensor:
    """M (b, l, l) with ``M^T G M`` = 1 for the directions in which the columns really extend, columns of zeros for the rest.

    Columns that are parallel to the last bit, as those of an exact product of small integers, have no rounding outside of
    each other that could be lengthened to something new.
    """
    values, vectors = torch.linalg.eigh(small)
    found: Tensor = vectors * torch.where(values > PARALLEL * values[:, -1:], values.clamp_min(1e-300).rsqrt(), 0.0)[:, None, :]
    return found


def _is_orthonormal(small: Tensor) -> bool:
    """Nearly, and but for columns of zeros: what is left :func:`whitener` can mend without amplifying rounding."""
    size = small.diagonal(dim1=1, dim2=2)
    rest = small - torch.diag_embed(torch.where(size == 0.0, size, 1.0))
    return float(rest.abs().amax()) < 0.1 / small.shape[1]


def ritz(block: Block) -> tuple[Tensor, Tensor]:
    """The squared singular values (b, l) within the block, descending, and the turn (b, l, l) to their vectors.

    ``basis @ turn`` is orthonormal, ``image @ turn`` orthogonal with these squared norms.
    """
    return _solved(whitener(block.basis_gram), block.image_gram, block.basis.shape[2])


def window_ritz(newer: Block, older: Block) -> tuple[Tensor, Tensor]:
    """The l largest within both blocks together: (b, l) and the turn (b, 2 l, l) of the newer beside the older."""
    white = whitener(newer.basis_gram)
    shadow = white.mT @ gram(newer.wide_basis, older.wide_basis)
    rest = _independent(older.basis_gram - shadow.mT @ shadow)
    joint = torch.cat((torch.cat((white, -white @ (shadow @ rest)), 2), torch.cat((torch.zeros_like(white), rest), 2)), 1)
    across = gram(newer.wide_image, older.wide_image)
    image = torch.cat((torch.cat((newer.image_gram, across), 2), torch.cat((across.mT, older.image_gram), 2)), 1)
    return _solved(joint, image, newer.basis.shape[2])


def _independent(small: Tensor) -> Tensor:
    """M (b, l, k) with ``M^T G M`` = 1 on the diagonal for the directions of ``small: (b, l, l)`` above ``INDEPENDENT``.

    k is the most that a matrix of the batch has; the others have columns of zeros.
    """
    values, vectors = torch.linalg.eigh(small)
    count = max((values > INDEPENDENT).sum(1).tolist())
    values, vectors = values[:, len(values[0]) - count :], vectors[:, :, len(values[0]) - count :]
    lengths: Tensor = torch.where(values > INDEPENDENT, values.clamp_min(INDEPENDENT).rsqrt(), 0.0)
    found: Tensor = vectors * lengths[:, None, :]
    return found


def _solved(white: Tensor, image: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(white.mT @ image @ white)
    return values[:, -count:].clamp_min(0.0).flip(1), white @ vectors[:, :, -count:].flip(2)
