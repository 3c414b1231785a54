"""Two models with a known difference, and what an extracted file says of it, from first principles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tests import oracle
from tests.models.small import diffusers_arrays, original_of
from tests.oracle import rank_of, read

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]
    Change = Callable[[str, tuple[int, ...], np.random.Generator], NDArray[Any]]

GRID = 2.0**-4
"""Weights of :func:`grid` are small multiples of it, which bf16 holds exactly, changes of the same grid included."""


def grid(key: str) -> Arrays:
    """A model by Diffusers' names whose weights every 16-bit dtype holds exactly."""
    rng = np.random.default_rng(5)
    return {name: rng.integers(-40, 41, a.shape) * GRID for name, a in sorted(diffusers_arrays(key).items())}


def whole_low_rank(rank: int) -> Change:
    """``up @ down`` of small whole numbers on the grid; vectors get a change of their own."""

    def change(_: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
        if len(shape) < 2:
            return rng.integers(-3, 4, shape) * GRID
        up, down = rng.integers(-1, 2, (shape[0], rank)), rng.integers(-1, 2, (rank, math.prod(shape[1:])))
        return (up @ down).reshape(shape) * GRID

    return change


def changed(arrays: Arrays, change: Change, seed: int = 1) -> Arrays:
    """The same model with a change of every tensor."""
    rng = np.random.default_rng(seed)
    return {name: values + change(name, values.shape, rng) for name, values in arrays.items()}


def differences(key: str, base: Arrays, tuned: Arrays, *, original: bool) -> Arrays:
    """tuned - base in float64 by Diffusers' or by the original names."""
    found = {name: tuned[name].astype("f8") - base[name] for name in base}
    return original_of(key, found) if original else found


def said(path: Path, names: Mapping[str, Any], prefix: str = "lora_unet_", *, flat: bool = True) -> Arrays:
    """The change that a file makes of each weight and bias, by the names given (with ``.weight`` and ``.bias``)."""
    tensors, _ = read(path)
    parts, others = oracle.modules(tensors)
    assert not others
    found: Arrays = {}
    stems = {prefix + (n.replace(".", "_") if flat else n): n for n in {name.rpartition(".")[0] for name in names}}
    for stem, own in parts.items():
        name, slots = stems.get(stem, stem), own.slots
        if name == stem:  # a norm, which the list of names does not have
            assert own.family == "norm"
            continue
        alpha, rank = slots.get("alpha"), rank_of(own)
        scale = 1.0 if alpha is None or rank is None else alpha.item() / rank
        if own.family:
            shape = names[f"{name}.weight"].shape
            found[f"{name}.weight"] = scale * oracle.delta(own, np.arange(math.prod(shape[1:]))).reshape(shape)
        if "bias" in slots:
            found[f"{name}.bias"] = slots["bias"].f64()
        if "scaled bias" in slots:
            found[f"{name}.bias"] = slots["scaled bias"].f64() * scale
    return found


def relative(found: Arrays, wanted: Arrays) -> float:
    """``||found - wanted|| / ||wanted||`` over all tensors of ``wanted``; missing ones count as zeros."""
    error = sum(float(np.sum((found.get(name, 0.0) - values) ** 2)) for name, values in wanted.items())
    return math.sqrt(error / sum(float(np.sum(values**2)) for values in wanted.values()))


def optimum(matrix: NDArray[Any], rank: int) -> float:
    """The squared error of the best approximation of a rank, by a dense float64 SVD."""
    values = np.linalg.svd(matrix.reshape(matrix.shape[0], -1).astype("f8"), compute_uv=False)
    return float(np.sum(values[rank:] ** 2))
