"""From a module's name as some file spells it to the rows of the base weights it stands for.

Prefixes and namings are independent: a prefix says which component a name belongs to, whether its dots became
underscores, and which naming to try first; the name itself is looked up in the architecture's enumerated namings.
"""

from __future__ import annotations

import re
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS, Architecture, Span, flat, name_pattern
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.site import DENOISER, SECOND_DENOISER, Site

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorasurgery.architectures.table import Encoder, Shape, Spans

ALIAS = "alias"
PEFT_ENCODER = "base_model.model.text_encoder_"
"""What the modules of a text encoder's own PEFT folder are called here, with its table; there they have no prefix."""


class Prefix(NamedTuple):
    """What stands before a denoiser module's name."""

    text: str
    layout: str
    flat: bool
    order: tuple[str, ...]
    """Namings in the order to look the rest up in."""
    component: str = DENOISER


_NATIVE = (ORIGINAL, SD_SCRIPTS, DIFFUSERS)
_DIFFUSERS = (DIFFUSERS, ORIGINAL, SD_SCRIPTS)
_TRAINED = (SD_SCRIPTS, ORIGINAL, DIFFUSERS)

PREFIXES = (
    Prefix("lora_unet__", "sd-scripts", True, _TRAINED),  # VideoX-Fun
    Prefix("lora_unet_", "sd-scripts", True, _TRAINED),
    Prefix("lora_transformer_", "onetrainer", True, _DIFFUSERS),
    Prefix("lycoris_", "lycoris", True, _DIFFUSERS),
    Prefix("oft_unet_", "sd-scripts", True, _TRAINED),
    Prefix("base_model.model.diffusion_model.", "peft", False, _NATIVE),
    Prefix("base_model.model.transformer.", "peft", False, _DIFFUSERS),
    Prefix("base_model.model.unet.", "peft", False, _DIFFUSERS),
    Prefix("base_model.model.", "peft", False, _DIFFUSERS),
    Prefix("model.diffusion_model.", "comfyui", False, _NATIVE),
    Prefix("diffusion_model.", "comfyui", False, _NATIVE),
    Prefix("transformer_2.", "diffusers", False, _DIFFUSERS, SECOND_DENOISER),
    Prefix("transformer.", "diffusers", False, _DIFFUSERS),
    Prefix("unet.base_model.model.", "peft", False, _DIFFUSERS),
    Prefix("unet.", "diffusers", False, _DIFFUSERS),
    Prefix("net.", "bare", False, _NATIVE),  # OneTrainer's original form of Cosmos models
    Prefix("", "bare", False, _NATIVE),
)
"""Longest first: a longer prefix is tried before one it begins with."""


class Found(NamedTuple):
    """Where a spelled name leads, and what that says about the file's layout."""

    site: Site
    naming: str
    layout: str
    shape: Shape
    """(out, in[, k...]) of the weight rows the site stands for."""
    prefix: str = ""
    """What stands before the name."""
    flat: bool = False
    """Whether the name has underscores for dots."""


REMEMBERED = 1 << 15
"""Names that an index remembers: the files of a folder have many in common."""


