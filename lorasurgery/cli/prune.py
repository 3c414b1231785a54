"""``lorasurgery prune``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.batch import Job, jobs_for
from lorasurgery.cli.dry_run import dry_jobs
from lorasurgery.cli.files import is_adapter
from lorasurgery.cli.meta_files import Found, Shown, run_each
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.render import SHOWN, warning_lines

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.cli.part_file import Writing
    from lorasurgery.report import Report
    from lorasurgery.verbs.prune import Pruned, PruneOptions

SCHEMA = 1
"""Version of the JSON form; see docs/split.md."""

PLACES = {"keep": "alpha", "fold": "the factors", "header": "the header"}

HELP = """Leave modules out: by component, block, family or name, or because another model does not have them.

[cyan]--prune-for chroma[/cyan] makes a FLUX LoRA fit Chroma: what it does not have, or has in another shape, goes and is
listed. [cyan]--scale[/cyan] and [cyan]--negate[/cyan] change the strength of what stays: exactly, in alpha, where the
layout has it; else in the factors, exactly for a power of two and with the rounding reported for other numbers.

[bold]Selections[/bold]: te, te1, unet or transformer, in=4-8, mid, double=0-18, single=3,7-9, family=lokr, re=REGEX.

[bold]Examples[/bold]

  lorasurgery prune flux.safetensors chroma.safetensors --prune-for chroma

  lorasurgery prune lora.safetensors style.safetensors --drop te --keep in=4-8 --keep out=0-5

  lorasurgery prune lora.safetensors half.safetensors --scale 0.5

  lorasurgery prune loras/*.safetensors --out-dir unet --keep unet
"""


def prune(
    paths: Annotated[Optional[list[Path]], typer.Argument(metavar="IN... [OUT]", help="Input files or folders, and the output file unless --out or --out-dir is given.", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    keep: Annotated[Optional[list[str]], typer.Option("--keep", help="Keep only this selection. Repeatable.", show_default=False)] = None,  # noqa: UP045
    drop: Annotated[Optional[list[str]], typer.Option("--drop", help="Leave this selection out. Repeatable.", show_default=False)] = None,  # noqa: UP045
    prune_for: Annotated[Optional[str], typer.Option("--prune-for", help="A model by name (chroma, flux1-schnell), or its file: keep what it has.", show_default=False)] = None,  # noqa: UP045
    scale: Annotated[float, typer.Option("--scale", help="Multiply the strength.")] = 1.0,
    negate: Annotated[bool, typer.Option("--negate", help="The opposite of every change.")] = False,
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045
    trained_alpha: TrainedAlpha = None,
    base: Annotated[Optional[Path], typer.Option("--base", help="Base model, header only: names and shapes of a model no table knows.", show_default=False)] = None,  # noqa: UP045
    target: Annotated[Optional[str], typer.Option("--target", "-t", help="Layout to write, as for convert. Default: the input's own.", show_default=False)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option("--dtype", help="keep, fp32, fp16 or bf16.")] = "keep",
    given: Annotated[Optional[Path], typer.Option("--input", "-i", help="The input.", show_default=False)] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", help="The output file (a folder for peft).", show_default=False)] = None,  # noqa: UP045
    out_dir: Annotated[Optional[Path], typer.Option("--out-dir", help="Folder for the outputs of several inputs; mirrors input folders.", show_default=False)] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where anything else would be left out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write; no output has to be named.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Leave modules out of adapters."""
    from lorasurgery.cli.part_file import Writing
    from lorasurgery.verbs.prune import PruneOptions

    options = PruneOptions(tuple(keep or ()), tuple(drop or ()), prune_for, scale, negate)
    options.check()
    how = Writing(target, dtype, force, strict, dry_run, arch, base, trained_alpha)
    how.check()
    inputs = [*([given] if given else []), *(paths or [])]
    folders = target == "peft" or (target is None and bool(inputs) and all(p.is_dir() and is_adapter(p) for p in inputs))
    if dry_run and out is None and out_dir is None and len(inputs) == 1:
        jobs, several = dry_jobs(inputs[0], "pruned", folder_output=folders)
    else:
        jobs, several = jobs_for(paths or [], given, out, out_dir, folder_output=folders), out_dir is not None
    targets = {job.source: job.target for job in jobs}
    run_each(
        [Found(job.source, Path(job.source.name)) for job in jobs],
        lambda found: _one(Job(found.path, targets[found.path]), options, how),
        as_json=json_,
        several=several,
    )


def _one(job: Job, options: PruneOptions, how: Writing) -> Shown:
    from lorasurgery.cli.part_file import write_part
    from lorasurgery.verbs.prune import prune as pruned

    adapter = how.read(job.source)
    result, found = pruned(adapter, options)
    report = write_part(result, job.source, job.target, how)
    report.losses.gather(found.losses)
    report.ledger = adapter.ledger.without([*found.dropped, *report.dropped])
    report.warnings = list(dict.fromkeys([*adapter.warnings, *found.warnings, *report.warnings, *found.losses.alerts()]))
    return Shown(_json(adapter, result, options, found, report), _lines(adapter, result, options, found, report))


def _json(adapter: Adapter, result: Adapter, options: PruneOptions, found: Pruned, report: Report) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "input": report.input,
        "output": report.output,
        "written": report.written,
        "architecture": {"from": adapter.architecture.key, "to": result.architecture.key},
        "layout": {"from": report.source_layout, "to": report.target_layout},
        "modules": {"input": len(adapter), "output": len(result)},
        "pruned": [{"name": name, "reason": reason} for name, reason in found.dropped],
        "scale": {
            "factor": options.factor,
            "written": report.scale_written,
            "alpha_rounding": _alpha_rounding(result, report),
        },
        "rounding": report.losses.total(),
        "dropped": [{"key": key, "reason": reason} for key, reason in report.dropped],
        "carried": [key for key, _ in report.carried],
        "ledger": None if report.ledger is None else report.ledger.to_json(),
        "warnings": report.warnings,
    }


def _alpha_rounding(result: Adapter, report: Report) -> float:
    """The largest relative error of an alpha in fp32, where the result has alphas."""
    from lorasurgery.io.tensors import scalar

    found = 0.0
    for module in result.modules.values() if report.scale_written == "keep" else ():
        if module.delta is not None and module.delta.rank is not None and module.scale.alpha is None:
            alpha = module.scale.value * module.delta.rank
            found = max(found, abs(scalar(alpha).item() / alpha - 1.0) if alpha else 0.0)
    return found


def _lines(adapter: Adapter, result: Adapter, options: PruneOptions, found: Pruned, report: Report) -> list[str]:
    written = report.output if report.written else f"{report.output} (not written)"
    keys = adapter.architecture.key, result.architecture.key
    lines = [
        f"{Path(report.input).name} -> {written}",
        f"  {'model':<9}{keys[0] if keys[0] == keys[1] else ' -> '.join(keys)}",
        f"  {'modules':<9}{len(adapter)} -> {len(result)}",
    ]
    if options.factor != 1.0:
        rounding = report.losses.total() or _alpha_rounding(result, report)
        exact = "exact" if not rounding else f"to {rounding:.1e}"
        lines.append(f"  {'scale':<9}x {options.factor:g}, in {PLACES.get(report.scale_written, 'the factors')}, {exact}")
    for reason, count in Counter(reason for _, reason in found.dropped).most_common(SHOWN):
        first = next(name for name, own in found.dropped if own == reason)
        lines.append(f"  pruned: {first}{f' and {count - 1} more' if count > 1 else ''}: {reason}")
    more = len({reason for _, reason in found.dropped}) - SHOWN
    lines += [f"  pruned: ... for {more} more reasons (--json lists every module)"] if more > 0 else []
    lines += [f"  left out: {key}: {reason}" for key, reason in report.dropped]
    lines += [f"  carried: {key}: {reason}" for key, reason in report.carried]
    return lines + warning_lines(report.warnings)


prune.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
