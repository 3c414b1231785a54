"""Rows of original weights, put together from whichever tensors hold them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.io.dtypes import widest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from lorasurgery.architectures.table import Span, Spans
    from lorasurgery.io.tensors import Shape
    from lorasurgery.models.weights import Weight

CHUNK_BYTES = 4 << 20
"""About as much float32 as :meth:`Reader.chunks` hands out at a time."""


class Piece(NamedTuple):
    """Rows ``start:stop`` of an original weight are the rows of ``weight`` from ``offset`` on."""

    start: int
    stop: int
    weight: Weight
    offset: int


class Part(NamedTuple):
    """``rows`` rows of ``weight`` from ``first`` on."""

    weight: Weight
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class Reader:
    """The rows of a site in its order, read when asked for; safe from several threads."""

    parts: tuple[Part, ...]
    shape: Shape
    """(out, in[, k...]), or (out,) of biases and norms."""
    dtype: str
    """The stored dtype (safetensors name), the widest where the tensors differ."""

    def rows(self, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Rows ``start:stop`` as (rows, in*k...) float32, float64 when stored so; of biases and norms as (rows, 1)."""
        import numpy as np

        found = list(self._within(start, self.shape[0] if stop is None else stop))
        if not found:
            return np.zeros((0, prod(self.shape[1:])), np.float64 if self.dtype == "F64" else np.float32)
        blocks = [part.weight.rows(part.first, part.first + part.rows) for part in found]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def array(self) -> NDArray[Any]:
        """All rows in the site's shape."""
        return self.rows().reshape(self.shape)

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row, rows) one block after another, each of about ``size`` bytes in float32."""
        step = max(size // (4 * max(prod(self.shape[1:]), 1)), 1)
        for at in range(0, self.shape[0], step):
            yield at, self.rows(at, min(at + step, self.shape[0]))

    def _within(self, start: int, stop: int) -> Iterator[Part]:
        at = 0
        for part in self.parts:
            low, high = max(start, at), min(stop, at + part.rows)
            if low < high:
                yield Part(part.weight, part.first + low - at, high - low)
            at += part.rows


def assembled(parts: Sequence[Part]) -> Reader:
    """A reader of parts in this order; raises ValueError when they are not of one width."""
    widths = {prod(part.weight.shape[1:]) for part in parts}
    if len(widths) != 1:
        raise ValueError(f"widths {sorted(widths)}")
    tail = parts[0].weight.shape[1:]
    return Reader(tuple(parts), (sum(part.rows for part in parts), *tail), widest([p.weight.tensor.dtype for p in parts]))


def parts_of(spans: Spans, pieces: Sequence[Sequence[Piece]]) -> list[Part] | Span:
    """The parts that make up ``spans``, given the pieces of each one's weight in order; or the first rows nobody holds."""
    found: list[Part] = []
    for span, own in zip(spans, pieces, strict=True):
        at = span.start
        for piece in own:
            if piece.start <= at < min(piece.stop, span.stop):
                stop = min(piece.stop, span.stop)
                found.append(Part(piece.weight, piece.offset + at - piece.start, stop - at))
                at = stop
        if at < span.stop:
            return span._replace(start=at, stop=min([p.start for p in own if p.start > at] + [span.stop]))
    return found
