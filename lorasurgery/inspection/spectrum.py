"""Singular values, norms and effective rank of every module's change, from its factors.

The change is ``scale * delta``; a DoRA magnitude, which needs the base weight, is left out. Singular values of a Kronecker
product are the products of its factors' singular values; those of up @ down come from two small matrices.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.linalg.hadamard import khatri_rao
from lorasurgery.linalg.low_rank import factored_svd, rank_for_energy
from lorasurgery.linalg.randomized import dense_svd
from lorasurgery.linalg.threads import map_threads, one_blas_thread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.inspection.description import ModuleInfo
    from lorasurgery.io.tensors import Float64

SHOWN = 512
"""Singular values kept for a module, the largest first."""
DENSE_RANK = 128
"""Singular values computed of a change that is not given by small factors."""
KHATRI_RAO = 512
"""Largest rank^2 for which a LoHa is taken as a low-rank product."""
SHARES = (0.5, 0.9, 0.99)


class ModuleSpectrum(NamedTuple):
    """One module's change."""

    name: str
    block: str
    kind: str
    component: str
    state: str
    """``ok``, ``dead`` (all zero), ``nan`` (not finite) or ``unknown`` (it needs the base weight)."""
    norm: float | None = None
    """Frobenius norm."""
    relative: float | None = None
    """Root mean square of its elements: the norm over sqrt(out * in), comparable between shapes."""
    effective_rank: float | None = None
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007)."""
    complete: bool = True
    """False when only the largest singular values were computed."""
    singular_values: tuple[float, ...] = ()
    ranks: tuple[tuple[float, int], ...] = ()
    """(share of the squared norm, rank that keeps it)."""

    def energy(self, rank: int) -> float:
        """Share of the squared norm that the best approximation of this rank keeps."""
        if not self.norm:
            return 0.0
        return min(sum((value / self.norm) ** 2 for value in self.singular_values[:rank]), 1.0)


class Spectrum(NamedTuple):
    """The spectra of a file."""

    modules: tuple[ModuleSpectrum, ...]
    energy: tuple[tuple[int, float], ...]
    """(rank, share of the file's squared norm kept when every module is cut to it)."""
    dead: tuple[str, ...]
    not_finite: tuple[str, ...]


def spectrum_of(modules: Sequence[Module], infos: Sequence[ModuleInfo]) -> Spectrum:
    """The spectra of the modules; ``infos`` give their place in the model."""
    places = {info.name: info for info in infos}
    with one_blas_thread():
        found = map_threads(lambda m: _module(m, places[m.name]), modules, min(os.cpu_count() or 1, 8))
    total = sum(own.norm**2 for own in found if own.norm)
    ranks = [2**i for i in range(10)]
    energy = []
    for rank in ranks if total else ():
        kept = sum(own.energy(rank) * own.norm**2 for own in found if own.norm)
        energy.append((rank, kept / total))
        if kept >= total * (1 - 1e-9):
            break
    return Spectrum(
        tuple(found),
        tuple(energy),
        tuple(own.name for own in found if own.state == "dead"),
        tuple(own.name for own in found if own.state == "nan"),
    )


def _module(module: Module, info: ModuleInfo) -> ModuleSpectrum:
    place: dict[str, Any] = {"name": info.name, "block": info.block, "kind": info.kind, "component": info.component}
    delta = module.delta
    if isinstance(delta, Opaque):
        return ModuleSpectrum(state="unknown", **place)
    tensors = [module.bias] if delta is None and module.bias is not None else [] if delta is None else delta.tensors.values()
    if not all(np.isfinite(tensor.f32()).all() for tensor in tensors):
        return ModuleSpectrum(state="nan", **place)
    if delta is None:
        values, norm, complete = _vector(module.bias.f64()) if module.bias is not None else _vector(np.zeros(1))
    else:
        values, norm, complete = _values(delta)
        values, norm = values * abs(module.scale.value), norm * abs(module.scale.value)
    if norm == 0.0 or not math.isfinite(norm):
        return ModuleSpectrum(state="dead" if norm == 0.0 else "nan", norm=0.0 if norm == 0.0 else None, **place)
    shares = values[values > 0] / values.sum()
    squares = float(norm**2)
    reached = [(share, _rank_for(values, squares, share)) for share in SHARES]
    return ModuleSpectrum(
        state="ok",
        norm=norm,
        relative=norm / math.sqrt(math.prod(info.shape) or 1),
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        complete=complete,
        singular_values=tuple(float(f"{value:.9g}") for value in values[:SHOWN]),
        ranks=tuple((share, rank) for share, rank in reached if rank),
        **place,
    )


def _rank_for(values: Float64, squares: float, share: float) -> int:
    """The rank that keeps a share of the squared norm; 0 when more singular values than are known would be needed."""
    known = float((values**2).sum())
    if known < share * squares * (1 - 1e-9):
        return 0
    return rank_for_energy(values, min(share * squares / known, 1.0))


def _values(delta: Delta) -> tuple[Float64, float, bool]:
    """Descending singular values, the Frobenius norm, and whether the values are all there are."""
    if len(delta.shape) < 2:
        return _vector(delta.dense())
    if isinstance(delta, LowRank):
        low = delta.to_low_rank()
        return _of_factors(low.up.f64().reshape(low.up.shape[0], -1), low.down.f64().reshape(low.down.shape[0], -1))
    if isinstance(delta, Kronecker):
        return _kronecker(delta)
    if isinstance(delta, Hadamard) and delta.t1 is None and delta.rank**2 <= min(KHATRI_RAO, *delta.shape[:2]):
        up, down = khatri_rao(delta.w1_a.f64(), delta.w1_b.f64(), delta.w2_a.f64(), delta.w2_b.f64())
        return _of_factors(up, down.reshape(len(down), -1))
    return _dense(delta.dense())


def _of_factors(up: Float64, down: Float64) -> tuple[Float64, float, bool]:
    if not (up.any() and down.any()):  # an untrained module's up is zero
        return np.zeros(1), 0.0, True
    values = factored_svd(up, down)[1]
    return values, float(np.linalg.norm(values)), True


def _vector(values: Float64) -> tuple[Float64, float, bool]:
    norm = float(np.linalg.norm(values))
    return np.array([norm]), norm, True


def _dense(matrix: Float64) -> tuple[Float64, float, bool]:
    flat = matrix.reshape(matrix.shape[0], -1)
    norm = float(np.linalg.norm(flat))
    found = dense_svd(flat, rank=DENSE_RANK)
    return found.singular_values, norm, min(flat.shape) <= DENSE_RANK


def _kronecker(delta: Kronecker) -> tuple[Float64, float, bool]:
    """The products of the two factors' singular values."""
    first = _singular(delta.w1, delta.w1_a, delta.w1_b)
    if delta.t2 is not None and delta.w2_a is not None and delta.w2_b is not None:
        core = np.einsum("ij...,ip,jr->pr...", delta.t2.f64(), delta.w2_a.f64(), delta.w2_b.f64())
        second = np.linalg.svd(core.reshape(core.shape[0], -1), compute_uv=False)
    else:
        second = _singular(delta.w2, delta.w2_a, delta.w2_b)
    values = np.sort(np.outer(first, second).ravel())[::-1]
    return values, float(np.linalg.norm(values)), True


def _singular(whole: Any, left: Any, right: Any) -> Float64:  # noqa: ANN401  Tensor or None
    if whole is not None:
        flat: Float64 = np.linalg.svd(whole.f64().reshape(whole.shape[0], -1), compute_uv=False)
        return flat
    return factored_svd(left.f64(), right.f64().reshape(right.shape[0], -1))[1]
