"""What an architecture table is made of, and how it becomes the names of every layout.

A table says, once for each base weight, what the original checkpoint (and ComfyUI) calls it, its shape, and what the
Diffusers model and the model that sd-scripts or musubi-tuner trains call it. Everything else is enumerated from that:
no name is ever guessed from its underscores.

A *naming* maps a module name to the rows of the original weights it stands for (``Span``). One whole span is a rename,
a part of one is a fused weight seen from its split side, two spans with the halves exchanged are Diffusers'
scale/shift order. Fusing, splitting and permuting are then one question: which rows of which source module make up
this target module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

from lorasurgery.architectures.rows import (
    DIFFUSERS,
    NAMINGS,
    ORIGINAL,
    SD_SCRIPTS,
    Alias,
    Base,
    Block,
    Names,
    Part,
    Row,
    Shape,
    Span,
    Spans,
    block,
    cut,
    expand,
    flat,
    join,
    name_pattern,
    patterns,
    row,
)

DENOISERS = ("denoiser", "denoiser_2")
"""The components that :attr:`Architecture.rows` are about: the UNet or transformer, and Wan 2.2's low-noise expert."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """Where one text encoder's modules stand in each layout. Module names are Hugging Face's own."""

    table: str
    """Key into :data:`lorasurgery.architectures.text_encoders.TEXT_ENCODERS`."""
    sd_scripts: str
    """Prefix without the trailing underscore: ``lora_te1``."""
    diffusers: str | None
    """Pipeline component: ``text_encoder_2``; None when no pipeline loads it."""
    comfyui: str
    """Prefix without the trailing dot: ``text_encoders.clip_l.transformer``."""
    onetrainer: str | None = None
    """Prefix when it differs from ``sd_scripts``: OneTrainer numbers FLUX's T5 ``lora_te2``."""


