"""Convert an adapter to another layout: rename where names suffice, fuse, split and permute where they do not.

An exact way is always taken when there is one. Where there is none, the conversion raises and names the options that
would do it; it never approximates on its own.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Leftover, Module, written_in
from lorasurgery.deltas.full import Opaque
from lorasurgery.errors import NotRepresentableError, RequestError, UnknownArchitectureError
from lorasurgery.layouts.peft_keys import is_carried
from lorasurgery.layouts.targets import namings
from lorasurgery.operations.conversion.cast import cast_module
from lorasurgery.operations.conversion.families import held, uniform
from lorasurgery.operations.conversion.job import Job
from lorasurgery.operations.conversion.options import DTYPES, Options
from lorasurgery.operations.conversion.refamily import check_target, refamilied, refamilied_metadata
from lorasurgery.operations.conversion.regroup import regroup
from lorasurgery.operations.conversion.settled import settled
from lorasurgery.operations.conversion.split_alpha import check_split_alpha
from lorasurgery.site import DENOISER, SECOND_DENOISER, Site

if TYPE_CHECKING:
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.report import Report

__all__ = ["Options", "convert"]


def convert(adapter: Adapter, target: str | None = None, options: Options | None = None) -> tuple[Adapter, Report]:
    """The adapter with the modules that layout ``target`` names, and the report of what was done to each.

    Without a target every module keeps its name, and only the family and the dtype change.

    Nothing is computed yet but truncated factors: tensors are read when the result is saved, and rounding errors reach
    the report then. Raises NotRepresentableError when the target cannot hold a module exactly and no option allows
    otherwise, BrokenModuleError for modules that contradict each other, RequestError for options,
    UnknownArchitectureError when models that the keys fit equally well give different results.
    """
    started = time.perf_counter()
    options = options or Options()
    options.check()
    writing = written_in(adapter, target)
    if not writing.own:
        settled(adapter, writing, options.prefix)
    _refuse_unknown(adapter, writing, options)
    job = Job(adapter, writing, options)
    check_target(job)
    result = _run(job)
    job.report.seconds = time.perf_counter() - started
    return result, job.report


def _refuse_unknown(adapter: Adapter, target: Layout, options: Options) -> None:
    """Raises UnknownArchitectureError where nothing tells what the modules of an unknown model are called in a layout."""
    try:
        namings(target, adapter.architecture, options.prefix)
    except RequestError as error:
        raise UnknownArchitectureError(
            adapter.unknown or error.message,
            path=adapter.path,
            hint=with_nearest(adapter, error.hint),
            candidates=adapter.candidates,
        ) from error


def with_nearest(adapter: Adapter, hint: str | None) -> str | None:
    """The hint, with the model that some of the modules are of."""
    near = next((key for key, share in adapter.candidates if share), None)
    return hint if near is None else f"{hint}; or --arch {near} if it is for that model all the same"


def _run(job: Job) -> Adapter:
    if job.target.id == "comfyui" and not job.target.own and not job.arch.has_comfyui:
        raise job.refusal(
            next(iter(job.adapter.modules.values())),
            f"ComfyUI has no model with the names of {job.arch.name}",
            "--arch of the model it was made from (hunyuan-video for FramePack, which is the same network)",
        )
    modules = [m for m in job.adapter.modules.values() if not _dropped(job, m)]
    if not modules:
        raise RequestError(
            f"--drop {' --drop '.join(job.options.drop)} leaves nothing of the {len(job.adapter)} modules",
            path=job.adapter.path, hint="a narrower pattern",
        )  # fmt: skip
    leftovers = _carried(job)
    modules = check_split_alpha(modules, job.adapter, job.report, fix=job.options.fix_split_alpha)
    modules = [kept for m in _components(job, modules) if (kept := held(job, m)) is not None]
    groups: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        groups[module.site.component].append(module)
    result = [new for component, own in groups.items() for new in _placed(job, component, own)]
    if job.zero_parts:
        job.report.warnings.append(
            f"{len(job.zero_parts)} parts of fused modules (first: of {job.zero_parts[0]}) are all zeros, the places of "
            "members that were not trained; they are not written"
        )
    result = refamilied(job, result)
    _warn_without_effect(job, result)
    if job.kept_split:
        name, reason = job.kept_split[0]
        job.report.warnings.append(
            f"{len(job.kept_split)} fused weights (first: {name}) keep their split names, which "
            f"{job.target.reader} reads: {reason}; --qkv fuse makes them LoRA"
        )
    if job.options.dtype != "keep":
        result = [cast_module(module, DTYPES[job.options.dtype], job.recorder_of) for module in result]
    made = {module.site: module for module in result}
    spelled = job.adapter.spelling if job.target.own else None
    return replace(
        job.adapter, modules=made, layout=job.target.id, path=None, metadata=refamilied_metadata(job), spelling=spelled,
        leftovers=leftovers,
    )  # fmt: skip


def _carried(job: Job) -> tuple[Leftover, ...]:
    """The keys that are no part of a module and that the target takes; others are refused, or left out under ``--lossy``."""
    if job.target.carries_unknown or job.target.own:
        return job.adapter.leftovers
    kept = [left for left in job.adapter.leftovers if _is_taken(job, left)]
    for left in job.adapter.leftovers:
        if left in kept:
            continue
        if not job.options.lossy:
            raise NotRepresentableError(
                f"{left.key}: {left.reason}, and {job.target.reader} takes no such key", module=left.key, path=job.adapter.path,
                hint="--lossy to leave it out",
            )  # fmt: skip
        job.report.dropped.append((left.key, left.reason))
    return tuple(kept)


def _is_taken(job: Job, left: Leftover) -> bool:
    """Whether a key may go into a target that takes no unknown ones, or may be left out without a word."""
    return (
        left.state == "harmless"
        or job.target.reads(left.key)
        or (job.target.folder and bool(job.adapter.configs) and is_carried(left.key, job.adapter.configs))
    )


def _placed(job: Job, component: str, modules: list[Module]) -> list[Module]:
    """The modules of one component under names of the target; those that keep the file's own stay as they are."""
    kept = [module for module in modules if job.target.own and (module.keys or job.speller.stem(module.site) is not None)]
    own = {id(module) for module in kept}
    others = [module for module in modules if id(module) not in own]
    moved = regroup(job, component, others if job.target.own else uniform(job, others)) if others else []
    return [*(job.done(module, "kept", module) for module in kept), *moved]


