"""What stands around the names: modules that hold the model, and spellings that cannot hold a dot.

A trainer that saves its own object saves the names of what it holds the model in: ``pipe.dit.blocks.0...`` (DiffSynth),
``module.`` (``DistributedDataParallel``), ``_orig_mod.`` (``torch.compile``), ``base_model.model.model.`` (PEFT around a
wrapper). No list of them is complete, so the rule is: what nearly all names begin with, and without which tables know them.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.layouts.names import stem_pattern

if TYPE_CHECKING:
    from collections.abc import Collection

HYPHEN = "___lorahyphen___"
"""LongCat-Video's dot. Source: ``longcat_video/modules/lora_utils.py`` (``LORA_HYPHEN``)."""
COMMON = 0.9
"""Share of a denoiser's names that begin with a wrapper."""
KNOWN = 0.5
"""Share of them that tables must know without it."""
_COMPILED = re.compile(r"(?<![A-Za-z0-9])_orig_mod[._]")
"""``torch.compile``'s module, wherever it is: a model is compiled whole or block by block."""
_ENCODER = re.compile(r"(^|[._])(lora_te\d?|te\d|text_encoders?|text_model|cond_stage_model|conditioner)(_\d)?[._]")


def unwrapped(stems: Collection[str]) -> dict[str, str]:
    """Name as spelled -> the name inside, for those that have something around them."""
    plain = {stem: _undone(stem) for stem in stems}
    wrapper = _wrapper([name for name in plain.values() if not _ENCODER.search(name)])
    found = {stem: _inside(name, wrapper) for stem, name in plain.items()} if wrapper else plain
    if len(set(found.values())) < len(found):  # two modules would be one: these names are no wrappers
        return {}
    return {stem: name for stem, name in found.items() if stem != name}


def _undone(stem: str) -> str:
    """Without what no model's own name has."""
    if HYPHEN in stem:
        stem = stem.replace(HYPHEN, ".").removeprefix("lora.")
    return _COMPILED.sub("", stem) if "_orig_mod" in stem else stem


def _wrapper(names: Collection[str]) -> str:
    """What nearly all of these names begin with and tables do not know, its dot included; empty where there is none."""
    needed = COMMON * len(names)
    if not names or sum(map(is_known, names)) >= KNOWN * len(names):
        return ""
    best, most, prefix = "", 0, ""
    while True:
        heads = Counter(name[len(prefix) :].split(".", 1)[0] for name in names if name.startswith(prefix) and "." in name)
        head, count = heads.most_common(1)[0] if heads else ("", 0)
        if not head or head.isdigit() or count < needed:
            return best if most >= KNOWN * len(names) else ""
        prefix += head + "."
        known = sum(is_known(name[len(prefix) :]) for name in names if name.startswith(prefix))
        if known > most:
            best, most = prefix, known


def _inside(name: str, wrapper: str) -> str:
    """A name without the wrapper; a text encoder beside the denoiser has as much of it as comes before its own prefix."""
    if name.startswith(wrapper):
        return name[len(wrapper) :]
    match = _ENCODER.search(name)
    if match is not None and match.start() and wrapper.startswith(name[: match.start()] + "."):
        return name[match.start() + 1 :]
    return name


def is_known(name: str) -> bool:
    """Whether a table may have a module that is spelled so: its numbers do not count."""
    return bool(name) and stem_pattern(name) in _patterns()


@cache
def _patterns() -> frozenset[str]:
    """The pattern of every name in every table."""
    return frozenset().union(*(arch.patterns for arch in architectures().values()))
