"""OFT and BOFT: orthogonal matrices that turn the rows (LyCORIS, sd-scripts) or the columns (PEFT) of a base weight.

Row side, blocks B (n, b, b): ``Q = B - B^T``, shortened to the norm ``c = alpha * out`` where alpha is above 0 and Q is
longer; ``R = (I + Q)(I - Q)^-1``; Diag-OFT ``W'_k = R_k^T W_k`` for each block of b rows. BOFT has m sets of blocks; set i is
applied to rows taken in another order (``2^i b / 2`` apart). ``rescale`` multiplies rows. A strength s makes ``R`` of each
set ``s R + (1 - s) I``. Source: LyCORIS 4.1 ``modules/diag_oft.py`` and ``functional/boft.py``, sd-scripts ``networks/oft.py``.

Where the layer is several in one (sd-scripts ``networks/oft_flux.py``: q, k, v and the MLP), each part has blocks of its own
size and its own ``c = alpha * rows``; there Q is shortened to c whatever alpha is, 0 included.

Column side, OFT (PEFT ``tuners/oft/layer.py`` 0.21, OneTrainer ``modules/module/oft_utils.py`` 2026-08): skew-symmetric Q
from its upper triangle, R by five terms of the Neumann series or by Cayley's transform, ``W' = W blockdiag(R)^T``. COFT
shortens each block's Q to ``eps / sqrt(n)``. OneTrainer's scaled OFT divides Q by ``2 sqrt(b - 1)``, and on convolutions it
takes ``W' = W blockdiag(R)``, the other direction. PEFT before 0.16 kept whole matrices, ``Q = (R - R^T) / 2``, with Cayley's
transform: 0.14 and 0.15 for columns, with a factor for each row, earlier ones for rows.

Column side, BOFT (PEFT ``tuners/boft/layer.py`` 0.21): R (m, n, b, b), ``Q = (R - R^T) / 2``, ``(I - Q)(I + Q)^-1``; set i acts
on runs of b / 2 columns in the butterfly's order, set 0 first; then rows are multiplied by ``boft_s``.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.deltas.base import CannotError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lorasurgery.io.tensors import Float64

    Work = NDArray[Any]

TINY = 1e-8
"""Added to the norm of Q before it is compared, as LyCORIS does."""
COLUMNS = 1 << 18
"""Elements that BOFT has copies of at a time."""
NEUMANN_TERMS = 5
"""PEFT's ``num_cayley_neumann_terms``."""


def rotations(blocks: Float64, constraint: float, strength: float = 1.0) -> Float64:
    """(..., b, b) rotations, moved towards the identity by ``strength``."""
    skew = blocks - np.swapaxes(blocks, -1, -2)
    norm = float(np.sqrt((skew**2).sum())) + TINY
    if 0 < constraint < norm:
        skew = skew * (constraint / norm)
    eye = np.eye(blocks.shape[-1])
    turned = (eye + skew) @ np.linalg.inv(eye - skew)
    mixed: Float64 = strength * turned + (1.0 - strength) * eye
    return mixed


def clamped_rotations(blocks: Float64, constraint: float, strength: float = 1.0) -> Float64:
    """The same as sd-scripts takes them: Q no longer than ``constraint``, which may be 0."""
    skew = blocks - np.swapaxes(blocks, -1, -2)
    norm = float(np.sqrt((skew**2).sum()))
    skew = skew * ((min(norm, constraint) + TINY) / (norm + TINY))
    eye = np.eye(blocks.shape[-1])
    mixed: Float64 = strength * ((eye + skew) @ np.linalg.inv(eye - skew)) + (1.0 - strength) * eye
    return mixed


def turn_parts(weight: Work, parts: Sequence[Float64], *, undo: bool = False) -> None:
    """Diag-OFT of consecutive rows in place: ``parts[i]`` (n, b, b) turns the next n * b rows of ``weight``."""
    start = 0
    for turns in parts:
        stop = start + turns.shape[0] * turns.shape[-1]
        turn_rows(weight[start:stop], turns, None, undo=undo)
        start = stop


def turn_rows(weight: Work, turns: Float64, rescale: Float64 | None, *, undo: bool = False) -> None:
    """Diag-OFT in place: ``weight`` (n * b, columns), ``turns`` (n, b, b), ``rescale`` (n * b,)."""
    size = turns.shape[-1]
    if rescale is not None and undo:
        weight /= rescale.reshape(-1, 1).astype(weight.dtype)
    for k, turn in enumerate(turns):
        matrix = np.linalg.inv(turn.T) if undo else turn.T
        own = weight[k * size : (k + 1) * size]
        own[...] = matrix.astype(weight.dtype) @ own
    if rescale is not None and not undo:
        weight *= rescale.reshape(-1, 1).astype(weight.dtype)


