"""Why the table that explains most of a file is not the file's model after all.

Names and shapes of one model's attention occur in others: a table that knows them may explain most of a file for a model
that no table knows. What is left unexplained tells. A newer variant or an add-on branch *adds* to a known model, whose own
modules are all there (Wan VACE's ``vace_blocks``, LTX-2.3's ``to_gate_logits``); another model has something else *in the
place* of what the table has: other feed-forwards in every block, or another number of blocks.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import flat
from lorasurgery.deltas.full import is_parameter
from lorasurgery.layouts.names import index, prefixed
from lorasurgery.layouts.stacks import ATTENTION, DEEP, parts_of, stacks

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.layouts.stacks import Part

COMMON = 1000.0
"""From this :attr:`Architecture.usage` on, a model has derivatives with more blocks that adapters are trained on; a file
that goes deeper than the table of a rarer model is taken to be for another one."""
FEW_WRONG = 10
"""One in so many modules of the blocks may have another shape: a variant's."""
FEW_LEFT = 10
"""One in so many modules may be unexplained, whatever it is."""

_FIRST_NUMBER = re.compile(r"(\D*?)_(\d+)(?=_|$)")


def objection(arch: Architecture, stems: Collection[str], misfits: Sequence[str], unexplained: int) -> str:
    """What speaks against a table that explains most of a file, as a clause ("its blocks end at 41 ..."); "" if nothing does.

    ``misfits``: the modules whose names it has with other shapes; ``unexplained``: how many it has no name for.
    """
    every = parts_of(arch, stems, misfits)
    parts = [part for part in every if part.blocks or part.misfits]
    return (
        _other_sizes(arch, parts)
        or _shallower(arch, parts)
        or _deeper(arch, every)
        or _beside(arch, stems)
        or (FEW_LEFT * unexplained > len(stems) and next(filter(None, (_replaced(arch, part) for part in parts)), ""))
        or ""
    )


def _other_sizes(arch: Architecture, parts: Sequence[Part]) -> str:
    """Kinds of modules that have other shapes in most blocks; a damaged module is one of many that fit."""
    deep = [part for part in parts if part.stack.depth >= DEEP]
    wrong = [
        (kind, len(own)) for part in deep for kind, own in part.misfits.items()
        if 2 * len(own) > len(part.blocks.union(*part.misfits.values()))
    ]  # fmt: skip
    count = sum(many for _, many in wrong)
    if FEW_WRONG * count <= count + sum(part.fitting for part in deep):
        return ""
    return f"in its blocks {_some([kind for kind, _ in wrong])} have other sizes than {arch.name}'s"


def _shallower(arch: Architecture, parts: Sequence[Part]) -> str:
    """Complete stacks of fewer blocks, all of them: one alone is a pruned derivative's (FLUX.1-lite).

    A few first blocks are a choice of what to train, and so are blocks with gaps.
    """
    deep = [(part.stack.depth, part.touched) for part in parts if part.stack.depth >= DEEP and part.blocks]
    early = [(depth, own) for depth, own in deep if DEEP <= len(own) < depth and max(own) == len(own) - 1]
    if not early or len(early) < len(deep):
        return ""
    ends = " and ".join(str(max(own)) for _, own in early)
    theirs = " and ".join(str(depth - 1) for depth, _ in early)
    return f"its blocks end at {ends}, {arch.name}'s at {theirs}"


def _deeper(arch: Architecture, parts: Sequence[Part]) -> str:
    for part in parts:
        own = [b for kind, at in part.foreign.items() if part.stack.submodule(kind) is not None for b in at]
        last = max(own, default=0)
        if last >= part.stack.depth and arch.usage < COMMON:
            return f"its blocks go up to {last}, {arch.name}'s to {part.stack.depth - 1}"
    return ""


def _beside(arch: Architecture, stems: Collection[str]) -> str:
    """Something for every block that the table's blocks do without, kept beside them."""
    find, own = index(arch).find, stacks(arch)
    numbers: dict[str, set[str]] = {}
    for stem in stems:
        if find(stem) is None:
            body = flat(prefixed(stem)[0][1])
            numbered = _FIRST_NUMBER.match(body)
            if numbered is not None and not any(stack.place(body) for stack in own):
                numbers.setdefault(numbered[1], set()).add(numbered[2])
    most = max((stack.depth for stack in own), default=0)
    name, found = max(numbers.items(), key=lambda item: len(item[1]), default=("", set()))
    if not len(found) >= most >= DEEP:
        return ""
    return f"it has {len(found)} {name}, at least one for each block, and {arch.name} has none"


def _replaced(arch: Architecture, part: Part) -> str:
    """Kinds of modules in most blocks that the table lacks, in the place of submodules that it has.

    Adapters of attention alone are no evidence that the rest is missing.
    """
    kinds = {
        kind: part.stack.submodule(kind) for kind, blocks in part.foreign.items()
        if 2 * len({b for b in blocks if b < part.stack.depth}) >= max(len(part.blocks), 1) and not is_parameter(kind)
    }  # fmt: skip
    new = {kind: own for kind, own in kinds.items() if own not in part.submodules}
    missing = part.stack.wide - part.submodules
    attention = {own for own in missing if ATTENTION.search(own)}
    alone = all(ATTENTION.search(kind) for kind in (*part.kinds, *new))
    instead = missing & set(new.values())
    many = 4 * len(new) > len(new) + len(part.kinds) and (attention if alone else missing)
    all_but_attention = attention and any(not ATTENTION.search(own) for own in part.submodules)
    if not new or not (instead or many or all_but_attention):
        return ""
    return f"its blocks have {_some(new)}, and none of the {_some(instead or missing)} that {arch.name}'s have"


def _some(names: Collection[str]) -> str:
    own = sorted(names)
    return ", ".join(own[:3]) + (f" and {len(own) - 3} more" if len(own) > 3 else "")