class Own(NamedTuple):
    """A weight that a file or a base model names and the table does not: a newer variant's, an add-on's, a bare parameter."""

    component: str
    """``denoiser`` or a text encoder, as in a site."""
    name: str
    """The name without its prefix; a weight's ends before ``.weight``, any other parameter's is whole."""
    shape: Shape
    """(out, in[, k...]) as far as it is known."""
    naming: str
    """Whose name it is: no other layout has one for it."""
    flat: bool = False
    """With underscores for dots, so that it is no name where there are dots."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """One base model: its weights and what each layout calls them.

    ``rows`` is data. ``id`` is the stable public name, ``variant`` tells apart models with the same rows and other numbers.
    """

    id: str
    variant: str
    name: str
    rows: tuple[Row | Block, ...]
    source: str
    """Where the names and shapes were read."""
    no_bias: str | None = None
    """A pattern found in the original names of the weights that have no bias beside them, and in no others; None: not known."""
    sd_scripts: str = ORIGINAL
    """The naming sd-scripts or musubi-tuner trains: ``original``, ``diffusers``, or ``sd_scripts`` (its own names)."""
    has_comfyui: bool = True
    """False when ComfyUI has no model whose names these are (FramePack)."""
    has_diffusers: bool = True
    """False when no Diffusers class exists."""
    denoiser: str = "transformer"
    """Diffusers' component name: ``unet`` or ``transformer``."""
    comfyui_split: str | None = None
    """The dotted prefix under which ComfyUI also takes Diffusers' names, slices of fused weights included."""
    onetrainer: str = "flat"
    """``flat``: ``lora_transformer_`` + Diffusers names with underscores. ``dotted``: ``transformer.`` + Diffusers names."""
    encoders: tuple[Encoder, ...] = ()
    diffusers_encoders: tuple[str, ...] = ()
    """The encoders whose LoRA the Diffusers pipeline loads (``_lora_loadable_modules``); it ignores the others."""
    aliases: tuple[Alias, ...] = ()
    """Further names in files; ``{i}`` runs over :attr:`alias_range`."""
    alias_range: int = 64
    diffusers_families: frozenset[str] = frozenset()
    """The families that the Diffusers pipeline loads beside LoRA and DoRA."""
    diffusers_fused: str | None = None
    """A pattern of those :attr:`aliases` for which that pipeline fuses its own weights (``to_qkv``)."""
    comfyui_slices: str = r"(?!)"
    """A pattern of the aliases that are ComfyUI's own names for rows of a fused weight."""
    diffusers_roots: tuple[tuple[str, str], ...] = ()
    """(name prefix, Diffusers component) where a part of the denoiser is a pipeline component of its own."""
    beside: tuple[tuple[str, str], ...] = ()
    """(original name, ComfyUI's key) of modules that stand beside the denoiser: no dotted layout but Diffusers' puts a prefix
    there, and ComfyUI has them in its text encoder."""
    usage: float = 0.0
    """How common adapters of the model are: about how often, of those in a month of 2026, a workflow of the kind is run
    (ComfyUI's template index where it has the model). Tells which of several models that fit a file is likelier."""
    widened: tuple[str, ...] = ()
    """Weights with more input columns than the plain base model's, which a reader must pad first (control LoRAs)."""
    replaced_norms: tuple[str, ...] = ()
    """How the names of the norms end that Diffusers' loader replaces, from a plain ``.weight`` beside LoRA keys."""
    only_prefix: str | None = None
    """For a model known by its adapters alone: what stands before their names, which are no other program's."""
    own: tuple[Own, ...] = ()
    """Weights beyond the rows, named by the files at hand or by a base model."""
    metadata_names: tuple[str, ...] = ()
    """What trainers call the model in ``ss_base_model_version`` and ``modelspec.architecture`` (before the slash). Letters
    and digits alone are compared: ``Flux.1-dev`` is ``flux_1_dev``. Sources: sd-scripts, musubi-tuner, ai-toolkit
    (``get_base_model_version``) and OneTrainer (``resources/sd_model_spec``), 2026."""

    @property
    def key(self) -> str:
        """``id`` or ``id-variant``, the name the command line takes."""
        return f"{self.id}-{self.variant}" if self.variant else self.id

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Every original weight's module name and its shape (out, in[, k...]); own weights of the denoiser among them."""
        own = {weight.name: weight.shape for weight in self.own if weight.component in DENOISERS}
        return MappingProxyType({base.name: base.shape for base in self.expanded} | own)

    @cached_property
    def own_shapes(self) -> Mapping[tuple[str, str], Shape]:
        """(component, name) of every weight of :attr:`own`, and its shape."""
        return MappingProxyType({(weight.component, weight.name): weight.shape for weight in self.own})

    def flat_names(self, naming: str) -> Mapping[str, Spans]:
        """The own weights of the denoiser that a naming knows with underscores only."""
        naming = self.sd_scripts if naming == SD_SCRIPTS else naming
        own = (weight for weight in self.own if weight.flat and weight.naming == naming and weight.component in DENOISERS)
        return {weight.name: (Span(weight.name, 0, weight.shape[0]),) for weight in own}

    def with_own(self, own: Iterable[Own]) -> Architecture:
        """The same model with further weights of its own; those it has are not added again."""
        known = {(weight.component, weight.name, weight.naming) for weight in self.own}
        new = tuple(weight for weight in own if (weight.component, weight.name, weight.naming) not in known)
        return replace(self, own=(*self.own, *new)) if new else self

    @cached_property
    def namings(self) -> Mapping[str, Mapping[str, Spans]]:
        """For each naming, every module name and the rows it stands for; expanded when first asked for.

        Raises ValueError when a table gives two weights one name, or parts that do not sum to their row.
        """
        return _Namings(self)

    @cached_property
    def expanded(self) -> tuple[Base, ...]:
        """Every base weight with its names in every naming."""
        return tuple(expand(self.rows))

    @cached_property
    def alias_names(self) -> Mapping[str, Spans]:
        """The further names of :attr:`aliases`, expanded."""
        known = {**self.namings[SD_SCRIPTS], **self.namings[DIFFUSERS], **self.namings[ORIGINAL]}
        found: dict[str, Spans] = {}
        for alias, target in self.aliases:
            name, rows = (target, None) if isinstance(target, str) else target
            for i in range(self.alias_range) if "{i}" in alias else (0,):
                spans = known.get(name.format(i=i))
                if spans is not None:
                    found[alias.format(i=i)] = spans if rows is None else cut(spans, *rows)
        return MappingProxyType(found)

    @cached_property
    def patterns(self) -> frozenset[str]:
        """Every name of every naming, flattened, its numbers replaced by ``#``: a cheap first look at a file."""
        return patterns(self.rows) | {name_pattern(alias.format(i=0)) for alias, _ in self.aliases}

    def has_bias(self, weight: str) -> bool | None:
        """Whether the model has a bias beside an original weight; None where that is not known."""
        known = weight in self.shapes and not any(own.name == weight for own in self.own)
        return None if self.no_bias is None or not known else re.search(self.no_bias, weight) is None

    def module_shape(self, spans: Spans) -> Shape:
        """(out, in[, k...]) of the module that stands for ``spans``; raises KeyError for an unknown weight."""
        return (sum(s.stop - s.start for s in spans), *self.shapes[spans[0].weight][1:])


