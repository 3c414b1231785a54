"""The singular vectors of a difference that the options may need.

A fixed rank needs that many. A size, a recipe or a share of the parameters decides over all modules together, so each keeps
as many as it may get at most. A policy looks at one module: ``energy``, ``error`` and ``sv_fro`` grow the basis until they are
met, the others look at the whole spectrum first. Nothing is decomposed twice once the ranks are known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.errors import NoRoomError
from lorasurgery.linalg.halving import DeviceFullError, in_halves
from lorasurgery.verbs.extract.options import CAP

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from lorasurgery.linalg.dense import DenseSvd
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.verbs.extract.options import ExtractOptions


@dataclass(frozen=True, slots=True)
class Wanted:
    """How many singular triples."""

    rank: int | None
    """The rank that is named for the module, or the most it may get; None: none is."""
    fixed: bool
    """Whether that decides."""


@dataclass(frozen=True, slots=True)
class Found:
    """Singular triples of one matrix (out, in)."""

    u: AnyArray
    """(k, out): left singular vectors as rows"""
    v: AnyArray
    """(k, in)"""
    values: Array
    """At least k of them, descending, float64"""
    residual: float
    """Squared norm beyond ``values``"""
    clamp: float | None = None
    """Where sd-scripts' clamp cuts off the elements of ``U S`` and ``Vt``"""
    clamped_error: float | None = None
    """The squared error with clamped factors"""


def decomposed(matrices: Sequence[AnyArray], wanted: Wanted, options: ExtractOptions, device: str) -> list[Found]:
    """Some matrices (out, in) of one shape on a device, together where that is faster and there is the memory for it.

    Raises NoRoomError where a device has too little for one.
    """
    try:
        return in_halves(matrices, lambda some: _decomposed(some, wanted, options, device))
    except DeviceFullError:
        pass
    raise NoRoomError(
        f"{device} has too little memory left for a matrix of {matrices[0].shape[0]} x {matrices[0].shape[1]}",
        hint="--jobs 1, or --device cpu",
    )


def _decomposed(matrices: Sequence[AnyArray], wanted: Wanted, options: ExtractOptions, device: str) -> list[Found]:
    batch = _sent(matrices, device)
    cut, most = options.cut, min(batch.shape[1:])
    overall = cut.policy in (None, "params")
    if wanted.fixed or overall:
        return _truncated(batch, min(wanted.rank or CAP, most), options, matrices)
    if cut.policy in ("energy", "error", "sv_fro"):
        return [_until(matrix, wanted.rank, options) for matrix in batch]
    return [_by_spectrum(matrix, min(wanted.rank or most, most), options) for matrix in batch]


def _sent(matrices: Sequence[AnyArray], device: str) -> torch.Tensor:
    """``(b, out, in)`` on a device; a GPU fetches it from pinned memory by itself. mps has no float64."""
    import torch

    place = torch.device(device)
    if place.type == "cpu":
        return torch.from_numpy(matrices[0][None] if len(matrices) == 1 else np.stack(matrices))
    gpu, wide = place.type == "cuda", any(matrix.dtype == np.float64 for matrix in matrices)
    dtype = torch.float64 if wide and place.type != "mps" else torch.float32
    host = torch.empty((len(matrices), *matrices[0].shape), dtype=dtype, pin_memory=gpu)
    for own, matrix in zip(host, matrices, strict=True):
        own.copy_(torch.from_numpy(matrix))
    return host.to(place, non_blocking=gpu)


def _truncated(batch: torch.Tensor, rank: int, options: ExtractOptions, matrices: Sequence[AnyArray]) -> list[Found]:
    from lorasurgery.linalg.dense import truncated_svds

    found = truncated_svds(batch, rank, tolerance=options.tolerance, exact=options.exact, seed=options.seed)
    sides = zip(_fetched([own.u for own in found]), _fetched([own.v for own in found]), strict=True)
    plain = [Found(u, v, own.values[: own.rank], own.squared_error()) for own, (u, v) in zip(found, sides, strict=True)]
    if options.clamp_quantile is None:
        return plain
    return [_clamped(own, options.clamp_quantile, matrix) for own, matrix in zip(plain, matrices, strict=True)]


def _fetched(sides: Sequence[torch.Tensor]) -> list[AnyArray]:
    """Each (size, k) as rows (k, size) on the host, all in one copy."""
    import torch

    return list(torch.stack([side.T for side in sides]).cpu().numpy())


def _until(matrix: torch.Tensor, cap: int | None, options: ExtractOptions) -> Found:
    """As many as the policy asks for; the squares beyond them stand in values of one size, for the policy to see."""
    from lorasurgery.linalg.dense import svd_until

    param = options.cut.param or 0.0

    found = svd_until(
        matrix,
        energy={"energy": param, "sv_fro": param**2}.get(options.cut.policy or ""),
        error=min(param, 1.0) if options.cut.policy == "error" else None,
        max_rank=cap, tolerance=options.tolerance, exact=options.exact, seed=options.seed,
    )  # fmt: skip
    return _found(found, with_tail(found.values, found.squared_residual, min(matrix.shape)), 0.0)


def with_tail(values: Array, residual: float, length: int) -> Array:
    """The values, and as few as possible of one size below the last whose squares sum to ``residual``; ``length`` at most."""
    if not residual > 0.0 or not values[-1] > 0.0 or len(values) >= length:
        return values
    count = min(max(int(np.ceil(residual / values[-1] ** 2)), 1), length - len(values))
    return np.concatenate([values, np.full(count, np.sqrt(residual / count))])


def _by_spectrum(matrix: torch.Tensor, cap: int, options: ExtractOptions) -> Found:
    """All singular values, the policy's count of them, and the vectors of those."""
    from lorasurgery.linalg.dense import full_spectrum, truncated_svd

    values = full_spectrum(matrix)
    count = max(min(options.cut.rule(values), cap), 1)
    found = truncated_svd(matrix, count, tolerance=options.tolerance, exact=options.exact, seed=options.seed)
    return _found(found, np.concatenate([found.values[:count], values[count:]]), 0.0)


def _found(own: DenseSvd, values: Array, residual: float) -> Found:
    return Found(_fetched([own.u])[0], _fetched([own.v])[0], np.asarray(values, np.float64), residual)


def _clamped(found: Found, quantile: float, matrix: AnyArray) -> Found:
    """With sd-scripts' limit, the quantile of all signed values of ``U S`` and ``Vt``, and the squared error that it makes.

    Source: sd-scripts ``networks/extract_lora_from_models.py`` and ``flux_extract_lora.py`` (2026).
    """
    left = found.u * found.values[:, None].astype(found.u.dtype)
    limit = abs(float(np.quantile(np.concatenate([left.ravel(), found.v.ravel()]), quantile)))
    off = matrix - np.clip(left, -limit, limit).T @ np.clip(found.v, -limit, limit)
    error = float(np.sum(off.astype(np.float64) ** 2))
    return Found(found.u, found.v, found.values, found.residual, limit, error)
