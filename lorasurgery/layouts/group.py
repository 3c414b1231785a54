"""Keys to modules: which tensors belong together, and which family they make, before any name is understood."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.full import Full, Opaque, is_gain
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank, block_rows
from lorasurgery.deltas.miss import Miss
from lorasurgery.deltas.sparse import sparse
from lorasurgery.errors import BrokenModuleError
from lorasurgery.layouts.adopt import adopt
from lorasurgery.layouts.entry import Entry, Group
from lorasurgery.layouts.fit import FACTORED, broken, check_factors, check_fit
from lorasurgery.layouts.numbered import CLONEOFSIMO, named_keys
from lorasurgery.layouts.peft_keys import FACTOR, REFUSED, doubles, peft_key, transposed
from lorasurgery.layouts.peft_types import MERGED
from lorasurgery.layouts.words import (
    BIAS,
    FULL,
    LOHA,
    LOKR,
    LORA,
    MISS,
    NORM,
    OPAQUE_FAMILIES,
    SET,
    SPARSE,
    split_key,
)
from lorasurgery.layouts.wrappers import unwrapped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.deltas.delta import Delta
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor


def group(raw: RawFile) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """Sort a file's keys into modules by name; the second result is what ends in no known word.

    Raises BrokenModuleError when two keys fill one slot (two PEFT adapters in one file).
    """
    groups: dict[str, Group] = {}
    others: dict[str, Tensor] = {}
    named = named_keys(raw.tensors)
    splits = {key: split_key(named.get(key, key)) for key in raw.tensors}
    inside = unwrapped({split.stem: None for split in splits.values() if split is not None})
    for key, split in splits.items():
        if split is None:
            others[key] = raw.tensors[key]
            continue
        stem = inside.get(split.stem, split.stem)
        word = split.word._replace(dialect=CLONEOFSIMO) if key in named else split.word
        entry = Entry(key, word, raw.tensors[key], split.suffix)
        own = groups.get(stem)
        if own is None:
            own = groups[stem] = Group(stem, key.rpartition(":")[0] if key in named else split.stem)
        slot = split.word[:2]
        if slot in own.entries:
            raise BrokenModuleError(
                f"{key} and {own.entries[slot].key} fill the same place; the file seems to hold two adapters",
                key=key,
                path=raw.path,
                hint="save one adapter at a time",
            )
        own.entries[slot] = entry
    adopt(groups, others, inside)
    _adopt_pefts(groups, others, raw.path)
    return groups, others


LIST = "oft_blocks.0"
"""The first of sd-scripts' rotations of a fused layer of FLUX."""


def _adopt_pefts(groups: dict[str, Group], others: dict[str, Tensor], path: object) -> None:
    """PEFT's saved weights, biases and rows, and the LoRA of an embedding; what is left from training stays in ``others``.

    Without any factors they are no adapter but a model's weights.
    """
    if not groups and not any(".lora_embedding_" in key for key in others):
        return
    twice = doubles(others)
    for key, found in [(key, peft_key(key)) for key in others if key not in twice]:
        if found is not None and found.role == REFUSED:
            raise BrokenModuleError(f"{key} is {found.reason}", key=key, path=str(path), hint=MERGED)
        if found is None or found.word is None or len(others[key].shape) < 1:
            continue
        tensor, own = others[key], groups.setdefault(found.module, Group(found.module, found.module))
        if found.role == FACTOR and len(tensor.shape) == 2:
            tensor = transposed(tensor)
        own.entries.setdefault(found.word[:2], Entry(key, found.word, tensor, found.slot))
        if own.entries[found.word[:2]].key == key:
            del others[key]


def build(own: Group, path: Mapping[str, str] | object) -> Delta | None:
    """The delta of a module, or None when it has only a bias.

    Raises BrokenModuleError for missing factors, factors that do not fit, or two families at once.
    """
    families = [family for family in own.families() if family != SPARSE]
    numbers = own.slots(SPARSE)
    if not families and not numbers:
        if own.modifier(BIAS) is None:
            raise broken(own, path, f"{own.key()} stands alone: no factors go with it", "the complete file")
        return None
    if len(families) > 1:
        raise broken(own, path, f"{own.stem} has tensors of two families ({' and '.join(families)})", "keep one of them")
    delta = _of_family(own, families[0], path) if families else None
    if not numbers:
        return delta
    try:
        return sparse(numbers, delta)
    except CannotError as reason:
        raise broken(own, path, f"{own.stem}: {reason.message}", "the original file") from reason


