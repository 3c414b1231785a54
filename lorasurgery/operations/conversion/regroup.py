"""The modules of one component at the target's granularity: fused, split and permuted as its names ask."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import BrokenModuleError, RequestError
from lorasurgery.layouts.diffusers_lokr import AS_LORA
from lorasurgery.layouts.targets import PEFT, names_in
from lorasurgery.operations.conversion.as_lora import reduced
from lorasurgery.operations.conversion.fuse import stack_bias, stack_modules, take_rows, wide
from lorasurgery.operations.conversion.job import without_magnitude
from lorasurgery.operations.conversion.options import AUTO, FUSE, SPLIT
from lorasurgery.operations.conversion.pieces import Target, plan, targets_of
from lorasurgery.site import DENOISER, SECOND_DENOISER, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.operations.conversion.job import Job


def regroup(job: Job, component: str, modules: list[Module]) -> list[Module]:
    """The modules of one component at the target's granularity."""
    if component not in (DENOISER, SECOND_DENOISER):
        named = [module for module in modules if _has_name(job, module)]
        return [job.done(module, "renamed", module) for module in named]
    fused = _kept_fused(job, modules)
    done = {module.site for module in fused}
    modules = [module for module in modules if module.site not in done]
    names = targets_of(names_in(job.namings[0], job.arch))
    try:
        targets = plan(modules, names)
        missing = _unplaced(job, modules, targets)
        if missing:
            targets = plan([module for module in modules if id(module) not in missing], names)
    except ValueError as twice:
        raise BrokenModuleError(
            f"{twice}; programs add them up or pick one", key=modules[0].name, path=job.adapter.path,
            hint="--drop REGEX to leave one of them out",
        ) from twice  # fmt: skip
    if job.options.qkv == SPLIT:
        targets = _split_names(job, targets)
    return [*fused, *(module for target in targets for module in _built(job, component, target))]


def _kept_fused(job: Job, modules: Sequence[Module]) -> list[Module]:
    """LoKr of fused weights that the reader takes as they are, having fused its own: split, they would have two factors.

    Source: Diffusers 0.42.1 ``_maybe_fuse_qkv_projections_for_lokr`` and ``_create_lokr_config``.
    """
    if job.target.id != "diffusers":
        return []
    names = {spans for naming in job.namings if naming.only is not None for spans in names_in(naming, job.arch).values()}
    fused = [module for module in modules if module.family == "lokr" and module.site.spans in names]
    if fused:
        job.report.warnings.append(
            f"{len(fused)} LoKr modules of fused weights (first: {fused[0].name}) stay fused; {job.target.reader} fuses the "
            "model's q, k and v when it loads them"
        )
    return [job.done(module, "renamed", module) for module in fused]


def _has_name(job: Job, module: Module) -> bool:
    """Whether the target has a name for a text encoder's module; what has none is refused, or left out under ``--lossy``."""
    if job.speller.stem(module.site) is not None:
        return True
    _left_out(job, module, *job.target.no_name)
    return False


def _left_out(job: Job, module: Module, reason: str, hint: str) -> None:
    """Note a module that ``--lossy`` leaves out, or refuse it."""
    if not job.options.lossy:
        raise job.refusal(module, reason, hint)
    job.report.dropped.append((module.name, reason))


def _unplaced(job: Job, modules: Sequence[Module], targets: Sequence[Target]) -> set[int]:
    """The modules of which the target has no name for every row: they are refused, or left out under ``--lossy``."""
    placed: Counter[int] = Counter()
    for target in targets:
        for piece in target.pieces:
            if piece.source is not None:
                placed[id(piece.source)] += piece.rows
    missing = [module for module in modules if placed[id(module)] != module.out]
    for module in missing:
        _left_out(
            job, module, f"{job.target.reader} has no name for this module of {job.arch.name}",
            "--base MODEL if the model has it under this name, --lossy to leave it out, or --drop REGEX",
        )  # fmt: skip
    return {id(module) for module in missing}


def _split_names(job: Job, targets: Sequence[Target]) -> list[Target]:
    """Diffusers' names for every weight that is fused in the target's own naming."""
    by_weight = targets_of(job.arch.namings[DIFFUSERS])
    found: list[Target] = []
    for target in targets:
        weights = {span.weight for span in target.spans}
        fused = any(len(by_weight[weight]) > sum(weight in {s.weight for s in t.spans} for t in targets) for weight in weights)
        if fused and len(job.namings) == 1:
            raise RequestError(
                f"{job.target.reader} has no split names for {job.arch.name}",
                path=job.adapter.path,
                hint="--qkv auto, or --target diffusers, whose names are split",
            )
        found += plan(target.sources, by_weight) if fused else [target]
    return found


