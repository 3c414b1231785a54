"""What other programs count, mistakes included, so that their results can be had again.

Sources: kohya-ss/sd-scripts ``networks/resize_lora.py`` at 063ef10 (2026, release 0.11.1); kijai/ComfyUI-KJNodes
``nodes/lora_nodes.py`` at 3f20054 (2026-08). Both look at the singular values of the dense, unscaled product in float32, all
``min(out, in)`` of them; beyond the rank of the factors these are rounding there and zero here. KJNodes looks at no more than
that rank in linear layers of more than 10^8 elements. sd-scripts kept one more than asked for until 41de936 (2025-09;
``sv_ratio`` until 0.11); KJNodes still does (its ``index`` is a count already, and 1 is added to it), and never keeps fewer
than 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorasurgery.linalg.factors import AnyArray

MIN_SV = 1e-6
"""A largest singular value up to this (unscaled) is taken for a module of zeros, which gets rank 1."""


KJ_LARGE = 100_000_000
"""From more elements on KJNodes decomposes a linear layer's factors, not their product."""
LARGE = 2048
"""sd-scripts decomposes a matrix with both sides above this by ``torch.svd_lowrank``, into twice the largest rank."""


def kohya_length(sides: tuple[int, int], limit: int, *, lowrank: bool) -> int:
    """How many singular values sd-scripts looks at; ``lowrank`` is false where its ``--svd_lowrank_niter`` is 0."""
    return min(2 * limit, *sides) if lowrank and min(sides) > LARGE else min(sides)


def kohya(values: AnyArray, method: str, parameter: float, *, length: int, limit: int) -> int:
    """sd-scripts' new rank for ``sv_ratio``, ``sv_cumulative`` or ``sv_fro`` and the cap ``limit`` (its ``--new_rank``).

    ``values``: singular values without the scale; ``length``: see :func:`kohya_length`. Raises ``ValueError`` for another
    method or a parameter of 0.
    """
    if not parameter:
        raise ValueError("the parameter must not be 0")
    if method not in COUNTS:
        raise ValueError(f"sd-scripts has sv_ratio, sv_cumulative and sv_fro, not {method}")
    spectrum = _padded(values, length)
    if not spectrum[0] > MIN_SV:
        return 1
    index = max(0, min(COUNTS[method](spectrum, parameter), len(spectrum) - 1))
    return min(index + 1, limit)


def kj_length(sides: tuple[int, int], rank: int, *, linear: bool) -> int:
    """How many singular values KJNodes looks at of a module with factors of ``rank``."""
    return min(rank, *sides) if linear and sides[0] * sides[1] > KJ_LARGE else min(sides)


def kj(values: AnyArray, method: str, parameter: float, *, length: int, limit: int) -> int:
    """KJNodes' new rank for ``knee``, ``sv_ratio``, ``sv_cumulative`` or ``sv_fro`` and the cap ``limit``.

    ``values``: singular values without the scale; ``length``: see :func:`kj_length`. Raises ``ValueError`` for another method.
    """
    if method == "knee":
        return kj_knee(values, parameter, length=length, limit=limit)
    if method not in COUNTS or not parameter:
        raise ValueError(
            f"KJNodes has sv_knee, sv_ratio, sv_cumulative and sv_fro with a parameter, not {method} {parameter:g}"
        )
    spectrum = _padded(values, length)
    if not spectrum[0] > MIN_SV:
        return 1
    index = max(1, min(COUNTS[method](spectrum, parameter) + 1, len(spectrum) - 1))
    return min(index + 1, limit)


def kj_knee(values: AnyArray, sensitivity: float, *, length: int, limit: int) -> int:
    """KJNodes' ``sv_knee`` of singular values without the scale; ``length``: ``min(out, in*k*k)``; ``limit``: the cap.

    It looks for the point furthest *above* the line, where a falling convex curve has none, so the answer is nearly always 2.
    At a sensitivity of 1 both ends lie on the line, and only float32's rounding says which comes first.
    :func:`lorasurgery.linalg.policies.knee` looks below the line.
    """
    spectrum = _padded(values, length)
    if not spectrum[0] > MIN_SV:
        return 1
    index, last = 1, spectrum[-1]
    if length > 2:
        y = (spectrum - last) / (spectrum[0] - last + np.float32(1e-10))
        index = int(np.argmax(y - (1.0 - sensitivity * np.linspace(0.0, 1.0, length))))
    return min(max(1, min(index, length - 1)) + 1, limit, length)


def _padded(values: AnyArray, length: int) -> NDArray[np.float32]:
    spectrum = np.zeros(max(length, 1), np.float32)
    spectrum[: min(len(values), length)] = values[:length]
    return spectrum


def _ratio(spectrum: NDArray[np.float32], ratio: float) -> int:
    return int(np.sum(spectrum > spectrum[0] / np.float32(ratio))) - 1


def _cumulative(spectrum: NDArray[np.float32], share: float) -> int:
    return _first(spectrum, share)


def _fro(spectrum: NDArray[np.float32], share: float) -> int:
    return _first(spectrum**2, share**2)


def _first(weights: NDArray[np.float32], share: float) -> int:
    """The first position at which the sum has the share; torch adds float32 up in float64 and rounds each sum."""
    sums = np.cumsum(weights, dtype=np.float64).astype(np.float32)
    return int(np.searchsorted(sums / sums[-1], np.float32(share)))


COUNTS = {"sv_ratio": _ratio, "sv_cumulative": _cumulative, "sv_fro": _fro}
"""Of both programs: the position of the last singular value that is kept."""