def _of_family(own: Group, family: str, path: object) -> Delta:
    slots = own.slots(family)
    if family in FACTORED:
        check_factors(own, family, path)
    delta = _BUILDERS[family](own, slots, path) if family in _BUILDERS else _opaque(own, family, slots)
    check_fit(own, delta, path)
    return delta


def _low_rank(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:
    ups = [slots[slot] for slot in sorted(slots, key=_number) if slot.startswith("up.")]
    for slot, other in (("down", "up"), ("up", "down")):
        if slot not in slots and not (slot == "up" and ups):
            have = own.entries[LORA, other if other in slots else next(iter(slots))].key
            raise broken(own, path, f"{own.stem} has {have} but no {slot} factor", "the complete file")
    if "diagonal" in slots:
        text = f"{own.stem} is AdaLoRA, whose strength hangs on a count of ranks that PEFT does not save"
        raise broken(own, path, text, "merge_and_unload() of PEFT, and lorasurgery extract for an adapter of the difference")
    if not ups:
        return LowRank(slots["up"], slots["down"], slots.get("mid"))
    try:
        return block_rows(ups, slots["down"])
    except CannotError as reason:
        raise broken(own, path, f"{own.stem}: {reason.message}", "the original file") from reason


def _number(slot: str) -> int:
    """Of a slot that is one of a list (``up.2``), else -1."""
    number = slot.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1


def _hadamard(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:
    _need(own, slots, ("w1_a", "w1_b", "w2_a", "w2_b"), "hada_", path)
    return Hadamard(**slots)


def _kronecker(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:
    for whole in ("w1", "w2"):
        if whole not in slots:
            _need(own, slots, (f"{whole}_a", f"{whole}_b"), "lokr_", path)
    return Kronecker(**slots)


def _full(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:  # noqa: ARG001  the builders' signature
    """A weight's difference; that of a norm or of a bare parameter is one of a norm, however it is spelled."""
    diff = slots["diff"]
    return Full(diff, "norm" if is_gain(own.stem, diff.shape) else "full", "diff")


def _norm(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:  # noqa: ARG001  the builders' signature
    return Full(slots["w_norm"], "norm")


def _miss(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:  # noqa: ARG001  the builders' signature
    """A block of rows; with three axes it is the variant that multiplies the base."""
    block = slots["miss_block"]
    return Miss(block) if len(block.shape) == 2 else Opaque("bat", ((own.entries[MISS, "miss_block"].suffix, block),))


_BUILDERS = {LORA: _low_rank, LOHA: _hadamard, LOKR: _kronecker, FULL: _full, NORM: _norm, MISS: _miss}


def _opaque(own: Group, family: str, slots: Mapping[str, Tensor]) -> Opaque:
    if family == "oft" and set(slots) == {LIST}:  # of one part
        return Opaque(family, ((f".{LIST.partition('.')[0]}", slots[LIST]),))
    if family == "oft" and "oft_blocks" in slots and len(slots["oft_blocks"].shape) == 4:
        family = "boft"
    named = tuple(
        (entry.suffix if kind == SET else f".{slot}", entry.tensor)
        for (kind, slot), entry in own.entries.items()
        if kind in (*OPAQUE_FAMILIES, SET)
    )
    shape = slots["set_weight"].shape if family == SET else ()
    return Opaque(family, named, shape)


def _need(own: Group, slots: Mapping[str, Tensor], names: tuple[str, ...], prefix: str, path: object) -> None:
    missing = [name for name in names if name not in slots]
    if missing:
        raise broken(own, path, f"{own.stem} has no {prefix}{missing[0]}", "the complete file")


__all__ = ["Entry", "Group", "build", "group"]
