"""Exact low-rank factors of an elementwise product of two low-rank products (LoHa)."""

from __future__ import annotations

from lorasurgery.linalg.factors import AnyArray, Array, as_float64


def khatri_rao(w1_a: AnyArray, w1_b: AnyArray, w2_a: AnyArray, w2_b: AnyArray) -> tuple[Array, Array]:
    """Factors with ``up @ down = (w1_a @ w1_b) * (w2_a @ w2_b)``, exactly, of rank r1 * r2.

    ``w1_a: (out, r1)``, ``w1_b: (r1, in, ...)``, ``w2_a: (out, r2)``, ``w2_b: (r2, in, ...)`` -> ``up: (out, r1 r2)``,
    ``down: (r1 r2, in, ...)``, float64: ``up[o, i r2 + j] = w1_a[o, i] w2_a[o, j]`` (row-wise Khatri-Rao) and
    ``down[i r2 + j] = w1_b[i] * w2_b[j]`` (column-wise). The products are exact for float32 input and narrower (48 of
    53 bits). Raises ``ValueError`` if the shapes do not fit together.
    """
    fits = w1_a.ndim == w2_a.ndim == 2 and w1_a.shape[0] == w2_a.shape[0] and w1_b.shape[1:] == w2_b.shape[1:]
    if not fits or w1_a.shape[1] != w1_b.shape[0] or w2_a.shape[1] != w2_b.shape[0]:
        shapes = ", ".join(str(w.shape) for w in (w1_a, w1_b, w2_a, w2_b))
        raise ValueError(f"not the factors of one elementwise product: w1_a, w1_b, w2_a, w2_b are {shapes}")
    rank = w1_a.shape[1] * w2_a.shape[1]
    up = as_float64(w1_a)[:, :, None] * as_float64(w2_a)[:, None, :]
    down = as_float64(w1_b)[:, None] * as_float64(w2_b)[None, :]
    return up.reshape(w1_a.shape[0], rank), down.reshape(rank, *w1_b.shape[1:])
