"""``lorasurgery resize``."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.batch import SUFFIX, Job, jobs_for
from lorasurgery.cli.files import is_adapter
from lorasurgery.cli.meta_files import Found, Shown, run_each
from lorasurgery.cli.resize_request import PRECISIONS, Request, cache_file, parse_ranks, parse_size, with_sd_scripts
from lorasurgery.cli.resize_text import dropped_lines, plan_lines, report_lines
from lorasurgery.errors import OutputExistsError, RequestError, SurgeryError, UnknownArchitectureError

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.report import Report
    from lorasurgery.surgery.resize import BaseModel, NormCache, Plan, ResizeReport

SCHEMA = 1
"""Version of the JSON form; see docs/resize.md."""

HELP = """Other ranks for an adapter: the best approximation of the asked rank, size or quality, from its factors alone.

Every family, model and layout: LoRA and LoCon, Tucker, LoHa and LoKr (which stay what they are, or become LoRA with
[cyan]--as lora[/cyan]), DoRA with [cyan]--base[/cyan], full differences with [cyan]--full[/cyan]. The effect keeps its
strength. Text encoders stay as they are without [cyan]--te[/cyan]. sd-scripts' command lines work as they are.

[bold]What decides[/bold]: [cyan]--rank[/cyan]; [cyan]--policy[/cyan] with [cyan]--param[/cyan]: sv_ratio, sv_cumulative,
sv_fro, energy, threshold, knee, error, params; [cyan]--size[/cyan]; or [cyan]--recipe[/cyan] as in resize_lora. With the
last three, [cyan]--rank[/cyan] is the most a module may get.

