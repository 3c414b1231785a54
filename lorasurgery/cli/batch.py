"""Inputs to outputs: one file, many files, folders, mirrored into an output folder."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lorasurgery.cli.render import data, show_error, show_report
from lorasurgery.errors import SurgeryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.report import Report

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


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
        if out.is_dir() and not folder_output:
            out = out / inputs[0].name
        return [Job(inputs[0], out)]
    if out is not None:
        raise typer.BadParameter("either --output or --out-dir", param_hint="--output")
    found = [job for path in inputs for job in _expanded(path, out_dir, folder_output=folder_output)]
    if not found:
        raise typer.BadParameter(f"no adapter file among {', '.join(map(str, inputs)) or 'nothing'}", param_hint="IN")
    return found


def _expanded(path: Path, out_dir: Path, *, folder_output: bool) -> list[Job]:
    """A file, a PEFT folder, a folder of files (searched through), or a glob the shell left alone."""

    def target(relative: Path) -> Path:
        return out_dir / (relative.with_suffix("") if folder_output else relative.with_suffix(".safetensors"))

    if path.is_dir() and not (path / "adapter_config.json").is_file():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        return [Job(p, target(p.relative_to(path))) for p in files]
    if not path.exists() and glob.has_magic(str(path)):
        return [Job(Path(p), target(Path(Path(p).name))) for p in sorted(glob.glob(str(path), recursive=True))]
    return [Job(path, target(Path(path.name)))]


def run_batch(jobs: Sequence[Job], run: Callable[[Job], Any], *, as_json: bool, several: bool) -> None:
    """Run every job; one bad file does not stop the rest. Exit code 3 when some failed, 1 when all did."""
    if not several:
        _show(run(jobs[0]), as_json=as_json)
        return
    failed = 0
    for job in jobs:
        try:
            _show(run(job), as_json=as_json, one_line=True)
        except (SurgeryError, OSError) as error:
            failed += 1
            show_error(error, job.source)
            if as_json:
                data(json.dumps({"input": str(job.source), "error": str(error)}))
    if failed:
        raise typer.Exit(1 if failed == len(jobs) else 3)


def _show(report: Report, *, as_json: bool, one_line: bool = False) -> None:
    if as_json:
        data(json.dumps(report.to_json(), indent=None if one_line else 2))
    else:
        show_report(report, one_line=one_line)
