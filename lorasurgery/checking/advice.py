"""What else to say about a file, and the command that mends it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from lorasurgery.checking.result import LOADS
from lorasurgery.layouts.targets import layout
from lorasurgery.layouts.words import MAGNITUDE

if TYPE_CHECKING:
    from lorasurgery.checking.result import Result
    from lorasurgery.checking.rules import Consumer, Route
    from lorasurgery.checking.subject import Subject

FACTORED = ("loha", "lokr", "full")


def notes(subject: Subject, consumer: Consumer, route: Route | None, result: Result) -> tuple[str, ...]:
    """Remarks that change no module's verdict."""
    found = list(consumer.facts)
    if route is not None and route.note:
        found.append(route.note)
    if subject.candidates:
        found.append(f"the same keys fit {', '.join(subject.candidates)}; --arch decides")
    if saved_split(subject):
        found.append(
            "trained with split_qkv: sd-scripts saves the fused modules too weak for every program; "
            "lorasurgery convert --fix-split-alpha puts it right"
        )
    if result.unread_keys:
        found.append(f"{len(result.unread_keys)} further keys are passed over, first {result.unread_keys[0]}")
    if consumer.id == "comfyui" and any(i.group.modifier(MAGNITUDE) is not None for i in subject.items):
        found.append("ComfyUI takes a DoRA's output-axis norm of the base weight alone, not of base and change together")
    return tuple(found)


def saved_split(subject: Subject) -> bool:
    """Whether the metadata says ``split_qkv=True`` (sd-scripts issue 2204)."""
    try:
        arguments = json.loads(subject.metadata.get("ss_network_args", "") or "{}")
    except ValueError:
        return False
    return isinstance(arguments, dict) and str(arguments.get("split_qkv", "")).lower() == "true"


def mend(subject: Subject, consumer: Consumer, result: Result) -> str | None:
    """The conversion whose result the program loads completely, or None where there is none."""
    if consumer.layout is None or result.complete or not any(i.site is not None for i in subject.items):
        return None
    target = layout(consumer.layout)
    families = {i.delta.family for i in subject.items if i.delta is not None}
    words = ["lorasurgery", "convert", str(subject.path), _output(subject, consumer), "--target", target.id]
    if any(f in families and f not in target.holds for f in FACTORED):
        words += ["--as", "lora"]
    if saved_split(subject):
        words.append("--fix-split-alpha")
    if not all(f.status == LOADS for f in result.findings) and subject.candidates:
        words += ["--arch", subject.architecture.id]
    return shlex.join(words)


def _output(subject: Subject, consumer: Consumer) -> str:
    name = subject.path.stem if subject.path.suffix else subject.path.name
    suffix = "" if consumer.folder else ".safetensors"
    return str(subject.path.with_name(f"{name}-{consumer.layout}{suffix}"))
