"""Where a module acts: which rows of which base weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures.table import DENOISERS

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Spans


DENOISER, SECOND_DENOISER = DENOISERS
"""Component names of the UNet or transformer, and of Wan 2.2's low-noise expert; text encoders are named by their table."""


class Site(NamedTuple):
    """Where a module acts: the component and the rows of its original weights, in the module's row order."""

    component: str
    spans: Spans

    def __str__(self) -> str:
        return f"{self.component}:{self.spans[0].weight}"
