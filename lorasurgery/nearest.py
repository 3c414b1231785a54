"""The name that somebody meant who wrote one that does not exist."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CLOSE = 0.6
"""Least likeness (:func:`difflib.SequenceMatcher.ratio`) of a name that may be meant."""
FEWEST = 3
"""Letters that a part of a name must have to stand for it."""
_NO_LETTERS = re.compile(r"[^a-z0-9]")


def bare(name: str) -> str:
    """Its letters and digits: ``Flux.1-dev`` and ``flux_1_dev`` are ``flux1dev``."""
    return _NO_LETTERS.sub("", name.lower())


def one_of(text: str, names: Iterable[str], also: Mapping[str, str] | None = None) -> str:
    """A hint of the names there are, those that ``text`` may mean first. ``also``: another name -> the name it stands for."""
    every = list(dict.fromkeys(names))
    meant = _meant(bare(text), {**{bare(name): name for name in every}, **{bare(k): v for k, v in (also or {}).items()}})
    others = [name for name in every if name not in meant]
    if not meant:
        return f"one of {', '.join(every)}"
    return f"{' or '.join(meant)}" + (f"; the others are {', '.join(others)}" if others else "")


def _meant(text: str, known: Mapping[str, str]) -> list[str]:
    """The names that begin as ``text`` does or the other way round, else the nearest one."""
    if text in known:
        return [known[text]]
    if len(text) < FEWEST:
        return []
    begun = [name for own, name in known.items() if own.startswith(text) or (len(own) >= FEWEST and text.startswith(own))]
    close = get_close_matches(text, known, 1, CLOSE)
    return list(dict.fromkeys(begun or [known[own] for own in close]))
