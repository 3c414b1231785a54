"""Inputs to outputs: one file, many files, folders, mirrored into an output folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasurgery.cli.files import ADAPTERS, found_in
from lorasurgery.cli.render import data, error_text, show_error, show_report
from lorasurgery.errors import RequestError, SurgeryError
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.report import SCHEMA

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasurgery.report import Report

SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Job:
    """One input and where its result goes."""

    source: Path
    target: Path


def jobs_for(
    paths: Sequence[Path], given: Path | None, out: Path | None, out_dir: Path | None, *, folder_output: bool
) -> list[Job]:
    """Pair inputs with outputs; raises typer.BadParameter for a combination that makes no sense.

    Without ``--out-dir`` there is one input, and the last path is the output unless ``--output`` names it.
    """
    inputs = [*([given] if given else []), *paths]
    if out_dir is None:
        if out is None and len(inputs) > 1:
            inputs, out = inputs[:-1], inputs[-1]
        if len(inputs) != 1 or out is None:
            raise typer.BadParameter("one input and one output, or several inputs with --out-dir", param_hint="IN OUT")
        if not folder_output:
            out = _file_name(inputs[0], out)
        return [Job(inputs[0], out)]
    if out is not None:
        raise typer.BadParameter("either --output or --out-dir", param_hint="--output")
    found = [job for path in inputs for job in _jobs(path, out_dir, folder_output=folder_output)]
    if not found:
        raise typer.BadParameter(f"no adapter file among {', '.join(map(str, inputs)) or 'nothing'}", param_hint="IN")
    _refuse_collisions(found)
    return found


def _file_name(source: Path, out: Path) -> Path:
    """The output file: in an existing folder it gets the input's name; what is written is safetensors."""
    if out.is_dir():
        return out / f"{source.stem if source.suffix.lower() in ADAPTERS else source.name}{SUFFIX}"
    if out.suffix.lower() in TORCH_SUFFIXES:
        raise RequestError(
            f"the output {out} would be a safetensors file with a PyTorch suffix", hint=str(out.with_suffix(SUFFIX))
        )
    return out


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    """Two inputs with one output, or an output that is another's input, would destroy something."""
    sources = {job.source.absolute(): job.source for job in jobs}
    taken: dict[Path, Path] = {}
    for job in jobs:
        own = job.target.absolute()
        first = taken.setdefault(own, job.source)
        if first is not job.source:
            raise RequestError(f"{first} and {job.source} would both become {job.target}", hint="two --out-dir, one run each")
        if own in sources and sources[own] != job.source:
            raise RequestError(f"{job.target} would replace an input of the same run", hint="another --out-dir")


def _jobs(path: Path, out_dir: Path, *, folder_output: bool) -> Iterator[Job]:
    """A path's inputs, each with its place below ``out_dir``."""
    for source, relative in found_in(path, ADAPTERS, results=out_dir):
        plain = relative.with_suffix("") if relative.suffix.lower() in ADAPTERS else relative
        yield Job(source, out_dir / (plain if folder_output else plain.parent / (plain.name + SUFFIX)))


def run_batch(jobs: Sequence[Job], run: Callable[[Job], Any], *, as_json: bool, several: bool) -> None:
    """Run every job; one bad file does not stop the rest. Exit code 3 when some failed, 1 when all did."""
    if not several:
        try:
            report = run(jobs[0])
        except SurgeryError as error:
            error.path = error.path or str(jobs[0].source)
            raise
        _show(report, as_json=as_json)
        return
    failed = 0
    for job in jobs:
        try:
            _show(run(job), as_json=as_json, one_line=True)
        except (SurgeryError, OSError) as error:
            failed += 1
            show_error(error, job.source)
            if as_json:
                data(json.dumps({"schema": SCHEMA, "input": str(job.source), "error": error_text(error, job.source)}))
    if failed:
        raise typer.Exit(1 if failed == len(jobs) else 3)


def _show(report: Report, *, as_json: bool, one_line: bool = False) -> None:
    if as_json:
        data(json.dumps(report.to_json(), indent=None if one_line else 2))
    else:
        show_report(report, one_line=one_line)
