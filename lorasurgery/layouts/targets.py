"""The layouts that can be written, as data: naming rule, suffix words, where alpha goes, what the readers accept."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.table import DIFFUSERS, NAMINGS, ORIGINAL, SD_SCRIPTS, flat
from lorasurgery.errors import RequestError
from lorasurgery.layouts.names import ALIAS
from lorasurgery.nearest import one_of
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.architectures.table import Architecture, Encoder, Spans
    from lorasurgery.site import Site

EVERYTHING = frozenset({"lora", "dora", "loha", "lokr", "full", "norm", "bias", "set", "oft", "boft", "glora", "ia3"})
TOKENS = r"^bundle_emb\."
KOHYA, PEFT, DOTTED = "kohya", "peft", "dotted"
_KOHYA = {
    "up": ".lora_up.weight", "down": ".lora_down.weight", "mid": ".lora_mid.weight", "magnitude": ".dora_scale",
    "bias": ".diff_b", "norm": ".w_norm", "norm bias": ".b_norm", "set": ".set_weight",
}  # fmt: skip
_OTHERS = {".lora_A": ".lora_B"} | {
    f"{start}.down.weight": f"{start}.up.weight" for start in (".lora", ".lora_linear_layer", "_lora", "")
}
"""Further spellings of down and up; they are read, and written only where a file keeps its own."""

SUFFIXES = MappingProxyType(
    {
        KOHYA: _KOHYA,
        PEFT: {
            "up": ".lora_B.weight", "down": ".lora_A.weight", "magnitude": ".lora_magnitude_vector",
            "bias": ".lora_B.bias", "norm bias": ".b_norm", "set": ".weight",
        },
        DOTTED: {  # lora_A and lora_B as in Diffusers, all else as ComfyUI reads it
            "up": ".lora_B.weight", "down": ".lora_A.weight", "magnitude": ".dora_scale", "bias": ".diff_b",
            "norm bias": ".b_norm", "set": ".set_weight",
        },
        **{down: {**_KOHYA, "down": down, "up": up} for down, up in _OTHERS.items()},
    }
)  # fmt: skip
"""Slot -> suffix in each dialect; LoHa, LoKr, full and norm slots are spelled the same in both."""


class Naming(NamedTuple):
    """A prefix, whether dots become underscores, and which naming follows."""

    prefix: str
    flat: bool
    naming: str
    only: str | None = None
    """A pattern in the names that are meant; None: all."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout: who reads it and by which rules."""

    id: str
    reader: str
    """The program that reads it, for messages."""
    denoiser: Naming
    """``{denoiser}`` in the prefix is the Diffusers component name, ``{prefix}`` the caller's."""
    words: str
    alphas: tuple[str, ...]
    """Ways to carry the scale, the default first: ``keep`` (alpha tensors), ``fold``, ``header``."""
    holds: frozenset[str] = EVERYTHING
    """Families its readers load."""
    split_names: bool = False
    """Whether :attr:`Architecture.comfyui_split` names may be used beside its own."""
    carries_unknown: bool = True
    """False when the reader refuses a file with keys it does not know."""
    any_shape: bool = False
    """True when the reader flattens a convolution's factors itself, whatever axes they have."""
    always_alpha: bool = False
    """True when the reader needs an alpha tensor even for scale 1."""
    in_axis_dora: bool = True
    encoders: str = "comfyui"
    """Which of an encoder's prefixes is written: ``sd_scripts``, ``diffusers``, ``comfyui`` or ``onetrainer``."""
    takes: str = r"(?!)"
    """A pattern of the keys beside the modules that its readers take: learned tokens as OneTrainer saves them, which the web
    UIs read, too, and what they pass over although they refuse other unknown keys."""
    folder: bool = False
    """Whether it is PEFT's folder and no file."""
    own: bool = False
    """Whether it is a file's own spelling: modules that have keys keep them."""
    nameless: bool = False
    """For a file's own spelling: its keys are numbers, and a module that has none cannot get one."""
    prefixes: Mapping[str, Naming] = field(default_factory=dict)
    """For a file's own spelling: text encoder -> what its names begin with."""
    rslora: bool = False
    """For a file's own spelling: alpha is divided by the square root of the rank, as a flag in it says."""

    def holding(self, arch: Architecture) -> frozenset[str]:
        """The families its readers load for a model."""
        return self.holds | arch.diffusers_families if self.id == "diffusers" else self.holds

    @property
    def no_name(self) -> tuple[str, str]:
        """What to say of a module that it has no key for, and what to try."""
        if self.nameless:
            return f"{self.reader} numbers its modules and has no number for it", "--target NAME, for a layout with names"
        return f"{self.reader} has no name for it", "--drop te to leave the text encoders out, or --lossy"

    def reads(self, key: str) -> bool:
        """Whether its readers take a key that is no module's."""
        return re.search(self.takes, key) is not None


