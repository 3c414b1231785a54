"""``lorasurgery resize``."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.cli import resize_options as ask
from lorasurgery.cli.batch import Job, jobs_for
from lorasurgery.cli.dry_run import dry_jobs
from lorasurgery.cli.files import is_adapter
from lorasurgery.cli.meta_files import Found, run_each
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.resize_request import (
    Request,
    Theirs,
    data_type,
    layout_id,
    parse_ranks,
    parse_size,
    planned_ranks,
    request,
)
from lorasurgery.cli.resize_run import resized
from lorasurgery.errors import RequestError

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

  lorasurgery resize flux.safetensors small.safetensors --rank 16 --rank "double=0-9:4" --rank "single:8"

  lorasurgery resize sd1.safetensors small.safetensors --rank blocks=0,4,4,4,4,4,4,4,4,4,4,4,8,8,8,8,8,8,8,8,8,8,8,8,8

  lorasurgery resize lora.safetensors --dry-run

  lorasurgery resize --model lora.safetensors --save_to small.safetensors --new_rank 16 --save_precision fp16
"""


def resize(
    paths: ask.Paths = None, given: ask.Given = None, out: ask.Out = None, out_dir: ask.OutDir = None,
    rank: ask.Rank = None, conv_rank: ask.ConvRank = None, pointwise_rank: ask.PointwiseRank = None,
    policy: ask.Policy = None, param: ask.Param = None, size: ask.Size = None, recipe: ask.Recipe = None,
    compat: ask.Compat = None, min_rank: ask.MinRank = 1, grow: ask.Grow = False, uniform: ask.Uniform = False,
    base: ask.Base = None, arch: ask.Arch = None, trained_alpha: TrainedAlpha = None, include: ask.Include = None, exclude: ask.Exclude = None,
    te: ask.TextEncoders = False, full: ask.Full = False, as_: ask.As = None, dora: ask.Dora = "refuse",
    alpha: ask.Alpha = "keep-ratio", factors: ask.Factors = "balanced", target: ask.Target = None,
    dtype: ask.Dtype = "keep", strict: ask.Strict = False, force: ask.Force = False, workers: ask.Workers = None, device: ask.Device = None,
    dry_run: ask.DryRun = False, plan: ask.Plan = None, verbose: ask.Verbose = False, json_: ask.Json = False,
    new_rank: ask.NewRank = None, new_conv_rank: ask.NewConvRank = None, dynamic_method: ask.DynamicMethod = None,
    dynamic_param: ask.DynamicParam = None, model: ask.Model = None, save_to: ask.SaveTo = None,
    save_precision: ask.SavePrecision = None, svd_lowrank_niter: ask.Iterations = None,
) -> None:  # fmt: skip
    """Resize adapters."""
    from lorasurgery.operations.cut import ResizeOptions

    if as_ not in (None, "lora"):
        raise RequestError(f"--as is lora, not {as_}", hint="lorasurgery convert --as lokr, loha or full")
    ranks = parse_ranks(rank, conv_rank)
    theirs = Theirs(new_rank, new_conv_rank, dynamic_method, dynamic_param, model, save_to, save_precision, svd_lowrank_niter)
    options = ResizeOptions(
        **ranks._asdict(), pointwise_rank=pointwise_rank, policy=policy, param=param, compat=compat,
        size=None if size is None else parse_size(size), layout=layout_id(target), recipe=recipe,
        include=tuple(include or ()), exclude=tuple(exclude or ()), as_lora=as_ == "lora", full=full, text_encoders=te,
        dora=dora, min_rank=min_rank, grow=grow, uniform=uniform, alpha=alpha, factors=factors,
        dtype=data_type(dtype, save_precision), workers=workers, device=device,
    )  # fmt: skip
    named = not dry_run or len(paths or []) > 1 or any(path is not None for path in (out, out_dir, save_to))
    how = request(
        theirs.added_to(options), Request(options, size_text=size, planned=planned_ranks(plan), base=base, arch=arch, alpha=trained_alpha,
        strict=strict, force=force, dry_run=dry_run, named=named, verbose=verbose),
    )  # fmt: skip
    jobs, several = _jobs(paths or [], theirs.source_or(given), theirs.output_or(out), out_dir, how)
    targets = {job.source: job.target for job in jobs}
    run_each(
        [Found(job.source, Path(job.source.name)) for job in jobs],
        lambda found: resized(Job(found.path, targets[found.path]), how),
        as_json=json_,
        several=several,
    )


def _jobs(
    paths: list[Path], given: Path | None, out: Path | None, out_dir: Path | None, how: Request
) -> tuple[list[Job], bool]:
    """Inputs and outputs, and whether the request is for several; a dry run of one input needs no output."""
    inputs = [*([given] if given else []), *paths]
    folders = how.options.layout == "peft" or (how.options.layout is None and all(p.is_dir() and is_adapter(p) for p in inputs))
    if how.dry_run and out is None and out_dir is None and len(inputs) == 1:
        return dry_jobs(inputs[0], "resized", folder_output=folders)
    return jobs_for(paths, given, out, out_dir, folder_output=folders), out_dir is not None


resize.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
