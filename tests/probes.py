"""Fixed random vectors, so that a large delta can be compared by a few numbers.

``left.T @ delta @ right`` with random probes differs, with probability one, when any entry of the delta does.
"""

from zlib import crc32

import numpy as np

COUNT = 6


def probes(size: int, side: int) -> np.ndarray:
    """(size, COUNT) numbers in [-0.5, 0.5), the same in every run; ``side`` is 0 for the left and 1 for the right."""
    return np.random.default_rng([size, side]).random((size, COUNT)) - 0.5


def bilinear(delta: np.ndarray) -> np.ndarray:
    """(COUNT, COUNT) numbers of a matrix or convolution kernel (flattened to two axes), (COUNT,) of a vector."""
    wide = np.asarray(delta, np.float64)
    left = probes(wide.shape[0], 0)
    if wide.ndim == 1:
        return np.ascontiguousarray(left.T @ wide)
    flat = wide.reshape(wide.shape[0], -1)
    return np.ascontiguousarray(left.T @ flat @ probes(flat.shape[1], 1))


def base_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A model's weight, float32 numbers around 0.05 that depend on its name only."""
    values = np.random.default_rng(crc32(name.encode())).standard_normal(shape) * 0.05
    return np.ascontiguousarray(values.astype(np.float32))
