"""The configuration of PEFT's types that have no scale: MiSS from its blocks, OFT, BOFT and (IA)^3 from their source's.

How an OFT's rotations are made, how a BOFT's sets are ordered and what an (IA)^3 multiplies stands in the configuration
alone. Source: PEFT 0.21 ``MissConfig``, ``OFTConfig``, ``BOFTConfig``, ``IA3Config``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lorasurgery.deltas.full import Opaque
from lorasurgery.deltas.miss import Miss
from lorasurgery.errors import FileFormatError, NotRepresentableError
from lorasurgery.layouts.peft_types import BOFT, IA3, ONLY_PEFT, SHARED_OFT, type_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Module
    from lorasurgery.layouts.emit import Written

_FORWARD = "feedforward_modules"


def miss(modules: Mapping[str, Written], source: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG001  the builders' signature
    """PEFT has one r for all blocks, and one width for all where they are repeated over the outputs.

    Blocks of three axes, (out / r, r, r), are those of ``bat``, which multiplies the base.
    """
    blocks = [(w, _block(w.module)) for w in modules.values()]
    first = blocks[0][1]
    bat, rank = len(first) > 2, first[-2]
    narrow = None if bat else next((shape[-1] for w, shape in blocks if shape[-1] != w.shape[0]), None)
    for own, shape in blocks:
        width = rank if bat else own.shape[0] if narrow is None else narrow
        if len(shape) != len(first) or shape[-2:] != (rank, width):
            raise NotRepresentableError(
                f"{own.module.name}: PEFT gives every MiSS block one size", module=own.module.name, hint="--as lora"
            )
    if bat:
        return {"r": rank, "init_weights": "bat"}
    return {"r": rank, "init_weights": True} if narrow is None else {"r": rank, "init_weights": "mini", "mini_r": narrow}


def _block(module: Module) -> tuple[int, ...]:
    delta = module.delta
    return delta.block.shape if isinstance(delta, Miss) else next(iter(delta.tensors.values())).shape if delta else ()


def oft(modules: Mapping[str, Written], source: Mapping[str, Any]) -> dict[str, Any]:
    """How the rotations are made is the source's."""
    _of_source(modules, source, "OFT", {SHARED_OFT, ".oft_r", ".oft_s"})
    return {"init_weights": True}


def boft(modules: Mapping[str, Written], source: Mapping[str, Any]) -> dict[str, Any]:
    """The order of the sets is the source's."""
    _of_source(modules, source, BOFT, ONLY_PEFT)
    return {"init_weights": True}


def ia3(modules: Mapping[str, Written], source: Mapping[str, Any]) -> dict[str, Any]:
    """Which modules' inputs are multiplied, by name as PEFT asks for it: among the targets."""
    _of_source(modules, source, IA3, ONLY_PEFT)
    forward = source.get(_FORWARD)
    return {_FORWARD: sorted(name for name in modules if is_named(forward, name)), "init_ia3_weights": True}


def is_named(ends: object, name: str) -> bool:
    """Whether a module is one of ``feedforward_modules``: ends of names, or one pattern for the whole name."""
    if isinstance(ends, str):
        try:
            return re.fullmatch(ends, name) is not None
        except re.error as error:
            raise FileFormatError(f"{_FORWARD} is no pattern ({error})", hint="the configuration PEFT wrote") from error
    return isinstance(ends, (list, tuple, set)) and name.endswith(tuple(map(str, ends)))


def _of_source(modules: Mapping[str, Written], source: Mapping[str, Any], kind: str, slots: set[str] | frozenset[str]) -> None:
    """Raises NotRepresentableError for a module that is not PEFT's own, or came without its configuration."""
    for written in modules.values():
        module, delta = written.module, written.module.delta
        pefts = isinstance(delta, Opaque) and slots.issuperset(delta.tensors)
        if not pefts or type_of(source) != kind:
            what = "without its adapter_config.json" if pefts else "of another program"
            raise NotRepresentableError(
                f"{module.name}: PEFT does not load {module.family.upper()} {what}", module=module.name,
                hint="the folder that PEFT saved",
            )  # fmt: skip
