"""To another family than LoRA: LoKr by the nearest Kronecker product, LoHa exactly or near it, or the full difference.

What can be fused or split exactly as it is, is so first; the new family is made of the target's own modules.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Scale
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import rounded
from lorasurgery.errors import BrokenModuleError, RequestError, ValueRangeError
from lorasurgery.io.tensors import computed
from lorasurgery.layouts.targets import PEFT
from lorasurgery.operations.conversion.as_lora import reduced
from lorasurgery.operations.conversion.job import without_magnitude
from lorasurgery.operations.conversion.refamily_loha import to_loha
from lorasurgery.operations.conversion.refamily_lokr import to_lokr
from lorasurgery.operations.conversion.refamily_made import Made, dtype_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64
    from lorasurgery.operations.conversion.job import Job
    from lorasurgery.report import Change

NAMES = {"lokr": "LoKr", "loha": "LoHa", "full": "full-difference"}
_TRAINING = ("algo", "factor", "decompose_both", "full_matrix", "block_size", "unit", "use_tucker", "network_module")


def check_target(job: Job) -> None:
    """Raises RequestError where the target's programs do not load the family that is asked for."""
    family = job.options.family
    if family is not None and family not in job.target.holding(job.arch):
        raise RequestError(
            f"{job.target.reader} does not load {NAMES[family]} modules",
            path=job.adapter.path, hint="--target comfyui, sd-scripts or lycoris, or --as lora",
        )  # fmt: skip


def convertible(delta: Delta | None) -> bool:
    """Whether a module has a form in other families: not norms, vectors, replacements and what multiplies the base."""
    return delta is not None and not isinstance(delta, Opaque) and delta.family != "norm" and len(delta.shape) > 1


def prepared(job: Job, module: Module) -> Module:
    """The module in a form that can be fused and split exactly: itself, an exact LoRA, or already the full difference.

    What a budget cuts is cut afterwards.
    """
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
    if family == "lokr" or isinstance(delta, Hadamard):
        return module
    if job.options.budget.exact:
        return reduced(job, module, [(delta, module.scale.value, module.out)], "to LoHa")
    return module if isinstance(delta, Full) else module.with_delta(delta.to_low_rank())


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
    made = modules
    if family != "full":
        found = map_threads(lambda m: _remade(job, m), modules, min(8, os.cpu_count() or 1))
        for one in found:
            job.report.losses.record(one.module.name, one.error, one.norm)
        made = [one.module for one in found]
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


def _full(job: Job, module: Module, delta: Delta) -> Module:
    """The dense change with its scale, computed when it is written."""
    shape, scale = shape_of(job, module, delta), module.scale.value

    def dense() -> Float64:
        whole: Float64 = (delta.dense() * scale).reshape(shape)
        return whole

    diff = rounded(computed("F64", shape, dense), dtype_of(job, module, delta), job.recorder(module))
    job.actions[module.site] = "to full"
    return replace(module, delta=Full(diff), scale=Scale(1.0, module.scale.source))


def _remade(job: Job, module: Module) -> Made:
    """The module in the family, with errors that name it."""
    delta = module.delta
    if delta is None or not convertible(delta):
        return Made(module)
    try:
        return (to_lokr if job.options.family == "lokr" else to_loha)(job, module, delta)
    except CannotError as reason:
        raise job.refusal(module, reason.message, "--drop REGEX to leave the module out") from reason
    except (BrokenModuleError, ValueRangeError) as broken:
        raise BrokenModuleError(
            f"{module.name}: {broken.message}", key=module.name, path=job.adapter.path,
            hint=broken.hint or "--drop REGEX to leave the module out",
        ) from broken  # fmt: skip
