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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple

Shape = tuple[int, ...]

ORIGINAL, DIFFUSERS, SD_SCRIPTS = "original", "diffusers", "sd_scripts"
NAMINGS = (ORIGINAL, DIFFUSERS, SD_SCRIPTS)


class Span(NamedTuple):
    """Rows ``start:stop`` (output axis) of the original weight ``weight``."""

    weight: str
    start: int
    stop: int


Spans = tuple[Span, ...]


class Part(NamedTuple):
    """One module stacked into a fused weight: its name and its number of rows."""

    name: str
    rows: int


@dataclass(frozen=True, slots=True)
class Names:
    """What one naming calls a base weight: one module, or several stacked in this order."""

    parts: tuple[Part, ...]
    swap_halves: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One base weight. ``shape`` is (out, in[, k...]), or (dim,) for a norm; names are relative to the block."""

    name: str
    shape: Shape
    diffusers: Names | None
    sd_scripts: Names | None


@dataclass(frozen=True, slots=True)
class Block:
    """Rows repeated ``count`` times from index ``start``; ``{i}`` in the prefixes is the index.

    A prefix of None in another naming means: the same as the original.
    """

    name: str
    rows: tuple[Row | Block, ...]
    count: int = 1
    start: int = 0
    diffusers: str | None = None
    sd_scripts: str | None = None


def _names(spec: str | Sequence[str | tuple[str, int]] | None, rows: int, *, swap: bool) -> Names | None:
    if spec is None:
        return Names((), swap_halves=True) if swap else None
    if isinstance(spec, str):
        return Names((Part(spec, rows),), swap)
    equal = rows // len(spec)
    return Names(tuple(Part(p, equal) if isinstance(p, str) else Part(*p) for p in spec), swap)


def row(
    name: str,
    shape: Shape,
    diffusers: str | Sequence[str | tuple[str, int]] | None = None,
    *,
    sd_scripts: str | Sequence[str | tuple[str, int]] | None = None,
    swap_halves: bool = False,
) -> Row:
    """A row of a table.

    ``diffusers`` and ``sd_scripts`` are None where the name is the original one, a string where it differs, or a list
    of the modules stacked in this weight: a plain name has an equal share of the rows, ``(name, rows)`` its own.
    ``swap_halves``: Diffusers holds the two halves of the output axis the other way round (scale/shift).
    """
    return Row(name, shape, _names(diffusers, shape[0], swap=swap_halves), _names(sd_scripts, shape[0], swap=False))


def block(
    name: str,
    rows: Sequence[Row | Block],
    count: int = 1,
    *,
    start: int = 0,
    diffusers: str | None = None,
    sd_scripts: str | None = None,
) -> Block:
    """Rows under a common prefix, repeated ``count`` times with ``{i}`` running from ``start``."""
    return Block(name, tuple(rows), count, start, diffusers, sd_scripts)


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
    aliases: tuple[tuple[str, str], ...] = ()
    """Further names in files: (template, name in any naming); ``{i}`` runs over :attr:`alias_range`."""
    alias_range: int = 64
    diffusers_roots: tuple[tuple[str, str], ...] = ()
    """(name prefix, Diffusers component) where a part of the denoiser is a pipeline component of its own."""
    precedence: int = 0
    """Of tables that explain a file equally well, the one with the highest counts (the more common model)."""
    widened: tuple[str, ...] = ()
    """Weights with more input columns than the plain base model's, which a reader must pad first (control LoRAs)."""
    metadata_names: tuple[str, ...] = ()
    """Values of ``ss_base_model_version`` and ``modelspec.architecture`` (before the slash) that mean this model."""

    @property
    def key(self) -> str:
        """``id`` or ``id-variant``, the name the command line takes."""
        return f"{self.id}-{self.variant}" if self.variant else self.id

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Every original weight's module name and its shape (out, in[, k...])."""
        return MappingProxyType({base.name: base.shape for base in _expand(self.rows)})

    @cached_property
    def namings(self) -> Mapping[str, Mapping[str, Spans]]:
        """For each naming, every module name and the rows it stands for; expanded when first asked for.

        Raises ValueError when a table gives two weights one name, or parts that do not sum to their row.
        """
        return _Namings(self)

    def expanded(self) -> Iterator[Base]:
        """Every base weight with its names in every naming."""
        return _expand(self.rows)

    @cached_property
    def alias_names(self) -> Mapping[str, Spans]:
        """The further names of :attr:`aliases`, expanded."""
        known = {**self.namings[SD_SCRIPTS], **self.namings[DIFFUSERS], **self.namings[ORIGINAL]}
        found: dict[str, Spans] = {}
        for alias, target in self.aliases:
            for i in range(self.alias_range) if "{i}" in alias else (0,):
                spans = known.get(target.format(i=i))
                if spans is not None:
                    found[alias.format(i=i)] = spans
        return MappingProxyType(found)

    @cached_property
    def patterns(self) -> frozenset[str]:
        """Every name of every naming, flattened, its numbers replaced by ``#``: a cheap first look at a file."""
        found = {name_pattern(alias.format(i=0)) for alias, _ in self.aliases}
        for expanded in _expand(self.rows, once=True):
            for naming in NAMINGS:
                found.update(name_pattern(part.name) for part in expanded.in_naming(naming).parts)
        return frozenset(found)

    def module_shape(self, spans: Spans) -> Shape:
        """(out, in[, k...]) of the module that stands for ``spans``; raises KeyError for an unknown weight."""
        return (sum(s.stop - s.start for s in spans), *self.shapes[spans[0].weight][1:])


