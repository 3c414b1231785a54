"""One LoRA module at a smaller rank: its first components, or the best approximation; a Tucker core on both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.tensors import of_array

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.prefix import PrefixCurve
    from lorasurgery.verbs.rerank.nested import NestedModule


class Cut(NamedTuple):
    """One module at its new rank, with the squared error of its product."""

    delta: LowRank
    rank: int
    error: float


def curve_of(module: NestedModule) -> PrefixCurve:
    """The module's errors by rank; raises BrokenModuleError for NaN and infinity."""
    from lorasurgery.linalg.prefix import prefix_curve, tucker_curve

    delta = module.delta
    up, down = delta.up.f64().reshape(delta.up.shape[0], -1), delta.down.f64().reshape(delta.down.shape[0], -1)
    try:
        if delta.mid is None:
            return prefix_curve(up, down)
        return tucker_curve(up, delta.mid.f64().reshape(*delta.mid.shape[:2], -1), down)
    except (ValueError, ArithmeticError) as broken:
        key = module.keys["down"]
        raise BrokenModuleError(f"{module.stem}: {broken}", key=key, hint="the file before it broke") from broken


def cut_module(module: NestedModule, curve: PrefixCurve, rank: int, *, svd: bool, dtype: str | None) -> Cut:
    """``module`` at ``rank`` (or as it is, if that is no less), by its SVD or its prefix, in ``dtype`` (None: its own)."""
    delta, small = module.delta, min(rank, module.rank)
    if small < module.rank:
        delta = _best(delta, small, dtype) if svd else _prefix(delta, small)
    if dtype is not None:
        delta = delta.cast(dtype)
    if not svd and dtype is None:
        return Cut(delta, small, float(curve.prefix[small]))
    kept = delta.rank if delta.mid is None else max(delta.mid.shape[:2])
    return Cut(delta, kept, 0.0 if delta == module.delta else _squared_error(module.delta, delta))


def _prefix(delta: LowRank, rank: int) -> LowRank:
    """The first components: rows of ``down``, columns of ``up``, both sides of a core. Moves bytes."""
    rows, columns = [(0, min(rank, delta.down.shape[0]))], [(0, min(rank, delta.up.shape[1]))]
    mid = None if delta.mid is None else delta.mid.rows(columns).columns(rows)
    return LowRank(delta.up.columns(columns), delta.down.rows(rows), mid)


def _best(delta: LowRank, rank: int, dtype: str | None) -> LowRank:
    """The best approximation of this rank, in the file's axes; a Tucker core stays one."""
    up, down = delta.up.f64().reshape(delta.up.shape[0], -1), delta.down.f64().reshape(delta.down.shape[0], -1)
    mid: Tensor | None = None
    if delta.mid is None:
        from lorasurgery.linalg.low_rank import truncate

        new_up, new_down, _ = truncate(up, down, rank)
    else:
        from lorasurgery.linalg.tucker import truncate_tucker

        new_up, core, new_down = truncate_tucker(up, delta.mid.f64().reshape(*delta.mid.shape[:2], -1), down, rank)
        mid = of_array(core.reshape(*core.shape[:2], *delta.mid.shape[2:]), dtype or delta.mid.dtype)
    return LowRank(
        of_array(new_up.reshape(*new_up.shape, *delta.up.shape[2:]), dtype or delta.up.dtype),
        of_array(new_down.reshape(new_down.shape[0], *delta.down.shape[1:]), dtype or delta.down.dtype),
        mid,
    )


def _squared_error(old: LowRank, new: LowRank) -> float:
    from lorasurgery.linalg.low_rank import difference_norm

    one, two = old.to_low_rank(), new.to_low_rank()
    pair = [(d.up.f64().reshape(d.up.shape[0], -1), d.down.f64().reshape(d.rank, -1)) for d in (one, two)]
    return difference_norm(*pair[0], *pair[1]) ** 2
