"""Modules by name: blocks and components of the model, or a regular expression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from lorasurgery.errors import RequestError
from lorasurgery.surgery.blocks import REGEX, member, parse_selection

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture


@dataclass(frozen=True, slots=True)
class Picked:
    """A selection looked up in an architecture."""

    text: str
    holds: Callable[[Module], bool]

    def __str__(self) -> str:
        return self.text


Pattern: TypeAlias = "str | Picked"


def picked(pattern: Pattern, arch: Architecture) -> Pattern:
    """A block or component of the architecture as such (``double=0-18``, ``mid``, ``te1``); other text is an expression.

    ``re=REGEX`` is always one. Raises RequestError for blocks with indices that the architecture does not have.
    """
    if isinstance(pattern, Picked):
        return pattern
    name, equals, rest = pattern.partition("=")
    if name == REGEX and equals:
        return rest
    try:
        return Picked(pattern, member(parse_selection(pattern), arch))
    except RequestError:
        if equals and name.isidentifier():
            raise
        return pattern


def named(module: Module, pattern: Pattern) -> bool:
    """Whether a module is picked; an expression is looked for in its name as the file spells it and as the model does."""
    if isinstance(pattern, Picked):
        return pattern.holds(module)
    return bool(re.search(pattern, module.name) or re.search(pattern, module.site.spans[0].weight))