@dataclass(frozen=True, eq=False)
class EncoderTable:
    """One text encoder: its weights under Hugging Face's module names, the same in every layout (prefixes differ)."""

    id: str
    rows: tuple[Row | Block, ...]
    source: str

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Every weight's module name and its shape (out, in[, k...])."""
        return MappingProxyType({base.name: base.shape for base in _expand(self.rows)})

    @cached_property
    def patterns(self) -> frozenset[str]:
        """Every name, flattened, its numbers replaced by ``#``."""
        return frozenset(name_pattern(base.name) for base in _expand(self.rows, once=True))


_NUMBER = re.compile(r"\d+")


def flat(name: str) -> str:
    """A dotted module name as sd-scripts writes it: every dot an underscore."""
    return name.replace(".", "_")


def name_pattern(name: str) -> str:
    """``layers.3.attention.to_q`` -> ``layers_#_attention_to_q``."""
    return _NUMBER.sub("#", flat(name))


class Base(NamedTuple):
    """A row with its block prefixes, (original, Diffusers, sd-scripts); its names are put together when asked for."""

    row: Row
    prefixes: tuple[str, str, str]

    @property
    def name(self) -> str:
        """The original module name."""
        return _join(self.prefixes[0], self.row.name)

    @property
    def shape(self) -> Shape:
        """(out, in[, k...]) or (dim,)."""
        return self.row.shape

    def in_naming(self, naming: str) -> Names:
        """Its names in one naming; a row without names of its own keeps the original one under that naming's prefix."""
        if naming == ORIGINAL:
            return Names((Part(self.name, self.shape[0]),))
        own = self.row.diffusers if naming == DIFFUSERS else self.row.sd_scripts
        prefix = self.prefixes[1 if naming == DIFFUSERS else 2]
        if own is None or not own.parts:
            swap = own is not None and own.swap_halves
            return Names((Part(_join(prefix, self.row.name), self.shape[0]),), swap)
        return Names(tuple(Part(_join(prefix, p.name), p.rows) for p in own.parts), own.swap_halves)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix and name else prefix or name


def _expand(
    rows: Sequence[Row | Block], prefixes: tuple[str, str, str] = ("", "", ""), *, once: bool = False
) -> Iterator[Base]:
    for item in rows:
        if isinstance(item, Row):
            yield Base(item, prefixes)
            continue
        names = (item.name, item.name if item.diffusers is None else item.diffusers,
                 item.name if item.sd_scripts is None else item.sd_scripts)  # fmt: skip
        for i in range(item.start, item.start + (1 if once else item.count)):
            original, diffusers, trained = (_join(p, n.format(i=i)) for p, n in zip(prefixes, names, strict=True))
            yield from _expand(item.rows, (original, diffusers, trained), once=once)


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
    if naming == DIFFUSERS and not arch.has_diffusers:
        return {}
    found: dict[str, Spans] = {}
    for base in _expand(arch.rows):
        names = base.in_naming(naming)
        if sum(p.rows for p in names.parts) != base.shape[0]:
            raise ValueError(f"{arch.key}: the {naming} parts of {base.name} do not sum to {base.shape[0]} rows")
        start = 0
        for part in names.parts:
            spans: Spans = (Span(base.name, start, start + part.rows),)
            if names.swap_halves:
                half = part.rows // 2
                spans = (Span(base.name, half, part.rows), Span(base.name, 0, half))
            if part.name in found:
                raise ValueError(f"{arch.key}: two weights are called {part.name} in the {naming} naming")
            found[part.name] = spans
            start += part.rows
    return found
