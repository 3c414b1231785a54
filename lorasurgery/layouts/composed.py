"""Modules whose change a file puts together from tensors that are no factors of it, written so again.

LongCat-Video has one down factor for the q, k and v of a fused layer and an up factor for each, and alpha / rank in the
place of alpha. Its loader knows no other words. Any LoRA of such a layer is one of these: the down factor has, for every
run of rows, the ranks that act on it. Source: LongCat-Video ``modules/lora_utils.py`` (``LoRAUPParallel``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.io.tensors import Tensor, of_array, scalar

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.adapter import Composed, Module

BLOCKS = ".lora_up.blocks."


def as_composed(module: Module, record: Callable[[float, float], None]) -> tuple[dict[str, Tensor], float] | None:
    """A module's change in the words of the file it is from, and its scale; None where those cannot say it.

    The rounding of the scale goes to ``record``.
    """
    composed, scale = module.composed, module.scale.value
    if composed is None or (composed.strength is None and scale != 1.0):
        return None
    tensors = dict(composed.factors) if module.delta is composed.delta else _factors(module, composed)
    if tensors is None:
        return None
    if composed.strength is not None:
        key, stored = composed.strength
        kept = module.scale.alpha is not None and module.delta is composed.delta
        written = stored if kept else scalar(scale).reshape(*stored.shape)
        tensors[key] = written
        if not kept and scale:
            record((written.item() / scale - 1.0) ** 2, 1.0)
    return tensors, scale


def _factors(module: Module, composed: Composed) -> dict[str, Tensor] | None:
    """Another change in the file's own words; None for what is no LoRA, or has rows that they do not divide."""
    import numpy as np

    delta, keys = module.delta, list(composed.factors)
    ups = sorted((key for key in keys if BLOCKS in key), key=lambda key: int(key.rpartition(BLOCKS)[2].partition(".")[0]))
    downs = [key for key in keys if key.endswith(".lora_down.weight")]
    if not isinstance(delta, LowRank) or delta.mid is not None or len(downs) != 1:
        return None
    if not ups:
        others = [key for key in keys if key != downs[0]]
        return {downs[0]: delta.down, others[0]: delta.up} if len(others) == 1 else None
    if delta.up.shape[0] % len(ups) or len(delta.up.shape) > 2:
        return None
    up, down = delta.up.array(), delta.down.array()
    runs = np.split(up, len(ups))
    ranks = [np.flatnonzero(run.any(axis=0)) for run in runs]
    most = max(1, *(len(own) for own in ranks))
    tensors = {
        key: of_array(np.pad(run[:, own], ((0, 0), (0, most - len(own)))), delta.up.dtype)
        for key, run, own in zip(ups, runs, ranks, strict=True)
    }
    stacked = np.concatenate([np.pad(down[own], ((0, most - len(own)), (0, 0))) for own in ranks])
    return {downs[0]: of_array(stacked, delta.down.dtype), **tensors}