class NameIndex:
    """Every name of one architecture, looked up by prefix, form and naming."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self._flat: dict[str, Mapping[str, Spans]] = {}
        self._found: dict[str, Found | None] = {}

    def _names(self, naming: str, *, is_flat: bool) -> Mapping[str, Spans]:
        """The names of one naming (or the aliases), with underscores for dots when ``is_flat``."""
        arch = self.architecture
        if naming == SD_SCRIPTS and arch.sd_scripts != SD_SCRIPTS:
            naming = arch.sd_scripts
        if is_flat and naming in self._flat:
            return self._flat[naming]
        names = arch.alias_names if naming == ALIAS else arch.namings[naming]
        if is_flat:
            names = self._flat[naming] = {flat(name): spans for name, spans in names.items()}
        return names

    @cached_property
    def _encoder_prefixes(self) -> tuple[tuple[str, str, bool, str], ...]:
        """(prefix, component, flat, layout), longest first."""
        encoders = self.architecture.encoders
        found = [(text, own.table, is_flat, layout) for own in encoders for text, is_flat, layout in encoder_prefixes(own)]
        if len(encoders) == 1:  # trainers number a single encoder differently; every number means it
            numbers = ("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_")
            found += [(number, encoders[0].table, True, "sd-scripts") for number in numbers]
        return tuple(sorted(set(found), key=lambda item: -len(item[0])))

    @cached_property
    def _encoder_starts(self) -> tuple[str, ...]:
        """The encoder prefixes alone."""
        return tuple(text for text, *_ in self._encoder_prefixes)

    def find(self, stem: str) -> Found | None:
        """The site of a spelled module name, or None when this architecture has no such name."""
        try:
            return self._found[stem]
        except KeyError:
            pass
        if len(self._found) >= REMEMBERED:
            self._found.clear()
        self._found[stem] = found = self._in_encoder(stem) or self._in_denoiser(stem) or self._in_root(stem)
        return found

    def _in_encoder(self, stem: str) -> Found | None:
        if not stem.startswith(self._encoder_starts):
            return None
        for text, component, is_flat, layout in self._encoder_prefixes:
            if stem.startswith(text):
                body = stem[len(text) :]
                weight = _encoder_names(component)[is_flat].get(body) or self._own_in_encoders.get((component, is_flat, body))
                if weight is not None:
                    shape = TEXT_ENCODERS[component].shapes.get(weight) or self.architecture.own_shapes[component, weight]
                    return Found(Site(component, (Span(weight, 0, shape[0]),)), ORIGINAL, layout, shape, text, is_flat)
        return None

    @cached_property
    def _own_in_encoders(self) -> Mapping[tuple[str, bool, str], str]:
        """(component, flat?, name as spelled) -> name of the weights of encoders that only files name."""
        found = {}
        for own in self.architecture.own:
            found[own.component, True, flat(own.name)] = own.name
            if not own.flat:
                found[own.component, False, own.name] = own.name
        return found

    def own_place(self, stem: str, shape: Shape, namings: Mapping[str, str]) -> Found:
        """The place of a name that is in no table: the weight is called what the file calls it.

        ``shape`` is that of the module's change, ``namings`` the naming that the file uses under each prefix.
        """
        text, component, is_flat, layout = next(
            (own for own in self._encoder_prefixes if stem.startswith(own[0]) and len(stem) > len(own[0])), ("", "", False, "")
        )
        encoder = None if text else _ENCODER.match(stem)
        if encoder is not None:  # of an encoder that the table has not, which is called by its prefix
            text, component = encoder[0], encoder[0].rstrip("._")
            is_flat = text.endswith("_")
            layout = "sd-scripts" if is_flat else "comfyui" if text.startswith("text_encoders.") else "diffusers"
        if text:
            return Found(_whole(component, stem[len(text) :], shape), ORIGINAL, layout, shape, text, is_flat)
        prefix, body = next(((p, b) for p, b in prefixed(stem) if b and not (p.flat and "." in b)), (PREFIXES[-1], stem))
        naming = namings.get(prefix.text, prefix.order[0])
        if naming == SD_SCRIPTS:
            naming = self.architecture.sd_scripts
        return Found(_whole(prefix.component, body, shape), naming, prefix.layout, shape, prefix.text, prefix.flat)

    def _in_denoiser(self, stem: str) -> Found | None:
        for prefix, body in prefixed(stem):
            for naming in (*prefix.order, ALIAS):
                spans = self._names(naming, is_flat=prefix.flat).get(body)
                if spans is not None:
                    return self._of(Site(prefix.component, spans), naming, prefix.layout)._replace(
                        prefix=prefix.text, flat=prefix.flat
                    )
        return None

    def _in_root(self, stem: str) -> Found | None:
        """A part of the denoiser that is a pipeline component of its own in Diffusers."""
        for root, component in self.architecture.diffusers_roots:
            if stem.startswith(component + "."):
                spans = self._names(DIFFUSERS, is_flat=False).get(root + stem[len(component) + 1 :])
                if spans is not None:
                    return self._of(Site(DENOISER, spans), DIFFUSERS, "diffusers")._replace(prefix=component + ".")
        return None

    def _of(self, site: Site, naming: str, layout: str) -> Found:
        return Found(site, naming, layout, self.architecture.module_shape(site.spans))

    def spellings(self) -> Iterator[str]:
        """Every name without its prefix, for nearest-name searches."""
        for naming in (ORIGINAL, DIFFUSERS, SD_SCRIPTS, ALIAS):
            for is_flat in (False, True):
                yield from self._names(naming, is_flat=is_flat)


def _whole(component: str, name: str, shape: Shape) -> Site:
    return Site(component, (Span(name, 0, shape[0]),))


_ENCODER = re.compile(r"(lora_te\d?_|text_encoders\.[^.]+\.(transformer\.)?|text_encoder(_\d)?\.|te\d?\.)(?=.)")
"""What the names of a text encoder's modules begin with, whichever encoder it is."""
_STARTS = tuple(prefix.text for prefix in PREFIXES if prefix.text)


@lru_cache(maxsize=REMEMBERED)
def prefixed(stem: str) -> tuple[tuple[Prefix, str], ...]:
    """The denoiser prefixes a spelled name can begin with, and what follows each: the same for every architecture."""
    possible = PREFIXES if stem.startswith(_STARTS) else PREFIXES[-1:]
    return tuple([(prefix, stem[len(prefix.text) :]) for prefix in possible if stem.startswith(prefix.text)])


def encoder_prefixes(encoder: Encoder) -> Iterator[tuple[str, bool, str]]:
    """(prefix, flat, layout) of every spelling of one text encoder's modules."""
    yield encoder.sd_scripts + "_", True, "sd-scripts"
    if encoder.onetrainer:
        yield encoder.onetrainer + "_", True, "onetrainer"
    if encoder.sd_scripts == "lora_te1":
        yield "lora_te_", True, "sd-scripts"
    if encoder.diffusers:
        yield encoder.diffusers + ".", False, "diffusers"
        yield f"base_model.model.{encoder.diffusers}.", False, "peft"
    yield f"{PEFT_ENCODER}{encoder.table}.", False, "peft"
    yield encoder.comfyui + ".", False, "comfyui"


def encoder_names(table: str) -> Mapping[str, str]:
    """Dotted name -> weight of a text encoder, as any release of transformers spells it."""
    return _encoder_names(table)[False]


@cache
def _encoder_names(table: str) -> Mapping[bool, Mapping[str, str]]:
    """flat? -> spelled name -> weight. transformers 5.6 dropped CLIP's ``text_model.``, so both spellings are known."""
    dotted = {}
    for name in TEXT_ENCODERS[table].shapes:
        dotted[name.removeprefix("text_model.")] = name
        dotted[name] = name
    return {False: dotted, True: {flat(spelled): name for spelled, name in dotted.items()}}


@cache
def index(architecture: Architecture) -> NameIndex:
    """The (cached) index of an architecture."""
    return NameIndex(architecture)


@lru_cache(maxsize=REMEMBERED)
def stem_pattern(stem: str) -> str:
    """A spelled name without its prefix, its numbers as ``#``: what :attr:`Architecture.patterns` holds."""
    return name_pattern(prefixed(stem)[0][1])
