"""Layouts that are a file's own spelling: its prefix, its words for the factors, its way to carry the scale.

For adapters of models that no table knows: which program reads them is not known, so the result has the input's keys. A
layout is called by what its keys look like, ``lora_unet_*.lora_down.weight + alpha``.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.adapter import DENOISER
from lorasurgery.architectures.table import ORIGINAL
from lorasurgery.layouts.names import PREFIXES
from lorasurgery.layouts.targets import DOTTED, EVERYTHING, KOHYA, PEFT, SUFFIXES, Layout, Naming
from lorasurgery.layouts.words import ALPHA, BIAS, LORA, MAGNITUDE

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.names import Prefix

PREFIXED = tuple(prefix for prefix in PREFIXES if prefix.component == DENOISER)
"""Wan's second expert is a matter of its table."""
KEEP, FOLD, HEADER = "keep", "fold", "header"
_TAILS = MappingProxyType({KEEP: " + alpha", FOLD: "", HEADER: " + header"})
_DIFF = " + diff"
"""What tells PEFT's words with ComfyUI's for the rest (``diff``, ``dora_scale``) from PEFT's alone."""
_COMPONENTS = ("transformer.", "unet.")
"""Prefixes under which ``lora_adapter_metadata`` has a configuration. Source: Diffusers 0.42 ``loaders/peft.py``."""
PLAIN = frozenset({"lora", "dora"})
"""What that configuration can describe."""
_NOT_PEFT = frozenset({"full", "norm", "set", "bias"})
"""Families that PEFT has no words for; a file that has them has ComfyUI's."""
_HELD = EVERYTHING | {"miss", "bat", "sparse"}


@cache
def spelled_layouts() -> Mapping[str, Layout]:
    """Every such layout by its id."""
    found = (
        _layout(prefix, words, alpha)
        for prefix in PREFIXED
        for words in SUFFIXES
        for alpha in _TAILS
        if alpha != HEADER or (words == PEFT and prefix.text in _COMPONENTS)
    )
    return MappingProxyType({own.id: own for own in found})


def _layout(prefix: Prefix, words: str, alpha: str) -> Layout:
    return Layout(
        _id(prefix, words, alpha), "the input's own spelling", Naming(prefix.text, prefix.flat, ORIGINAL), words,
        {KEEP: (KEEP, FOLD), FOLD: (FOLD, KEEP), HEADER: (HEADER, FOLD)}[alpha],
        holds=PLAIN if alpha == HEADER else _HELD - _NOT_PEFT if words == PEFT else _HELD, any_shape=True,
        always_alpha=alpha == KEEP,
    )  # fmt: skip


def _id(prefix: Prefix, words: str, alpha: str) -> str:
    return f"{prefix.text}*{SUFFIXES[words]['down']}{_TAILS[alpha]}{_DIFF if words == DOTTED else ''}"


def spelling(prefix: Prefix, groups: Mapping[str, Group], families: Collection[str], *, header: bool) -> str:
    """The id of the layout that these modules, of these families, are spelled in.

    ``header``: whether the file's header has their scales. Without alpha tensors the scale is folded into the factors, as
    whoever reads the file may not know them.
    """
    entries = [entry for own in groups.values() for entry in own.entries.values()]
    words = _words(groups)
    if words == PEFT and not _NOT_PEFT.isdisjoint(families):
        words = DOTTED
    if any(entry.word.family == ALPHA for entry in entries):
        return _id(prefix, words, KEEP)
    kept = header and words == PEFT and prefix.text in _COMPONENTS and PLAIN.issuperset(families)
    return _id(prefix, words, HEADER if kept else FOLD)


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
