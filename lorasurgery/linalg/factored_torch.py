"""The factored SVD of :mod:`lorasurgery.linalg.low_rank` for many products of one shape at once, on any torch device.

The formulas and limits are the same; batches are ``up: (b, out, rank)``, ``down: (b, rank, in)`` in any floating dtype, and
all decompositions are float64, so a device without it (mps) is no use. Importing this module imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lorasurgery.linalg.low_rank import GRAM_LIMIT, SMALLEST

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import AnyArray


class BatchCores(NamedTuple):
    """``up @ down = U diag(values) Vt`` for each product, with ``U[:, :k] = up @ left`` and ``Vt[:k] = right @ down``."""

    values: Tensor
    """(b, min(rank, out, in)), descending"""
    left: Tensor
    """(b, rank, k)"""
    right: Tensor
    """(b, k, rank)"""
    bounds: Tensor
    """(b,): ``(||up^T up||_F ||down down^T||_F)^(1/2)``, what errors are relative to; not finite for broken factors"""
    accurate: Tensor
    """(b,), bool: whether the first k values and vectors are (relative error below 1e-7)"""


def checked_device(name: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``; raises ``ValueError`` for a device that is not there or has no float64."""
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"torch has no device {name} with float64 here ({str(error).splitlines()[0]})") from error
    return device


def on_device(array: AnyArray, device: torch.device) -> Tensor:
    """A numpy array in float64 there; exact. 16-bit values travel as they are, smaller ones as float32."""
    if array.dtype.name == "bfloat16":  # which only torch knows
        held = torch.as_tensor(array.view("int16")).view(torch.bfloat16)
    else:
        held = torch.as_tensor(array if array.dtype.itemsize > 1 else array.astype("float32"))
    return held.to(device).to(torch.float64)


def batched_cores(up: Tensor, down: Tensor, needed: int | None) -> BatchCores:
    """The Gram route: ``G_d = L L^T``, ``L^T G_u L = V S^2 V^T``, ``U = up L V / S``, ``Vt = S^-2 V^T L^T G_u down``.

    ``needed``: k, how many singular triples are wanted, None for all. Zero products have zeros and are accurate.
    """
    left_side, right_side = up.to(torch.float64), down.to(torch.float64)
    rank, most = down.shape[1], min(up.shape[1], down.shape[2])
    up_gram, down_gram = left_side.mT @ left_side, right_side @ right_side.mT
    bounds = (torch.linalg.matrix_norm(up_gram) * torch.linalg.matrix_norm(down_gram)).sqrt()
    usable = bounds.isfinite()
    up_gram, down_gram = (torch.where(usable[:, None, None], gram, 0.0) for gram in (up_gram, down_gram))
    spread, basis = torch.linalg.eigh(down_gram)
    root = basis * spread.clamp(min=0.0).sqrt()[:, None, :]
    squares, vectors = torch.linalg.eigh(root.mT @ up_gram @ root)
    values, vectors = squares.clamp(min=0.0).sqrt().flip(1), vectors.flip(2)
    wanted = min(rank if needed is None else needed, rank)
    kept, zero = values[:, :wanted], bounds == 0.0
    accurate = usable & (zero | ((bounds > SMALLEST) & (kept[:, -1] > GRAM_LIMIT * bounds))) & (wanted <= most)
    safe = torch.where(kept > 0.0, kept, torch.inf)[:, None, :]
    mixed = root @ vectors[:, :, :wanted]
    return BatchCores(values[:, :most], mixed / safe, (mixed / safe**2).mT @ up_gram, bounds, accurate)


def batched_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The QR route: thin SVDs ``U: (b, out, k)``, ``S: (b, k)``, ``Vt: (b, k, in)`` with ``k = min(rank, out, in)``.

    As accurate as a dense float64 SVD of the product: ``eps ||up||_2 ||down||_2``.
    """
    up_basis, up_rest = torch.linalg.qr(up.to(torch.float64))
    down_basis, down_rest = torch.linalg.qr(down.to(torch.float64).mT)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.mT, full_matrices=False)
    return up_basis @ left, values, right @ down_basis.mT
