"""Convert an adapter to another layout: rename where names suffice, fuse, split and permute where they do not.

An exact way is always taken when there is one. Where there is none, the conversion raises and names the options that
would do it; it never approximates on its own.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.adapter import DENOISER, SECOND_DENOISER, Adapter, Magnitude, Module, Scale, Site
from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.deltas.base import CannotError, Delta
from lorasurgery.deltas.full import Full, Opaque, stack_full
from lorasurgery.deltas.hadamard import Hadamard, stack_hadamard
from lorasurgery.deltas.kronecker import Kronecker, stack_kronecker
from lorasurgery.deltas.low_rank import LowRank, stack_low_rank
from lorasurgery.errors import BrokenModuleError, NotRepresentableError, RequestError, UnknownArchitectureError, ValueRangeError
from lorasurgery.io.tensors import Tensor, stack, widest, zeros
from lorasurgery.layouts.targets import KOHYA, Layout, layout, namings
from lorasurgery.report import Change, Report
from lorasurgery.surgery.pieces import Piece, Target, plan, targets_of
from lorasurgery.surgery.reduce import Budget, to_lora
from lorasurgery.surgery.split_alpha import check_split_alpha

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorasurgery.deltas.base import Record

AUTO, FUSE, SPLIT = "auto", "fuse", "split"
DTYPES = MappingProxyType({"fp32": "F32", "fp16": "F16", "bf16": "BF16"})


@dataclass(frozen=True, slots=True)
class Options:
    """What :func:`convert` may do. The defaults are exact or refuse."""

    qkv: str = AUTO
    """``auto``: fuse and split where exact, else keep split names where the target reads them; ``fuse``: make a LoRA
    where a fuse is not exact in the family; ``split``: Diffusers' names for fused weights, where the target reads them."""
    rank: int | None = None
    """Cut LoRAs made from other families to this rank (``--lokr-rank``)."""
    energy: float | None = None
    """Cut them to this share of the squared norm."""
    as_lora: bool = False
    """Turn LoHa, LoKr and full differences into LoRA."""
    lossy: bool = False
    """Leave out what the target cannot hold (biases, norms, input-axis magnitudes) and list it."""
    drop: tuple[str, ...] = ()
    """``te``, ``unet``, or regular expressions on module names, to leave out on purpose."""
    prefix: str = "diffusion_model"
    """For the layout ``other``."""
    dtype: str = "keep"
    fix_split_alpha: bool = False
    """Multiply the scale of fused modules written by sd-scripts' ``split_qkv`` by the number of parts."""

    @property
    def budget(self) -> Budget:
        """The cut that was asked for."""
        return Budget(self.rank, self.energy)

    def check(self) -> None:
        """Raises RequestError for values out of range."""
        if self.qkv not in (AUTO, FUSE, SPLIT):
            raise RequestError(f"--qkv is auto, fuse or split, not {self.qkv}")
        if self.rank is not None and self.rank < 1:
            raise RequestError(f"the rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RequestError(f"the energy must lie in (0, 1], not {self.energy}")
        if self.dtype not in ("keep", *DTYPES):
            raise RequestError(f"--dtype is keep, fp32, fp16 or bf16, not {self.dtype}")
        try:
            re.compile("|".join(f"(?:{pattern})" for pattern in self.drop))
        except re.error as error:
            raise RequestError(f"--drop {' --drop '.join(self.drop)} is no regular expression ({error})") from error


def convert(adapter: Adapter, target: str, options: Options | None = None) -> tuple[Adapter, Report]:
    """The adapter with the modules that layout ``target`` names, and the report of what was done to each.

    Nothing is computed yet but truncated factors: tensors are read when the result is saved, and rounding errors reach
    the report then. Raises NotRepresentableError when the target cannot hold a module exactly and no option allows
    otherwise, BrokenModuleError for modules that contradict each other, RequestError for options.
    """
    started = time.perf_counter()
    options = options or Options()
    options.check()
    if adapter.ambiguous:
        raise UnknownArchitectureError(
            f"its keys fit {' and '.join((adapter.architecture.key, *adapter.ambiguous))} equally well, and the results differ",
            path=adapter.path,
            hint=f"--arch {adapter.architecture.id}, or whichever it was trained on",
            candidates=adapter.candidates,
        )
    job = _Job(adapter, layout(target), options)
    result = job.run()
    job.report.seconds = time.perf_counter() - started
    return result, job.report


class _Job:
    """One conversion: the adapter, the target, and the report that fills up."""

    def __init__(self, adapter: Adapter, target: Layout, options: Options) -> None:
        self.adapter, self.target, self.options = adapter, target, options
        self.arch = adapter.architecture
        self.namings = namings(target, self.arch, options.prefix)
        self._actions: dict[Site, str] = {}
        """What was done to a module before its rows were looked at."""
        self._kept_split: list[tuple[str, str]] = []
        self.report = Report(
            input=str(adapter.path or ""),
            architecture=self.arch.key,
            candidates=adapter.candidates,
            source_layout=adapter.layout,
            target_layout=target.id,
            modules=len(adapter),
            warnings=list(adapter.warnings),
            scale_sources=Counter(m.scale.source for m in adapter.modules.values()),
        )

    def run(self) -> Adapter:
        if self.target.id == "comfyui" and not self.arch.has_comfyui:
            raise self._refuse(
                next(iter(self.adapter.modules.values())),
                f"ComfyUI has no model with the names of {self.arch.name}",
                "--arch of the model it was made from (hunyuan-video for FramePack, which is the same network)",
            )
        modules = [m for m in self.adapter.modules.values() if not self._dropped(m)]
        if not modules:
            raise RequestError(
                f"--drop {' --drop '.join(self.options.drop)} leaves nothing of the {len(self.adapter)} modules",
                path=self.adapter.path, hint="a narrower pattern",
            )  # fmt: skip
        modules = check_split_alpha(modules, self.adapter, self.report, fix=self.options.fix_split_alpha)
        modules = [held for m in self._components(modules) if (held := self._held(m)) is not None]
        groups: dict[str, list[Module]] = defaultdict(list)
        for module in modules:
            groups[module.site.component].append(module)
        result = [new for component, own in groups.items() for new in self._regroup(component, own)]
        if self._kept_split:
            name, reason = self._kept_split[0]
            self.report.warnings.append(
                f"{len(self._kept_split)} fused weights (first: {name}) keep their split names, which "
                f"{self.target.reader} reads: {reason}; --qkv fuse makes them LoRA"
            )
        if self.options.dtype != "keep":
            result = [self._cast(module) for module in result]
        return replace(self.adapter, modules={module.site: module for module in result}, layout=self.target.id, path=None)

    def _dropped(self, module: Module) -> bool:
        """Whether ``--drop`` names this module."""
        denoiser = module.site.component in (DENOISER, SECOND_DENOISER)
        for what in self.options.drop:
            hit = denoiser if what == "unet" else not denoiser if what == "te" else bool(re.search(what, module.name))
            if hit:
                self.report.dropped.append((module.name, f"--drop {what}"))
                return True
        return False

    def _components(self, modules: list[Module]) -> list[Module]:
        """Layouts with one denoiser take Wan's second one alone as theirs, and refuse both at once."""
        if self.target.second_denoiser is not None:
            return modules
        present = {m.site.component for m in modules}
        if SECOND_DENOISER not in present:
            return modules
        if DENOISER in present:
            raise self._refuse(
                next(m for m in modules if m.site.component == SECOND_DENOISER),
                f"{self.target.reader} keeps the two Wan 2.2 experts in two files",
                r"--drop '^transformer_2\.' for the first, --drop '^transformer\.' for the second",
            )
        return [replace(m, site=Site(DENOISER, m.site.spans)) for m in modules]

    # families ---------------------------------------------------------------------------------------------------------

    def _held(self, module: Module) -> Module | None:
        """The module in a family the target holds; None when ``--lossy`` leaves it out."""
        if module.delta is not None and (self.options.as_lora or not self._holds(module)):
            lora = self._as_lora(module)
            if lora is None:
                return None
            module = lora
        if module.delta is None and "bias" not in self.target.holds:
            self._leave_out(module, "a bias without factors")
            return None
        if module.magnitude is not None and module.magnitude.axis == "in" and not self.target.in_axis_dora:
            return self._without_magnitude(module, f"{self.target.reader} only knows DoRA magnitudes per output row")
        if isinstance(module.delta, LowRank) and module.delta.mid is not None and self.target.words != KOHYA:
            flat = module.delta.to_low_rank().cast(module.delta.down.dtype, self._record(module))
            module = module.with_delta(flat)
            self._actions[module.site] = "Tucker core folded"
        return module

    def _holds(self, module: Module) -> bool:
        if module.family not in self.target.holds:
            return False
        return module.magnitude is None or module.family == "dora" or self.target.id != "peft"

    def _as_lora(self, module: Module) -> Module | None:
        delta = module.delta
        if delta is None or isinstance(delta, LowRank):
            return module
        if isinstance(delta, Opaque) or delta.family == "norm":
            if self.options.as_lora and self._holds(module):
                return module
            self._leave_out(module, f"{delta.family.upper()} modules")
            return None
        if not self.options.as_lora:
            raise self._refuse(
                module,
                f"{self.target.reader} does not load {_name(delta.family)} modules",
                "--as lora (exact), with --lokr-rank N or --energy 0.9999 for a smaller file",
            )
        return self._reduced(module, [(delta, module.scale.value, module.out)], "to LoRA")

    def _reduced(self, module: Module, members: Sequence[tuple[Delta | None, float, int]], action: str) -> Module:
        """``module`` with the LoRA of ``members``; its error goes into the report."""
        dtype = widest([t.dtype for d, _, _ in members if d is not None for t in d.tensors.values()])
        try:
            reduced = to_lora(members, self.options.budget, dtype, self._record(module))
        except CannotError as reason:
            raise self._refuse(module, reason.message, "a target that holds it") from reason
        except (BrokenModuleError, ValueRangeError) as broken:
            raise BrokenModuleError(
                f"{module.name}: {broken.message}", key=module.name, path=self.adapter.path,
                hint=broken.hint or "--drop REGEX to leave the module out",
            ) from broken  # fmt: skip
        self._actions[module.site] = action
        self.report.losses.record(module.name, reduced.error, reduced.norm)
        return replace(module, delta=reduced.delta, scale=Scale(1.0, module.scale.source))

    def _leave_out(self, module: Module, what: str) -> None:
        """Drop a module under ``--lossy``, or refuse."""
        if not self.options.lossy:
            raise self._refuse(module, f"{self.target.reader} does not load {what}", "--lossy to leave it out")
        self.report.dropped.append((module.name, f"{self.target.reader} does not load {what}"))

    def _without_magnitude(self, module: Module, reason: str) -> Module:
        if not self.options.lossy:
            raise self._refuse(module, reason, "--lossy to drop the magnitude (the result is a plain LoRA)")
        self.report.dropped.append((f"{module.name}.dora_scale", reason))
        return replace(module, magnitude=None)

    # rows -------------------------------------------------------------------------------------------------------------

    def _regroup(self, component: str, modules: list[Module]) -> list[Module]:
        """The modules of one component at the target's granularity."""
        if component not in (DENOISER, SECOND_DENOISER):
            return [self._done(module, "renamed", module) for module in modules]
        names = self.arch.namings[self.namings[0].naming]
        try:
            targets = plan(modules, targets_of(names))
        except ValueError as twice:
            raise BrokenModuleError(
                f"{twice}; programs add them up or pick one", key=modules[0].name, path=self.adapter.path,
                hint="--drop REGEX to leave one of them out",
            ) from twice  # fmt: skip
        self._all_placed(modules, targets)
        if self.options.qkv == SPLIT:
            targets = self._split_names(targets)
        return [module for target in targets for module in self._built(component, target)]

    def _all_placed(self, modules: Sequence[Module], targets: Sequence[Target]) -> None:
        """Every row of every module must have a name in the target."""
        placed: Counter[int] = Counter()
        for target in targets:
            for piece in target.pieces:
                if piece.source is not None:
                    placed[id(piece.source)] += piece.rows
        for module in modules:
            if placed[id(module)] != module.out:
                raise self._refuse(
                    module, f"{self.target.reader} has no name for this module of {self.arch.name}", "--drop REGEX"
                )

    def _split_names(self, targets: Sequence[Target]) -> list[Target]:
        """Diffusers' names for every weight that is fused in the target's own naming."""
        by_weight = targets_of(self.arch.namings[DIFFUSERS])
        found: list[Target] = []
        for target in targets:
            weights = {span.weight for span in target.spans}
            fused = any(len(by_weight[weight]) > sum(weight in {s.weight for s in t.spans} for t in targets) for weight in weights)
            if fused and len(self.namings) == 1:
                raise RequestError(
                    f"{self.target.reader} has no split names for {self.arch.name}",
                    path=self.adapter.path,
                    hint="--qkv auto, or --target diffusers, whose names are split",
                )
            found += plan(target.sources, by_weight) if fused else [target]
        return found

    def _built(self, component: str, target: Target) -> list[Module]:
        """The target module, or, where its family cannot be fused exactly, what stands for it."""
        try:
            return [self._build(Site(component, target.spans), target)]
        except CannotError as reason:
            return self._otherwise(component, target, reason)

    def _otherwise(self, component: str, target: Target, reason: CannotError) -> list[Module]:
        module = target.sources[0]
        if self.options.qkv == AUTO and self.options.budget.exact and len(self.namings) > 1:
            by_weight = targets_of(self.arch.namings[DIFFUSERS])
            split = plan(target.sources, by_weight)
            if all(part.is_rename for part in split):
                self._kept_split.append((module.name, reason.message))
                return [self._build(Site(component, part.spans), part) for part in split]
        if any(source.magnitude is not None for source in target.sources):
            if not self.options.lossy:
                raise self._refuse(module, reason.message, self._hint(magnitude=True)) from reason
            bare = {id(s): self._without_magnitude(s, reason.message) for s in target.sources}
            pieces = tuple(p._replace(source=bare[id(p.source)] if p.source else None) for p in target.pieces)
            return self._built(component, Target(target.spans, pieces))
        if self.options.qkv != FUSE and self.options.budget.exact and not self.options.as_lora:
            raise self._refuse(module, reason.message, self._hint(magnitude=False)) from reason
        return [self._fused_to_lora(Site(component, target.spans), target)]

    def _hint(self, *, magnitude: bool) -> str:
        keep = (
            "--target comfyui (which reads the split names), or "
            if self.arch.comfyui_split and self.target.id != "comfyui"
            else ""
        )
        if magnitude:
            return f"{keep}--lossy to drop the magnitude"
        return f"{keep}--qkv fuse for an exact LoRA of these modules, --lokr-rank N or --energy 0.9999 for a smaller one"

    def _fused_to_lora(self, site: Site, target: Target) -> Module:
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
        module = self._reduced(replace(head, site=site), members, "fused to LoRA")
        return self._done(replace(module, bias=_stack_bias(target.pieces)), "fused to LoRA", head)

    def _build(self, site: Site, target: Target) -> Module:
        """The target module, exactly; raises CannotError."""
        head = target.sources[0]
        if target.is_rename:
            return self._done(replace(head, site=site), "renamed", head)
        if len(target.pieces) == 1:
            piece = target.pieces[0]
            action = "permuted" if piece.rows == head.out else "split"
            return self._done(take_rows(replace(head, site=site), piece.ranges, head.out), action, head)
        parts = [(None if p.source is None else take_rows(p.source, p.ranges, p.source.out), p.rows) for p in target.pieces]
        fold = self.target.alphas[0] == "fold"
        return self._done(stack_modules(site, parts, self._record(head), fold=fold), "fused", head)

    # bookkeeping ------------------------------------------------------------------------------------------------------

    def _done(self, module: Module, action: str, was: Module) -> Module:
        rank = None if module.delta is None else module.delta.rank
        original = self.adapter.modules.get(was.site, was)
        if action == "renamed":
            action = self._actions.get(was.site, action)
        self.report.changes.append(Change(module.name, action, module.family, original.family, rank))
        return module

    def _cast(self, module: Module) -> Module:
        """Every factor, magnitude and bias in the asked dtype; alphas keep theirs."""
        dtype = DTYPES[self.options.dtype]
        record = self._record(module)
        magnitude, bias = module.magnitude, module.bias
        return replace(
            module,
            delta=None if module.delta is None else module.delta.cast(dtype, record),
            magnitude=None if magnitude is None else Magnitude(magnitude.tensor.cast(dtype), magnitude.axis),
            bias=None if bias is None else bias.cast(dtype),
        )

    def _record(self, module: Module) -> Callable[[float, float], None]:
        def record(error: float, norm: float) -> None:
            self.report.losses.record(module.name, error, norm)

        return record

    def _refuse(self, module: Module, reason: str, hint: str) -> NotRepresentableError:
        return NotRepresentableError(f"{module.name}: {reason}", module=module.name, path=self.adapter.path, hint=hint)


def take_rows(module: Module, ranges: Sequence[tuple[int, int]], rows: int) -> Module:
    """The module with only these of its ``rows`` output rows, in this order; raises CannotError where that is not exact."""
    delta = None if module.delta is None else module.delta.rows(ranges)
    magnitude = None if module.magnitude is None else module.magnitude.rows(ranges, rows)
    bias = None if module.bias is None else module.bias.rows(ranges)
    taken = replace(module, magnitude=magnitude, bias=bias, extras={})
    return taken if delta is None else taken.with_delta(delta)


def stack_modules(
    site: Site, parts: Sequence[tuple[Module | None, int]], record: Record | None = None, *, fold: bool = False
) -> Module:
    """Modules one below the other; None is rows of nothing. Raises CannotError where the family cannot do that.

    Where the scales differ, each member is multiplied by its ratio to the most frequent one, or by its whole scale when
    it will be folded anyway (``fold``); ``record`` gets what that costs in the file's dtype, nothing for a power of two.
    """
    present = [module for module, _ in parts if module is not None]
    head = present[0]
    deltas = [m.delta for m in present if m.delta is not None]
    kinds = {type(delta) for delta in deltas}
    if len(kinds) > 1:
        raise CannotError(f"its parts are of different families ({', '.join(sorted({d.family for d in deltas}))})")
    magnitude = _stack_magnitudes(parts)
    bias = _stack_bias([Piece(m, ((0, rows),)) for m, rows in parts])
    if not deltas:
        return replace(head, site=site, bias=bias, magnitude=magnitude)
    value, common = _common_scale(present, fold=fold)
    recorded = _shares(present, value, record)
    members = []
    for module, rows in parts:
        delta = None if module is None else module.delta
        if module is not None and delta is not None and module.scale.value != value:
            delta = delta.scaled(module.scale.value / value, recorded(module))
        members.append((delta, rows))
    stacked = _stack_deltas(members)
    same = common and stacked.rank == deltas[0].rank
    alpha = head.scale.alpha if same else None
    return replace(
        head, site=site, delta=stacked, scale=replace(head.scale, value=value, alpha=alpha), magnitude=magnitude,
        bias=bias, extras={},
    )  # fmt: skip


def _common_scale(modules: Sequence[Module], *, fold: bool) -> tuple[float, bool]:
    """The scale a stack of these modules gets, and whether all have it: the usual one that is not 0, or 1 to ``fold``."""
    values = Counter(module.scale.value for module in modules if module.delta is not None)
    usual = 1.0 if fold and len(values) > 1 else max(values, key=lambda value: (value != 0.0, values[value]))
    return usual, len(values) == 1


def _shares(modules: Sequence[Module], value: float, record: Record | None) -> Callable[[Module], Record | None]:
    """What the members of a stack give their rounding errors to: weighted by their shares of the stack's squared norm."""
    scaled = [m for m in modules if m.delta is not None and m.scale.value != value]

    @cache
    def norms() -> dict[str, float]:
        return {m.name: m.scale.value**2 * _squared_norm(m.delta) for m in modules if m.delta is not None}

    def of(module: Module) -> Record | None:
        def own(error: float, norm: float) -> None:
            if record is not None and norm > 0.0:
                record(error / norm * norms()[module.name], sum(norms().values()) / len(scaled))

        return own

    return of


def _squared_norm(delta: Delta) -> float:
    """About the squared norm of a factored delta: exact for a full or Kronecker one, expected for a product of rank r."""
    return prod(float((tensor.f64() ** 2).sum()) for tensor in delta.tensors.values()) / (delta.rank or 1)


def _stack_deltas(members: Sequence[tuple[Delta | None, int]]) -> Delta:
    kind = next(type(delta) for delta, _ in members if delta is not None)
    if kind is LowRank:
        return stack_low_rank([(d if isinstance(d, LowRank) else None, rows) for d, rows in members])
    if kind is Hadamard:
        return stack_hadamard([(d if isinstance(d, Hadamard) else None, rows) for d, rows in members])
    if kind is Kronecker:
        return stack_kronecker([(d if isinstance(d, Kronecker) else None, rows) for d, rows in members])
    if kind is Full:
        return stack_full([(d if isinstance(d, Full) else None, rows) for d, rows in members])
    family = next(d.family for d, _ in members if d is not None)
    raise CannotError(f"{family.upper()} modules cannot be fused without the base weight")


def _stack_magnitudes(parts: Sequence[tuple[Module | None, int]]) -> Magnitude | None:
    magnitudes = [None if module is None else module.magnitude for module, _ in parts]
    if all(m is None for m in magnitudes):
        return None
    if any(m is None for m in magnitudes):
        raise CannotError("only some of its parts have a DoRA magnitude, and the others' is the base weight's own norm")
    if any(m.axis == "in" for m in magnitudes if m is not None):
        raise CannotError("its parts have DoRA magnitudes per input column, one set for each part")
    tensors = [m.tensor.reshape(m.tensor.size) for m in magnitudes if m is not None]
    flat = stack(tensors)
    rest = magnitudes[0].tensor.shape[1:] if magnitudes[0] is not None else ()
    return Magnitude(flat.reshape(flat.size, *(1 for _ in rest)), "out")


def _stack_bias(pieces: Sequence[Piece]) -> Tensor | None:
    """Biases one after the other, zeros where a part has none; None when no part has one."""
    biases = [None if p.source is None or p.source.bias is None else p.source.bias.rows(p.ranges) for p in pieces]
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    dtype = present[0].dtype
    return stack([zeros(dtype, (p.rows,)) if bias is None else bias for p, bias in zip(pieces, biases, strict=True)])


def _name(family: str) -> str:
    return {"loha": "LoHa", "lokr": "LoKr", "full": "full-difference", "set": "replacement"}.get(family, family)