@dataclass(frozen=True, eq=False)
class EncoderTable:
    """One text encoder: its weights under Hugging Face's module names, the same in every layout (prefixes differ)."""

    id: str
    rows: tuple[Row | Block, ...]
    source: str
    no_bias: str
    """As of :class:`Architecture`."""

    def has_bias(self, weight: str) -> bool | None:
        """Whether the encoder has a bias beside a weight; None for one that is not in the table."""
        return re.search(self.no_bias, weight) is None if weight in self.shapes else None

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Every weight's module name and its shape (out, in[, k...])."""
        return MappingProxyType({base.name: base.shape for base in expand(self.rows)})

    @cached_property
    def patterns(self) -> frozenset[str]:
        """Every name, flattened, its numbers replaced by ``#``."""
        return patterns(self.rows)


class _Namings(Mapping[str, Mapping[str, Spans]]):
    """The namings of one architecture, each made when it is first looked up."""

    def __init__(self, arch: Architecture) -> None:
        self._arch = arch
        self._made: dict[str, Mapping[str, Spans]] = {}

    def __getitem__(self, naming: str) -> Mapping[str, Spans]:
        if naming not in NAMINGS:
            raise KeyError(naming)
        if naming == SD_SCRIPTS and self._arch.sd_scripts != SD_SCRIPTS:
            return self[self._arch.sd_scripts]
        if naming not in self._made:
            self._made[naming] = MappingProxyType(_naming(self._arch, naming))
        return self._made[naming]

    def __iter__(self) -> Iterator[str]:
        return iter(NAMINGS)

    def __len__(self) -> int:
        return len(NAMINGS)


def _naming(arch: Architecture, naming: str) -> dict[str, Spans]:
    """Every module name of a naming and its rows. A loop over tens of thousands of names at start-up: kept tight."""
    found: dict[str, Spans] = {}
    which = NAMINGS.index(naming)
    for row_, prefixes in () if naming == DIFFUSERS and not arch.has_diffusers else arch.expanded:
        weight, rows = join(prefixes[0], row_.name), row_.shape[0]
        parts, swap_halves = row_.in_naming(naming)
        start = 0
        for name, own in parts:
            stop = start + own
            spans: Spans = (Span(weight, start, stop),)
            if swap_halves:
                spans = (Span(weight, start + own // 2, stop), Span(weight, start, start + own // 2))
            full = join(prefixes[which], name)
            if full in found:
                raise ValueError(f"{arch.key}: two weights are called {full} in the {naming} naming")
            found[full], start = spans, stop
        if start != rows:
            raise ValueError(f"{arch.key}: the {naming} parts of {weight} do not sum to {rows} rows")
    for extra in arch.own:
        if extra.naming == naming and not extra.flat and extra.component in DENOISERS:
            found.setdefault(extra.name, (Span(extra.name, 0, extra.shape[0]),))
    return found


__all__ = [
    "DENOISERS", "DIFFUSERS", "NAMINGS", "ORIGINAL", "SD_SCRIPTS", "Alias", "Architecture", "Base", "Block", "Encoder",
    "EncoderTable", "Names", "Own", "Part", "Row", "Shape", "Span", "Spans", "block", "flat", "name_pattern", "row",
]  # fmt: skip
