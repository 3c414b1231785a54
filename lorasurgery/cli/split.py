"""``lorasurgery split``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.files import expanded
from lorasurgery.cli.meta_files import Found, Shown, run_each
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.render import warning_lines
from lorasurgery.cli.resize_text import dropped_lines
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.cli.part_file import Writing
    from lorasurgery.report import Report

SCHEMA = 1
"""Version of the JSON form; see docs/split.md."""

HELP = """Divide an adapter into several files, whose modules are the same bytes; merging them gives the file back.

By component (unet or transformer, te1, te2 ...), by block, by kind of module (all attn1.to_q ...) or by family. Keys that no
table explains go with the first part, and are listed.

[bold]Examples[/bold]

  lorasurgery split lora.safetensors --by component -o parts/lora

  lorasurgery split lora.safetensors --by block --out-dir blocks

  lorasurgery split loras/*.safetensors --by component --out-dir parts --json
"""


def split(
    paths: Annotated[list[Path], typer.Argument(metavar="IN...", help="Input files or folders.")],
    by: Annotated[str, typer.Option("--by", help="component, block, kind or family.")] = "component",
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", help="What the outputs' names begin with: OUT-te1.safetensors, OUT-unet.safetensors ...", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    out_dir: Annotated[Optional[Path], typer.Option("--out-dir", help="Folder for the outputs, named after their inputs.", show_default=False)] = None,  # noqa: UP045
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045
    trained_alpha: TrainedAlpha = None,
    base: Annotated[Optional[Path], typer.Option("--base", help="Base model, header only: names and shapes of a model no table knows.", show_default=False)] = None,  # noqa: UP045
    target: Annotated[Optional[str], typer.Option("--target", "-t", help="Layout to write, as for convert. Default: the input's own.", show_default=False)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option("--dtype", help="keep, fp32, fp16 or bf16.")] = "keep",
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail rather than leave anything out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write; no output has to be named.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Divide adapters."""
    from lorasurgery.cli.part_file import Writing
    from lorasurgery.operations.select.parts import WAYS

    if by not in WAYS:
        raise RequestError(f"--by is {', '.join(WAYS[:-1])} or {WAYS[-1]}, not {by}")
    how = Writing(target, dtype, force, strict, dry_run, arch, base, trained_alpha)
    how.check()
    inputs = [file for path in paths for file in expanded(path)]
    if not inputs:
        raise RequestError(f"no adapter among {', '.join(map(str, paths))}")
    stems = _stems(inputs, out, out_dir, dry_run=dry_run)
    run_each(
        [Found(path, Path(path.name)) for path in inputs],
        lambda found: _one(found.path, stems[found.path], by, how),
        as_json=json_,
        several=len(inputs) > 1,
    )


def _stems(inputs: list[Path], out: Path | None, out_dir: Path | None, *, dry_run: bool) -> dict[Path, Path]:
    """What each input's outputs begin with."""
    if out is not None and out_dir is not None:
        raise RequestError("one place for the results, please", hint="-o PREFIX or --out-dir DIR")
    if out is not None:
        if len(inputs) > 1:
            raise RequestError("several inputs have no room in one prefix", hint="--out-dir DIR")
        name = out.with_suffix("") if out.suffix == ".safetensors" else out
        return {inputs[0]: name / inputs[0].stem if name.is_dir() else name}
    if out_dir is None and not dry_run:
        raise RequestError("where should the parts go?", hint="-o PREFIX, or --out-dir DIR")
    found = {path: (out_dir or path.parent) / path.stem for path in inputs}
    if len(set(found.values())) < len(found):
        raise RequestError("two inputs of one name would share their outputs", hint="one run and --out-dir each")
    return found


def _one(source: Path, stem: Path, by: str, how: Writing) -> Shown:
    from lorasurgery.cli.part_file import write_part
    from lorasurgery.io.writer import check_output
    from lorasurgery.operations.select.parts import file_name
    from lorasurgery.operations.select.parts import split as divided

    adapter = how.read(source)
    parts = divided(adapter, by)
    suffix = how.suffix(adapter)
    outputs = {name: stem.with_name(f"{stem.name}-{file_name(name)}{suffix}") for name in parts}
    if len(set(outputs.values())) < len(outputs):
        raise RequestError("two parts would get one file name", path=source, hint="--by another way")
    for path in outputs.values():
        if not how.dry_run:
            check_output(path, [source], force=how.force)
    new = [path for path in outputs.values() if not path.exists()]
    try:
        reports = {name: write_part(part, source, outputs[name], how) for name, part in parts.items()}
    except BaseException:  # all parts or none
        _remove(new)
        raise
    return Shown(_json(source, adapter, by, parts, reports), _lines(source, adapter, by, parts, reports))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _json(source: Path, adapter: Adapter, by: str, parts: dict[str, Adapter], reports: dict[str, Report]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "input": str(source),
        "architecture": adapter.architecture.key,
        "by": by,
        "modules": len(adapter),
        "parts": [
            {
                "part": name,
                "output": report.output,
                "written": report.written,
                "modules": len(parts[name]),
                "rounding": report.losses.total(),
                "carried": [key for key, _ in report.carried],
                "dropped": [{"key": key, "reason": reason} for key, reason in report.dropped],
            }
            for name, report in reports.items()
        ],
        "ledger": adapter.ledger.without([left for report in reports.values() for left in report.dropped]).to_json(),
        "warnings": _warnings(adapter, reports),
    }


def _warnings(adapter: Adapter, reports: dict[str, Report]) -> list[str]:
    return list(dict.fromkeys([*adapter.warnings, *(text for report in reports.values() for text in report.warnings)]))


def _lines(source: Path, adapter: Adapter, by: str, parts: dict[str, Adapter], reports: dict[str, Report]) -> list[str]:
    lines = [f"{source.name}: {adapter.architecture.key}, {len(adapter)} modules, {len(parts)} parts by {by}"]
    for name, report in reports.items():
        error = f", rounded: {report.losses.total():.1e}" if report.losses.entries else ""
        written = report.output if report.written else f"{report.output} (not written)"
        lines.append(f"  {len(parts[name]):>5} modules  {name:<20}  {written}{error}")
    for report in reports.values():
        lines += [f"  carried: {key} ({reason}), to {Path(report.output).name}" for key, reason in report.carried]
        lines += dropped_lines(report.dropped)
    return lines + warning_lines(_warnings(adapter, reports))


split.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
