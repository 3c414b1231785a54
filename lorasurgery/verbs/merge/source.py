"""One adapter that is merged, and its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.verbs.merge.weights import Weight


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the merge."""

    adapter: Adapter
    weight: Weight
    name: str
    """For reports and messages."""
