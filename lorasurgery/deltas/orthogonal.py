"""OFT and BOFT: orthogonal matrices that turn the rows (LyCORIS, sd-scripts) or the columns (PEFT) of a base weight.

Row side, blocks B (n, b, b): ``Q = B - B^T``, shortened to the norm ``c = alpha * out`` where alpha is above 0 and Q is
longer; ``R = (I + Q)(I - Q)^-1``; Diag-OFT ``W'_k = R_k^T W_k`` for each block of b rows. BOFT has m sets of blocks; set i is
applied to rows taken in another order (``2^i b / 2`` apart). ``rescale`` multiplies rows. A strength s makes ``R`` of each
set ``s R + (1 - s) I``. Source: LyCORIS 4.1 ``modules/diag_oft.py`` and ``functional/boft.py``, sd-scripts ``networks/oft.py``.

Column side (PEFT ``tuners/oft/layer.py`` 0.21): skew-symmetric Q from its upper triangle, R by five terms of the Neumann
series or by Cayley's transform, ``W' = W blockdiag(R)^T``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
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


def column_rotations(triangle: Float64, *, neumann: bool = True) -> Float64:
    """PEFT's R (n, b, b) from the upper triangles (n, b (b - 1) / 2)."""
    count = triangle.shape[1]
    size = round((1 + (1 + 8 * count) ** 0.5) / 2)
    rows, columns = np.triu_indices(size, 1)
    skew = np.zeros((len(triangle), size, size))
    skew[:, rows, columns] = triangle
    skew -= np.swapaxes(skew, 1, 2)
    eye = np.eye(size)
    if not neumann:
        cayley: Float64 = (eye - skew) @ np.linalg.inv(eye + skew)
        return cayley
    series, power = eye + 2.0 * skew, skew
    for term in range(2, NEUMANN_TERMS):
        power = power @ skew
        series = series + (2.0 if term < NEUMANN_TERMS - 1 else 1.0) * power
    return series


def turn_columns(weight: Work, turns: Float64, *, undo: bool = False) -> Work:
    """``W blockdiag(R)^T``: ``weight`` (rows, n * b), ``turns`` (n, b, b), or (1, b, b) for one that all blocks share."""
    matrices = np.linalg.inv(turns) if undo else turns
    size = matrices.shape[-1]
    blocks = weight.reshape(weight.shape[0], -1, size).swapaxes(0, 1)
    turned: Work = (blocks @ np.swapaxes(matrices, 1, 2).astype(weight.dtype)).swapaxes(0, 1)
    return turned.reshape(weight.shape)
