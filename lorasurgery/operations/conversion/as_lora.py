"""A module as a LoRA, with the error that a smaller rank costs in the report."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Scale
from lorasurgery.deltas.base import CannotError
from lorasurgery.errors import BrokenModuleError, ValueRangeError
from lorasurgery.operations.conversion.reduce import to_lora

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.operations.conversion.job import Job


def reduced(job: Job, module: Module, members: Sequence[tuple[Delta | None, float, int]], action: str) -> Module:
    """``module`` with the LoRA of ``members``; its error goes into the report."""
    dtype = job.options.dtype_for(t for d, _, _ in members if d is not None for t in d.tensors.values())
    try:
        reduced = to_lora(members, job.options.budget, dtype, job.recorder(module))
    except CannotError as reason:
        raise job.refusal(module, reason.message, "a target that holds it") from reason
    except (BrokenModuleError, ValueRangeError) as broken:
        raise BrokenModuleError(
            f"{module.name}: {broken.message}", key=module.name, path=job.adapter.path,
            hint=broken.hint or "--drop REGEX to leave the module out",
        ) from broken  # fmt: skip
    job.actions[module.site] = action
    job.report.losses.record(module.name, reduced.error, reduced.norm)
    return replace(module, delta=reduced.delta, scale=Scale(1.0, module.scale.source))