LAYOUTS = MappingProxyType(
    {
        layout.id: layout
        for layout in (
            Layout(
                "sd-scripts", "sd-scripts and musubi-tuner", Naming("lora_unet_", True, SD_SCRIPTS), KOHYA,
                ("keep", "fold"), always_alpha=True, encoders="sd_scripts", takes=TOKENS,
            ),
            Layout(
                "diffusers", "Diffusers", Naming("{denoiser}.", False, DIFFUSERS), PEFT, ("fold", "header"),
                holds=frozenset({"lora", "dora"}), carries_unknown=False, in_axis_dora=False, encoders="diffusers",
            ),
            Layout(
                "comfyui", "ComfyUI", Naming("diffusion_model.", False, ORIGINAL), KOHYA, ("keep", "fold"),
                split_names=True, any_shape=True,
            ),
            Layout(
                "other", "musubi-tuner's `other`", Naming("{prefix}.", False, SD_SCRIPTS), DOTTED, ("fold", "keep"),
                any_shape=True,
            ),
            Layout(
                "peft", "PEFT", Naming("base_model.model.", False, DIFFUSERS), PEFT, ("header", "fold"),
                holds=frozenset({"lora", "dora", "loha", "lokr", "miss"}), carries_unknown=False, in_axis_dora=False,
                encoders="diffusers", folder=True,
            ),
            Layout(
                "lycoris", "LyCORIS and SimpleTuner", Naming("lycoris_", True, DIFFUSERS), KOHYA, ("keep", "fold"),
                always_alpha=True, encoders="sd_scripts",
            ),
            Layout(
                "onetrainer", "OneTrainer", Naming("lora_{denoiser}_", True, DIFFUSERS), KOHYA, ("keep", "fold"),
                always_alpha=True, carries_unknown=False, encoders="onetrainer", takes=rf"{TOKENS}|^lokr_factor$",
            ),
        )
    }
)  # fmt: skip

ALIASES = MappingProxyType({"default": "sd-scripts", "kohya": "sd-scripts"})


def layout(name: str) -> Layout:
    """The layout called ``name`` or one of its aliases; raises RequestError for another name."""
    found = LAYOUTS.get(ALIASES.get(name, name))
    if found is None:
        raise RequestError(f"no layout is called {name}", hint=one_of(name, (*LAYOUTS, *ALIASES)))
    return found


def names_in(own: Naming, arch: Architecture) -> Mapping[str, Spans]:
    """Every name that a naming has for the denoiser, dotted; where they become underscores, those known only so too."""
    names = arch.alias_names if own.naming == ALIAS else arch.namings[own.naming]
    if own.only is not None:
        return {name: spans for name, spans in names.items() if re.search(own.only, name)}
    more = arch.flat_names(own.naming) if own.flat and arch.own else {}
    return {**names, **more} if more else names


