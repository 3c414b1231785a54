"""``lorasurgery ema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.advice import advised
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.render import data, plain, warning_lines
from lorasurgery.cli.resize_text import dropped_lines
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.cli.ema_run import Averaged, EmaRequest

SCHEMA = 1
"""Version of the JSON form; see docs/ema.md."""
FACTORS, DELTA = "factors", "delta"

HELP = """Average the checkpoints of a training run (post-hoc EMA): newer ones count more.

As musubi-tuner's lora_post_hoc_ema: the tensors are averaged one by one, bit for bit as there, with a decay of
[cyan]--beta[/cyan], going to [cyan]--beta2[/cyan], or with the power function of a width [cyan]--sigma-rel[/cyan] (up to
0.3003, where there it ends at 0.2887). [cyan]--on delta[/cyan] averages what the files do instead, exactly: then ranks,
alphas, modules and layouts may differ, the ranks add up, and [cyan]--rank[/cyan] cuts them to the best approximation.

The order is read from ss_steps in the metadata, else from the numbers in the names (name-000010, name-step00000500, the one
without a number last). Every file's weight is shown; [cyan]--dry-run[/cyan] only shows them.

[bold]Examples[/bold]

  lorasurgery ema run/*.safetensors -o ema.safetensors --sigma-rel 0.2

  lorasurgery ema run-000010.safetensors run-000020.safetensors run.safetensors -o ema.safetensors --beta 0.5 --beta2 0.9

  lorasurgery ema run/ -o ema.safetensors --on delta --rank 32
"""


def ema(
    paths: Annotated[list[Path], typer.Argument(metavar="CHECKPOINTS...", help="Files of one training run, or their folder.")],
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", "--output_file", help="The output file (a folder for peft).", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    beta: Annotated[float, typer.Option("--beta", help="How much of the average stays at each file.")] = 0.95,
    beta2: Annotated[Optional[float], typer.Option("--beta2", help="The same at the last file, going there linearly. Default: --beta.", show_default=False)] = None,  # noqa: UP045
    sigma_rel: Annotated[Optional[float], typer.Option("--sigma-rel", "--sigma_rel", help="In place of both: the relative width of a power function, e.g. 0.2. The first file then only marks the start, with weight 0.", show_default=False)] = None,  # noqa: UP045
    keep_first: Annotated[bool, typer.Option("--keep-first", help="With --sigma-rel: count the first file, too.")] = False,
    on: Annotated[str, typer.Option("--on", help="factors: average the tensors. delta: average the changes they make.")] = FACTORS,
    rank: Annotated[Optional[int], typer.Option("--rank", "-r", help="With --on delta: cut every module to this rank.", show_default=False)] = None,  # noqa: UP045
    measure: Annotated[bool, typer.Option("--measure", help="With --on factors: say how far the result is from the average of the changes.")] = False,
    sort: Annotated[str, typer.Option("--sort", help="steps, time (of the files' last change) or given (oldest first).")] = "steps",
    no_sort: Annotated[bool, typer.Option("--no-sort", "--no_sort", help="The same as --sort given.")] = False,
    arch: Annotated[Optional[str], typer.Option("--arch", help="With --on delta: override detection.", show_default=False)] = None,  # noqa: UP045
    trained_alpha: TrainedAlpha = None,
    base: Annotated[Optional[Path], typer.Option("--base", help="Base model, header only: names and shapes of a model no table knows.", show_default=False)] = None,  # noqa: UP045
    target: Annotated[Optional[str], typer.Option("--target", "-t", help="Layout to write, as for convert. Default: the files' own.", show_default=False)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option("--dtype", help="keep, fp32, fp16 or bf16.")] = "keep",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail rather than leave anything out.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write; no output has to be named.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Average checkpoints."""
    from lorasurgery.cli.ema_run import EmaRequest, run
    from lorasurgery.verbs.ema.ema import EmaOptions

    if on not in (FACTORS, DELTA):
        raise RequestError(f"--on is {FACTORS} or {DELTA}, not {on}")
    if on == FACTORS and (rank is not None or arch is not None):
        raise RequestError("--rank and --arch are for --on delta: averaged tensors keep their shapes", hint="--on delta")
    if on == FACTORS and trained_alpha is not None:
        raise RequestError("--trained-alpha is for --on delta: averaged tensors keep their scale", hint="--on delta")
    if on == FACTORS and base is not None and target is None and dtype == "keep":
        raise RequestError("the files' own names need no --base: averaged tensors keep them", hint="--on delta, or --target")
    if on == DELTA and measure:
        raise RequestError("--measure is for --on factors: the average of the changes is exact")
    if out is None and not dry_run:
        raise RequestError("where should the average go?", hint="-o OUT, or --dry-run to see the weights")
    if sigma_rel is not None and beta2 is not None:
        raise RequestError("--sigma-rel stands in place of --beta and --beta2", hint="one of the two")
    options = EmaOptions(beta, beta2, sigma_rel, keep_first)
    options.check()
    order = "given" if no_sort else sort
    request = EmaRequest(
        options, on == DELTA, rank, order, arch, base, target, dtype, force, strict, dry_run, measure, trained_alpha
    )
    with advised({}):
        done = run(paths, out, request)
    _show(request, done, as_json=json_)


def _show(request: EmaRequest, done: Averaged, *, as_json: bool) -> None:
    if as_json:
        data(json.dumps(_json(request, done), indent=2))
        return
    for line in _lines(request, done):
        data(plain(line))


def _json(request: EmaRequest, done: Averaged) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "output": None if done.output is None else str(done.output),
        "written": done.written,
        "on": DELTA if request.delta else FACTORS,
        "way": request.options.way,
        "order": done.by,
        "files": [{"path": str(path), "weight": weight} for path, weight in zip(done.paths, done.weights, strict=True)],
        "tensors": done.tensors,
        "rounding": done.rounding,
        "distance_from_changes": done.distance,
        "resize": done.resize,
        "dropped": [{"key": key, "reason": reason} for key, reason in done.dropped],
        "ledgers": [{"name": name, **own.to_json()} for name, own in done.ledgers],
        "warnings": list(done.warnings),
        "seconds": round(done.seconds, 3),
    }


def _lines(request: EmaRequest, done: Averaged) -> list[str]:
    name = "(no output)" if done.output is None else str(done.output)
    what = "changes" if request.delta else "tensors"
    lines = [f"{len(done.paths)} checkpoints -> {name}{'' if done.written else ' (not written)'}"]
    lines += [f"  {'average':<9}of the {what}, {request.options.way}", f"  {'order':<9}{done.by}"]
    lines += [f"  {weight:>9.5f}  {path.name}" for path, weight in zip(done.paths, done.weights, strict=True)]
    if done.resize is not None:
        lines.append(f"  {'rank':<9}{request.rank}: relative error {done.resize['relative_error']:.4f}, the least at that rank")
    if done.distance is not None:
        lines.append(f"  {'distance':<9}{done.distance:.4f} from the average of the changes, which --on delta gives")
    if done.rounding:
        lines.append(f"  {'rounding':<9}{done.rounding:.1e} of the change")
    lines += dropped_lines(done.dropped) + warning_lines(_notes(request, done))
    return [*lines, f"  {'time':<9}{done.seconds:.2f} s"]


def _notes(request: EmaRequest, done: Averaged) -> Sequence[str]:
    unused = [path.name for path, weight in zip(done.paths, done.weights, strict=True) if weight == 0.0]
    more = " (--keep-first counts it)" if request.options.sigma_rel is not None else ""
    return [*done.warnings, *(f"{name} has no weight{more}" for name in unused)]


ema.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
