"""The model of an adapter file: which rows of which base weights it changes, and how."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.deltas.base import CannotError
from lorasurgery.layouts.targets import layout
from lorasurgery.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.tensors import Float64, Ranges, Tensor
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.site import Site


SCALED = "scaled"
"""Source of a scale that is no longer the file's own."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The number a delta is multiplied by, resolved once, and where it came from."""

    value: float
    source: str
    """``alpha tensor``, ``adapter_config.json``, ``lora_adapter_metadata``, ``rsLoRA``, or ``none (1.0)``."""
    alpha: Tensor | None = None
    """The file's own alpha tensor, kept so that a rename returns it bit for bit."""
    stored: Tensor | None = None
    """The same where only the file's own rules read it so (an rsLoRA flag): kept for the file's own spelling."""


@dataclass(frozen=True, slots=True)
class Magnitude:
    """A DoRA magnitude: one number per output row (``out``) or per input column (``in``). Never scaled."""

    tensor: Tensor
    axis: str

    def rows(self, ranges: Ranges, rows: int) -> Magnitude:
        """The magnitude of these rows of ``rows``; an input-axis one only when all rows stay (a permutation)."""
        if self.axis == "out":
            flat = self.tensor.reshape(self.tensor.size).rows(ranges)
            return Magnitude(flat.reshape(flat.size, *(1 for _ in self.tensor.shape[1:])), "out")
        if sum(stop - start for start, stop in ranges) != rows:
            raise CannotError("its DoRA magnitude is per input column and couples all output rows")
        return self


class LayerBias(NamedTuple):
    """A bias that readers multiply by the module's scale, as ``lora_B.bias``: what is stored, and what it was read as."""

    stored: Tensor
    read: Tensor
    scale: float


class Composed(NamedTuple):
    """A module whose change is put together from tensors that are not themselves its factors (LongCat-Video's)."""

    delta: Delta
    factors: Mapping[str, Tensor]
    """Key -> tensor, as the file has them; what they make is ``delta``."""
    strength: tuple[str, Tensor] | None
    """The key and the tensor of alpha / rank, the scale itself."""


@dataclass(frozen=True, slots=True)
class Module:
    """Everything a file says about one module."""

    site: Site
    name: str
    """The module's name as the file spells it, for messages."""
    delta: Delta | None
    """None when the file only has a bias for it."""
    scale: Scale
    magnitude: Magnitude | None = None
    bias: Tensor | None = None
    """Added to the base bias, (out,)."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Further tensors of the module by suffix (``.reshape_weight``), carried where the rows stay whole."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Slot (the delta's, ``alpha``, ``magnitude``, ``bias``, or an extra's suffix) -> key as the file spells it."""
    layer_bias: LayerBias | None = None
    composed: Composed | None = None
    inside: str = ""
    """The name without what stands around it in the file (``pipe.dit.``); empty where that is nothing."""

    @property
    def stem(self) -> str:
        """The name that a table can know."""
        return self.inside or self.name

    @property
    def out(self) -> int:
        """Number of output rows."""
        return sum(span.stop - span.start for span in self.site.spans)

    @property
    def family(self) -> str:
        """``lora``, ``loha``, ``lokr``, ``dora`` (a LoRA with a magnitude), ``full``, ``norm``, ``bias``, ..."""
        if self.delta is None:
            return "bias"
        return "dora" if self.magnitude is not None and self.delta.family == "lora" else self.delta.family

    def dense(self) -> Float64:
        """The change of the weight in float64, scale included, magnitude not (it needs the base weight).

        Raises CannotError for families that multiply the base, and for a module that only has a bias.
        """
        if self.delta is None:
            raise CannotError("this module only has a bias")
        return self.delta.dense() * self.scale.value

    def with_delta(self, delta: Delta, scale: float | None = None) -> Module:
        """The same module with another delta; the alpha tensor is forgotten where the rank or the scale changed."""
        value = self.scale.value if scale is None else scale
        kept = self.delta is not None and delta.rank == self.delta.rank and value == self.scale.value
        return replace(self, delta=delta, scale=self.scale if kept else Scale(value, self.scale.source))


@dataclass(frozen=True, slots=True)
class Leftover:
    """A key that belongs to no module."""

    key: str
    tensor: Tensor
    reason: str
    """Why it is harmless, what it is, or what is not understood about it."""
    state: str = "unknown"
    """``harmless`` (changes nothing), ``kept`` (understood, and copied where its reader is written for), or ``unknown``."""


def account(used: Mapping[str, str], others: Iterable[Leftover]) -> Ledger:
    """The account of a file with these keys of modules (and whose each is) and these others."""
    rows: dict[str, dict[str, str]] = {state: {} for state in ("harmless", "kept", "unknown")}
    for left in others:
        rows[left.state][left.key] = left.reason
    return Ledger({**used, **rows["kept"]}, rows["harmless"], rows["unknown"])


@dataclass(frozen=True, slots=True)
class Adapter:
    """A parsed adapter file. Iterating yields ``(site, module)``."""

    architecture: Architecture
    modules: Mapping[Site, Module]
    metadata: Mapping[str, str]
    layout: str
    """``sd-scripts``, ``diffusers``, ``comfyui``, ``peft``, ``onetrainer``, ``lycoris``, ``bfl``, ``xlabs``, ``cloneofsimo``,
    ``bare``."""
    leftovers: tuple[Leftover, ...] = ()
    candidates: tuple[tuple[str, float], ...] = ()
    """Other architectures that explain the same keys, with the share they explain."""
    evidence: tuple[str, ...] = ()
    """Why it is for this architecture, as sentences without a full stop; the first counts the modules that fit."""
    warnings: tuple[str, ...] = ()
    path: Path | None = None
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """PEFT's configurations as JSON, by component ("" for the whole file): from its folder, or from the header."""
    operation: str | None = None
    """What was done, for ``lorasurgery.operation`` in the metadata; None: a conversion."""
    unknown: str = ""
    """Why no table knows the model; empty where one does."""
    spelling: Layout | None = None
    """How the file it was read from spells its modules; None where it is written in :attr:`layout`."""

    def __iter__(self) -> Iterator[tuple[Site, Module]]:
        return iter(self.modules.items())

    def __len__(self) -> int:
        return len(self.modules)

    @property
    def ledger(self) -> Ledger:
        """What became of each key of the file: part of a module, harmless, or not understood."""
        return account({key: module.name for module in self.modules.values() for key in module.keys.values()}, self.leftovers)

    @property
    def lokr_factor(self) -> int | None:
        """The LoKr factor the trainer used: the ``lokr_factor`` buffer, else ``ss_lokr_factor``, else None.

        Source: the musubi-tuner fork with native LoKr; the maths of a file never needs it.
        """
        for leftover in self.leftovers:
            if leftover.key == "lokr_factor":
                return round(leftover.tensor.item())
        text = self.metadata.get("ss_lokr_factor", "")
        return int(text) if text.lstrip("-").isdigit() else None


def written_in(adapter: Adapter, target: str | None = None) -> Layout:
    """The layout that an adapter is written in: ``target``, else its file's own spelling, else the layout it was brought to.

    Raises RequestError for a name that is no layout.
    """
    if target is not None:
        return layout(target)
    return layout(adapter.layout) if adapter.spelling is None else adapter.spelling
