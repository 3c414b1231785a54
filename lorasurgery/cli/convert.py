"""``lorasurgery convert``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, Optional

import typer

from lorasurgery.cli.batch import Job, jobs_for, run_batch
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.render import announce
from lorasurgery.errors import OutputExistsError, RequestError, UnknownArchitectureError

if TYPE_CHECKING:
    from lorasurgery.api import SaveOptions
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.operations.conversion.convert import Options
    from lorasurgery.report import Report

HELP = """Convert adapter files between the layouts of trainers and programs, exactly or not at all.

The input's layout, architecture and families are detected; renames move bytes, fused weights (qkv) are put together or
taken apart exactly. What the target cannot hold exactly is refused with the options that would do it.

[bold]Targets[/bold]: [cyan]sd-scripts[/cyan] (also default, kohya) for sd-scripts and musubi-tuner;
[cyan]diffusers[/cyan] for load_lora_weights; [cyan]comfyui[/cyan]; [cyan]other[/cyan], musubi-tuner's name for
dotted trainer names; [cyan]peft[/cyan], a folder with adapter_config.json; [cyan]lycoris[/cyan] for LyCORIS and
SimpleTuner; [cyan]onetrainer[/cyan].

[bold]Examples[/bold]

  lorasurgery convert my_lora.safetensors out.safetensors --target comfyui

  lorasurgery convert --input zimage_lokr.safetensors --output out.safetensors --target comfyui --qkv fuse --lokr-rank 64

  lorasurgery convert loras/*.safetensors --out-dir converted --target diffusers --as lora --energy 0.9999

  lorasurgery convert peft_folder/ out.safetensors --target sd-scripts --dry-run --json
"""

Inputs = Annotated[
    Optional[list[Path]],  # noqa: UP045  typer evaluates this on Python 3.10 too
    typer.Argument(
        metavar="IN... [OUT]",
        help="Input files or folders, and the output file unless --out-dir is given.",
        show_default=False,
    ),
]


def convert(
    paths: Inputs = None,
    target: Annotated[str, typer.Option("--target", "-t", help="Layout to write: sd-scripts (default, kohya), diffusers, comfyui, other, peft, lycoris, onetrainer.", show_default=False)] = ...,  # type: ignore[assignment]
    given: Annotated[Optional[Path], typer.Option("--input", "-i", help="The input, as musubi-tuner spells it.", show_default=False)] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option("--output", "--out", "-o", help="The output file (a folder for peft).", show_default=False)] = None,  # noqa: UP045
    out_dir: Annotated[Optional[Path], typer.Option("--out-dir", help="Folder for the outputs of several inputs; mirrors input folders.", show_default=False)] = None,  # noqa: UP045
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045
    base: Annotated[Optional[Path], typer.Option("--base", help="Base model, header only: names and shapes of a model no table knows.", show_default=False)] = None,  # noqa: UP045
    qkv: Annotated[str, typer.Option("--qkv", help="Fused weights: auto (exact, else split names where the target reads them), fuse (a LoRA where the family cannot be fused exactly), split (split names).")] = "auto",
    rank: Annotated[Optional[int], typer.Option("--lokr-rank", "--rank", help="Cut LoRAs made from other families to this rank; the error is printed.", show_default=False)] = None,  # noqa: UP045
    energy: Annotated[Optional[float], typer.Option("--energy", help="Cut them to this share of the squared norm, e.g. 0.9999; the error is printed.", show_default=False)] = None,  # noqa: UP045
    as_: Annotated[Optional[str], typer.Option("--as", help="Another family: lora (exact, or cut by --rank, --energy), lokr (the nearest; --factor), loha (exact from a LoRA; with --rank or --energy the nearest that is found), full (dense .diff).", show_default=False)] = None,  # noqa: UP045
    factor: Annotated[Optional[int], typer.Option("--factor", help="For --as lokr: LyCORIS' factor, -1 for balanced; --rank and --energy are then w2's.", show_default=False)] = None,  # noqa: UP045
    lossy: Annotated[bool, typer.Option("--lossy", help="Leave out what the target cannot hold, and list it.")] = False,
    alpha: Annotated[Optional[str], typer.Option("--alpha", help="How the scale is written: keep (alpha tensors), fold (into the factors), header (configuration). Default: the layout's own.", show_default=False)] = None,  # noqa: UP045
    trained_alpha: TrainedAlpha = None,
    dtype: Annotated[str, typer.Option("--dtype", help="keep, fp32, fp16 or bf16.")] = "keep",
    lokr_factor: Annotated[Optional[int], typer.Option("--lokr-factor", help="LoKr factor to record instead of the file's own.", show_default=False)] = None,  # noqa: UP045
    diffusers_prefix: Annotated[str, typer.Option("--diffusers-prefix", help="Prefix for --target other; - is none.")] = "diffusion_model",
    fix_split_alpha: Annotated[bool, typer.Option("--fix-split-alpha", help="Mend the alpha of fused modules that sd-scripts' split_qkv saved too weak.")] = False,
    drop: Annotated[Optional[list[str]], typer.Option("--drop", help="Leave out te, unet, or modules whose name matches a regular expression. Repeatable.", show_default=False)] = None,  # noqa: UP045
    strict: Annotated[bool, typer.Option("--strict", help="Fail when any key would be left out or a module would be off by more than 5 %, and check every value for NaN and infinity.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Convert adapter files between layouts."""
    from lorasurgery.api import SaveOptions
    from lorasurgery.layouts.targets import layout
    from lorasurgery.operations.conversion.convert import Options

    if as_ not in (None, "lora", "lokr", "loha", "full"):
        raise typer.BadParameter("lora, lokr, loha or full", param_hint="--as")
    prefix = "" if diffusers_prefix == "-" else diffusers_prefix.rstrip(".")
    how = Options(
        qkv=qkv, rank=rank, energy=energy, as_lora=as_ == "lora",
        family=None if as_ == "lora" else as_, factor=factor, lossy=lossy, drop=tuple(drop or ()), dtype=dtype,
        prefix=prefix, fix_split_alpha=fix_split_alpha,
    )  # fmt: skip
    writing = SaveOptions(
        alpha=alpha, prefix=prefix, lokr_factor=lokr_factor, strict=strict, force=force, dry_run=dry_run, announce=announce
    )  # fmt: skip
    _check(layout(target), how, writing, arch)
    files = jobs_for(paths or [], given, out, out_dir, folder_output=target == "peft")
    run_batch(
        files,
        lambda job: _one(job, target, how, writing, Reading(arch, base, trained_alpha)),
        as_json=json_,
        several=out_dir is not None,
    )


def _check(target: Layout, how: Options, writing: SaveOptions, arch: str | None) -> None:
    """Raises RequestError for options that no file could make right, before any file is opened."""
    how.check()
    if writing.alpha is not None and writing.alpha not in target.alphas:
        raise RequestError(
            f"{target.reader} cannot take its scale by --alpha {writing.alpha}", hint="--alpha " + " or ".join(target.alphas)
        )
    if arch is not None:
        from lorasurgery.architectures import named

        named(arch)


class Reading(NamedTuple):
    """How inputs are read: :func:`lorasurgery.load`'s options."""

    arch: str | None
    base: Path | None
    alpha: float | None


def _one(job: Job, target: str, how: Options, writing: SaveOptions, reading: Reading) -> Report:
    from lorasurgery.api import save
    from lorasurgery.files.opened import load
    from lorasurgery.operations.conversion.convert import convert as convert_adapter
    from lorasurgery.operations.conversion.convert import with_nearest

    started = time.perf_counter()
    base = reading.base
    if base is not None and job.target.exists() and base.exists() and job.target.samefile(base):
        raise OutputExistsError("the output is the base model; it is never overwritten", path=job.target, hint="another name")
    adapter = load(job.source, **reading._asdict())
    if adapter.unknown:
        raise UnknownArchitectureError(
            adapter.unknown, path=adapter.path, candidates=adapter.candidates,
            hint=with_nearest(adapter, "--base MODEL, the checkpoint it was trained on (only its header is read)"),
        )  # fmt: skip
    result, report = convert_adapter(adapter, target, how)
    save(result, job.target, options=writing, report=report)
    report.seconds = time.perf_counter() - started
    return report


convert.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
