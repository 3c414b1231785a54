"""Ranks as a command line says them: for all modules, for some by name, and for every block in a list."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError
from lorasurgery.operations.cut.pick import Part, block_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.operations.cut.pick import Pattern

_NUMBER = re.compile(r"(?:(.+)[=:])?\s*(\d+)\s*")
_LIST = re.compile(r"([A-Za-z_][\w.]*)=\s*(\d+(?:\s*,\s*\d+)+)\s*")


def parse_rank(text: str) -> int | tuple[str, int]:
    """``16``, or ``MODULES=16`` (``MODULES:16``) for :attr:`ResizeOptions.ranks`; raises RequestError for anything else."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise RequestError(
            f"{text!r} is no rank", hint="16, REGEX=16, double=0-18=16 for blocks, or blocks=4,4,8,... for each block"
        )
    return int(found[2]) if found[1] is None else (found[1], int(found[2]))


def parse_ranks(texts: Sequence[str], *, conv: bool = False) -> tuple[int | None, tuple[tuple[Pattern, int], ...]]:
    """The one plain rank among several texts, and the ranks by name and by block, for :class:`ResizeOptions`.

    ``blocks=4,4,8,...`` is a list for all blocks, ``double=4,8,...`` one for a run of them; ``conv``: they are all for
    convolutions with a kernel. Raises RequestError for other texts, and for two plain ranks.
    """
    plain: int | None = None
    by_name: list[tuple[Pattern, int]] = []
    for text in texts:
        listed = _LIST.fullmatch(text)
        found = parse_rank(text) if listed is None else 0
        if listed is not None:
            by_name += block_ranks([int(value) for value in listed[2].split(",")], listed[1], conv=conv)
        elif not isinstance(found, int):
            by_name.append((Part(found[0], conv=True) if conv else found[0], found[1]))
        elif plain is not None:
            raise RequestError("two plain ranks", hint="one rank N; MODULES=N for modules by name")
        else:
            plain = found
    return plain, tuple(by_name)