def _warn_without_effect(job: Job, modules: list[Module]) -> None:
    """Say so where a rank cuts nothing, and which modules are not the LoRA that was asked for."""
    how, changes = job.options, job.report.changes
    if (how.rank, how.energy) != (None, None) and not any("to " in change.action for change in changes):
        job.report.warnings.append(
            "--rank and --energy cut what becomes another family, and no module does; lorasurgery resize gives other ranks"
        )
    stay = [module for module in modules if how.as_lora and isinstance(module.delta, Opaque)]
    if stay:
        first = f"{stay[0].name}, {stay[0].family}"
        job.report.warnings.append(
            f"{len(stay)} modules multiply the base weight, have no LoRA form and stay as they are (first: {first})"
        )
    dora = [module for module in modules if how.as_lora and module.magnitude is not None]
    if dora:
        job.report.warnings.append(
            f"{len(dora)} modules stay DoRA (first: {dora[0].name}), whose magnitude only the base model can make part of a "
            "LoRA: lorasurgery resize --rank N --dora fold --base MODEL"
        )


def _dropped(job: Job, module: Module) -> bool:
    """Whether ``--drop`` names this module."""
    denoiser = module.site.component in (DENOISER, SECOND_DENOISER)
    for what in job.options.drop:
        hit = denoiser if what == "unet" else not denoiser if what == "te" else bool(re.search(what, module.name))
        if hit:
            job.report.dropped.append((module.name, f"--drop {what}"))
            return True
    return False


def _components(job: Job, modules: list[Module]) -> list[Module]:
    """Wan's second expert alone is written as the denoiser, both at once are refused: no loader takes both from one file.

    Source: Diffusers 0.42 ``WanLoraLoaderMixin`` reads only ``transformer.``, into either expert.
    """
    present = {m.site.component for m in modules}
    if SECOND_DENOISER not in present or job.target.own:
        return modules
    if DENOISER in present:
        raise job.refusal(
            next(m for m in modules if m.site.component == SECOND_DENOISER),
            f"{job.target.reader} keeps the two Wan 2.2 experts in two files",
            r"--drop '^transformer_2\.' for the first, --drop '^transformer\.' for the second",
        )
    load = " (load_lora_weights(..., load_into_transformer_2=True))" if job.target.id == "diffusers" else ""
    job.report.warnings.append(f"these are the modules of Wan 2.2's second expert; load the result into it{load}")
    return [m if m.site.component != SECOND_DENOISER else replace(m, site=Site(DENOISER, m.site.spans)) for m in modules]
