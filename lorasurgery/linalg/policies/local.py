"""Rules that look at one module's singular values S_1 >= S_2 >= ... >= 0 only.

``sv_ratio``, ``sv_cumulative`` and ``sv_fro`` are sd-scripts' dynamic methods counted right; what sd-scripts itself counts
is in :mod:`lorasurgery.linalg.policies.compat`. Sums run from the small end in extended precision, and a tie within
``4 eps`` of the total counts as reached, so that 0.9 of ten equal values is 9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.linalg.low_rank import rank_for_energy

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import AnyArray

SLACK = 4 * float(np.finfo(np.float64).eps)
"""Of the total: what rounding may add to a sum that should meet its target exactly."""


def fixed(values: AnyArray, rank: int) -> int:
    """``min(rank, len(S))``: the same rank everywhere, zeros included, as a file with one ``network_dim`` has it.

    Raises ``ValueError`` for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    return min(rank, len(values))


def sv_ratio(values: AnyArray, ratio: float) -> int:
    """``#{i: S_i > S_1 / ratio}``, at least 1 unless all are zero. Raises ``ValueError`` for a ratio below 1."""
    if not ratio >= 1.0:
        raise ValueError(f"the ratio must be at least 1, not {ratio}")
    if not _largest(values) > 0.0:
        return 0
    return max(int(np.sum(np.asarray(values, np.float64) > _largest(values) / ratio)), 1)


def sv_cumulative(values: AnyArray, share: float) -> int:
    """The smallest k with ``sum_{i<=k} S_i >= share * sum S_i``. Raises ``ValueError`` unless ``0 < share <= 1``."""
    _check_share(share)
    return _smallest(np.asarray(values, np.longdouble), 1 - np.longdouble(share), exact=share == 1.0)


def sv_fro(values: AnyArray, share: float) -> int:
    """The smallest k with ``sqrt(sum_{i<=k} S_i^2) >= share * sqrt(sum S_i^2)``: the energy ``share^2``.

    Raises ``ValueError`` unless ``0 < share <= 1``.
    """
    _check_share(share)
    return _smallest(np.asarray(values, np.longdouble) ** 2, 1 - np.longdouble(share) ** 2, exact=share == 1.0)


def energy(values: AnyArray, share: float) -> int:
    """The smallest k with ``sum_{i<=k} S_i^2 >= share * sum S_i^2``. Raises ``ValueError`` unless ``0 < share <= 1``."""
    return rank_for_energy(values, share)


def relative_error(values: AnyArray, error: float) -> int:
    """The smallest k with ``sqrt(sum_{i>k} S_i^2 / sum S_i^2) <= error``; 0 for an error of 1 or more.

    Raises ``ValueError`` for a negative error.
    """
    if not error >= 0.0:
        raise ValueError(f"the relative error must not be negative, not {error}")
    return _smallest(np.asarray(values, np.longdouble) ** 2, np.longdouble(error) ** 2, exact=error == 0.0)


def absolute_threshold(values: AnyArray, threshold: float) -> int:
    """``#{i: S_i > threshold}``. Raises ``ValueError`` for a negative threshold."""
    if not threshold >= 0.0:
        raise ValueError(f"the threshold must not be negative, not {threshold}")
    return int(np.sum(np.asarray(values, np.float64) > threshold))


def knee(values: AnyArray, sensitivity: float = 1.0) -> int:
    """How many values stand before the elbow of the curve (Kneedle; Satopaa, Albrecht, Irwin and Raghavan 2011).

    With ``x_i = (i - 1) / (n - 1)`` and ``y_i = (S_i - S_n) / (S_1 - S_n)``, the elbow is where ``y_i + x_i / sensitivity``
    is smallest, that is, where the curve lies furthest below the line from its first to its last point (sensitivity 1).
    A higher sensitivity keeps more. Zeros at the end are left out first: how many there are depends on the width of the
    layer, not on the change. All values stay where there is no elbow: up to two of them, or all equal.
    Raises ``ValueError`` for a sensitivity that is not positive.
    """
    if not sensitivity > 0.0:
        raise ValueError(f"the sensitivity must be positive, not {sensitivity}")
    spectrum = np.asarray(values, np.float64)
    spectrum = spectrum[: int(np.sum(spectrum > 0.0))]
    count = len(spectrum)
    if count <= 2 or spectrum[0] == spectrum[-1]:
        return count
    y = (spectrum - spectrum[-1]) / (spectrum[0] - spectrum[-1])
    return max(int(np.argmin(y + np.linspace(0.0, 1.0, count) / sensitivity)), 1)


def _largest(values: AnyArray) -> float:
    return float(np.max(values, initial=0.0))


def _check_share(share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"the share must be above 0 and at most 1, not {share}")


def _smallest(weights: AnyArray, missing: np.longdouble, *, exact: bool) -> int:
    """The smallest k with ``sum_{i>k} weights_i <= missing * sum weights``; 0 where all weights are zero."""
    scale = np.max(weights, initial=0.0)
    if not scale > 0.0:
        return 0
    tails = np.append(np.cumsum((weights / scale)[::-1])[::-1], 0.0)
    allowed = (missing + (0.0 if exact else SLACK)) * tails[0]
    return int(np.argmax(tails <= allowed))
