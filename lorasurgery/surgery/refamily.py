"""To another family than LoRA: LoKr by the nearest Kronecker product, LoHa exactly, or the full difference.

What can be fused or split exactly as it is, is so first; the new family is made of the target's own modules.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.adapter import Scale
from lorasurgery.deltas.base import CannotError, rounded
from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import BrokenModuleError, RequestError, ValueRangeError
from lorasurgery.io.finite import is_finite
from lorasurgery.io.tensors import computed, of_array, widest
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.layouts.peft_config import factorization
from lorasurgery.layouts.targets import PEFT
from lorasurgery.surgery.families import reduced, without_magnitude
from lorasurgery.surgery.options import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.tensors import Float64, Shape
    from lorasurgery.linalg.nearest_kronecker import Rearranged
    from lorasurgery.report import Change
    from lorasurgery.surgery.job import Job
    from lorasurgery.surgery.options import Options

NAMES = {"lokr": "LoKr", "loha": "LoHa", "full": "full-difference"}
_TRAINING = ("algo", "factor", "decompose_both", "full_matrix", "block_size", "unit", "use_tucker", "network_module")


def check_target(job: Job) -> None:
    """Raises RequestError where the target's programs do not load the family that is asked for."""
    family = job.options.family
    if family is not None and family not in job.target.holds:
        raise RequestError(
            f"{job.target.reader} does not load {NAMES[family]} modules",
            path=job.adapter.path, hint="--target comfyui, sd-scripts or lycoris, or --as lora",
        )  # fmt: skip


def convertible(delta: Delta | None) -> bool:
    """Whether a module has a form in other families: not norms, vectors, replacements and what multiplies the base."""
    return delta is not None and not isinstance(delta, Opaque) and delta.family != "norm" and len(delta.shape) > 1


def prepared(job: Job, module: Module) -> Module:
    """The module in a form that can be fused and split exactly: itself, an exact LoRA, or already the full difference."""
    delta, family = module.delta, job.options.family
    assert delta is not None  # noqa: S101  convertible() said so
    if module.bias is not None and job.target.words == PEFT:
        raise job.refusal(
            module, f"PEFT has no place for a bias beside {NAMES[family or '']} factors", "--drop REGEX, --as lora"
        )
    if module.magnitude is not None and (family == "full" or job.target.words == PEFT):
        where = "PEFT has" if job.target.words == PEFT else "programs read"
        module = without_magnitude(job, module, f"{where} no DoRA magnitude beside {NAMES[family or '']} tensors")
    if family == "full":
        return module if isinstance(delta, Full) else _full(job, module, delta)
    if isinstance(delta, LowRank):
        return module if delta.mid is None else module.with_delta(delta.to_low_rank())
    if family == "lokr" and isinstance(delta, Hadamard):
        return module.with_delta(delta.to_low_rank())
    if family == "loha" and not isinstance(delta, Hadamard):
        return reduced(job, module, [(delta, module.scale.value, module.out)], "to LoHa")
    return module


def refamilied(job: Job, modules: list[Module]) -> list[Module]:
    """The target's modules in the family that was asked for; the report's changes and losses follow.

    Modules that have no such form stay what they are, with a warning.
    """
    from lorasurgery.linalg.threads import map_threads

    family = job.options.family
    if family is None:
        return modules
    stay = [m for m in modules if not convertible(m.delta)]
    if stay:
        first = f"{stay[0].name}, {stay[0].family}"
        job.report.warnings.append(f"{len(stay)} modules have no {NAMES[family]} form and stay as they are (first: {first})")
    if family == "lokr":
        found = map_threads(lambda m: _named_errors(job, m), modules, min(8, os.cpu_count() or 1))
        for one in found:
            job.report.losses.record(one.module.name, one.error, one.norm)
        made = [one.module for one in found]
    else:
        made = [_loha(job, m) if family == "loha" else m for m in modules]
    changes = zip(modules, made, job.report.changes, strict=True)
    job.report.changes = [_changed(change, new, family) if new is not old else change for old, new, change in changes]
    return made


def _changed(change: Change, module: Module, family: str) -> Change:
    """The report's entry after the last step."""
    to = f"to {NAMES[family]}"
    action = to if change.action in ("renamed", to) else f"{change.action} {to}"
    return replace(change, action=action, family=module.family, rank=None if module.delta is None else module.delta.rank)


def refamilied_metadata(job: Job) -> Mapping[str, str]:
    """``ss_network_module`` and ``ss_network_args`` of the new family, as LyCORIS' trainer writes them."""
    metadata, family = dict(job.adapter.metadata), job.options.family
    if family is None or not ("ss_network_module" in metadata or job.target.id == "sd-scripts"):
        return metadata
    try:
        args = json.loads(metadata.get("ss_network_args", "") or "{}")
    except ValueError:
        args = {}
    args = {k: v for k, v in args.items() if k not in _TRAINING} if isinstance(args, dict) else {}
    args["algo"] = family
    if family == "lokr":
        args["factor"] = str(-1 if job.options.factor is None else job.options.factor)
    return metadata | {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)}


def _dtype(options: Options, delta: Delta, job: Job, module: Module) -> str:
    """The asked dtype, else the file's own for this module (a delta on its way may be float64)."""
    if options.dtype != "keep":
        return DTYPES[options.dtype]
    own = next((m.delta for m in job.adapter.modules.values() if m.name == module.name and m.delta is not None), delta)
    return widest([tensor.dtype for tensor in own.tensors.values()])


