"""One tensor of the output: the same rows in both models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.operations.cut.subject import CONV, LINEAR, POINTWISE

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Shape
    from lorasurgery.models import Reader
    from lorasurgery.site import Site


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor of the output: the same rows in both models."""

    site: Site
    name: str
    """As the target spells the module."""
    kind: str
    """``linear``, ``conv``, ``1x1``, ``norm``, ``bias``, ``embedding``, or ``parameter``: what is no module's in the tables."""
    base: Reader
    tuned: Reader
    reason: str = ""
    """Why it is left out; empty for what is extracted."""

    @property
    def id(self) -> str:
        """Names it in the journal."""
        return f"{self.name}.bias" if self.kind == BIAS else self.name

    @property
    def shape(self) -> Shape:
        """(out, in[, k...]), or (out,)."""
        return self.base.shape

    @property
    def is_vector(self) -> bool:
        """Whether it goes along whole."""
        return self.kind in (NORM, BIAS, EMBEDDING, PARAMETER)


NORM, BIAS, EMBEDDING, PARAMETER = "norm", "bias", "embedding", "parameter"


MATRICES = frozenset({LINEAR, CONV, POINTWISE})
"""Kinds of weights that are multiplied."""