def namings(target: Layout, arch: Architecture, prefix: str = "diffusion_model") -> tuple[Naming, ...]:
    """The denoiser namings a layout may use for an architecture, its own first.

    Raises RequestError for another program's layout where only one's names are known.
    """
    own = target.denoiser
    if target.own:
        split = arch.comfyui_split == own.prefix and not own.flat
        return (own, *(own._replace(naming=n) for n in (ORIGINAL, DIFFUSERS) if split and n != own.naming))
    if target.id == "onetrainer" and arch.onetrainer == "dotted":
        own = Naming("{denoiser}.", False, DIFFUSERS)
    own = own._replace(prefix=own.prefix.format(denoiser=arch.denoiser, prefix=prefix).removeprefix("."))
    if arch.only_prefix not in (None, own.prefix):
        raise RequestError(
            f"no table knows the model, so what {arch.only_prefix}{next(iter(arch.shapes), '')} is called in the layout "
            f"{target.id} is not known",
            hint="--base MODEL, whose header has the names; or no --target, for the input's own",
        )
    if target.split_names and arch.comfyui_split is not None:
        return own, Naming(arch.comfyui_split, False, DIFFUSERS), own._replace(naming=ALIAS, only=arch.comfyui_slices)
    if target.id == "diffusers" and arch.diffusers_fused is not None:
        return own, own._replace(naming=ALIAS, only=arch.diffusers_fused)
    return (own,)


class Speller:
    """Sites to key stems in one layout, for one architecture."""

    def __init__(self, target: Layout, arch: Architecture, prefix: str = "diffusion_model") -> None:
        self._target = target
        self._arch = arch
        self.namings = namings(target, arch, prefix)
        self._names: list[Mapping[Spans, str]] = [
            {spans: name for name, spans in names_in(own, arch).items()} for own in self.namings
        ]
        self._flat = {own.name for own in arch.own if own.flat}
        if target.own and self.namings[0].flat:  # whose names those are does not matter to the file that has the prefix
            self._names[0] = {spans: name for n in NAMINGS for name, spans in arch.flat_names(n).items()} | dict(self._names[0])
        self._beside = dict(arch.beside)
        self._encoders: Mapping[str, Encoder] = {encoder.table: encoder for encoder in arch.encoders}

    def stem(self, site: Site) -> str | None:
        """The key without its suffix, or None when the layout has no name for the site."""
        if self._target.nameless:
            return None
        if site.component == DENOISER or (self._target.own and site.component == SECOND_DENOISER):
            return self._denoiser(site)
        weight = site.spans[0].weight
        own = self._target.prefixes.get(site.component)
        if own is not None:
            return None if weight in self._flat and not own.flat else own.prefix + (flat(weight) if own.flat else weight)
        encoder = self._encoders.get(site.component)
        return None if encoder is None else self._encoder(encoder, weight)

    def _denoiser(self, site: Site) -> str | None:
        for own, names in zip(self.namings, self._names, strict=True):
            name = names.get(site.spans)
            if name is None:
                continue
            if own.naming == DIFFUSERS and self._target.id == "diffusers":
                for root, component in self._arch.diffusers_roots:
                    if name.startswith(root):
                        return f"{component}.{name[len(root) :]}"
            beside = None if own.flat else self._beside.get(name)
            if beside is not None:
                return beside if self._target.id == "comfyui" and not self._target.own else name
            return own.prefix + (flat(name) if own.flat else name)
        return None

    def _encoder(self, encoder: Encoder, weight: str) -> str | None:
        kind = self._target.encoders
        if weight in self._flat and kind in ("diffusers", "comfyui"):
            return None
        if kind == "diffusers":
            loaded = self._target.id != "diffusers" or encoder.diffusers in self._arch.diffusers_encoders
            return f"{encoder.diffusers}.{weight}" if loaded and encoder.diffusers is not None else None
        if kind == "comfyui":
            return f"{encoder.comfyui}.{weight}"
        prefix = encoder.onetrainer if kind == "onetrainer" and encoder.onetrainer else encoder.sd_scripts
        return f"{prefix}_{flat(weight)}"