def _full(job: Job, module: Module, delta: Delta) -> Module:
    """The dense change with its scale, computed when it is written."""
    shape, scale = _shape(job, module, delta), module.scale.value

    def dense() -> Float64:
        whole: Float64 = (delta.dense() * scale).reshape(shape)
        return whole

    diff = rounded(computed("F64", shape, dense), _dtype(job.options, delta, job, module), job.recorder(module))
    job.actions[module.site] = "to full"
    return replace(module, delta=Full(diff), scale=Scale(1.0, module.scale.source))


def _loha(job: Job, module: Module) -> Module:
    """A LoRA as a LoHa of the same rank, exactly: the second arm is all ones, its first column times its first row.

    ``w1_a = up``, ``w1_b = down`` (flat for a convolution); alpha / rank stays. A budget cuts the LoRA first.
    """
    budget, delta = job.options.budget, module.delta
    if isinstance(delta, LowRank) and (budget.energy is not None or delta.rank > (budget.rank or delta.rank)):
        module = reduced(job, module, [(delta, module.scale.value, module.out)], "to LoHa")
        delta = module.delta
    if not isinstance(delta, LowRank):
        return module
    dtype, record = _dtype(job.options, delta, job, module), job.recorder(module)
    left, right = (delta.up.shape[0], delta.rank), (delta.rank, prod(delta.down.shape[1:]))
    return module.with_delta(
        Hadamard(
            rounded(delta.up, dtype, record).reshape(*left),
            rounded(delta.down, dtype, record).reshape(*right),
            computed(dtype, left, lambda: _ones(left, column=True)),
            computed(dtype, right, lambda: _ones(right, column=False)),
        )
    )


def _ones(shape: tuple[int, int], *, column: bool) -> Float64:
    """Zeros but for ones in the first column, or the first row."""
    import numpy as np

    found = np.zeros(shape)
    found[(slice(None), 0) if column else 0] = 1.0
    return found


class _Made(NamedTuple):
    """A module with its squared error and squared norm."""

    module: Module
    error: float = 0.0
    norm: float = 0.0


def _named_errors(job: Job, module: Module) -> _Made:
    """:func:`_lokr` with errors that name the module."""
    try:
        return _lokr(job, module)
    except CannotError as reason:
        raise job.refusal(module, reason.message, "--drop REGEX to leave the module out") from reason
    except (BrokenModuleError, ValueRangeError) as broken:
        raise BrokenModuleError(
            f"{module.name}: {broken.message}", key=module.name, path=job.adapter.path,
            hint=broken.hint or "--drop REGEX to leave the module out",
        ) from broken  # fmt: skip


def _lokr(job: Job, module: Module) -> _Made:
    """The nearest ``kron(w1, w2)`` with LyCORIS' factors of both sides; a LoKr of those factors is left alone."""
    from lorasurgery.linalg.nearest_kronecker import kronecker_error, nearest_kronecker

    delta, how, scale = module.delta, job.options, module.scale.value
    if delta is None or not convertible(delta):
        return _Made(module)
    out, inputs, *kernel = _shape(job, module, delta)
    outer = tuple(factorization(size, -1 if how.factor is None else how.factor)[0] for size in (out, inputs))
    if isinstance(delta, Kronecker) and (how.factor is None or delta.outer == outer):
        return _Made(module)
    of = _rearranged(delta, (outer[0], outer[1]))
    found = nearest_kronecker(of, rank=how.rank, energy=how.energy)
    dtype = _dtype(how, delta, job, module)
    w1 = of_array(found.w1 * scale, dtype)
    if found.w2_b is None:
        w2 = of_array(found.w2.reshape(out // outer[0], inputs // outer[1], *kernel), dtype)
        made, right = Kronecker(w1=w1, w2=w2), w2.f64().reshape(of.inner)
    else:
        w2_a, w2_b = of_array(found.w2, dtype), of_array(found.w2_b, dtype)
        made, right = Kronecker(w1=w1, w2_a=w2_a, w2_b=w2_b), w2_a.f64() @ w2_b.f64()
    error = kronecker_error(of, w1.f64() / scale, right) * scale**2 if scale else 0.0
    return _Made(replace(module, delta=made, scale=Scale(1.0, module.scale.source)), error, of.norm * scale**2)


def _shape(job: Job, module: Module, delta: Delta) -> Shape:
    """The weight's shape where the delta, which may be flat, has its size; else the delta's own."""
    shape = expected_shape(job.arch, module.site)
    return shape if prod(shape) == prod(delta.shape) else delta.shape


def _rearranged(delta: Delta, outer: tuple[int, int]) -> Rearranged:
    from lorasurgery.linalg.nearest_kronecker import rearranged_dense, rearranged_product

    for slot, tensor in delta.tensors.items():
        if tensor.compute is None and not is_finite(tensor):
            raise BrokenModuleError(f"its {slot} holds NaN or infinity", key=slot)
    if isinstance(delta, Full):
        return rearranged_dense(delta.diff.array().reshape(delta.shape[0], -1), outer)
    low = delta.to_low_rank()
    return rearranged_product(low.up.f64().reshape(low.up.shape[0], -1), low.down.f64().reshape(low.rank, -1), outer)
