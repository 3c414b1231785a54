"""Keys to modules: which tensors belong together, and which family they make, before any name is understood."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.deltas.full import Full, Opaque
from lorasurgery.deltas.hadamard import Hadamard
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.miss import Miss
from lorasurgery.errors import BrokenModuleError
from lorasurgery.io.dtypes import CARRIED, FLOATS
from lorasurgery.layouts.peft_keys import FACTOR, REFUSED, doubles, peft_key, transposed
from lorasurgery.layouts.peft_types import MERGED
from lorasurgery.layouts.words import (
    ALPHA,
    BIAS,
    EXTRA,
    FULL,
    LOHA,
    LOKR,
    LORA,
    MAGNITUDE,
    MISS,
    NORM,
    OPAQUE_FAMILIES,
    SET,
    Word,
    split_key,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.deltas.base import Delta
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor

_MODIFIERS = (ALPHA, MAGNITUDE, BIAS, EXTRA)


class Entry(NamedTuple):
    """One tensor of a module: its key, its word, the tensor."""

    key: str
    word: Word
    tensor: Tensor


@dataclass(slots=True)
class Group:
    """The tensors of one module as spelled in the file."""

    stem: str
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def families(self) -> list[str]:
        """The families its tensors belong to, modifiers (alpha, magnitude, bias) left out."""
        found: list[str] = []
        for family, _ in self.entries:
            if family not in found and family not in _MODIFIERS:
                found.append(family)
        return found

    def modifier(self, name: str) -> Entry | None:
        """The alpha, magnitude, bias or extra entry."""
        return self.entries.get((name, "reshape_weight" if name == EXTRA else name))

    def slots(self, family: str) -> dict[str, Tensor]:
        """The family's tensors by slot."""
        return {slot: entry.tensor for (own, slot), entry in self.entries.items() if own == family}

    def key(self) -> str:
        """A key to name in messages."""
        return next(iter(self.entries.values())).key


def group(raw: RawFile) -> tuple[dict[str, Group], dict[str, Tensor]]:
    """Sort a file's keys into modules; the second result is what ends in no known word.

    Raises BrokenModuleError when two keys fill one slot (two PEFT adapters in one file).
    """
    groups: dict[str, Group] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in raw.tensors.items():
        split = split_key(key)
        if split is None:
            others[key] = tensor
            continue
        entry = Entry(key, split.word, tensor)
        own = groups.get(split.stem)
        if own is None:
            own = groups[split.stem] = Group(split.stem)
        slot = split.word[:2]
        if slot in own.entries:
            raise BrokenModuleError(
                f"{key} and {own.entries[slot].key} fill the same place; the file seems to hold two adapters",
                key=key,
                path=raw.path,
                hint="save one adapter at a time",
            )
        own.entries[slot] = entry
    _adopt_ia3(groups, others)
    _adopt_pefts(groups, others, raw.path)
    return groups, others


def _adopt_ia3(groups: dict[str, Group], others: dict[str, Tensor]) -> None:
    """LyCORIS' (IA)^3 calls its vector plain ``weight``; it is one only beside ``on_input``."""
    for stem, own in groups.items():
        key = f"{stem}.weight"
        if ("ia3", "on_input") in own.entries and key in others:
            own.entries["ia3", "weight"] = Entry(key, Word("ia3", "weight", "kohya"), others.pop(key))


