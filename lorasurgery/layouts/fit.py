"""Whether the factors of one module go together: kinds of numbers, axes and inner dimensions."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.dtypes import CARRIED, FLOATS
from lorasurgery.layouts.peft_types import MERGED
from lorasurgery.layouts.words import LOHA, LOKR, LORA, MISS

if TYPE_CHECKING:
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.entry import Group

FACTORED = (LORA, LOHA, LOKR, MISS)
_CORES = ("mid", "t1", "t2")


def check_factors(own: Group, family: str, path: object) -> None:
    """A factor is a matrix (a Tucker core has its kernel too) of floating-point numbers, none of its sides empty."""
    for (kind, slot), entry in own.entries.items():
        if kind != family:
            continue
        shape, dtype = entry.tensor.shape, entry.tensor.dtype
        if len(shape) < (3 if slot in _CORES else 2) or 0 in shape:
            raise broken(own, path, f"{entry.key} has shape {list(shape)}, a factor has rows and columns", "the original file")
        if dtype not in FLOATS and dtype not in CARRIED:
            raise broken(
                own,
                path,
                f"{entry.key} has dtype {dtype}, a factor holds floating-point numbers",
                "the file before it was quantised",
            )


def check_fit(own: Group, delta: Delta, path: object) -> None:
    """Inner dimensions must agree; raises BrokenModuleError."""
    pairs: list[tuple[str, int, str, int]] = []
    if isinstance(delta, LowRank):
        pairs += _low_rank_pairs(own, delta, path)
    elif isinstance(delta, Hadamard):
        pairs += _arm_ranks("hada_w1", "hada_t1", delta.w1_a, delta.w1_b, delta.t1)
        pairs += _arm_ranks("hada_w2", "hada_t2", delta.w2_a, delta.w2_b, delta.t2)
    elif isinstance(delta, Kronecker):
        if delta.w1 is None and delta.w1_a is not None and delta.w1_b is not None:
            pairs.append(("lokr_w1_a", delta.w1_a.shape[1], "lokr_w1_b", delta.w1_b.shape[0]))
        if delta.w2 is None and delta.w2_a is not None and delta.w2_b is not None:
            pairs += _arm_ranks("lokr_w2", "lokr_t2", delta.w2_a, delta.w2_b, delta.t2)
    if isinstance(delta, Hadamard):
        _check_arms(own, delta, path)
    for first, has, second, other in pairs:
        if has != other:
            raise broken(own, path, f"{own.stem}: {first} has rank {has} but {second} has {other}", "the original file")


def _low_rank_pairs(own: Group, delta: LowRank, path: object) -> list[tuple[str, int, str, int]]:
    """The inner dimensions of up @ down, or of up, mid and down."""
    core = delta.mid
    if core is None:
        return [("up", delta.up.shape[1], "down", delta.rank)]
    for slot, factor in (("up", delta.up), ("down", delta.down)):
        if prod(factor.shape[2:]) != 1:
            text = f"{own.stem}: {slot} has shape {list(factor.shape)}, beside a mid it has no kernel of its own"
            raise broken(own, path, text, "the original file")
    return [("up", delta.up.shape[1], "mid", core.shape[0]), ("mid", core.shape[1], "down", delta.rank)]


def _arm_ranks(name: str, core_name: str, a: Tensor, b: Tensor, core: Tensor | None) -> list[tuple[str, int, str, int]]:
    """The inner dimensions of a @ b that must be equal, or of a, b and the Tucker core between them."""
    if core is None:
        return [(f"{name}_a", a.shape[1], f"{name}_b", b.shape[0])]
    return [(f"{name}_a", a.shape[0], core_name, core.shape[0]), (core_name, core.shape[1], f"{name}_b", b.shape[0])]


def _check_arms(own: Group, delta: Hadamard, path: object) -> None:
    """Both arms of a LoHa have one shape."""
    if (delta.t1 is None) != (delta.t2 is None):
        raise broken(own, path, f"{own.stem} has only one of hada_t1 and hada_t2", "the complete file")
    axis = 0 if delta.t1 is None else 1
    kernels = [None if core is None else core.shape[2:] for core in (delta.t1, delta.t2)]
    one, two = ([a.shape[axis], *b.shape[1:]] for a, b in ((delta.w1_a, delta.w1_b), (delta.w2_a, delta.w2_b)))
    if one != two or kernels[0] != kernels[1]:
        raise broken(own, path, f"{own.stem}: the first arm of this LoHa is {one}, the second {two}", "the original file")


def is_misread(delta: Delta | None) -> bool:
    """Whether PEFT multiplies the factors along other axes than every other program: of a kernel of one axis.

    Its ``make_kron`` adds the missing axes of w1 behind for a w2 of four axes alone; for three ``torch.kron`` adds them in
    front. Source: PEFT 0.21 ``tuners/lokr/layer.py``.
    """
    return isinstance(delta, Kronecker) and delta.w2 is not None and len(delta.w2.shape) == 3


def check_pefts(own: Group, delta: Delta | None, path: object) -> None:
    """Raises BrokenModuleError for what PEFT's own folder means otherwise than its tensors do anywhere else."""
    if is_misread(delta):
        text = f"{own.stem}.lokr_w2 has a kernel of one axis, along which PEFT multiplies the factors otherwise than all others"
        raise broken(own, path, text, MERGED)


def broken(own: Group, path: object, message: str, hint: str) -> BrokenModuleError:
    """The error for a module whose tensors do not go together."""
    return BrokenModuleError(message, key=own.key(), path=str(path) if path is not None else None, hint=hint)
