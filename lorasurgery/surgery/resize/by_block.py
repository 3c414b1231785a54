"""Resize with what concerns whole blocks: those of rank 0 are left out, and the metadata gives the ranks by block."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Scale
from lorasurgery.errors import RequestError
from lorasurgery.layouts.detect import expected_shape
from lorasurgery.surgery.resize import engine
from lorasurgery.surgery.resize.block_args import with_block_args
from lorasurgery.surgery.resize.pick import has_list
from lorasurgery.surgery.resize.size import file_size
from lorasurgery.surgery.resize.subject import kind_of
from lorasurgery.surgery.resize.survey import rank_asked

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.surgery.resize.base import BaseModel
    from lorasurgery.surgery.resize.options import ResizeOptions
    from lorasurgery.surgery.resize.report import ModuleReport, ResizeReport


def resize(adapter: Adapter, options: ResizeOptions, base: BaseModel | None = None) -> tuple[Adapter, ResizeReport]:
    """As :func:`lorasurgery.surgery.resize.engine.resize`; modules whose rank is to be 0 are not in the result.

    That is what a 0 in sd-scripts' ``block_dims`` means: no module is made for the block. They count in the error. Where a
    list gave the ranks, or made those of the file, sd-scripts' fields for it are written into ``ss_network_args``.
    Raises RequestError besides when nothing is left.
    """
    options.check()
    options = options.on(adapter.architecture)
    least = replace(options, ranks=tuple((pattern, max(rank, 1)) for pattern, rank in options.ranks))
    result, report = engine.resize(adapter, least, base)
    if any(rank == 0 for _, rank in options.ranks):
        result = _without(adapter, result, options, report)
    layout, asked = options.layout or adapter.layout, has_list(options.ranks)
    result = replace(result, metadata=with_block_args(result, adapter.metadata, layout, asked=asked))
    if options.has_size:
        report.size = file_size(result, options.layout)
    return result, report


def _without(adapter: Adapter, result: Adapter, options: ResizeOptions, report: ResizeReport) -> Adapter:
    """The result without those of its cut modules whose rank is to be 0; a bias of theirs stays."""
    cut = {module.name for module in report.modules}
    gone = {
        site
        for site, module in adapter.modules.items()
        if module.name in cut and rank_asked(module, kind_of(expected_shape(adapter.architecture, site)), options) == 0
    }
    bare = {
        site: replace(module, delta=None, magnitude=None, scale=Scale(1.0, "none (1.0)")) if site in gone else module
        for site, module in result.modules.items()
        if site not in gone or module.bias is not None
    }
    if not bare:
        raise RequestError("no module would be left", path=adapter.path, hint="a rank above 0 for some blocks")
    names = {adapter.modules[site].name for site in gone}
    report.modules[:] = [_left_out(own) if own.name in names else own for own in report.modules]
    for name in names:
        report.losses.entries.pop(name, None)
    return replace(result, modules=bare)


def _left_out(own: ModuleReport) -> ModuleReport:
    return replace(
        own, family="", action="left out", new_rank=0, relative_error=1.0 if own.squared_norm else 0.0, sum_kept=0.0,
        max_ratio=1.0, note="",
    )  # fmt: skip
