"""Whether a module that is found also has the effect its file gives it."""

from __future__ import annotations

import re
from math import isclose, isfinite
from typing import TYPE_CHECKING

from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.checking.patches import patched
from lorasurgery.checking.result import CHANGED, IGNORED, LOADS, Finding
from lorasurgery.layouts.words import BIAS, MAGNITUDE, SET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.checking.job import Job
    from lorasurgery.checking.rules import Consumer, Route
    from lorasurgery.checking.subject import Item
    from lorasurgery.layouts.group import Entry
    from lorasurgery.site import Site

LARGEST_ALPHA = 1e8
"""Above this an alpha is ai-toolkit's stand-in for infinity (1e10), meant for readers that do not use it."""
ADDITIVE = ("lora", "loha", "lokr", "full", "norm")
SCALED = ("lora", "loha", "lokr")


def effect(item: Item, site: Site | None, job: Job, unread: Sequence[Entry]) -> Finding:
    """The verdict of a module whose name is read; ``unread`` are those of its tensors whose suffix is not."""
    consumer, route = job.consumer, job.route
    families = {e.word.family for e in unread}
    if item.delta is None and BIAS in families:
        return Finding(item.stem, IGNORED, "suffix", f"{consumer.name} does not read these biases")
    for note in route.wrong:
        if re.search(note.pattern, item.stem):
            return Finding(item.stem, CHANGED, "effect", note.text)
    return (
        _strength(item, job.consumer, route, job.alpha)
        or _dora(item, consumer, route)
        or (patched(item, site, job.architecture, consumer.name) if consumer.patches else None)
        or _bias(item, consumer, families, part=_is_part(site, job.architecture))
        or _swapped(item, site, consumer)
        or Finding(item.stem, LOADS)
    )


def _strength(item: Item, consumer: Consumer, route: Route, shared: float | None) -> Finding | None:
    """Another number than the file's own in front of the product; ``shared``: what modules without alpha get."""
    if item.delta is None or item.delta.family not in SCALED:
        return None
    alpha = item.alpha
    if alpha is None and shared is not None and item.delta.rank and not isclose(shared, item.delta.rank):
        text = f"{shared / item.delta.rank:.4g} times as strong: without an alpha it gets that of others"
        return Finding(item.stem, CHANGED, "strength", text)
    if alpha is not None and alpha.size != 1:
        return Finding(item.stem, IGNORED, "strength", f"an alpha of shape {list(alpha.shape)} is no number")
    reads = ".alpha" in route.reads
    used = (
        item.strength
        if alpha is not None and reads
        else item.scale
        if (consumer.header or route.header) and alpha is None
        else 1.0
    )
    if alpha is not None and reads and not item.whole_kronecker and not abs(alpha.item()) < LARGEST_ALPHA:
        return Finding(item.stem, CHANGED, "strength", f"alpha {alpha.item():g} is read as a number")
    if isclose(used, item.scale, rel_tol=1e-3) or not isfinite(item.scale):
        return None
    ratio = used / item.scale if item.scale else 0.0
    why = "alpha tensors are not read" if alpha is not None and not reads else _source(item)
    return Finding(item.stem, CHANGED, "strength", f"{ratio:.4g} times as strong: {why}")


def _source(item: Item) -> str:
    if item.alpha is None:
        return "the alpha in the header or configuration is not read"
    if item.whole_kronecker:
        return "both LoKr factors are whole, and alpha is not used then"
    return "the rsLoRA flag is not read"


def _dora(item: Item, consumer: Consumer, route: Route) -> Finding | None:
    entry = item.group.modifier(MAGNITUDE)
    if entry is None or (entry.suffix in route.reads and not re.search(route.deletes, entry.key)):
        return None
    suffix = entry.suffix
    return Finding(item.stem, CHANGED, "dora", f"the DoRA magnitude is lost: {consumer.name} does not read {suffix}")


def _bias(item: Item, consumer: Consumer, unread: set[str], *, part: bool) -> Finding | None:
    if item.group.modifier(BIAS) is None:
        return None
    if BIAS in unread:
        return Finding(item.stem, CHANGED, "bias", f"the bias is lost: {consumer.name} does not read it")
    if part and not consumer.slices_bias:
        return Finding(
            item.stem, CHANGED, "bias", f"the bias is lost: {consumer.name} cannot address a part of a fused weight's"
        )
    return None


def _is_part(site: Site | None, arch: Architecture) -> bool:
    """Whether a site is less than its whole weight, or has its halves exchanged."""
    if site is None or site.component in TEXT_ENCODERS:
        return False
    first = site.spans[0]
    return len(site.spans) > 1 or (first.start, first.stop) != (0, arch.shapes[first.weight][0])


def _swapped(item: Item, site: Site | None, consumer: Consumer) -> Finding | None:
    """ComfyUI exchanges the halves of the finished difference only."""
    if consumer.swaps or site is None or len(site.spans) < 2:
        return None
    dora = item.group.modifier(MAGNITUDE) is not None
    family = SET if item.delta is None else item.delta.family
    if dora or family not in ADDITIVE:
        what = "a DoRA magnitude" if dora else family
        return Finding(item.stem, CHANGED, "effect", f"{consumer.name} exchanges the halves wrongly for {what}")
    return None
