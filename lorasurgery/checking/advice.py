"""What else to say about a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lorasurgery.checking.patches import has_bias
from lorasurgery.layouts.words import BIAS

if TYPE_CHECKING:
    from lorasurgery.checking.result import Result
    from lorasurgery.checking.rules import Consumer, Route
    from lorasurgery.checking.subject import Item, Subject


def notes(subject: Subject, consumer: Consumer, route: Route | None, result: Result) -> tuple[str, ...]:
    """Remarks that change no module's verdict."""
    found = list(consumer.facts)
    if route is not None and route.note:
        found.append(route.note)
    if subject.candidates:
        found.append(f"the same keys fit {', '.join(subject.candidates)}; --arch decides")
    found += subject.evidence[1:]
    if saved_split(subject):
        found.append(
            "trained with split_qkv: sd-scripts saves the fused modules too weak for every program; "
            "lorasurgery convert --fix-split-alpha puts it right"
        )
    if result.unread_keys:
        found.append(f"{len(result.unread_keys)} further keys are passed over, first {result.unread_keys[0]}")
    if consumer.patches and any(i.group.modifier(BIAS) is not None and _unsure(i, subject) for i in subject.items):
        found.append(f"whether {subject.architecture.name} has biases to add these to is not recorded here")
    return tuple(found)


def _unsure(item: Item, subject: Subject) -> bool:
    return item.site is not None and has_bias(subject.architecture, item.site) is None


def saved_split(subject: Subject) -> bool:
    """Whether the metadata says ``split_qkv=True`` (sd-scripts issue 2204)."""
    try:
        arguments = json.loads(subject.metadata.get("ss_network_args", "") or "{}")
    except ValueError:
        return False
    return isinstance(arguments, dict) and str(arguments.get("split_qkv", "")).lower() == "true"
