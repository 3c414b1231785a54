"""The base model of an extraction, for scores of singular values that look at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.operations.cut.base import BaseModel, NormCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorasurgery.architectures.table import Spans
    from lorasurgery.models import Reader
    from lorasurgery.verbs.extract.pair import Pair


@dataclass(frozen=True, slots=True)
class _Weights:
    """The base rows of every matrix, by their site."""

    path: Path
    readers: Mapping[tuple[str, Spans], Reader]
    content: str = ""
    """Norms are kept in memory only, of one model."""

    def reader(self, component: str, spans: Spans) -> Reader:
        """The rows of a site."""
        return self.readers[component, spans]


def base_of(pairs: Sequence[Pair]) -> BaseModel | None:
    """The base model that these pairs read; None without any."""
    readers = {(pair.site.component, pair.site.spans): pair.base for pair in pairs if not pair.is_vector}
    if not readers:
        return None
    first = next(iter(readers.values()))
    return BaseModel(_Weights(first.parts[0].weight.file.path, readers), NormCache())
