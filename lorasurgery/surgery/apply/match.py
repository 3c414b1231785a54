"""Which tensors of a model each module changes, and which rows of them: fused, split and permuted weights alike."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import RequestError
from lorasurgery.io.tensors import FLOATS
from lorasurgery.models.names import BIAS, OTHER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Spans
    from lorasurgery.models import Model, Weight
    from lorasurgery.surgery.apply.inputs import Source


class Run(NamedTuple):
    """Rows ``at:at + length`` of a tensor are rows ``first:first + length`` of a module."""

    at: int
    first: int
    length: int


@dataclass(frozen=True, slots=True)
class Placed:
    """What one module does to one tensor."""

    source: Source
    module: Module
    bias: bool
    """Whether it is the module's bias that is added."""
    strength: float
    runs: tuple[Run, ...]


@dataclass(slots=True)
class Change:
    """One tensor of the model and all that happens to it, in order."""

    name: str
    """Prefix and key."""
    weight: Weight
    placed: list[Placed] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """Every tensor that changes, in file order, and what of the adapters is not used."""

    changes: dict[str, Change] = field(default_factory=dict)
    unmatched: list[tuple[str, str, str]] = field(default_factory=list)
    """(file, key, reason)."""
    order: list[Source] = field(default_factory=list)
    """The sources in the order they are applied."""
    modules: list[int] = field(default_factory=list)
    """Modules used, for each source."""
    left_out: list[int] = field(default_factory=list)
    """Modules of weight 0, for each source."""


def runs_between(holder: Spans, module: Spans) -> tuple[Run, ...]:
    """The rows that a tensor and a module have in common, given the original rows that each of them holds."""
    found = []
    at = 0
    for own in holder:
        first = 0
        for other in module:
            low, high = max(own.start, other.start), min(own.stop, other.stop)
            if own.weight == other.weight and low < high:
                found.append(Run(at + low - own.start, first + low - other.start, high - low))
            first += other.stop - other.start
        at += own.stop - own.start
    return tuple(sorted(found))


def match(model: Model, sources: Sequence[Source]) -> Plan:
    """Place every module of every source, in the order of the sources.

    A module is used when the model has all of its rows. Raises RequestError for a weight that is stored as integers.
    """
    plan = Plan(order=list(sources))
    holders = _holders(model)
    for source in sources:
        used = left = 0
        for module in source.adapter.modules.values():
            strength = source.strength(module)
            if strength == 0.0:
                left += 1
                continue
            used += _place(plan, holders, source, module, strength)
        plan.modules.append(used)
        plan.left_out.append(left)
        plan.unmatched += [(source.path, key, reason) for key, reason in source.unexplained()]
    order = {name: i for i, name in enumerate(model.weights)}
    plan.changes = dict(sorted(plan.changes.items(), key=lambda item: order[item[0]]))
    return plan


_Holders = dict[tuple[str, str, bool], list[tuple[str, "Weight"]]]


def _holders(model: Model) -> _Holders:
    """(component, original weight, whether biases) -> the tensors that hold rows of it."""
    found: _Holders = defaultdict(list)
    for name, weight in model.weights.items():
        if weight.place is None or weight.role == OTHER:
            continue
        for original in dict.fromkeys(span.weight for span in weight.place.spans):
            found[weight.place.component, original, weight.role == BIAS].append((name, weight))
    return found


def _place(plan: Plan, holders: _Holders, source: Source, module: Module, strength: float) -> bool:
    """Whether anything of the module is used."""
    used = False
    for bias in (False, True):
        if (module.bias if bias else module.delta) is None:
            continue
        reason = _place_part(plan, holders, Placed(source, module, bias, strength, ()))
        used = used or not reason
        if reason:
            keys = source.keys.get(module.name, [module.name])
            plan.unmatched += [(source.path, key, reason) for key in _of_part(keys, bias=bias)]
    return used


def _of_part(keys: Iterable[str], *, bias: bool) -> Iterator[str]:
    endings = (".diff_b", ".b_norm", ".bias")
    return (key for key in keys if key.endswith(endings) == bias)


def _place_part(plan: Plan, holders: _Holders, part: Placed) -> str:
    """Put a weight's or a bias' change where it belongs; the reason when it belongs nowhere."""
    component, spans = part.module.site
    found = {name: weight for span in spans for name, weight in holders.get((component, span.weight, part.bias), ())}
    placed = {name: runs_between(weight.place.spans, spans) for name, weight in found.items() if weight.place is not None}
    missing = _missing(part.module, [run for runs in placed.values() for run in runs])
    if missing is not None:
        return f"the model has no {'bias' if part.bias else 'weight'} for {missing}"
    for name, weight in found.items():
        reason = _misfit(part, weight)
        if reason:
            return reason
        if weight.tensor.dtype not in FLOATS:
            raise RequestError(f"{name} is stored as {weight.tensor.dtype}", path=weight.file.path, hint="a model of floats")
    for name, runs in placed.items():
        if runs:
            change = plan.changes.setdefault(name, Change(name, found[name]))
            change.placed.append(Placed(part.source, part.module, part.bias, part.strength, runs))
    return ""


def _missing(module: Module, runs: Sequence[Run]) -> str | None:
    """The rows of a module that no tensor has, in words; None when all are there."""
    at = 0
    for run in sorted(runs, key=lambda run: run.first):
        if run.first > at:
            break
        at = max(at, run.first + run.length)
    if at == module.out:
        return None
    name = f"{module.site.component} {module.site.spans[0].weight}"
    return name if not runs else f"rows {at}: of {name}"


def _misfit(part: Placed, weight: Weight) -> str:
    """Why a delta does not fit a tensor's rows; empty when it does."""
    delta = part.module.delta
    if part.bias or delta is None or not delta.shape:
        return ""
    have, need = prod(weight.shape[1:]), prod(delta.shape[1:])
    return "" if have == need else f"it has {need} columns, the model's {weight.key} has {have}"