def _adopt_pefts(groups: dict[str, Group], others: dict[str, Tensor], path: object) -> None:
    """PEFT's saved weights and the LoRA of an embedding; what else it saves beside its factors stays in ``others``.

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
        tensor, own = others[key], groups.setdefault(found.stem, Group(found.stem))
        if found.role == FACTOR and len(tensor.shape) == 2:
            tensor = transposed(tensor)
        own.entries.setdefault(found.word[:2], Entry(key, found.word, tensor))
        if own.entries[found.word[:2]].key == key:
            del others[key]


def build(own: Group, path: Mapping[str, str] | object) -> Delta | None:
    """The delta of a module, or None when it has only a bias.

    Raises BrokenModuleError for missing factors, factors that do not fit, or two families at once.
    """
    families = own.families()
    if not families:
        if own.modifier(BIAS) is None:
            raise _broken(own, path, f"{own.key()} stands alone: no factors go with it", "the complete file")
        return None
    if len(families) > 1:
        raise _broken(own, path, f"{own.stem} has tensors of two families ({' and '.join(families)})", "keep one of them")
    family = families[0]
    slots = own.slots(family)
    if family in _FACTORED:
        _check_factors(own, family, path)
    delta = _BUILDERS[family](own, slots, path) if family in _BUILDERS else _opaque(own, family, slots)
    _check_fit(own, delta, path)
    return delta


_FACTORED = (LORA, LOHA, LOKR, MISS)
_CORES = ("mid", "t1", "t2")


def _check_factors(own: Group, family: str, path: object) -> None:
    """A factor is a matrix (a Tucker core has its kernel too) of floating-point numbers, none of its sides empty."""
    for (kind, slot), entry in own.entries.items():
        if kind != family:
            continue
        shape, dtype = entry.tensor.shape, entry.tensor.dtype
        if len(shape) < (3 if slot in _CORES else 2) or 0 in shape:
            raise _broken(own, path, f"{entry.key} has shape {list(shape)}, a factor has rows and columns", "the original file")
        if dtype not in FLOATS and dtype not in CARRIED:
            raise _broken(
                own,
                path,
                f"{entry.key} has dtype {dtype}, a factor holds floating-point numbers",
                "the file before it was quantised",
            )


def _low_rank(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:
    for slot, other in (("down", "up"), ("up", "down")):
        if slot not in slots:
            have = own.entries[LORA, other if other in slots else next(iter(slots))].key
            raise _broken(own, path, f"{own.stem} has {have} but no {slot} factor", "the complete file")
    if "diagonal" in slots:
        text = f"{own.stem} is AdaLoRA, whose strength hangs on a count of ranks that PEFT does not save"
        raise _broken(own, path, text, "merge_and_unload() of PEFT, and lorasurgery extract for an adapter of the difference")
    return LowRank(slots["up"], slots["down"], slots.get("mid"))


def _hadamard(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:
    _need(own, slots, ("w1_a", "w1_b", "w2_a", "w2_b"), "hada_", path)
    return Hadamard(**slots)


def _kronecker(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:
    for whole in ("w1", "w2"):
        if whole not in slots:
            _need(own, slots, (f"{whole}_a", f"{whole}_b"), "lokr_", path)
    return Kronecker(**slots)


def _full(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:  # noqa: ARG001  the builders' signature
    return Full(slots["diff"])


def _norm(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:  # noqa: ARG001  the builders' signature
    return Full(slots["w_norm"], "norm")


def _miss(own: Group, slots: Mapping[str, Tensor], path: object) -> Delta:  # noqa: ARG001  the builders' signature
    """A block of rows; with three axes it is the variant that multiplies the base."""
    block = slots["miss_block"]
    return Miss(block) if len(block.shape) == 2 else Opaque("bat", ((own.key()[len(own.stem) :], block),))


_BUILDERS = {LORA: _low_rank, LOHA: _hadamard, LOKR: _kronecker, FULL: _full, NORM: _norm, MISS: _miss}


def _opaque(own: Group, family: str, slots: Mapping[str, Tensor]) -> Opaque:
    if family == "oft" and "oft_blocks" in slots and len(slots["oft_blocks"].shape) == 4:
        family = "boft"
    named = tuple(
        (entry.key[len(own.stem) :] if kind == SET else f".{slot}", entry.tensor)
        for (kind, slot), entry in own.entries.items()
        if kind in (*OPAQUE_FAMILIES, SET)
    )
    shape = slots["set_weight"].shape if family == SET else ()
    return Opaque(family, named, shape)


def _need(own: Group, slots: Mapping[str, Tensor], names: tuple[str, ...], prefix: str, path: object) -> None:
    missing = [name for name in names if name not in slots]
    if missing:
        raise _broken(own, path, f"{own.stem} has no {prefix}{missing[0]}", "the complete file")


def _check_fit(own: Group, delta: Delta, path: object) -> None:
    """Inner dimensions must agree."""
    pairs: list[tuple[str, int, str, int]] = []
    if isinstance(delta, LowRank):
        pairs += _low_rank_pairs(own, delta, path)
    elif isinstance(delta, Hadamard):
        pairs += _arm_ranks("hada_w1", "hada_t1", delta.w1_a, delta.w1_b, delta.t1)
        pairs += _arm_ranks("hada_w2", "hada_t2", delta.w2_a, delta.w2_b, delta.t2)
    elif isinstance(delta, Kronecker):
        if delta.w1 is None and delta.w1_a is not None and delta.w1_b is not None:
            pairs.append(("lokr_w1_a", delta.w1_a.shape[1], "lokr_w1_b", delta.w1_b.shape[0]))
        if delta.w2 is None and delta.w2_a is not None and delta.w2_b is not None:
            pairs += _arm_ranks("lokr_w2", "lokr_t2", delta.w2_a, delta.w2_b, delta.t2)
    if isinstance(delta, Hadamard):
        _check_arms(own, delta, path)
    for first, has, second, other in pairs:
        if has != other:
            raise _broken(own, path, f"{own.stem}: {first} has rank {has} but {second} has {other}", "the original file")


def _low_rank_pairs(own: Group, delta: LowRank, path: object) -> list[tuple[str, int, str, int]]:
    """The inner dimensions of up @ down, or of up, mid and down."""
    core = delta.mid
    if core is None:
        return [("up", delta.up.shape[1], "down", delta.rank)]
    for slot, factor in (("up", delta.up), ("down", delta.down)):
        if prod(factor.shape[2:]) != 1:
            text = f"{own.stem}: {slot} has shape {list(factor.shape)}, beside a mid it has no kernel of its own"
            raise _broken(own, path, text, "the original file")
    return [("up", delta.up.shape[1], "mid", core.shape[0]), ("mid", core.shape[1], "down", delta.rank)]


def _arm_ranks(name: str, core_name: str, a: Tensor, b: Tensor, core: Tensor | None) -> list[tuple[str, int, str, int]]:
    """The inner dimensions of a @ b that must be equal, or of a, b and the Tucker core between them."""
    if core is None:
        return [(f"{name}_a", a.shape[1], f"{name}_b", b.shape[0])]
    return [(f"{name}_a", a.shape[0], core_name, core.shape[0]), (core_name, core.shape[1], f"{name}_b", b.shape[0])]


def _check_arms(own: Group, delta: Hadamard, path: object) -> None:
    """Both arms of a LoHa have one shape."""
    if (delta.t1 is None) != (delta.t2 is None):
        raise _broken(own, path, f"{own.stem} has only one of hada_t1 and hada_t2", "the complete file")
    axis = 0 if delta.t1 is None else 1
    kernels = [None if core is None else core.shape[2:] for core in (delta.t1, delta.t2)]
    one, two = ([a.shape[axis], *b.shape[1:]] for a, b in ((delta.w1_a, delta.w1_b), (delta.w2_a, delta.w2_b)))
    if one != two or kernels[0] != kernels[1]:
        raise _broken(own, path, f"{own.stem}: the first arm of this LoHa is {one}, the second {two}", "the original file")


def _broken(own: Group, path: object, message: str, hint: str) -> BrokenModuleError:
    return BrokenModuleError(message, key=own.key(), path=str(path) if path is not None else None, hint=hint)
