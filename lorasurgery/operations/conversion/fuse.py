"""Rows of one module, and modules one below the other: delta, scale, magnitude and bias together."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Magnitude, Module, Scale
from lorasurgery.deltas.base import CannotError, is_power_of_two
from lorasurgery.deltas.full import Full, stack_full
from lorasurgery.deltas.hadamard import Hadamard, stack_hadamard
from lorasurgery.deltas.kronecker import Kronecker, stack_kronecker
from lorasurgery.deltas.low_rank import LowRank, stack_low_rank
from lorasurgery.io.tensors import stack, zeros
from lorasurgery.operations.conversion.pieces import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.site import Site


def take_rows(module: Module, ranges: Sequence[tuple[int, int]], rows: int) -> Module:
    """The module with only these of its ``rows`` output rows, in this order; raises CannotError where that is not exact."""
    delta = None if module.delta is None else module.delta.rows(ranges)
    magnitude = None if module.magnitude is None else module.magnitude.rows(ranges, rows)
    bias = None if module.bias is None else module.bias.rows(ranges)
    taken = replace(module, magnitude=magnitude, bias=bias, extras={}, keys={}, layer_bias=None)
    return taken if delta is None else taken.with_delta(delta)


def stack_modules(
    site: Site, parts: Sequence[tuple[Module | None, int]], record: Record | None = None, *, fold: bool = False
) -> Module:
    """Modules one below the other; None is rows of nothing. Raises CannotError where the family cannot do that.

    Where the scales differ, each member is multiplied by its ratio to the most frequent one, or by its whole scale when
    it will be folded anyway (``fold``); ``record`` gets what that costs in the file's dtype, nothing for a power of two.
    """
    present = [module for module, _ in parts if module is not None]
    head = present[0]
    deltas = [m.delta for m in present if m.delta is not None]
    kinds = {type(delta) for delta in deltas}
    if len(kinds) > 1:
        raise CannotError(f"its parts are of different families ({', '.join(sorted({d.family for d in deltas}))})")
    magnitude = _stack_magnitudes(parts)
    bias = stack_bias([Piece(m, ((0, rows),)) for m, rows in parts])
    if not deltas:
        return replace(head, site=site, bias=bias, magnitude=magnitude, extras={}, keys={}, layer_bias=None)
    value, common = _common_scale(present, fold=fold)
    recorded = _shares(present, record)
    members = []
    for module, rows in parts:
        delta = None if module is None else module.delta
        if module is not None and delta is not None and module.scale.value != value:
            delta = delta.scaled(module.scale.value / value, recorded(module))
        members.append((delta, rows))
    stacked = _stack_deltas(members)
    same = common and stacked.rank == deltas[0].rank
    alpha = head.scale.alpha if same else None
    return replace(
        head, site=site, delta=stacked, scale=Scale(value, head.scale.source, alpha), magnitude=magnitude,
        bias=bias, extras={}, keys={}, layer_bias=None,
    )  # fmt: skip


def wide(parts: Sequence[Module | None]) -> list[Module | None]:
    """The parts of a stack in float64, to be rounded only once, where making their scales one changes more than exponents."""
    scales = [part.scale.value for part in parts if part is not None and part.delta is not None]
    usual = next((scale for scale in scales if scale), 1.0)
    if all(is_power_of_two(scale / usual) for scale in scales):
        return list(parts)
    return [p if p is None or p.delta is None else replace(p, delta=p.delta.cast("F64")) for p in parts]


def _common_scale(modules: Sequence[Module], *, fold: bool) -> tuple[float, bool]:
    """The scale a stack of these modules gets, and whether all have it: the usual one that is not 0, or 1 to ``fold``."""
    values = Counter(module.scale.value for module in modules if module.delta is not None)
    usual = 1.0 if fold and len(values) > 1 else max(values, key=lambda value: (value != 0.0, values[value]))
    return usual, len(values) == 1


def _shares(modules: Sequence[Module], record: Record | None) -> Callable[[Module], Record | None]:
    """What the members of a stack give their rounding errors to: weighted by their shares of the stack's squared norm."""

    @cache
    def norms() -> dict[str, float]:
        return {m.name: m.scale.value**2 * _squared_norm(m.delta) for m in modules if m.delta is not None}

    def of(module: Module) -> Record | None:
        def own(error: float, norm: float) -> None:
            if record is not None:
                part, whole = norms()[module.name], sum(norms().values())
                record(*((error / norm * part, whole) if norm and part else (error, 0.0)))

        return own

    return of


def _squared_norm(delta: Delta) -> float:
    """The squared norm of a delta, in float64, of large ones never formed as a whole."""
    if isinstance(delta, Kronecker):
        return float((delta.outer_array() ** 2).sum() * (delta.inner_array() ** 2).sum())
    if isinstance(delta, LowRank):
        from lorasurgery.linalg.low_rank import product_norm

        low = delta.to_low_rank()
        up, down = (tensor.f64().reshape(tensor.shape[0], -1) for tensor in (low.up, low.down))
        return product_norm(up, down) ** 2
    from lorasurgery.deltas.by_rows import squared_norm

    return squared_norm(delta)


_STACKS: Mapping[type[Delta], Callable[[Any], Delta]] = {
    LowRank: stack_low_rank,
    Hadamard: stack_hadamard,
    Kronecker: stack_kronecker,
    Full: stack_full,
}


def _stack_deltas(members: Sequence[tuple[Delta | None, int]]) -> Delta:
    head = next(delta for delta, _ in members if delta is not None)
    stack_them = _STACKS.get(type(head))
    if stack_them is None:
        raise CannotError(f"{head.family.upper()} modules cannot be fused without the base weight")
    return stack_them(members)


def _stack_magnitudes(parts: Sequence[tuple[Module | None, int]]) -> Magnitude | None:
    magnitudes = [None if module is None else module.magnitude for module, _ in parts]
    if all(m is None for m in magnitudes):
        return None
    if any(m is None for m in magnitudes):
        raise CannotError("only some of its parts have a DoRA magnitude, and the others' is the base weight's own norm")
    if any(m.axis == "in" for m in magnitudes if m is not None):
        raise CannotError("its parts have DoRA magnitudes per input column, one set for each part")
    tensors = [m.tensor.reshape(m.tensor.size) for m in magnitudes if m is not None]
    flat = stack(tensors)
    rest = magnitudes[0].tensor.shape[1:] if magnitudes[0] is not None else ()
    return Magnitude(flat.reshape(flat.size, *(1 for _ in rest)), "out")


def stack_bias(pieces: Sequence[Piece]) -> Tensor | None:
    """Biases one after the other, zeros where a part has none; None when no part has one."""
    biases = [None if p.source is None or p.source.bias is None else p.source.bias.rows(p.ranges) for p in pieces]
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    dtype = present[0].dtype
    return stack([zeros(dtype, (p.rows,)) if bias is None else bias for p, bias in zip(pieces, biases, strict=True)])