def butterfly_rows(weight: Work, turns: Float64, rescale: Float64 | None, *, undo: bool = False) -> None:
    """BOFT in place: ``weight`` (n * b, columns), ``turns`` (m, n, b, b), ``rescale`` (n * b,)."""
    matrices = (np.linalg.inv(turns) if undo else turns).astype(weight.dtype)
    row_scale = None if rescale is None else rescale.reshape(-1, 1).astype(weight.dtype)
    step = max(COLUMNS // weight.shape[0], 1)
    order = range(len(matrices))
    for at in range(0, weight.shape[1], step):
        part = weight[:, at : at + step]
        if row_scale is not None and undo:
            part = part / row_scale
        for i in reversed(order) if undo else order:
            part = _stage(part, matrices[i], i)
        if row_scale is not None and not undo:
            part = part * row_scale
        weight[:, at : at + step] = part


def _stage(part: Work, matrices: Work, i: int) -> Work:
    """One set of blocks (n, b, b): rows (c, 2, k) in the order (c, k, 2), k = 2^i b / 2, blocks applied, order undone."""
    blocks, size, _ = matrices.shape
    columns, near = part.shape[1], 2**i * (size // 2)
    mixed = part.reshape(-1, 2, near, columns).swapaxes(1, 2).reshape(blocks, size, columns)
    turned = (matrices @ mixed).reshape(-1, near, 2, columns).swapaxes(1, 2)
    whole: Work = turned.reshape(part.shape)
    return whole


def triangle_size(count: int) -> int:
    """b of ``count = b (b - 1) / 2``; raises CannotError for a number that is none."""
    size = (1 + isqrt(1 + 8 * count)) // 2
    if not count or size * (size - 1) != 2 * count:
        raise CannotError(f"{count} numbers make no upper triangle")
    return size


def column_rotations(triangle: Float64, *, terms: int | None = NEUMANN_TERMS, longest: float | None = None) -> Float64:
    """R (n, b, b) from the upper triangles (n, b (b - 1) / 2).

    ``terms`` of the series, counted as PEFT counts them, or None for Cayley's transform; ``longest``: COFT's ``eps``.
    Raises CannotError for triangles of no size.
    """
    size = triangle_size(triangle.shape[1])
    rows, columns = np.triu_indices(size, 1)
    skew = np.zeros((len(triangle), size, size))
    skew[:, rows, columns] = triangle
    skew -= np.swapaxes(skew, 1, 2)
    if longest is not None:
        skew = shortened(skew, longest)
    return cayley(skew) if terms is None else _series(skew, terms)


def shortened(matrices: Float64, longest: float) -> Float64:
    """COFT: each of n matrices (n, b, b) no longer than ``longest / sqrt(n)``."""
    norms = np.sqrt((matrices**2).sum(axis=(1, 2), keepdims=True))
    short: Float64 = matrices * np.minimum(1.0, longest / len(matrices) ** 0.5 / np.maximum(norms, np.finfo(np.float64).tiny))
    return short


def _series(skew: Float64, terms: int) -> Float64:
    """``I + 2 Q + 2 Q^2 + ...``, of which the last of at least four terms counts once: PEFT's ``_cayley_batch``."""
    found = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape) + (2.0 * skew if terms > 1 else 0.0)
    if terms <= 2:
        return found
    last, power = max(terms, 4) - 1, skew
    for exponent in range(2, last + 1):
        power = power @ skew
        found = found + (1.0 if exponent == last else 2.0) * power
    return found


def cayley(matrices: Float64) -> Float64:
    """PEFT's R = ``(I - Q)(I + Q)^-1`` of BOFT and of its earlier OFT, from square matrices (..., b, b)."""
    skew = 0.5 * (matrices - np.swapaxes(matrices, -1, -2))
    eye = np.eye(matrices.shape[-1])
    turned: Float64 = (eye - skew) @ np.linalg.inv(eye + skew)
    return turned


def butterfly_columns(weight: Work, turns: Float64, rescale: Float64, *, undo: bool = False) -> Work:
    """PEFT's BOFT: ``weight`` (rows, n * b), ``turns`` (m, n, b, b), ``rescale`` (rows,) multiplies the rows at last.

    Undone, ``turns`` are the inverse matrices.
    """
    scale = rescale.reshape(-1, 1).astype(weight.dtype)
    order = range(len(turns))
    part = weight / scale if undo else weight
    for i in reversed(order) if undo else order:
        shape = (len(weight), -1, 2, 2**i, max(turns.shape[-1] // 2, 1))
        mixed = part if len(turns) == 1 else part.reshape(shape).swapaxes(2, 3).reshape(weight.shape)
        part = turn_columns(mixed, turns[i])
        if len(turns) > 1:
            part = part.reshape(shape[0], -1, 2**i, 2, shape[4]).swapaxes(2, 3).reshape(weight.shape)
    return part if undo else part * scale


def turn_columns(weight: Work, turns: Float64) -> Work:
    """``W blockdiag(R)^T``: ``weight`` (rows, n * b), ``turns`` (n, b, b), or (1, b, b) for one that all blocks share."""
    size = turns.shape[-1]
    blocks = weight.reshape(weight.shape[0], -1, size).swapaxes(0, 1)
    turned: Work = (blocks @ np.swapaxes(turns, 1, 2).astype(weight.dtype, copy=False)).swapaxes(0, 1)
    return turned.reshape(weight.shape)
