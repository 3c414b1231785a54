"""Modules by name: blocks and components of the model, a place in a list for all blocks, or a regular expression."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from lorasurgery.errors import RequestError
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.operations.cut.subject import CONV, kind_of
from lorasurgery.operations.select.block_lists import places
from lorasurgery.operations.select.blocks import REGEX, member, parse_selection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.architectures.table import Architecture


@dataclass(frozen=True, slots=True)
class Part:
    """Some kinds of modules only among those of a name, or one place of a list for blocks."""

    name: str
    """Modules by name, or the name of a list: :func:`lorasurgery.operations.select.block_lists.places`."""
    index: int | None = None
    """Which place of the list; None: no list."""
    count: int = 0
    """Values in the list."""
    conv: bool = False
    """Only convolutions with a kernel."""

    def __str__(self) -> str:
        words = self.name if self.index is None else f"{self.name}[{self.index}]"
        return f"conv {words}" if self.conv else words


@dataclass(frozen=True, slots=True)
class Picked:
    """A selection looked up in an architecture."""

    text: str
    holds: Callable[[Module], bool]
    part: Part | None = None
    """What it was before."""

    def __str__(self) -> str:
        return self.text


Pattern: TypeAlias = "str | Part | Picked"


def block_ranks(ranks: Sequence[int], name: str = "blocks", *, conv: bool = False) -> tuple[tuple[Pattern, int], ...]:
    """A list with a rank for each block, for :attr:`lorasurgery.operations.cut.ResizeOptions.ranks`.

    ``name``: ``blocks`` for all blocks of a UNet or of FLUX.1, or a run of blocks (``double``); ``conv``: only for
    convolutions with a kernel. What each value is for is looked up in the adapter's architecture.
    """
    return tuple((Part(name, i, len(ranks), conv), rank) for i, rank in enumerate(ranks))


def picked(pattern: Pattern, arch: Architecture, apart: Collection[str] = ()) -> Pattern:
    """A block or component of the architecture as such (``double=0-18``, ``mid``, ``te1``); other text is an expression.

    ``re=REGEX`` is always one. ``apart``: kinds with a rank of their own, which a place in a list does not hold. Raises
    RequestError for blocks with indices that the architecture does not have, and for lists that do not fit it.
    """
    if isinstance(pattern, Picked):
        return pattern
    if isinstance(pattern, Part):
        return _part(pattern, arch, apart)
    name, equals, rest = pattern.partition("=")
    if name == REGEX and equals:
        return rest
    try:
        return Picked(pattern, member(parse_selection(pattern), arch))
    except RequestError:
        if equals and name.isidentifier():
            raise
        return pattern


def _part(part: Part, arch: Architecture, apart: Collection[str]) -> Picked:
    among: Pattern | None
    if part.index is None:
        among = picked(part.name, arch)
    else:
        selection = places(part.name, part.count, arch)[part.index]
        among = None if selection is None else Picked(str(selection), member(selection, arch))

    def holds(module: Module) -> bool:
        if among is None or not named(module, among):
            return False
        kind = kind_of(expected_shape(arch, module.site))
        return kind == CONV if part.conv else kind not in apart

    return Picked(str(part), holds, part)


def named(module: Module, pattern: Pattern) -> bool:
    """Whether a module is picked; an expression is looked for in its name as the file spells it and as the model does.

    Raises TypeError for a part that :func:`picked` has not looked up.
    """
    if isinstance(pattern, Picked):
        return pattern.holds(module)
    if isinstance(pattern, Part):
        raise TypeError(f"{pattern} is not looked up in an architecture")
    return bool(re.search(pattern, module.name) or re.search(pattern, module.site.spans[0].weight))


def unfitting(patterns: Iterable[Pattern], modules: Collection[Module]) -> list[str]:
    """What to say of those that hold none of the modules: most likely mistyped. Places in a list may be without any."""
    lone = [pattern for pattern in patterns if _place(pattern) is None and not any(named(m, pattern) for m in modules)]
    return [f"{str(pattern)!r} fits no module" for pattern in dict.fromkeys(lone)]


def has_list(ranks: Sequence[tuple[Pattern, int]]) -> bool:
    """Whether some ranks come from a list for blocks."""
    return any(_place(pattern) is not None for pattern, _ in ranks)


def _place(pattern: Pattern) -> Part | None:
    """The place in a list that a pattern is, or was before it was looked up."""
    part = pattern.part if isinstance(pattern, Picked) else pattern
    return part if isinstance(part, Part) and part.index is not None else None


def ranks_text(ranks: Sequence[tuple[Pattern, int]]) -> Iterator[str]:
    """``mid 8``, ``blocks 4,4,8,...``: modules by name with their ranks, a list as it was given."""
    values: list[str] = []
    for pattern, rank in ranks:
        place = _place(pattern)
        if place is None:
            yield f"{pattern} {rank}"
            continue
        values.append(str(rank))
        if len(values) == place.count:
            yield f"{replace(place, index=None)} {','.join(values)}"
            values = []