def _built(job: Job, component: str, target: Target) -> list[Module]:
    """The target module, or, where its family cannot be fused exactly, what stands for it; nothing for a part of zeros."""
    if _is_untrained_part(target):
        job.zero_parts.append(target.sources[0].name)
        return []
    try:
        return [_build(job, Site(component, target.spans), target)]
    except CannotError as reason:
        return _otherwise(job, component, target, reason)


def _is_untrained_part(target: Target) -> bool:
    """Whether the target is the zero rows of a fused module: the place of a member that was never trained."""
    piece, source = target.pieces[0], target.sources[0]
    if len(target.pieces) > 1 or piece.rows == source.out or source.magnitude is not None or source.bias is not None:
        return False
    if not isinstance(source.delta, (LowRank, Hadamard, Full)):
        return False
    rows = {LowRank: "up", Hadamard: "w1_a", Full: "diff"}
    output = getattr(source.delta, rows[type(source.delta)])
    if isinstance(source.delta, Hadamard) and source.delta.t1 is not None:
        return False
    return not output.rows(piece.ranges).array().any() and bool(output.array().any())


def _otherwise(job: Job, component: str, target: Target, reason: CannotError) -> list[Module]:
    module = target.sources[0]
    whole = all(piece.source is None or piece.rows == piece.source.out for piece in target.pieces)
    named = whole and all(job.speller.stem(source.site._replace(component=component)) is not None for source in target.sources)
    if named and job.options.qkv == AUTO and job.options.budget.exact:
        job.kept_split.append((module.name, reason.message))
        return [job.done(source, "renamed", source) for source in target.sources]
    if any(source.magnitude is not None for source in target.sources):
        if not job.options.lossy:
            raise job.refusal(module, reason.message, _hint(job, magnitude=True)) from reason
        bare = {id(s): without_magnitude(job, s, reason.message) for s in target.sources}
        pieces = tuple(p._replace(source=bare[id(p.source)] if p.source else None) for p in target.pieces)
        return _built(job, component, Target(target.spans, pieces))
    told = job.options.as_lora or job.options.family is not None
    if job.options.qkv != FUSE and job.options.budget.exact and not told:
        raise job.refusal(module, reason.message, _hint(job, magnitude=False)) from reason
    return [_fused_to_lora(job, Site(component, target.spans), target)]


def _hint(job: Job, *, magnitude: bool) -> str:
    keep = (
        "--target comfyui (which reads the split names), or " if job.arch.comfyui_split and job.target.id != "comfyui" else ""
    )
    if job.target.words == PEFT and not magnitude:  # its readers take LoKr alone or none
        return AS_LORA
    if magnitude:
        return f"{keep}--lossy to drop the magnitude"
    return f"{keep}--qkv fuse for an exact LoRA of these modules, --lokr-rank N or --energy 0.9999 for a smaller one"


def _fused_to_lora(job: Job, site: Site, target: Target) -> Module:
    members: list[tuple[Delta | None, float, int]] = []
    for piece in target.pieces:
        source = piece.source
        if source is None or source.delta is None:
            members.append((None, 1.0, piece.rows))
            continue
        delta = source.delta
        try:
            part: Delta = delta.rows(piece.ranges)
        except CannotError:
            part = delta.to_low_rank().rows(piece.ranges)
        members.append((part, source.scale.value, piece.rows))
    head = target.sources[0]
    module = reduced(job, replace(head, site=site), members, "fused to LoRA")
    return job.done(replace(module, bias=stack_bias(target.pieces)), "fused to LoRA", head)


def _build(job: Job, site: Site, target: Target) -> Module:
    """The target module, exactly; raises CannotError."""
    head = target.sources[0]
    if target.is_rename:
        return job.done(replace(head, site=site), "renamed", head)
    if len(target.pieces) == 1:
        piece = target.pieces[0]
        action = "permuted" if piece.rows == head.out else "split"
        return job.done(take_rows(replace(head, site=site), piece.ranges, head.out), action, head)
    sources = [piece.source for piece in target.pieces]
    if job.options.dtype != "keep":  # they are cast to it in the end
        sources = wide(sources)
    parts = [
        (None if s is None else take_rows(s, p.ranges, s.out), p.rows) for s, p in zip(sources, target.pieces, strict=True)
    ]
    fold = job.target.alphas[0] == "fold"
    return job.done(stack_modules(site, parts, job.recorder(head), fold=fold), "fused", head)
