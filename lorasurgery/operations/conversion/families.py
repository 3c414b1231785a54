"""A module in a family the target holds: as it is, as a LoRA where that was asked for, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.layouts.detect import has_bias
from lorasurgery.layouts.peft_keys import is_embedding
from lorasurgery.layouts.peft_types import SHARED_OFT, is_parameter, is_pefts, is_saved
from lorasurgery.layouts.targets import KOHYA, PEFT
from lorasurgery.operations.conversion.as_lora import reduced
from lorasurgery.operations.conversion.job import without_magnitude

if TYPE_CHECKING:
    from lorasurgery.adapter import Module
    from lorasurgery.operations.conversion.job import Job


def held(job: Job, module: Module) -> Module | None:
    """The module in a family the target holds; None when ``--lossy`` leaves it out."""
    from lorasurgery.operations.conversion.refamily import convertible, prepared

    if job.options.family is not None and convertible(module.delta):
        module = prepared(job, module)
    elif module.delta is not None and (job.options.as_lora or not _holds(job, module)):
        lora = _as_lora(job, module)
        if lora is None:
            return None
        module = lora
    if module.delta is None and "bias" not in job.target.holds:
        _leave_out(job, module, "a bias without factors")
        return None
    if job.target.own:
        return module
    module = _held_bias(job, module)
    if module.delta is None and module.bias is None:
        return None
    if module.magnitude is not None and module.magnitude.axis == "in" and not _reads_columns(job, module):
        return without_magnitude(job, module, f"{job.target.reader} only knows DoRA magnitudes per output row")
    if isinstance(module.delta, LowRank) and module.delta.mid is not None and job.target.words != KOHYA:
        flat = module.delta.to_low_rank().cast(job.options.dtype_for([module.delta.down]), job.recorder(module))
        module = module.with_delta(flat)
        job.actions[module.site] = "Tucker core folded"
    return module


def _held_bias(job: Job, module: Module) -> Module:
    """The module without a bias that the target's readers have no place for."""
    if module.bias is None:
        return module
    what = ""
    if job.target.words == PEFT and module.delta is not None and not isinstance(module.delta, LowRank):
        what = f"a bias beside {_name(module.family)} factors"
    elif job.target.words != PEFT and has_bias(job.arch, module.site) is False:
        what = "a bias for a layer that has none (PEFT, which makes one, does)"
    if not what:
        return module
    _leave_out(job, module, what, "bias")
    return replace(module, bias=None)


def _reads_columns(job: Job, module: Module) -> bool:
    """Whether the reader knows DoRA magnitudes per input column: PEFT does for an embedding alone."""
    delta = module.delta
    return job.target.in_axis_dora or (
        job.target.id == "peft" and isinstance(delta, LowRank) and is_embedding(module.name, delta.up)
    )


def uniform(job: Job, modules: list[Module]) -> list[Module]:
    """The modules of one component, with magnitudes on all or none where the reader has one switch for them.

    Source: PEFT ``LoraConfig.use_dora``: a layer without a stored magnitude gets its base weight's norms, which is no LoRA.
    """
    plain = next((m for m in modules if m.magnitude is None and m.delta is not None), None)
    if job.target.words != PEFT or plain is None or all(m.magnitude is None for m in modules):
        return modules
    reason = f"{job.target.reader} makes DoRA of every module or of none"
    if not job.options.lossy:
        raise job.refusal(
            plain, f"{reason}, and this one has no magnitude", "--lossy to drop the others' (the result is a plain LoRA)"
        )
    return [m if m.magnitude is None else without_magnitude(job, m, reason) for m in modules]


def _holds(job: Job, module: Module) -> bool:
    if job.target.own:
        return True
    if is_parameter(module.delta):
        return job.target.id == "peft"
    if is_pefts(module.delta, job.adapter.configs):
        return job.target.id == "peft"
    if module.family == "set" and job.target.id == "diffusers":
        return module.site.spans[0].weight.endswith(job.adapter.architecture.replaced_norms)
    if module.family not in job.target.holding(job.arch) or _is_configured(job, module) or _is_list(job, module):
        return job.target.id == "peft" and is_saved(module.delta)
    return module.magnitude is None or module.family == "dora" or job.target.words != PEFT


def _is_configured(job: Job, module: Module) -> bool:
    """Whether it is PEFT's OFT, of which only the configuration tells how the rotations are made, on its way elsewhere."""
    slots = module.delta.tensors if isinstance(module.delta, Opaque) else {}
    return SHARED_OFT in slots and job.adapter.layout == "peft" and not job.target.own


def _is_list(job: Job, module: Module) -> bool:
    """Whether it is sd-scripts' OFT of a fused layer, a list of rotations that no other program reads."""
    slots = module.delta.tensors if isinstance(module.delta, Opaque) else {}
    return ".oft_blocks.0" in slots and job.target.id != "sd-scripts" and not job.target.own


def _as_lora(job: Job, module: Module) -> Module | None:
    delta = module.delta
    if delta is None or isinstance(delta, LowRank):
        return module
    if isinstance(delta, Opaque) or delta.family == "norm":
        if job.options.as_lora and _holds(job, module):
            return module
        name = delta.family.upper()
        what = "replaced weights" if delta.family == "set" else f"{name} modules"
        if is_parameter(delta):
            what = "a bias or rows that PEFT saved whole, which nothing else reads"
        elif is_pefts(delta, job.adapter.configs):
            what = f"{name} of PEFT, which nothing else does"
        elif _is_configured(job, module):
            what = f"{name} without its adapter_config.json"
        elif _is_list(job, module):
            what = f"{name} with a list of rotations, which sd-scripts alone reads"
        _leave_out(job, module, what)
        return None
    if not job.options.as_lora:
        raise job.refusal(
            module,
            f"{job.target.reader} does not load {_name(delta.family)} modules",
            "--as lora (exact), with --lokr-rank N or --energy 0.9999 for a smaller file",
        )
    return reduced(job, module, [(delta, module.scale.value, module.out)], "to LoRA")


def _leave_out(job: Job, module: Module, what: str, slot: str = "") -> None:
    """Drop a module, or one of its parts, under ``--lossy``, or refuse."""
    if not job.options.lossy:
        raise job.refusal(module, f"{job.target.reader} does not load {what}", "--lossy to leave it out")
    name = module.keys.get(slot, f"{module.name} {slot}") if slot else module.name
    job.report.dropped.append((name, f"{job.target.reader} does not load {what}"))


def _name(family: str) -> str:
    return {"loha": "LoHa", "lokr": "LoKr", "full": "full-difference", "set": "replacement", "miss": "MiSS"}.get(family, family)
