"""The smaller forms of a sum, for people: before it is written, and beside the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.alerts import bytes_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.verbs.merge.choices import Choice


def choice_text(choice: Choice) -> str:
    """The options of a smaller form, what it takes and what it costs."""
    way = "--as lokr" if choice.family == "lokr" else f"--as lora --rank {choice.rank}"
    about = "" if choice.measured is None else "about "
    source = "" if choice.measured is None else f", estimated from {choice.measured} modules"
    return f"{way}: {bytes_text(choice.size)}, {about}{choice.error:.4f} away from the sum{source}"


def choices_text(found: Sequence[Choice], size: int) -> str:
    """All of them in a line."""
    ways = "; ".join(map(choice_text, found))
    return f"the sum is full differences, which no file has, and takes {bytes_text(size)}. Smaller, but not exact: {ways}"
