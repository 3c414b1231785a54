"""A merge while it runs: what every step needs, and where it writes down what it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.deltas.base import Record
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.verbs.merge.options import MergeOptions
    from lorasurgery.verbs.merge.report import MergeReport
    from lorasurgery.verbs.merge.source import Source


@dataclass(slots=True)
class Merging:
    """A merge while it runs."""

    sources: list[Source]
    options: MergeOptions
    arch: Architecture
    target: Layout
    report: MergeReport

    @property
    def dtype(self) -> str:
        """What the first file is mostly in."""
        tensors = [t for m in self.sources[0].adapter.modules.values() if m.delta is not None for t in m.delta.tensors.values()]
        return Counter(tensor.dtype for tensor in tensors).most_common(1)[0][0] if tensors else "F32"

    def recorder(self, name: str) -> Record:
        """Where the rounding errors of a module go."""

        def record(error: float, norm: float) -> None:
            self.report.losses.record(name, error, norm)

        return record
