"""The singular values of an extracted change in the form that ``inspect`` describes a file's."""

from __future__ import annotations

from math import prod, sqrt
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.inspection.spectrum import SHARES, ModuleSpectrum
from lorasurgery.operations.select.blocks import block_and_kind

if TYPE_CHECKING:
    from lorasurgery.verbs.extract.report import ExtractReport, ModuleResult


def module_spectra(report: ExtractReport) -> tuple[ModuleSpectrum, ...]:
    """One for each matrix whose singular values were computed."""
    return tuple(_spectrum(module) for module in report.modules if module.values)


def _spectrum(own: ModuleResult) -> ModuleSpectrum:
    values = np.array(own.values)
    kept = np.cumsum(values**2) / own.squared
    shares = values[values > 0] / values.sum()
    block, kind = block_and_kind(own.weight)
    reached = ((share, int(np.argmax(kept >= share)) + 1) for share in SHARES if kept[-1] >= share)
    return ModuleSpectrum(
        name=own.name, block=block, kind=kind, component=own.component, state="ok", norm=sqrt(own.squared),
        relative=sqrt(own.squared / prod(own.shape)), effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        complete=own.complete, singular_values=own.values, ranks=tuple(reached),
    )  # fmt: skip
