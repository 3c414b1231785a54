"""How a LoKr's sides are split: the sizes of its two factors."""

from __future__ import annotations


def factorization(dimension: int, factor: int) -> tuple[int, int]:
    """LyCORIS' split of a dimension into m * n with m <= n.

    >>> factorization(3840, -1), factorization(3072, 16), factorization(127, -1)
    ((60, 64), (16, 192), (1, 127))
    """
    if factor > 0 and dimension % factor == 0:
        small, large = sorted((factor, dimension // factor))
        return small, large
    limit = dimension if factor < 0 else factor
    m, n = 1, dimension
    length = m + n
    while m < n:
        new_m = m + 1
        while dimension % new_m:
            new_m += 1
        new_n = dimension // new_m
        if new_m + new_n > length or new_m > limit:
            break
        m, n = new_m, new_n
    return (n, m) if m > n else (m, n)


def pefts_factorization(dimension: int, factor: int) -> tuple[int, int]:
    """PEFT's split, which is LyCORIS' but for a factor that divides: that one comes first, whichever is larger.

    Source: PEFT 0.21.2 ``tuners/lokr/layer.py``, ``factorization``.

    >>> pefts_factorization(64, 16), factorization(64, 16)
    ((16, 4), (4, 16))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    return factorization(dimension, factor)
