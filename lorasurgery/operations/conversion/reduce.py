"""To one LoRA: the exact low-rank form of any family, or its best approximation at a rank or energy.

Nothing here forms a dense matrix but for full differences, which are dense already.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from lorasurgery.deltas.full import Full
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank, stack_low_rank
from lorasurgery.deltas.rounding import COMPUTED
from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.finite import is_finite
from lorasurgery.io.tensors import of_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Array, Tensor
    from lorasurgery.linalg.factors import Factors


@dataclass(frozen=True, slots=True)
class Budget:
    """How far a result may be cut: both None is exact."""

    rank: int | None = None
    energy: float | None = None

    @property
    def exact(self) -> bool:
        """Whether nothing may be cut."""
        return self.rank is None and self.energy is None


@dataclass(frozen=True, slots=True)
class Reduced:
    """A low-rank delta of scale 1, with the squared error and squared norm of what it stands for (0, 0: exact)."""

    delta: LowRank
    error: float = 0.0
    norm: float = 0.0


Member = tuple["Delta | None", float, int]
"""(delta, scale, rows); None for a missing member."""


def to_lora(members: Sequence[Member], budget: Budget, dtype: str, record: Record) -> Reduced:
    """The members, one below the other, as one LoRA in ``dtype`` with every scale folded in.

    Exact without a budget: the rank is the sum of the members' ranks, or the numerical rank where that is smaller than
    both sides allow; ``record`` gets the rounding to ``dtype`` when the tensors are computed.
    Raises CannotError for families that multiply the base, norms and stacked convolutions.
    """
    exact = _exact(members, dtype, record) if budget.exact else None
    if exact is not None:
        return Reduced(exact)
    present = [delta for delta, _, _ in members if delta is not None]
    shape = present[0].shape
    factors = _truncated(members, budget)
    up, down = of_array(factors.up, dtype), of_array(factors.down, dtype)
    rank = factors.up.shape[1]
    norm = _norm(factors)
    delta = LowRank(up.reshape(up.shape[0], rank, *(1 for _ in shape[2:])), down.reshape(rank, shape[1], *shape[2:]))
    rounding = _rounding(factors, up, down)
    return Reduced(delta, (factors.relative_error**2 + COMPUTED) * norm + max(rounding, 0.0), norm)


def _exact(members: Sequence[Member], dtype: str, record: Record) -> LowRank | None:
    """The factors written down without arithmetic beyond one product, or None when that rank exceeds what is needed."""
    low = [(None if d is None else d.to_low_rank().times(scale), rows) for d, scale, rows in members]
    present = [delta for delta, _ in low if delta is not None]
    rows = sum(rows for *_, rows in members)
    if sum(delta.rank for delta in present) > min(rows, prod(present[0].shape[1:])):
        return None
    stacked = present[0] if len(low) == 1 else stack_low_rank(low)
    return stacked.cast(dtype, record)


def _truncated(members: Sequence[Member], budget: Budget) -> Factors:
    from lorasurgery.linalg.kronecker import KroneckerPart, ZeroRows, stacked_kronecker_svd
    from lorasurgery.linalg.randomized import dense_svd

    present = [delta for delta, _, _ in members if delta is not None]
    _refuse_not_finite(present)
    if all(isinstance(delta, Kronecker) and len(delta.shape) == 2 for delta in present):
        parts: list[KroneckerPart | ZeroRows] = []
        for delta, scale, rows in members:
            if isinstance(delta, Kronecker):
                parts.append(KroneckerPart(delta.outer_array() * scale, delta.inner_array()))
            else:
                parts.append(ZeroRows(rows))
        return stacked_kronecker_svd(parts, rank=budget.rank, energy=budget.energy)
    if len(members) == 1 and isinstance(present[0], Full):
        matrix = present[0].dense().reshape(present[0].shape[0], -1) * members[0][1]
        return dense_svd(matrix, rank=budget.rank, energy=budget.energy)
    return _cut_factors(members, budget)


def _refuse_not_finite(deltas: Sequence[Delta]) -> None:
    """A decomposition of NaN does not end well: raises BrokenModuleError."""
    for delta in deltas:
        for slot, tensor in delta.tensors.items():
            if not is_finite(tensor):
                raise BrokenModuleError(f"its {slot} holds NaN or infinity", key=slot)


def _cut_factors(members: Sequence[Member], budget: Budget) -> Factors:
    """Stack exact low-rank forms, then cut the product of the factors, or the dense stack where that is sooner done."""
    import numpy as np

    from lorasurgery.linalg.factors import Factors
    from lorasurgery.linalg.low_rank import factored_svd, rank_for_energy, tail_error
    from lorasurgery.linalg.randomized import dense_svd
    from lorasurgery.operations.route import dense_is_cheaper, making_dense

    low = [(None if d is None else d.to_low_rank().times(scale), rows) for d, scale, rows in members]
    whole = stack_low_rank(low) if len(low) > 1 else low[0][0]
    assert whole is not None  # noqa: S101  a stack has at least one member
    sides, making = (whole.shape[0], prod(whole.shape[1:])), making_dense(d for d, *_ in members if d is not None)
    if budget.rank is not None and dense_is_cheaper(sides, whole.rank, budget.rank, making):
        return dense_svd(_stacked_dense(members, sides), rank=budget.rank, energy=budget.energy, dtype=np.float64)
    left, values, right = factored_svd(whole.up.f64().reshape(whole.up.shape[0], -1), whole.down.f64().reshape(whole.rank, -1))
    kept = max(int(np.sum(values > 1e-13 * values[0])) if values.size else 1, 1)
    kept = min(kept, budget.rank or kept)
    if budget.energy is not None:
        kept = min(kept, max(rank_for_energy(values, budget.energy), 1))
    root = np.sqrt(values[:kept])
    return Factors(left[:, :kept] * root, root[:, None] * right[:kept], values[:kept], tail_error(values, kept))


def _stacked_dense(members: Sequence[Member], sides: tuple[int, int]) -> Array:
    """(out, in*k*k) in float64, missing members zeros."""
    import numpy as np

    parts = [np.zeros((rows, sides[1])) if d is None else d.dense().reshape(-1, sides[1]) * scale for d, scale, rows in members]
    return np.vstack(parts)


def _norm(factors: Factors) -> float:
    """Squared norm of the matrix that was cut."""
    kept = float((factors.singular_values**2).sum())
    return kept / max(1.0 - factors.relative_error**2, 1e-300)


def _rounding(factors: Factors, up: Tensor, down: Tensor) -> float:
    """Squared error of storing the factors in the file's dtype: ||U D - U' D'||^2 by Gram matrices."""
    rounded_up, rounded_down = up.f64(), down.f64()
    return float(_product_norm(rounded_up - factors.up, rounded_down) + _product_norm(factors.up, rounded_down - factors.down))


def _product_norm(up: Array, down: Array) -> float:
    """||up @ down||_F^2."""
    return float((up.T @ up * (down @ down.T)).sum())
