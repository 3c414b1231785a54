"""The command that mends a file for a program, from the header alone; nothing is promised that the rules cannot see."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.checking.advice import saved_split
from lorasurgery.layouts.targets import KOHYA, SUFFIXES, layout
from lorasurgery.layouts.words import BIAS, LOKR, LORA, MAGNITUDE, NORM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.checking.result import Result
    from lorasurgery.checking.rules import Consumer, Route
    from lorasurgery.checking.subject import Item, Subject
    from lorasurgery.layouts.targets import Layout

TO_LORA = frozenset({"loha", "lokr", "full", "miss"})
"""Families that ``--as lora`` turns into a LoRA exactly."""


def mend(subject: Subject, consumer: Consumer, route: Route | None, result: Result) -> str | None:
    """The conversion whose result the program loads completely, or None where there is none or it cannot be foreseen."""
    chosen = consumer.layout if route is None or route.layout is None else route.layout
    items = [item for item in subject.items if item.site is not None]
    if chosen is None or result.complete or not items or any(item.problem or item.misfit for item in items):
        return None
    target = layout(chosen)
    routes = _for_target(consumer.models.get(subject.architecture.id, consumer.default), target, subject.architecture.denoiser)
    families = {_family(item) for item in items}
    lossy = families - target.holds - TO_LORA
    kept = [item for item in items if _family(item) not in lossy]
    as_lora = _as_lora(families, target, routes)
    if not kept or not all(_can_load(item, target, routes, as_lora=as_lora) for item in kept):
        return None
    words = ["lorasurgery", "convert", str(subject.path), _output(subject, target.id, consumer), "--target", target.id]
    words += ["--as", "lora"] if as_lora else []
    words += ["--lossy"] if lossy else []
    words += ["--fix-split-alpha"] if saved_split(subject) else []
    words += ["--arch", subject.architecture.id] if subject.candidates else []
    return shlex.join(words)


def _for_target(routes: tuple[Route, ...], target: Layout, denoiser: str) -> Sequence[Route]:
    """The ways to read a file that the target's prefix may take; all where none is known by it."""
    prefix = target.denoiser.prefix.format(denoiser=denoiser, prefix="diffusion_model.")
    own = [r for r in routes if any(spelling.prefix.format(denoiser=denoiser) == prefix for spelling in r.names)]
    return own or routes


def _family(item: Item) -> str:
    return "bias" if item.delta is None else item.delta.family


def _as_lora(families: set[str], target: Layout, routes: Sequence[Route]) -> bool:
    """Whether the target or the program needs LoRA instead; a PEFT folder has one family, and its LoKr a shape of its own."""
    foreign = {f for f in families & TO_LORA if f not in target.holds or not _reads_family(f, routes)}
    return bool(foreign) or (target.id == "peft" and (len(families) > 1 or LOKR in families))


def _reads_family(family: str, routes: Sequence[Route]) -> bool:
    """Whether any of the program's ways to read this model's files knows the family's words."""
    telling = {"full": ".diff", "loha": ".hada_w1_a", "lokr": ".lokr_w1", "miss": ".miss_block"}
    return any(telling[family] in route.reads for route in routes)


def _can_load(item: Item, target: Layout, routes: Sequence[Route], *, as_lora: bool) -> bool:
    """Whether a module can arrive whole: its component, its bias and magnitude, and every tensor that keeps its word."""
    if item.site is not None and item.site.component in TEXT_ENCODERS and not _reads_encoder(item.site.component, routes):
        return False
    reads, words, family = frozenset().union(*(route.reads for route in routes)), SUFFIXES[target.words], _family(item)
    magnitude = item.group.modifier(MAGNITUDE)
    if magnitude is not None:
        columns = len(magnitude.tensor.shape) > 1 and magnitude.tensor.shape[0] == 1
        if words["magnitude"] not in reads or (columns and not target.in_axis_dora):
            return False
    if item.group.modifier(BIAS) is not None and words["norm bias" if family == NORM else "bias"] not in reads:
        return False
    if family == LORA:
        return "mid" not in item.group.slots(LORA) or target.words != KOHYA or words["mid"] in reads
    return (as_lora and family in TO_LORA) or family == "bias" or _suffixes(item, family) <= reads


def _reads_encoder(table: str, routes: Sequence[Route]) -> bool:
    return any(not own.tables or table in own.tables for route in routes for own in route.encoders)


def _suffixes(item: Item, family: str) -> set[str]:
    """The words of a module's own family, as the file spells them."""
    return {entry.suffix for (own, _), entry in item.group.entries.items() if own == family}


def _output(subject: Subject, target: str, consumer: Consumer) -> str:
    name = subject.path.stem if subject.path.suffix else subject.path.name
    suffix = "" if consumer.folder else ".safetensors"
    return str(subject.path.with_name(f"{name}-{target}{suffix}"))
