"""sd-scripts' own OFT network, which is another one than LyCORIS' under its prefix ``lora_unet_``.

Source: sd-scripts ``networks/oft.py`` (SD 1, SD 2, SDXL) and ``networks/oft_flux.py`` (2026-02). One number of blocks and one
constraint, read from the first keys, hold for all modules; the keys begin with ``oft_unet_``, and FLUX.1 has a list of
rotations for each module, one for each of q, k, v and mlp where they are fused. The rotations mean what LyCORIS' mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.deltas.full import Opaque

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.deltas.delta import Delta

PREFIX = "oft_unet_"
MODELS = frozenset({"sd1", "sd2", "sdxl", "flux1"})
LISTS = "flux1"
"""The model whose modules have lists."""
PARTS = {"img_attn_qkv": 3, "txt_attn_qkv": 3, "linear1": 4}
"""How many rotations the fused modules of FLUX.1 have; others have one."""


def unfit(model: str, found: Mapping[str, tuple[Delta | None, float | None]]) -> str:
    """Why the network does not take these modules; empty where it does.

    ``found``: module name with underscores -> (change, alpha), its rotations as :func:`listed` gives them.
    """
    if model not in MODELS:
        return "sd-scripts has no OFT network for the model"
    blocks, limits = set[int](), set[float | None]()
    for name, (delta, alpha) in found.items():
        slots = delta.tensors if isinstance(delta, Opaque) and delta.family == "oft" else {}
        if not slots or set(slots) != _expected(model, name):
            return f"{name} is no module of sd-scripts' OFT network"
        blocks |= {tensor.shape[0] for tensor in slots.values()}
        limits.add(alpha)
    if len(blocks) > 1:
        return f"sd-scripts' OFT has one number of blocks for all modules, and these have {sorted(blocks)}"
    if len(limits) > 1 or not all(limit is not None and limit > 0.0 for limit in limits):
        return "sd-scripts' OFT has one constraint above 0 for all modules, the alpha, and these have not"
    return ""


def listed(model: str, delta: Opaque) -> Opaque:
    """The rotations under the words of the model's network: those of one part alone are read under LyCORIS' word."""
    one = delta.tensors.get(".oft_blocks")
    return delta if one is None or model != LISTS else Opaque(delta.family, ((".oft_blocks.0", one),), delta.shape)


def _expected(model: str, name: str) -> set[str]:
    if model != LISTS:
        return {".oft_blocks"}
    return {f".oft_blocks.{i}" for i in range(next((n for end, n in PARTS.items() if name.endswith(end)), 1))}
