"""Matrices of known spectrum, as float64 numpy: what extraction meets, and what is hard for it."""

import numpy as np

SPECTRA = {
    "slow": lambda n: np.arange(1, n + 1) ** -0.8,
    "slower": lambda n: np.arange(1, n + 1) ** -0.3,
    "steep": lambda n: np.exp(-np.arange(n) / 6.0),
    "steps": lambda n: np.where(np.arange(n) < 20, 1.0, np.where(np.arange(n) < 50, 0.5, 0.01)),
    "flat": lambda n: np.full(n, 1.0),
}


def with_spectrum(values, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((side, len(values))))[0] for side in (rows, columns))
    return (left * values) @ right.T


def bf16(array):
    """Rounded to bfloat16, to nearest."""
    bits = np.asarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def baked(rows, columns, rank, seed=0, smallest=1.05):
    """The difference of a bf16 weight and itself with an adapter: rank ``rank`` in noise of nearly its smallest size."""
    rng = np.random.default_rng(seed)
    weight = bf16(rng.standard_normal((rows, columns)) * 0.03)
    noise = bf16(weight + 1e-4 * rng.standard_normal((rows, columns))) - weight
    edge = np.linalg.norm(noise, 2) * smallest
    return (bf16(weight + with_spectrum(np.geomspace(20, 1, rank) * edge, rows, columns, seed + 1)) - weight).astype(np.float64)


def optimum(matrix, rank):
    """The smallest Frobenius error of any matrix of this rank (Eckart and Young)."""
    return float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[rank:]))


def error(matrix, found):
    """``||matrix - u s v^T||_F`` in float64."""
    u, s, v = (side.double().cpu().numpy() for side in (found.u, found.s, found.v))
    return float(np.linalg.norm(matrix - (u * s) @ v.T))
