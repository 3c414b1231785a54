"""The same changes by the LyCORIS library's functional API, where it is installed: a second opinion on some modules.

API: LyCORIS ``lycoris.functional`` 3.0 to 4.1 (``locon``, ``loha``, ``lokr``, ``diag_oft``, ``boft``), float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import RequestError
from lorasurgery.operations.onto.tools import Tools
from lorasurgery.verbs.apply.fresh import made_step

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lorasurgery.adapter import Module
    from lorasurgery.io.tensors import Float64, Tensor
    from lorasurgery.models import Model
    from lorasurgery.operations.onto.options import ApplyOptions
    from lorasurgery.operations.onto.plan import Placed, Plan

EACH, ELEMENTS = 4, 1 << 24
"""Modules of a family that are compared, and the largest weight."""


class Compared(NamedTuple):
    """One module."""

    module: str
    family: str
    difference: float
    """``||ours - theirs|| / ||theirs||`` of the change."""

    def to_json(self) -> dict[str, Any]:
        """A plain object."""
        return self._asdict()


def compare(model: Model, plan: Plan, options: ApplyOptions) -> list[Compared]:
    """The changes of up to four modules of each family, by us and by LyCORIS; DoRA's without its magnitude.

    Raises RequestError when LyCORIS is not installed.
    """
    try:
        import lycoris.functional  # noqa: F401
    except ImportError as error:
        raise RequestError("--prefer-lycoris needs the LyCORIS library", hint="pip install lycoris-lora") from error
    found = []
    for placed in _chosen(plan):
        module = placed.module
        weight = model.reader(*module.site).array().astype(np.float64)
        theirs = _theirs(module, weight, placed.strength)
        if theirs is not None:
            ours = _ours(placed, weight.reshape(weight.shape[0], -1), options)
            norm = float(np.linalg.norm(theirs))
            off = float(np.linalg.norm(ours - theirs.reshape(ours.shape)))
            found.append(Compared(module.name, module.family, off / norm if norm else off))
    return found


def _chosen(plan: Plan) -> Iterator[Placed]:
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for change in plan.changes.values():
        for own in change.placed if change.shape == change.weight.shape else ():
            module = own.module
            size = module.out * (change.weight.tensor.size // max(change.weight.shape[0], 1))
            if own.bias or id(module) in seen or size > ELEMENTS or counts.get(module.family, 0) >= EACH:
                continue
            seen.add(id(module))
            counts[module.family] = counts.get(module.family, 0) + 1
            yield own


def _ours(placed: Placed, weight: Float64, options: ApplyOptions) -> Float64:
    """The change as it is computed when weights are written, in float64, without a DoRA's magnitude."""
    plain = replace(placed, module=replace(placed.module, magnitude=None))
    new = weight.copy()
    made_step(plain, weight.shape[1], "float64", replace(options, unapply=False), Tools()).change(new, 0)
    difference: Float64 = new - weight
    return difference


def _theirs(module: Module, weight: Float64, strength: float) -> Float64 | None:
    """LyCORIS' change, None for what its functional API does not have."""
    import torch

    delta = module.delta
    with torch.no_grad():
        if isinstance(delta, LowRank):
            change = _low_rank(delta)
        elif isinstance(delta, Hadamard):
            change = _hadamard(delta)
        elif isinstance(delta, Kronecker):
            change = _kronecker(delta)
        elif isinstance(delta, Opaque) and delta.family in {"oft", "boft"} and ".oft_blocks" in delta.tensors:
            return _turned(module, delta, weight, strength)
        else:
            return None
        result: Float64 = change.numpy() * (module.scale.value * strength)
        return result


def _torch(tensor: Tensor | None, *, narrow: bool = False) -> torch.Tensor | None:
    import torch

    return None if tensor is None else torch.from_numpy(tensor.f32() if narrow else tensor.f64())


def _low_rank(delta: LowRank) -> Any:  # noqa: ANN401  an untyped library's tensor
    from lycoris.functional import locon

    return locon.diff_weight(_torch(delta.down), _torch(delta.up), _torch(delta.mid), gamma=1.0)


def _hadamard(delta: Hadamard) -> Any:  # noqa: ANN401
    from lycoris.functional import loha

    factors = (delta.w1_b, delta.w1_a, delta.w2_b, delta.w2_a, delta.t1, delta.t2)
    return loha.diff_weight(*map(_torch, factors), gamma=1.0)


def _kronecker(delta: Kronecker) -> Any:  # noqa: ANN401
    """Its two factors are multiplied out by LyCORIS' own ``make_kron``: what ``gamma`` means differs between versions."""
    from lycoris.functional import lokr, rebuild_tucker

    one, a1, b1 = map(_torch, (delta.w1, delta.w1_a, delta.w1_b))
    two, a2, b2, core = map(_torch, (delta.w2, delta.w2_a, delta.w2_b, delta.t2))
    if one is None:
        assert a1 is not None and b1 is not None  # noqa: PT018, S101  the parser has looked
        one = a1 @ b1
    if two is None:
        assert a2 is not None and b2 is not None  # noqa: PT018, S101
        two = (a2 @ b2.reshape(len(b2), -1)).reshape(-1, *b2.shape[1:]) if core is None else rebuild_tucker(core, a2, b2)
    return lokr.make_kron(one, two, 1.0)


def _turned(module: Module, delta: Opaque, weight: Float64, strength: float) -> Float64 | None:
    """In float32, as the library inverts; OFT at weight 1 only: the functional API has no multiplier for it."""
    import torch
    from lycoris.functional import boft, diag_oft

    slots, alpha = delta.tensors, module.scale.alpha
    limit = 0.0 if alpha is None else alpha.item() * module.out
    rescale = _torch(slots.get(".rescale"), narrow=True)
    own = (torch.from_numpy(weight.astype(np.float32)), _torch(slots[".oft_blocks"], narrow=True), rescale)
    if delta.family == "boft":
        changed: Float64 = boft.diff_weight(*own, constraint=limit, scale=strength).numpy()
        return changed
    if strength != 1.0:
        return None
    turned: Float64 = diag_oft.diff_weight(*own, constraint=limit).numpy()
    return turned