[bold]Examples[/bold]

  lorasurgery resize lora.safetensors small.safetensors --rank 16

  lorasurgery resize lora.safetensors small.safetensors --size 40MiB

  lorasurgery resize lora.safetensors small.safetensors --policy sv_fro --param 0.95 --rank 32 --verbose

  lorasurgery resize loras/*.safetensors --out-dir small --rank 32 --rank "attn=8" --exclude "proj_out$"

  lorasurgery resize lora.safetensors --dry-run

  lorasurgery resize --model lora.safetensors --save_to small.safetensors --new_rank 16 --save_precision fp16
"""

HINTS = {
    "a rank, a policy, a size or a recipe": "--rank 16, --policy sv_fro --param 0.9, --size 40MiB, --recipe, or --dry-run for a plan",
    "as LoRA": "--as lora",
    "as LoRA, or a fixed rank": "--as lora, or --rank alone",
    "dora fold": "--dora fold",
    "min rank 0": "--min-rank 0",
    "the base model with dora recompute or fold, or exclude these modules": "--base MODEL with --dora recompute or --dora fold, or --exclude for these modules",
    "the base model's file or folder": "--base MODEL, a file or a pipeline's folder",
    "text encoders, full differences, or other patterns": "--te for text encoders, --full for full differences, or other patterns",
}
"""The library's advice in the words of the command line."""


def resize(
    paths: Annotated[Optional[list[Path]], typer.Argument(metavar="IN... [OUT]", help="Input files or folders, and the output file unless --out or --out-dir is given.", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    rank: Annotated[Optional[list[str]], typer.Option("--rank", "-r", help='The new rank N of linear layers (the most, where something else decides), or "REGEX=N" for modules by name, in the file or in the model; the first that fits holds. Repeatable.', show_default=False)] = None,  # noqa: UP045
    conv_rank: Annotated[Optional[int], typer.Option("--conv-rank", help="Of convolutions with a kernel. Default: --rank.", show_default=False)] = None,  # noqa: UP045
    pointwise_rank: Annotated[Optional[int], typer.Option("--pointwise-rank", help="Of 1x1 convolutions. Default: --rank.", show_default=False)] = None,  # noqa: UP045
    policy: Annotated[Optional[str], typer.Option("--policy", help="sv_ratio, sv_cumulative, sv_fro, energy (share of the squared norm), threshold (smallest singular value), knee, error (largest relative error) or params (share of the parameters).", show_default=False)] = None,  # noqa: UP045
    param: Annotated[Optional[float], typer.Option("--param", help="The policy's number.", show_default=False)] = None,  # noqa: UP045
    size: Annotated[Optional[str], typer.Option("--size", help="The largest size of the file, e.g. 40MiB, 800KiB, 40MB: spent where it counts most.", show_default=False)] = None,  # noqa: UP045
    recipe: Annotated[Optional[str], typer.Option("--recipe", help='As resize_lora: "fro_ckpt=1,thr=-3.5".', show_default=False)] = None,  # noqa: UP045
    base: Annotated[Optional[Path], typer.Option("--base", help="The base model, a checkpoint or a pipeline's folder: for recipes that look at it, for DoRA, and for names no table knows.", show_default=False)] = None,  # noqa: UP045
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045
    include: Annotated[Optional[list[str]], typer.Option("--include", help="Only modules whose name matches a regular expression. Repeatable.", show_default=False)] = None,  # noqa: UP045
    exclude: Annotated[Optional[list[str]], typer.Option("--exclude", help="Leave these modules as they are. Repeatable.", show_default=False)] = None,  # noqa: UP045
    te: Annotated[bool, typer.Option("--te", help="Resize text encoders, too.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Compress full differences into LoRA.")] = False,
    as_: Annotated[Optional[str], typer.Option("--as", help="lora: turn LoHa and LoKr into LoRA.", show_default=False)] = None,  # noqa: UP045
    dora: Annotated[str, typer.Option("--dora", help="refuse; with --base: recompute the magnitude, or fold it into a plain LoRA.")] = "refuse",
    uniform: Annotated[bool, typer.Option("--uniform", help="Pad with zeros to one rank, for readers that want that.")] = False,
    grow: Annotated[bool, typer.Option("--grow", help="Allow more than the old rank, padded with zeros.")] = False,
    min_rank: Annotated[int, typer.Option("--min-rank", help="0: leave out modules of which the policy keeps nothing.")] = 1,
    alpha: Annotated[str, typer.Option("--alpha", help="keep-ratio (alpha / rank stays), rank (alpha is the rank) or a number. The effect is the same.")] = "keep-ratio",
    factors: Annotated[str, typer.Option("--factors", help="balanced, or kohya: all of the strength in up, as sd-scripts writes it.")] = "balanced",
    compat: Annotated[Optional[str], typer.Option("--compat", help="Count as another tool does: kohya (sd-scripts' policies keep one more than they need) or kj (KJNodes' knee).", show_default=False)] = None,  # noqa: UP045
    target: Annotated[Optional[str], typer.Option("--target", "-t", help="Layout to write, as for convert. Default: the input's own.", show_default=False)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option("--dtype", help="keep, fp32, fp16 or bf16.")] = "keep",
    workers: Annotated[Optional[int], typer.Option("--workers", help="Threads. Default: one for each core, at most 8.", show_default=False)] = None,  # noqa: UP045
    plan: Annotated[Optional[str], typer.Option("--plan", help="Ranks of the plan, e.g. 2,6,12. Default: 4,8,16,32,64 up to the file's own.", show_default=False)] = None,  # noqa: UP045
    new_rank: Annotated[Optional[int], typer.Option("--new_rank", help="sd-scripts' --rank; 4 where its command line says nothing.", show_default=False)] = None,  # noqa: UP045
    new_conv_rank: Annotated[Optional[int], typer.Option("--new_conv_rank", help="sd-scripts' rank of all convolutions, 1x1 ones too.", show_default=False)] = None,  # noqa: UP045
    dynamic_method: Annotated[Optional[str], typer.Option("--dynamic_method", help="sd-scripts' --policy.", show_default=False)] = None,  # noqa: UP045
    dynamic_param: Annotated[Optional[float], typer.Option("--dynamic_param", help="sd-scripts' --param.", show_default=False)] = None,  # noqa: UP045
    model: Annotated[Optional[Path], typer.Option("--model", help="sd-scripts' input.", show_default=False)] = None,  # noqa: UP045
    save_to: Annotated[Optional[Path], typer.Option("--save_to", help="sd-scripts' output.", show_default=False)] = None,  # noqa: UP045
    save_precision: Annotated[Optional[str], typer.Option("--save_precision", help="sd-scripts' --dtype: float, fp16 or bf16; without it the dtype stays.", show_default=False)] = None,  # noqa: UP045
    device: Annotated[Optional[str], typer.Option("--device", help="sd-scripts' own; accepted, and not needed.", show_default=False)] = None,  # noqa: ARG001, UP045
    given: Annotated[Optional[Path], typer.Option("--input", "-i", help="The input.", show_default=False)] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", help="The output file (a folder for peft).", show_default=False)] = None,  # noqa: UP045
    out_dir: Annotated[Optional[Path], typer.Option("--out-dir", help="Folder for the outputs of several inputs; mirrors input folders.", show_default=False)] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write nothing, and plan: size against error for several ranks. Neither an output nor a rank has to be named.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every module.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Resize adapters."""
    if as_ not in (None, "lora"):
        raise RequestError(f"--as is lora, not {as_}", hint="lorasurgery convert --as lokr, loha or full")
    for first, second, names in ((given, model, "--input and --model"), (out, save_to, "--out and --save_to")):
        if first is not None and second is not None:
            raise RequestError(f"{names} are the same thing", hint="one of them")
    plain, by_name = parse_ranks(rank or [])
    chosen = with_sd_scripts(
        {
            "rank": plain, "ranks": by_name, "conv_rank": conv_rank, "pointwise_rank": pointwise_rank, "policy": policy,
            "param": param, "size": None if size is None else parse_size(size), "recipe": recipe, "compat": compat,
            "layout": _layout(target), "include": tuple(include or ()), "exclude": tuple(exclude or ()), "as_lora": as_ == "lora",
            "full": full, "text_encoders": te, "dora": dora, "min_rank": min_rank, "grow": grow, "uniform": uniform,
            "alpha": alpha, "factors": factors, "dtype": _dtype(dtype, save_precision), "workers": workers,
        },
        rank=new_rank, conv_rank=new_conv_rank, method=dynamic_method, param=dynamic_param,
        old=any(v is not None for v in (new_rank, new_conv_rank, dynamic_method, dynamic_param, model, save_to, save_precision)),
    )  # fmt: skip
    how = _request(chosen, size, _planned(plan), base=base, arch=arch, force=force, dry_run=dry_run, verbose=verbose)
    jobs, several = _jobs(paths or [], given or model, out or save_to, out_dir, how)
    targets = {job.source: job.target for job in jobs}
    run_each(
        [Found(job.source, Path(job.source.name)) for job in jobs],
        lambda found: _one(Job(found.path, targets[found.path]), how),
        as_json=json_,
        several=several,
    )


def _layout(target: str | None) -> str | None:
    from lorasurgery.layouts.targets import layout

    return None if target is None else layout(target).id


def _dtype(dtype: str, precision: str | None) -> str:
    if precision is None:
        return dtype
    if dtype != "keep":
        raise RequestError("--dtype and --save_precision are the same thing", hint="one of them")
    if precision not in PRECISIONS:
        raise RequestError(f"--save_precision is {' or '.join(PRECISIONS)}, not {precision}")
    return PRECISIONS[precision]


def _planned(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else text.replace(",", " ").split()
    if text is not None and not (words and all(word.isdigit() and int(word) for word in words)):
        raise RequestError(f"{text!r} is no list of ranks", hint="--plan 4,8,16")
    return tuple(sorted({int(word) for word in words}))


def _request(chosen: dict[str, Any], size: str | None, planned: tuple[int, ...], **more: Any) -> Request:  # noqa: ANN401
    """Raises RequestError for options that no file could make right, before any file is opened."""
    from lorasurgery.surgery.resize import ResizeOptions

    deciding = ("rank", "conv_rank", "pointwise_rank", "policy", "size", "recipe")
    asked = any(chosen[name] is not None for name in deciding) or bool(chosen["ranks"])
    if chosen["workers"] is not None and chosen["workers"] < 1:
        raise RequestError(f"--workers must be at least 1, not {chosen['workers']}")
    if planned and not more["dry_run"]:
        raise RequestError("--plan is for --dry-run")
    options = ResizeOptions(**chosen)
    with _Advice():
        if options.uniform and options.has_size:
            raise RequestError(
                "--uniform would pad the file beyond its size", hint="--rank N; --dry-run shows the size of each"
            )
        (options if asked or not more["dry_run"] else replace(options, rank=1)).check()
    if more["arch"] is not None:
        from lorasurgery.architectures import named

        named(more["arch"])
    return Request(options, asked, size, planned, **more)


class _Advice:
    """Says what to try in the words of the command line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, SurgeryError) and error.hint is not None:
            error.hint = HINTS.get(error.hint, error.hint)


def _jobs(
    paths: list[Path], given: Path | None, out: Path | None, out_dir: Path | None, how: Request
) -> tuple[list[Job], bool]:
    """Inputs and outputs, and whether the request is for several; a dry run of one input needs no output."""
    inputs = [*([given] if given else []), *paths]
    folders = how.options.layout == "peft" or (how.options.layout is None and all(p.is_dir() and is_adapter(p) for p in inputs))
    if how.dry_run and out is None and out_dir is None and len(inputs) == 1:
        one = inputs[0]
        if one.exists() and (one.is_file() or is_adapter(one)):
            return [Job(one, one.with_name(f"{one.stem}-resized{'' if folders else SUFFIX}"))], False
        out_dir = (one if one.is_dir() else one.parent) / "resized"
    return jobs_for(paths, given, out, out_dir, folder_output=folders), out_dir is not None


def _one(job: Job, how: Request) -> Shown:
    """One file."""
    with _Advice():
        adapter = _load(job.source, how)
        how = replace(how, options=replace(how.options, layout=_writable(adapter, how)))
        target = _output(job, adapter, how)
        model, cache = _base(adapter, how)
        try:
            return _resized(job.source, target, adapter, how, model)
        finally:
            if cache is not None:
                with suppress(OSError):  # a cache that cannot be written is no reason to fail
                    cache.save()


def _load(source: Path, how: Request) -> Adapter:
    """The adapter; names that no table knows come from the base model."""
    from lorasurgery.api import load

    try:
        return load(source, arch=how.arch)
    except UnknownArchitectureError as error:
        if how.base is not None and how.base.is_file() and how.arch is None:
            return load(source, base=how.base)
        error.hint = "--base MODEL for names and shapes, or --arch NAME"
        raise


def _writable(adapter: Adapter, how: Request) -> str:
    """The layout to write; raises RequestError for an input whose own is only read."""
    from lorasurgery.layouts.targets import LAYOUTS

    folder = adapter.path is not None and adapter.path.is_dir()
    name = how.options.layout or ("peft" if folder else adapter.layout)
    if name not in LAYOUTS:
        raise RequestError(
            f"its layout, {name}, is only read, not written", path=adapter.path, hint="--target comfyui, or another"
        )
    return name


def _output(job: Job, adapter: Adapter, how: Request) -> Path:
    """Where the result goes, checked before anything is computed."""
    from lorasurgery.io.writer import check_output

    target = job.target
    if how.options.layout == "peft" and target.suffix == SUFFIX:
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
    from lorasurgery.surgery.resize import NormCache, open_base

    if how.base is None or (how.options.recipe is None and how.options.dora == "refuse"):
        return None, None
    cache = NormCache(cache_file())
    return open_base(how.base, adapter.architecture, cache), cache


def _resized(source: Path, target: Path, adapter: Adapter, how: Request, model: BaseModel | None) -> Shown:
    from lorasurgery.api import SaveOptions, save
    from lorasurgery.surgery.resize import plan, resize
    from lorasurgery.surgery.resize.size import file_size

    planned = plan(adapter, how.options, how.plan_ranks(adapter), model) if how.dry_run else None
    if not how.asked:
        return _shown(source, target, adapter, how, planned, None)
    result, report = resize(how.marked(adapter), how.options, model)
    result, writing = _converted(result, adapter, how)
    writing.input = str(source)
    report.size = file_size(result)
    save(result, target, options=SaveOptions(force=how.force, dry_run=how.dry_run), report=writing)
    if writing.written:
        report.size = _bytes(target)
    return _shown(source, target, adapter, how, planned, (report, writing))


def _converted(result: Adapter, adapter: Adapter, how: Request) -> tuple[Adapter, Report]:
    """The result in its target layout; in the input's own it needs no conversion."""
    from lorasurgery.report import Report
    from lorasurgery.surgery.convert import convert

    target = how.options.layout or adapter.layout
    if target != adapter.layout:
        return convert(result, target)
    return result, Report(architecture=adapter.architecture.key, source_layout=target, target_layout=target)


def _bytes(path: Path) -> int:
    """Of a file, or of the safetensors files in a PEFT folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob(f"*{SUFFIX}"))
    return path.stat().st_size


def _shown(
    source: Path, target: Path, adapter: Adapter, how: Request, planned: Plan | None, done: tuple[ResizeReport, Report] | None
) -> Shown:
    report, writing = done if done is not None else (None, None)
    written = writing is not None and writing.written
    warnings = [*adapter.warnings, *(writing.warnings if writing is not None else ())]
    before = _bytes(source)
    found = {
        "schema": SCHEMA,
        "input": str(source),
        "output": str(target),
        "written": written,
        "architecture": adapter.architecture.key,
        "layout": {"from": adapter.layout, "to": how.options.layout},
        "way": how.way,
        "base": None if how.base is None else str(how.base),
        "bytes": {"input": before, "output": None if report is None else report.size},
        "resize": None if report is None else report.to_json(),
        "plan": None if planned is None else planned.to_json(),
        "dropped": [] if writing is None else [{"key": key, "reason": reason} for key, reason in writing.dropped],
        "warnings": warnings,
    }
    lines = [f"{source.name} -> {target if written else f'{target} (not written)'}"]
    layout = adapter.layout if adapter.layout == how.options.layout else f"{adapter.layout} -> {how.options.layout}"
    lines += [f"  {'model':<13}{adapter.architecture.key}", f"  {'layout':<13}{layout}"]
    if report is not None and writing is not None:
        lines.append(f"  {'asked':<13}{how.way}")
        lines += report_lines(report, before=before, after=report.size or 0, verbose=how.verbose)
        lines += dropped_lines(writing.dropped)
    if how.base is not None and how.options.dora != "refuse":
        lines.append(f"  note: errors of DoRA modules are against what they do to {how.base.name}")
    lines += [f"  note: {text}" for text in warnings]
    return Shown(found, lines + (plan_lines(planned) if planned is not None else []))


resize.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
