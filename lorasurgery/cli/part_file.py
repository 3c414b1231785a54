"""Writing an adapter that was made of another one's modules: ``split`` and ``prune``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.adapter import written_in
from lorasurgery.api import SaveOptions, save
from lorasurgery.cli.advice import advised
from lorasurgery.cli.batch import SUFFIX
from lorasurgery.cli.render import announce
from lorasurgery.errors import NotRepresentableError
from lorasurgery.files.opened import load
from lorasurgery.io.writer import check_output
from lorasurgery.layouts.targets import layout
from lorasurgery.operations.conversion.convert import Options, convert
from lorasurgery.report import Report
from lorasurgery.site import DENOISER, SECOND_DENOISER

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Writing:
    """How inputs are read and results written."""

    target: str | None = None
    """Layout; None: the input's own."""
    dtype: str = "keep"
    force: bool = False
    strict: bool = False
    dry_run: bool = False
    arch: str | None = None
    base: Path | None = None
    """Where the names come from of a model no table knows."""
    alpha: float | None = None
    """What the input was trained at, where it does not say it."""

    def read(self, source: Path) -> Adapter:
        """The input; raises what :func:`lorasurgery.load` raises."""
        return load(source, arch=self.arch, base=self.base, alpha=self.alpha)

    def check(self) -> None:
        """Raises RequestError for a layout or dtype that is none."""
        if self.target is not None:
            layout(self.target)
        Options(dtype=self.dtype).check()

    def suffix(self, adapter: Adapter) -> str:
        """What a result's name ends with: PEFT's are folders."""
        return "" if written_in(adapter, self.target).folder else SUFFIX


def write_part(adapter: Adapter, source: Path, out: Path, how: Writing) -> Report:
    """Save ``adapter``, made of ``source``'s modules, to ``out``; raises what convert and save raise."""
    if how.base is not None and not how.dry_run:
        check_output(out, [how.base], force=how.force)
    if how.target is not None and SECOND_DENOISER in {site.component for site in adapter.modules}:
        _refuse_both(adapter, source)
    options = SaveOptions(strict=how.strict, force=how.force, dry_run=how.dry_run, announce=announce)
    with advised({}):
        if how.target is not None or how.dtype != "keep":  # convert writes the second expert as the first
            adapter, report = convert(adapter, how.target, Options(dtype=how.dtype))
        else:
            report = Report.of(adapter, adapter.layout)
        report.input = str(source)
        save(adapter, out, options=options, report=report)
    return report


def _refuse_both(adapter: Adapter, source: Path) -> None:
    """No loader takes Wan 2.2's two experts from one file; raises NotRepresentableError when a result would hold both."""
    first = next((module for site, module in adapter if site.component == DENOISER), None)
    if first is not None:
        raise NotRepresentableError(
            f"{first.name}: Wan 2.2's two experts are written to two files", module=first.name, path=source,
            hint="--keep transformer_1 and --keep transformer_2, or split --by component",
        )  # fmt: skip
