"""Deltas that are not factored: a full difference, a norm's difference, a replacement, and families that multiply the base."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.by_rows import flat
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.deltas.rounding import multiplied, rounded
from lorasurgery.io.dtypes import widest
from lorasurgery.io.tensors import Tensor, computed, stack, zeros

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.deltas.base import Record
    from lorasurgery.deltas.by_rows import Rows
    from lorasurgery.io.tensors import Float64, Ranges, Shape


_PARAMETER = re.compile(r"(modulation|modulate_table|scale_shift_table\w*|registers|pad_token|padding|special_tokens?)$")
"""How the names of bare parameters end that have more than one axis, in Wan, LTX, PixArt, Kandinsky and their kin."""


def is_gain(name: str, shape: Shape) -> bool:
    """Whether a difference is that of a norm's gain or of a bare parameter, not of a layer's weight.

    ``name`` is the module's as spelled. One axis is no layer's, and no layer of one row has three.
    """
    return len(shape) < 2 or (len(shape) == 3 and shape[0] == 1) or is_parameter(name)


def is_parameter(name: str) -> bool:
    """Whether a name is that of a bare parameter, which is no layer and stands in the place of none."""
    return _PARAMETER.search(name) is not None


@dataclass(frozen=True, slots=True)
class Full:
    """``diff`` is added to the weight (or, for a norm, to its gain). Shape (out, in[, k...]) or (dim,)."""

    diff: Tensor
    family: str = "full"
    """``full``, or ``norm``: of a norm or a bare parameter, which has no other form."""
    word: str = ""
    """``diff`` or ``w_norm``: how a norm's difference is spelled; the former for all others."""

    @property
    def rank(self) -> None:
        """None: a full difference has none."""

    @property
    def shape(self) -> Shape:
        """The weight's shape."""
        return self.diff.shape

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """``diff``, or ``w_norm`` for a norm that is spelled so."""
        return {self.word or ("diff" if self.family == "full" else "w_norm"): self.diff}

    def rows(self, ranges: Ranges) -> Full:
        """Slice: exact."""
        return replace(self, diff=self.diff.rows(ranges))

    def scaled(self, factor: float, record: Record | None = None) -> Full:
        """Multiply."""
        return self if factor == 1.0 else replace(self, diff=multiplied(self.diff, factor, record))

    def cast(self, dtype: str, record: Record | None = None) -> Full:
        """In ``dtype``."""
        return replace(self, diff=rounded(self.diff, dtype, record))

    def dense(self) -> Float64:
        """The difference in float64."""
        return self.diff.f64()

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:
        """Rows of the difference itself, times ``factor`` in ``work``."""
        import numpy as np

        return lambda start, stop: flat(self.diff.rows([(start, stop)]).array(), work) * np.asarray(factor, work)

    def to_low_rank(self) -> LowRank:
        """The identity times the difference: exact, of rank min(out, in); raises CannotError for a norm."""
        if len(self.shape) < 2:
            raise CannotError("a norm or bias difference has no low-rank form")
        out, columns = self.shape[0], self.diff.size // self.shape[0]
        if out <= columns or len(self.shape) > 2:
            up = computed(self.diff.dtype, (out, out, *(1 for _ in self.shape[2:])), lambda: _eye(out))
            return LowRank(up, self.diff)
        return LowRank(self.diff, computed(self.diff.dtype, (columns, columns), lambda: _eye(columns)))


def _eye(size: int) -> Float64:
    import numpy as np

    return np.eye(size)


def stack_full(parts: Sequence[tuple[Full | None, int]]) -> Full:
    """Members one below the other; a missing one is zero rows. Exact."""
    present = [delta for delta, _ in parts if delta is not None]
    dtype = widest([d.diff.dtype for d in present])
    rest = present[0].shape[1:]
    return replace(present[0], diff=stack([zeros(dtype, (rows, *rest)) if d is None else d.diff for d, rows in parts]))


@dataclass(frozen=True, slots=True)
class Opaque:
    """A family carried through renames only: OFT, BOFT, GLoRA and (IA)^3 multiply the base, ``set`` replaces it."""

    family: str
    slots: tuple[tuple[str, Tensor], ...]
    """(suffix as the file has it, tensor)."""
    shape: Shape = ()
    """(): unknown without the base."""

    @property
    def rank(self) -> None:
        """None."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by the suffix they stand under."""
        return dict(self.slots)

    @property
    def called(self) -> str:
        """What messages call it."""
        return "a replaced weight" if self.family == "set" else self.family.upper()

    def rows(self, ranges: Ranges) -> Opaque:
        """A replacement's rows are slices; everything else raises CannotError."""
        if self.family != "set":
            raise CannotError(f"{self.called} multiplies the base weight and cannot be cut or permuted without it")
        return replace(self, slots=tuple((suffix, tensor.rows(ranges)) for suffix, tensor in self.slots))

    def scaled(self, factor: float, record: Record | None = None) -> Opaque:  # noqa: ARG002  the protocol's signature
        """Only by 1."""
        if factor != 1.0:
            raise CannotError(f"{self.called} has no scale to fold")
        return self

    def cast(self, dtype: str, record: Record | None = None) -> Opaque:
        """Every tensor in ``dtype``."""
        return replace(self, slots=tuple((suffix, rounded(tensor, dtype, record)) for suffix, tensor in self.slots))

    def dense(self) -> Float64:
        """Raises CannotError: it needs the base weight."""
        raise CannotError(f"the change {self.called} makes depends on the base weight")

    def by_rows(self, work: str, factor: float = 1.0) -> Rows:  # noqa: ARG002  the protocol's signature
        """Raises CannotError: it needs the base weight."""
        raise CannotError(f"the change {self.called} makes depends on the base weight")

    def to_low_rank(self) -> LowRank:
        """Raises CannotError: it needs the base weight."""
        raise CannotError(f"the change {self.called} makes depends on the base weight")
