"""What a check has at hand while it goes through the modules of one file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.layouts.words import BIAS, FULL, LORA, MAGNITUDE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.checking.names import Known
    from lorasurgery.checking.rules import Consumer, Route, Together
    from lorasurgery.checking.subject import Item
    from lorasurgery.layouts.entry import Entry
    from lorasurgery.site import Site


class Job(NamedTuple):
    """What is known of the file and the loader, and what was found so far."""

    architecture: Architecture
    consumer: Consumer
    route: Route
    known: Known
    absent: tuple[Together, ...]
    """Names that are not known in this file, because what must stand beside them does not."""
    alpha: float | None
    """What a module without alpha gets; None: its rank."""
    taken: dict[Site, str]
    """The first name found for each site."""
    refusals: dict[str, list[str]]
    """Why the loader refuses the file, and the keys that make it do so."""
    unread: list[str]
    """Keys of modules that it passes over."""
    parts: set[str]
    """The parts of a layer that any module has."""
    layers: dict[str, set[str]]
    """Modules that PEFT makes a layer of, and which parts of it the file has."""

    def refuse(self, reason: str, *keys: str) -> None:
        """Note something that makes the loader refuse the file."""
        self.refusals.setdefault(reason, []).extend(keys)

    def leave(self, item: Item, strange: Sequence[Entry], ignores: str) -> None:
        """Pass over a module; ``strange`` are the keys that the loader may stop at."""
        self.unread.extend(e.key for e in item.group.entries.values())
        for entry in strange:
            if not re.search(ignores, entry.key):
                self.refuse(f"{self.route.error} for keys it does not know", entry.key)

    def layer(self, stem: str, entries: Sequence[Entry], unread: Sequence[Entry], *, known: bool) -> None:
        """Note which parts of PEFT's layer a module has; one that the model does not have counts for the others' parts."""
        if self.route.keeps_words and any(e.key.endswith(".weight") and ".lora_B." in e.key for e in entries):
            self.parts.add("up")
        own = {part for entry in entries if entry not in unread for part in _parts(entry)}
        if not known:
            self.parts.update(own if self.route.keeps_words and stem.startswith(self.known.prefixes) else ())
        elif own or (self.route.keeps_words and any(".lora_" in e.key for e in entries)):
            self.parts.update(own)
            self.layers.setdefault(stem, set()).update(own)


def _parts(entry: Entry) -> tuple[str, ...]:
    """What a tensor is in PEFT's layer. A whole difference becomes a factor, with a unit matrix as the other (Wan's head)."""
    family, slot, _ = entry.word
    if family == FULL:
        return ("down", "up")
    return (family,) if family in (BIAS, MAGNITUDE) else (slot,) if family == LORA and slot in ("down", "up") else ()
