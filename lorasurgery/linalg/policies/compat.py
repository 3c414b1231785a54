"""What other programs count, mistakes included, so that their results can be had again.

Sources: kohya-ss/sd-scripts ``networks/resize_lora.py`` at 48d368f (2026-02); kijai/ComfyUI-KJNodes ``nodes/lora_nodes.py``
at 3f20054 (2026-08). Both look at all ``min(out, in)`` singular values of the dense, unscaled product; beyond the rank of
the factors these are rounding there and zero here. They count one singular value more than asked for (``index`` already
is a count and 1 is added to it), and never fewer than 2. sd-scripts' development branch has mended that (41de936, 2025-09).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import AnyArray, Array

MIN_SV = 1e-6
"""A largest singular value up to this (unscaled) is taken for a module of zeros, which gets rank 1."""


def kohya(values: AnyArray, method: str, parameter: float, *, length: int, limit: int) -> int:
    """sd-scripts' new rank for ``sv_ratio``, ``sv_cumulative`` or ``sv_fro`` and the cap ``limit`` (its ``--new_rank``).

    ``values``: singular values without the scale; ``length``: ``min(out, in*k*k)``. Where sd-scripts would fail with an
    index out of range (``length`` 1), the answer is 1. Raises ``ValueError`` for another method or a parameter of 0.
    """
    if not parameter:
        raise ValueError("the parameter must not be 0")
    counts = {"sv_ratio": _ratio, "sv_cumulative": _cumulative, "sv_fro": _fro}
    if method not in counts:
        raise ValueError(f"sd-scripts has sv_ratio, sv_cumulative and sv_fro, not {method}")
    spectrum = _padded(values, length)
    if not spectrum[0] > MIN_SV:
        return 1
    return _capped(counts[method](spectrum, parameter), length, limit)


def kj_knee(values: AnyArray, sensitivity: float, *, length: int, limit: int) -> int:
    """KJNodes' ``sv_knee``, as :func:`kohya`.

    It looks for the point furthest *above* the line, where a falling convex curve has none, so the answer is nearly always
    2 or ``limit``. :func:`lorasurgery.linalg.policies.knee` looks below it.
    """
    spectrum = _padded(values, length)
    if not spectrum[0] > MIN_SV:
        return 1
    if length <= 2:
        return _capped(1, length, limit)
    y = (spectrum - spectrum[-1]) / (spectrum[0] - spectrum[-1] + 1e-10)
    return _capped(int(np.argmax(y - (1.0 - sensitivity * np.linspace(0.0, 1.0, length)))), length, limit)


def _padded(values: AnyArray, length: int) -> Array:
    spectrum = np.zeros(max(length, 1))
    spectrum[: min(len(values), length)] = values[:length]
    return spectrum


def _capped(index: int, length: int, limit: int) -> int:
    """``index`` into [1, length - 1], plus one, up to ``limit``."""
    return min(max(1, min(index, length - 1)) + 1, limit, length)


def _ratio(spectrum: Array, ratio: float) -> int:
    return int(np.sum(spectrum > spectrum[0] / ratio))


def _cumulative(spectrum: Array, share: float) -> int:
    return int(np.searchsorted(np.cumsum(spectrum) / np.sum(spectrum), share)) + 1


def _fro(spectrum: Array, share: float) -> int:
    return int(np.searchsorted(np.cumsum(spectrum**2) / np.sum(spectrum**2), share**2)) + 1
