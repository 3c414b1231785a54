"""What ComfyUI's ``comfy/weight_adapter`` makes of tensors that it reads: skipped with an error in the log, or used otherwise.

Facts of ComfyUI 2026-08 (``lora.py``, ``lokr.py``, ``oft.py``, ``boft.py``, ``base.py``), tried with torch 2.13.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.checking.result import CHANGED, Finding
from lorasurgery.layouts.words import BIAS, LOHA, LOKR, LORA, MAGNITUDE

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.checking.subject import Item
    from lorasurgery.io.tensors import Shape
    from lorasurgery.site import Site

CORES = ((LORA, "mid"), (LOHA, "t1"), (LOHA, "t2"))
SKIPPED = "the module is skipped with an error in the log"


def patched(item: Item, site: Site | None, arch: Architecture, program: str) -> Finding | None:
    """The verdict of a module that such a program reads and does not use as the file means it."""
    text, reason = _rotation(item), "effect"
    text = text or _tucker(item)
    if not text and site is not None and item.group.modifier(MAGNITUDE) is not None:
        text, reason = _magnitude(item, _shape(site, arch), program), "dora"
    if not text and site is not None and item.group.modifier(BIAS) is not None and has_bias(arch, site) is False:
        text, reason = "the bias is lost: the model has none there to add it to", "bias"
    return Finding(item.stem, CHANGED, reason, text) if text else None


def has_bias(arch: Architecture, site: Site) -> bool | None:
    """Whether the base has a bias beside this weight; None where that is not known."""
    table = TEXT_ENCODERS.get(site.component, arch)
    return table.has_bias(site.spans[0].weight)


def _rotation(item: Item) -> str:
    """Of Diag-OFT and BOFT: ``alpha`` bounds the norm of all blocks together, and only BOFT multiplies by ``rescale``."""
    slots = item.group.slots("oft")
    blocks = slots.get("oft_blocks")
    if blocks is None:
        return ""
    alpha = None if item.alpha is None or item.alpha.size != 1 else item.alpha.item()
    butterfly = len(blocks.shape) == 4
    if butterfly and alpha is None:
        return f"a BOFT without alpha is compared with nothing: {SKIPPED}"
    if alpha is not None and alpha > 0:
        return f"the alpha {alpha:g} bounds the norm of all blocks together, which is another constraint than the trainer's"
    return "" if butterfly or "rescale" not in slots else "the factors of .rescale are read and not used"


def _tucker(item: Item) -> str:
    """Of a core: LoRA's and LoHa's are multiplied as those of two-dimensional convolutions, LoKr's is not multiplied at all."""
    if "t2" in item.group.slots(LOKR):
        return f"torch.kron takes no Tucker core as it lies in memory: {SKIPPED}"
    cores = [own for family, slot in CORES if (own := item.group.slots(family).get(slot)) is not None]
    if any(len(core.shape) != 4 for core in cores):
        return "its Tucker core is no two-dimensional convolution's, and ComfyUI's code stops with an error when it is used"
    return ""


def _shape(site: Site, arch: Architecture) -> Shape:
    """The part of the weight that a module changes."""
    if site.component in TEXT_ENCODERS:
        return TEXT_ENCODERS[site.component].shapes[site.spans[0].weight]
    return arch.module_shape(site.spans)


def _magnitude(item: Item, weight: Shape, program: str) -> str:
    """Of ``weight_decompose``: magnitude / norm times the weight, by the rules of broadcasting."""
    entry = item.group.modifier(MAGNITUDE)
    own = () if entry is None else tuple(entry.tensor.shape)
    if not own or len(weight) < 2:
        return f"a DoRA of a weight with shape {list(weight)} has no columns: {SKIPPED}"
    by_rows = own[0] == weight[0]
    norm = (weight[0], *(1 for _ in weight[1:])) if by_rows else (1, weight[1], *(1 for _ in weight[2:]))
    ratio = _broadcast(own, norm)
    if ratio is None or _broadcast(ratio, weight) != weight:
        return f"a DoRA magnitude of shape {list(own)} does not go with a weight of shape {list(weight)}: {SKIPPED}"
    if ratio != norm:
        return f"a DoRA magnitude of shape {list(own)} is multiplied with the columns instead of the rows"
    return f"{program} takes a DoRA's norm of the base weight alone, not of base and change together" if by_rows else ""


def _broadcast(one: Shape, other: Shape) -> Shape | None:
    """The common shape of two tensors, None where they have none."""
    length = max(len(one), len(other))
    sides = [(1,) * (length - len(shape)) + tuple(shape) for shape in (one, other)]
    if any(a != b and 1 not in (a, b) for a, b in zip(*sides, strict=True)):
        return None
    return tuple(a if b == 1 else b for a, b in zip(*sides, strict=True))
