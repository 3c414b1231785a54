"""What an extraction may do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError
from lorasurgery.layouts.targets import layout
from lorasurgery.operations.cut.options import KEEP_RATIO, KOHYA, ResizeOptions
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.models import Model

FAMILIES = ("lora", "locon", "lokr", "loha", "full")
FACTORED = ("lora", "locon")
"""Families made of singular vectors, which every way to choose a rank is for. They differ in the metadata only."""
CAP = 128
"""The most singular vectors of a module where a size, a recipe or a share of the parameters decides and no rank is named."""
DEFAULT, DIFFUSERS = "sd-scripts", "diffusers"
NONE, VECTORS, ALL = "none", "vectors", "all"


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """What :func:`extract` may do."""

    cut: ResizeOptions = field(default_factory=lambda: ResizeOptions(rank=32))
    """Ranks, policies, sizes, alpha, dtype, include and exclude, as for a resize."""
    family: str = "lora"
    """``lora`` or ``locon`` (the same tensors), ``lokr``, ``loha``, or ``full``: the whole difference."""
    target: str | None = None
    """The layout to write; its names decide which rows are one module. None: what loads beside the models, which is Diffusers'
    where Diffusers saved both and can hold the family, else sd-scripts'."""
    factor: int = -1
    """LyCORIS' factor of a LoKr; -1 is balanced."""
    tucker: bool = False
    """Convolutions with a kernel as a Tucker product (LyCORIS' ``lora_mid``) instead of flat."""
    dora: bool = False
    """Magnitude and direction apart: a LoRA with a magnitude per output row."""
    conv: bool = True
    """False leaves out convolutions with a kernel, as sd-scripts does without ``conv_dim``."""
    as_sd_scripts: bool = False
    """Only the matrices and convolutions that sd-scripts' and musubi-tuner's own scripts extract, at ranks of at most their
    input and output channels, as there; see :mod:`lorasurgery.verbs.extract.sd_scripts`."""
    small: str = VECTORS
    """``vectors``: norms and biases that changed go along whole; ``all``: embeddings too; ``none``: neither."""
    text_encoders: bool = True
    min_diff: float = 0.0
    """A module none of whose weights changed by more than this is left out."""
    encoder_min_diff: float | None = None
    """As sd-scripts: text encoders are left out together unless one of their weights changed by more than this."""
    clamp_quantile: float | None = None
    """As sd-scripts: factors are clamped to this quantile of their values, which loses part of the change; None: never."""
    exact: bool = False
    """A full decomposition of every matrix in place of the randomised one."""
    tolerance: float = 1e-3
    """How far the error of the randomised decomposition may be above the best one of its rank, relative."""
    seed: int = 0
    spec: bool = True
    """Write ``modelspec.*`` into the metadata."""
    device: str = "cpu"
    """``cpu``, ``mps``, ``cuda``, or several: ``cuda:0,cuda:1``."""
    jobs: int | None = None
    """Matrices decomposed at the same time; None: as many as cores and about a GiB of memory allow, four a GPU."""

    @property
    def layout(self) -> Layout:
        """The layout to write; sd-scripts' as long as no models have decided it."""
        return layout(self.target or DEFAULT)

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device."""
        return tuple(name.strip() for name in self.device.split(",") if name.strip()) or ("cpu",)

    @property
    def resizing(self) -> ResizeOptions:
        """The cut of the differences; a scale of 1 unless an alpha is asked for."""
        return replace(self.cut, layout=self.layout.id, full=True, text_encoders=True, include=(), exclude=())

    def aimed(self, models: Sequence[Model]) -> ExtractOptions:
        """With the target that follows from two models where none is named."""
        if self.target is not None:
            return self
        arch, component = models[0].architecture, models[0].component
        places = {own.diffusers for own in arch.encoders if own.table == component}
        loaded = arch.has_diffusers and (component == DENOISER or bool(places & set(arch.diffusers_encoders)))
        family = "lora" if self.family in FACTORED else self.family
        held = family in layout(DIFFUSERS).holds and not self.tucker
        follows = loaded and held and all(model.of_diffusers for model in models)
        return replace(self, target=DIFFUSERS if follows else DEFAULT)

    def on(self, arch: Architecture) -> ExtractOptions:
        """With blocks and components looked up in an architecture; raises RequestError for unknown ones."""
        return replace(self, cut=self.cut.on(arch))

    def check(self) -> None:
        """Raises RequestError for values out of range and options that contradict each other."""
        if self.family not in FAMILIES:
            raise RequestError(f"no family is called {self.family}", hint=f"one of {', '.join(FAMILIES)}")
        if self.family == "full" and not self.cut.is_fixed:
            raise RequestError("the whole difference has no rank to choose", hint="the family lora")
        if self.small not in (NONE, VECTORS, ALL):
            raise RequestError(f"small is {NONE}, {VECTORS} or {ALL}, not {self.small}")
        if self.family != "full" and (self.family != "lokr" or self.cut.rank is not None):
            self.cut.check()
        self._check_family()
        holds = self.layout.holds
        family = "lora" if self.family in FACTORED else self.family
        if family not in holds:
            raise RequestError(
                f"extract writes no {family} modules for {self.layout.reader}",
                hint="the family lora, or the targets comfyui and lycoris",
            )
        self._check_numbers()

    def _check_family(self) -> None:
        factored = self.family in FACTORED
        if (self.tucker or self.dora or self.clamp_quantile is not None) and not factored:
            raise RequestError(f"tucker, dora and clamp_quantile are for the family lora, not {self.family}")
        if self.tucker and self.dora:
            raise RequestError("tucker and dora contradict each other", hint="one of them")
        if self.factor != -1 and self.family != "lokr":
            raise RequestError("a factor is for the family lokr")
        if self.factor < 1 and self.factor != -1:
            raise RequestError(f"the factor is 1 or more, or -1 for balanced factors, not {self.factor}")
        if factored and self.cut.is_fixed and self.cut.rank is None:
            raise RequestError("no rank is named for linear layers", hint="a rank")
        if self.family == "full" or (factored and not (self.tucker or self.dora)):
            return
        what = self.family if not factored else "a DoRA" if self.dora else "a Tucker product"
        if not self.cut.is_fixed or self.cut.uniform:
            raise RequestError(f"{what} has no singular values that a policy or a size could choose by", hint="a rank")
        if self.tucker and self.layout.words != "kohya":
            raise RequestError(f"{self.layout.reader} does not load Tucker products", hint="the same without tucker")

    def _check_clamp(self) -> None:
        """sd-scripts clamps ``U S`` and ``Vt`` of a fixed rank, whose alpha is the rank."""
        if not self.cut.is_fixed:
            raise RequestError("clamp_quantile is for a fixed rank, as in sd-scripts", hint="a rank")
        if self.cut.factors != KOHYA:
            raise RequestError("clamp_quantile is for factors with all of the strength in up", hint="factors kohya")
        if self.cut.alpha not in (KEEP_RATIO, "rank"):
            raise RequestError("clamp_quantile is for an alpha that is the rank, as in sd-scripts", hint="alpha rank")

    def _check_numbers(self) -> None:
        for least in (self.min_diff, self.encoder_min_diff or 0.0):
            if not least >= 0.0:
                raise RequestError(f"a smallest difference is 0 or more, not {least}")
        if self.clamp_quantile is not None and not 0.0 < self.clamp_quantile <= 1.0:
            raise RequestError(f"the quantile must lie in (0, 1], not {self.clamp_quantile}")
        if self.clamp_quantile is not None:
            self._check_clamp()
        if not self.tolerance > 0.0:
            raise RequestError(f"the tolerance must be positive, not {self.tolerance}")
        if self.jobs is not None and self.jobs < 1:
            raise RequestError(f"jobs must be at least 1, not {self.jobs}")
