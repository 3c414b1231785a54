"""The modules of a result: one file's own, scaled, or the sum of several, with what is told about each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.rounding import rounded
from lorasurgery.errors import NotRepresentableError
from lorasurgery.io.dtypes import widest
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.operations.conversion.cast import BIAS
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.sum.add import Sum, added, nonlinear, refuse_nonlinear
from lorasurgery.operations.sum.adding import Adding, Cutting
from lorasurgery.verbs.merge.inputs import times
from lorasurgery.verbs.merge.report import MergedModule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.site import Site
    from lorasurgery.verbs.merge.inputs import Weighted
    from lorasurgery.verbs.merge.merging import Merging

FOLD = "lorasurgery resize FILE OUT --rank N --dora fold --base MODEL first, which makes a LoRA of it; or --drop-nonlinear"
LEAVE = "weight 1 and no other file for this module; or --drop-nonlinear to leave it out"


@dataclass(frozen=True, slots=True)
class Sums:
    """Makes the result's modules of those that the files have at one site."""

    run: Merging

    def __call__(self, site: Site, members: Sequence[Weighted], factors: Sequence[float] | None = None) -> Module | None:
        """Their sum, each times its factor (None: 1); None where nothing is left."""
        every = [m if f == 1.0 else _times(m, f) for m, f in zip(members, factors or [1.0] * len(members), strict=True)]
        members = [m for m in every if m.weight != 0.0]
        if not members:
            return self.noted(every, None, "times 0")
        try:
            found = self._one(site, members)
        except CannotError as reason:
            self.refused(members, reason)
            return None
        return self.noted(members, found.module, found.action)

    def addable(self, members: Sequence[Weighted]) -> Sequence[Weighted]:
        """The members at one site; of several, those that no sum can have are left out and noted, where that is allowed."""
        if len(members) == 1 or not self.run.options.drop_nonlinear:
            return members
        reasons = [nonlinear(member.module) for member in members]
        for member, reason in zip(members, reasons, strict=True):
            if reason is not None:
                self.refused([member], CannotError(reason))
        return [member for member, reason in zip(members, reasons, strict=True) if reason is None]

    def _one(self, site: Site, members: Sequence[Weighted]) -> Sum:
        if len(members) == 1:
            only = members[0]
            if only.weight != 1.0:
                refuse_nonlinear([only.module])
            return Sum(self._narrowed(_as_stored(only)), _action(only))
        return added([m.module for m in members], self.adding(site, members))

    def adding(self, site: Site, members: Sequence[Weighted]) -> Adding:
        """How the sum of these is to be written."""
        resizing = self.run.options.resize
        cut = None if resizing is None else Cutting(resizing.rank if resizing.is_fixed else None)
        dtype = self.dtype_of(members) if cut is None else "F32"
        name = members[0].original.name
        lokr = self.run.options.as_lokr  # what is none of their shape becomes one when it is written
        return Adding(
            expected_shape(self.run.arch, site), dtype, self.run.recorder(name),
            full=lokr or "full" in self.run.target.holds, lokr=lokr, factor=self.run.options.lokr_factor, cut=cut,
        )  # fmt: skip

    def dtype_of(self, members: Sequence[Weighted]) -> str:
        """The dtype that was asked for, the members' own where they agree, or the first file's."""
        if self.run.options.dtype != "keep":
            return DTYPES[self.run.options.dtype]
        own = {widest([t.dtype for t in m.original.delta.tensors.values()]) for m in members if m.original.delta is not None}
        return own.pop() if len(own) == 1 else self.run.dtype

    def _narrowed(self, only: Weighted) -> Module:
        """A module that went through float64 on its way to another granularity, in its file's dtype or the one asked for."""
        module, own = only.module, only.original.delta
        if module.delta is None or own is None:
            return module
        dtype = DTYPES.get(self.run.options.dtype) or widest([t.dtype for t in own.tensors.values()])
        if all(tensor.dtype in {t.dtype for t in own.tensors.values()} for tensor in module.delta.tensors.values()):
            return module
        return replace(module, delta=module.delta.cast(dtype, self.run.recorder(only.original.name)))

    def refused(self, members: Sequence[Weighted], reason: CannotError) -> None:
        """Raises NotRepresentableError, or notes what is left out."""
        odd = next((m for m in members if not m.linear), members[0])
        source = self.run.sources[odd.source]
        if not self.run.options.drop_nonlinear:
            dora = odd.module.magnitude is not None
            raise NotRepresentableError(
                f"{odd.original.name}: {reason.message}", module=odd.original.name, path=source.adapter.path,
                hint=FOLD if dora else LEAVE,
            ) from reason  # fmt: skip
        self.run.report.dropped += [(f"{self.run.sources[m.source].name}: {m.original.name}", reason.message) for m in members]

    def noted(self, members: Sequence[Weighted], module: Module | None, action: str) -> Module | None:
        """Write down what became of a module, and return it, its bias in the dtype that it had."""
        self.run.report.modules.append(described(members, module, action))
        return module if module is None or module.bias is None else self._with_bias(members, module, module.bias)

    def _with_bias(self, members: Sequence[Weighted], module: Module, bias: Tensor) -> Module:
        own = next((m.original.bias.dtype for m in members if m.original.bias is not None), self.run.dtype)
        dtype = own if self.run.options.dtype == "keep" else DTYPES[self.run.options.dtype]
        return replace(module, bias=rounded(bias, dtype, self.run.recorder(BIAS.format(members[0].original.name))))


def _as_stored(only: Weighted) -> Weighted:
    """A module that one file has, its factors with as many axes as there: those of the layer are for adding."""
    module, was = only.module, only.original
    cut = module.delta is not None and was.delta is not None and module.delta.rank != was.delta.rank
    return only if cut or module.site != was.site else replace(only, module=replace(module, delta=was.delta))


def _action(only: Weighted) -> str:
    """What became of a module that one file has."""
    if only.weight != 1.0:
        return "scaled"
    if only.module.site != only.original.site:
        return "cut or fused"
    ranks = [None if m.delta is None else m.delta.rank for m in (only.module, only.original)]
    return "kept" if ranks[0] == ranks[1] else "first ranks"


def described(members: Sequence[Weighted], module: Module | None, action: str) -> MergedModule:
    """A row of the report."""
    head = members[0]
    return MergedModule(
        name=head.original.name, component=head.module.site.component, action=action,
        sources=tuple(m.source for m in members), weights=tuple(m.weight for m in members),
        was=tuple(m.original.family for m in members), family="" if module is None else module.family,
        rank=None if module is None or module.delta is None else module.delta.rank,
    )  # fmt: skip


def _times(member: Weighted, factor: float) -> Weighted:
    return replace(member, module=times(member.module, factor), weight=member.weight * factor)
