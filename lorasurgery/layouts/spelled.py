"""How a file spells its modules, as a layout to write: prefixes, words for the factors, the way to carry the scale.

A command without a target writes every key as it was. What has no key in the file (a module of another file, a factor of a
new family) is spelled as the file's other modules are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.architectures.from_base import CUSTOM
from lorasurgery.architectures.table import ORIGINAL
from lorasurgery.layouts.numbered import CLONEOFSIMO
from lorasurgery.layouts.scales import HEADER_KEY
from lorasurgery.layouts.targets import DOTTED, EVERYTHING, KOHYA, LAYOUTS, PEFT, SUFFIXES, Layout, Naming
from lorasurgery.layouts.words import BIAS, LORA, MAGNITUDE
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.files.taken import Taken
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Found

KEEP, FOLD, HEADER = "keep", "fold", "header"
_TAILS = MappingProxyType({KEEP: " + alpha", FOLD: "", HEADER: " + header"})
_DIFF = " + diff"
"""What tells PEFT's words with ComfyUI's for the rest (``diff``, ``dora_scale``) from PEFT's alone."""
_NOT_PEFT = frozenset({"full", "norm", "set", "bias"})
"""Families that PEFT has no words for; a file that has them has ComfyUI's."""
_HELD = EVERYTHING | {"miss", "bat", "sparse"}


def spelling(taken: Taken, found: Mapping[str, Found], modules: Iterable[Module], arch: Architecture, name: str) -> Layout:
    """The layout that a file is spelled in. ``name`` is what its layout is called; of an unknown model it says how it looks."""
    modules = list(modules)
    families = {module.family for module in modules}
    words = PEFT if taken.configs is not None else _words(taken.groups)  # a folder is read by PEFT alone
    if words == PEFT and taken.configs is None and not _NOT_PEFT.isdisjoint(families):
        words = DOTTED
    alpha = _alpha(modules, folder=taken.configs is not None)
    denoiser = _usual(found.values(), (DENOISER, SECOND_DENOISER)) or Naming("", flat=False, naming=ORIGINAL)
    encoders = {place.site.component for place in found.values()} - {DENOISER, SECOND_DENOISER}
    base = LAYOUTS.get(name)
    own = Layout(
        _name(denoiser.prefix, words, alpha) if arch.id == CUSTOM and taken.configs is None else name,
        "the input's own spelling", denoiser, words, {KEEP: (KEEP, FOLD), FOLD: (FOLD, KEEP), HEADER: (HEADER, FOLD)}[alpha],
        holds=_held(base, arch, words, alpha) | families, any_shape=True,
        always_alpha=alpha == KEEP and all("alpha" in m.keys for m in modules if m.delta is not None and m.delta.rank),
        own=True, folder=taken.configs is not None, rslora=taken.rules.rslora_flag,
        prefixes=MappingProxyType({c: usual for c in sorted(encoders) if (usual := _usual(found.values(), (c,)))}),
    )  # fmt: skip
    if name == CLONEOFSIMO:
        return replace(own, reader="cloneofsimo/lora", holds=frozenset({LORA}), nameless=True)
    return own if base is None else replace(own, encoders=base.encoders, in_axis_dora=base.in_axis_dora)


def _name(prefix: str, words: str, alpha: str) -> str:
    """What the keys of an unknown model look like: ``lora_unet_*.lora_down.weight + alpha``."""
    return f"{prefix}*{SUFFIXES[words]['down']}{_TAILS[alpha]}{_DIFF if words == DOTTED else ''}"


def _held(base: Layout | None, arch: Architecture, words: str, alpha: str) -> frozenset[str]:
    """Families that whoever reads the file takes beside those it has."""
    if base is not None and arch.id != CUSTOM:
        return base.holds
    if alpha == HEADER:
        return frozenset({"lora", "dora"})
    return _HELD - _NOT_PEFT if words == PEFT else _HELD


def _usual(found: Iterable[Found], components: Collection[str]) -> Naming | None:
    """The prefix and naming that most modules of these components have."""
    votes = Counter(Naming(p.prefix, p.flat, p.naming) for p in found if p.site.component in components)
    return votes.most_common(1)[0][0] if votes else None


def _alpha(modules: Iterable[Module], *, folder: bool) -> str:
    """How the file says scales. Where it says none, a new one goes into the factors: its readers may not know alphas."""
    if folder:
        return HEADER
    modules = list(modules)
    if any("alpha" in module.keys for module in modules):
        return KEEP
    return HEADER if any(module.scale.source == HEADER_KEY for module in modules) else FOLD


def _words(groups: Mapping[str, Group]) -> str:
    """The dialect most factors are spelled in; kohya's where there are none."""
    by_suffix = {own["down"]: words for words, own in SUFFIXES.items() if words != DOTTED}
    votes: Counter[str] = Counter()
    dialects = set()
    for own in groups.values():
        for entry in own.entries.values():
            if entry.word.family in (MAGNITUDE, BIAS):
                dialects.add(entry.word.dialect)
            elif entry.word[:2] == (LORA, "down"):
                suffix = entry.suffix
                votes[by_suffix.get(suffix, PEFT if entry.word.dialect == "peft" else KOHYA)] += 1
    words = votes.most_common(1)[0][0] if votes else KOHYA
    return DOTTED if words == PEFT and "kohya" in dialects else words
