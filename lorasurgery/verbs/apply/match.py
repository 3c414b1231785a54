"""Which tensors of a model each module changes, and which rows of them: fused, split and permuted weights alike."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.gated import ia3_on_input
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import RequestError
from lorasurgery.io.dtypes import FLOATS
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.layouts.peft_keys import transposed
from lorasurgery.models.encoders import TURNED
from lorasurgery.models.names import BIAS, OTHER
from lorasurgery.operations.onto.plan import Change, Placed, Plan, Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Spans
    from lorasurgery.models import Model, Weight
    from lorasurgery.operations.onto.source import Source


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

    A module is used when the model has all of its rows; its weight may be a parameter that is no layer's. Raises
    RequestError for a weight that is stored as integers.
    """
    plan = Plan(order=list(sources))
    holders = _holders(model)
    components = {component for component, *_ in holders}
    for source in sources:
        used = left = 0
        for module in sorted(source.adapter.modules.values(), key=_is_added):
            strength = source.strength(module)
            if strength == 0.0:
                left += 1
                continue
            if module.site.component not in components:
                reason = f"not for this file, which has no {module.site.component}"
                plan.unmatched += [(source.path, key, reason) for key in source.keys.get(module.name, [module.name])]
                continue
            used += _place(plan, holders, source, module, strength)
        plan.modules.append(used)
        plan.left_out.append(left)
        plan.unmatched += [(source.path, key, reason) for key, reason in source.unexplained()]
    order = {name: i for i, name in enumerate(model.weights)}
    plan.changes = dict(sorted(plan.changes.items(), key=lambda item: order[item[0]]))
    return plan


def _is_added(module: Module) -> bool:
    """What a file replaces comes before what it adds: a trained bias, and a LoRA's own, which PEFT adds to that."""
    return module.family != "set"


class Holder(NamedTuple):
    """A tensor of the model, and the rows of a site's weights that it holds."""

    name: str
    weight: Weight
    spans: Spans


_Holders = dict[tuple[str, str, bool], list[Holder]]
WHOLE = (".bias", ".scale")
"""Ends of parameters' names that a site may have, too: ``head.head.bias`` is a parameter of its own then."""


def _holders(model: Model) -> _Holders:
    """(component, original weight or whole parameter, whether biases) -> the tensors that hold rows of it."""
    found: _Holders = defaultdict(list)
    for name, weight in model.weights.items():
        if weight.place is None or weight.role == OTHER:
            continue
        component, spans = weight.place
        for own, bias in _called(weight.key, spans, bias=weight.role == BIAS):
            for original in dict.fromkeys(span.weight for span in own):
                found[component, original, bias].append(Holder(name, weight, own))
    return found


def _called(key: str, spans: Spans, *, bias: bool) -> Iterator[tuple[Spans, bool]]:
    """The rows of a tensor under every name that a site may have for them: their module's, and the parameter's own."""
    yield spans, bias
    for end in WHOLE:
        if key.endswith(end) and not spans[0].weight.endswith(end):
            yield tuple(span._replace(weight=span.weight + end) for span in spans), False


def _place(plan: Plan, holders: _Holders, source: Source, module: Module, strength: float) -> bool:
    """Whether anything of the module is used."""
    used = False
    for bias in (False, True):
        own = (module.bias is not None or _multiplies_outputs(source, module)) if bias else module.delta is not None
        if not own:
            continue
        reason = _place_part(plan, holders, Placed(source, module, bias, strength, ()))
        if bias and module.bias is None:
            continue  # a layer without a bias lacks nothing
        used = used or not reason
        if reason:
            plan.unmatched += [(source.path, key, reason) for key in _of_part(source, module, bias=bias)]
    return used


def _multiplies_outputs(source: Source, module: Module) -> bool:
    """Whether it is PEFT's (IA)^3 on rows, which multiplies the layer's outputs, its bias included (``ia3/layer.py``)."""
    vector = module.delta.tensors.get(".ia3_l") if module.delta is not None else None
    if vector is None:
        return False
    rules, name = source.rules_of(module)
    shape = expected_shape(source.adapter.architecture, module.site)
    with suppress(CannotError):  # the weight's own step will say it
        return not ia3_on_input(vector, module.out, shape[1], rules.is_feedforward(name))
    return False


def _of_part(source: Source, module: Module, *, bias: bool) -> Iterator[str]:
    """The keys of a module's added bias, or its others. A bias that replaces the base's is a module of its own."""
    endings = () if module.bias is None else (".diff_b", ".b_norm", ".bias")
    return (key for key in source.keys.get(module.name, [module.name]) if key.endswith(endings) == bias)


def _place_part(plan: Plan, holders: _Holders, part: Placed) -> str:
    """Put a weight's or a bias' change where it belongs; the reason when it belongs nowhere."""
    component, spans = part.module.site
    holding = {own.name: own for span in spans for own in holders.get((component, span.weight, part.bias), ())}
    found = {name: own.weight for name, own in holding.items()}
    placed = {name: runs_between(own.spans, spans) for name, own in holding.items()}
    missing = _missing(part.module, [run for runs in placed.values() for run in runs])
    if missing is not None:
        return f"the model has no {'bias' if part.bias else 'weight'} for {missing}"
    if any(weight.role == TURNED for weight in found.values()):
        turned = _turned(part.module)
        if turned is None:
            return f"the model stores {next(iter(found))} turned over, and of {part.module.family} there is no such form"
        part, placed = replace(part, module=turned), {name: (Run(0, 0, own.shape[0]),) for name, own in found.items()}
    for name, weight in found.items():
        reason = _misfit(part, weight)
        if reason:
            return reason
        if weight.tensor.dtype not in FLOATS:
            raise RequestError(f"{name} is stored as {weight.tensor.dtype}", path=weight.file.path, hint="a model of floats")
    for name, runs in placed.items():
        if runs:
            change = plan.changes.setdefault(name, Change(name, found[name]))
            change.columns = max(change.columns, _more(part, found[name]))
            change.placed.append(Placed(part.source, part.module, part.bias, part.strength, runs))
    return ""


def _turned(module: Module) -> Module | None:
    """The module of a weight that is stored as (in, out); None for a family that has no such form."""
    delta = module.delta
    if module.magnitude is not None or delta is None or len(delta.shape) != 2:
        return None
    if isinstance(delta, LowRank) and delta.mid is None and len(delta.up.shape) == len(delta.down.shape) == 2:
        return replace(module, delta=LowRank(transposed(delta.down), transposed(delta.up)))
    return replace(module, delta=replace(delta, diff=transposed(delta.diff))) if isinstance(delta, Full) else None


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
    if have == need:
        return ""
    if _more(part, weight):
        blocks = weight.scale is not None and weight.scale.size not in (1, weight.shape[0])
        return f"the scales of {weight.key} are for blocks of columns, and it has more of them" if blocks else ""
    return f"it has {need} columns, the model's {weight.key} has {have}"


def _more(part: Placed, weight: Weight) -> int:
    """A LoRA's columns where the weight has fewer: the parser has made sure that it may make the weight wider."""
    if part.bias or not isinstance(part.module.delta, LowRank) or len(weight.shape) < 2:
        return 0
    need = prod(part.module.delta.shape[1:])
    return need if need > prod(weight.shape[1:]) and not need % prod(weight.shape[2:]) else 0
