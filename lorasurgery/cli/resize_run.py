"""One file of ``lorasurgery resize``: read, resize, write, and what is said about it."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from lorasurgery.alerts import Alert, bytes_of
from lorasurgery.cli.batch import SUFFIX, Job
from lorasurgery.cli.meta_files import Shown
from lorasurgery.cli.render import announce, warning_lines
from lorasurgery.cli.resize_advice import Advice
from lorasurgery.cli.resize_request import Request, cache_file
from lorasurgery.cli.resize_text import dropped_lines, plan_lines, report_lines
from lorasurgery.errors import OutputExistsError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.adapter import Adapter
    from lorasurgery.operations.cut import BaseModel, NormCache, ResizeReport
    from lorasurgery.report import Report
    from lorasurgery.verbs.resize.plan import Plan

SCHEMA = 1
"""Version of the JSON form; see docs/resize.md."""


def resized(job: Job, how: Request) -> Shown:
    """Resize one file; raises SurgeryError with advice in the words of the command line."""
    from lorasurgery.files.opened import load

    with Advice():
        adapter = load(job.source, arch=how.arch, base=how.base, alpha=how.alpha)
        target = _output(job, adapter, how)
        model, cache = _base(adapter, how)
        try:
            return _resized(job.source, target, adapter, how, model)
        finally:
            if cache is not None:
                with suppress(OSError):  # a cache that cannot be written is no reason to fail
                    cache.save()


def _output(job: Job, adapter: Adapter, how: Request) -> Path:
    """Where the result goes, checked before anything is computed."""
    from lorasurgery.adapter import written_in
    from lorasurgery.io.writer import check_output

    target, folder = job.target, written_in(adapter, how.options.layout).folder
    if folder and not how.named:
        target = target.with_suffix("")
    if folder and target.suffix == SUFFIX:
        raise RequestError(
            "PEFT's layout is a folder",
            path=adapter.path,
            hint=f"{target.with_suffix('')} for the output, or --target diffusers",
        )
    for path in (how.base, job.source):
        if path is not None and path.exists() and target.exists() and target.samefile(path):
            what = "the base model" if path == how.base else "the input"
            raise OutputExistsError(f"the output is {what}; it is never overwritten", path=target, hint="another name")
    if not how.dry_run:
        check_output(target, [job.source], force=how.force)
    return target


def _base(adapter: Adapter, how: Request) -> tuple[BaseModel | None, NormCache | None]:
    """The base model where a recipe or DoRA modules may look at it."""
    from lorasurgery.operations.cut import NormCache, open_base

    if how.base is None or (how.options.recipe is None and how.options.dora == "refuse"):
        return None, None
    cache = NormCache(cache_file())
    return open_base(how.base, adapter.architecture, cache), cache


def _resized(source: Path, target: Path, adapter: Adapter, how: Request, model: BaseModel | None) -> Shown:
    from lorasurgery.api import SaveOptions, save
    from lorasurgery.operations.cut import resize
    from lorasurgery.operations.cut.size import file_size
    from lorasurgery.verbs.resize.plan import plan

    planned = plan(adapter, how.options, how.plan_ranks(adapter), model) if how.dry_run else None
    if not how.asked:
        return _shown(source, target, adapter, how, planned, None)
    result, report = resize(how.marked(adapter), how.options, model)
    result, writing = _converted(result, adapter, how)
    writing.input = str(source)
    report.size = file_size(result)
    save(
        result,
        target,
        options=SaveOptions(strict=how.strict, force=how.force, dry_run=how.dry_run, announce=announce),
        report=writing,
    )
    if writing.written:
        report.size = bytes_of(target)
    return _shown(source, target, adapter, how, planned, (report, writing))


def _converted(result: Adapter, adapter: Adapter, how: Request) -> tuple[Adapter, Report]:
    """The result in its target layout; in the input's own spelling it needs no conversion."""
    from lorasurgery.operations.conversion.convert import convert
    from lorasurgery.report import Report

    if how.options.layout is not None:
        result, report = convert(result, how.options.layout)
    else:
        report = Report.of(result, adapter.layout)
    report.ledger = adapter.ledger
    return result, report


def _shown(
    source: Path, target: Path, adapter: Adapter, how: Request, planned: Plan | None, done: tuple[ResizeReport, Report] | None
) -> Shown:
    report, writing = done if done is not None else (None, None)
    written = writing is not None and writing.written
    warnings = list(dict.fromkeys([*adapter.warnings, *(writing.warnings if writing is not None else ())]))
    before = bytes_of(source)
    found = {
        "schema": SCHEMA,
        "input": str(source),
        "output": str(target),
        "written": written,
        "architecture": adapter.architecture.key,
        "layout": {"from": adapter.layout, "to": how.options.layout or adapter.layout},
        "way": how.way,
        "base": None if how.base is None else str(how.base),
        "bytes": {"input": before, "output": None if report is None else report.size},
        "resize": None if report is None else report.to_json(),
        "plan": None if planned is None else planned.to_json(),
        "dropped": [] if writing is None else [{"key": key, "reason": reason} for key, reason in writing.dropped],
        "ledger": (adapter.ledger if writing is None or writing.ledger is None else writing.ledger).to_json(),
        "warnings": warnings + [text for text in (report.warnings if report else ()) if isinstance(text, Alert)],
    }
    lines = [f"{source.name} -> {target if written else f'{target} (not written)'}"]
    layout = adapter.layout if how.options.layout in (None, adapter.layout) else f"{adapter.layout} -> {how.options.layout}"
    lines += [f"  {'model':<13}{adapter.architecture.key}", f"  {'layout':<13}{layout}"]
    if report is not None and writing is not None:
        lines.append(f"  {'asked':<13}{how.way}")
        lines += report_lines(report, before=before, after=report.size or 0, verbose=how.verbose)
        lines += dropped_lines(writing.dropped)
    if how.base is not None and how.options.dora != "refuse":
        lines.append(f"  note: errors of DoRA modules are against what they do to {how.base.name}")
    lines += warning_lines(warnings)
    return Shown(found, lines + (plan_lines(planned) if planned is not None else []))
