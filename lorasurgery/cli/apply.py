"""``lorasurgery apply``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from lorasurgery.cli.apply_run import Request, applied
from lorasurgery.cli.apply_text import apply_lines
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.render import data, plain
from lorasurgery.errors import RequestError

HELP = """Bake adapters into a model's own weights, or take them out again ([cyan]--unapply[/cyan]).

The model is a file, shards or a folder, in original, ComfyUI, all-in-one or Diffusers names; the result is one of the same
kind. Weights that no adapter touches are copied byte for byte, keys keep their order and their dtype; memory stays a few
times the largest tensor. Every family: LoRA, LoHa, LoKr, DoRA, OFT, BOFT, GLoRA, (IA)^3, full differences, norms, biases.

Weights are written as for [cyan]merge[/cyan]: [cyan]FILE:0.7[/cyan], [cyan]FILE:0.7:te=0.5[/cyan],
[cyan]FILE:1:double=0-18:0.5[/cyan], prompts' tags with [cyan]--lora-dir[/cyan]. Several adapters act in the order given,
each on what the one before left; for all but DoRA, OFT, GLoRA and (IA)^3 the order makes no difference.

What was rounded away is told: in 8 and 16 bits it can be much of a small change, and [cyan]--rounding stochastic[/cyan]
keeps it on average.

[bold]Examples[/bold]

  lorasurgery apply model.safetensors lora.safetensors:0.8 -o tuned.safetensors

  lorasurgery apply FLUX.1-dev a.safetensors:0.7 b.safetensors:-0.3 -o tuned --verify

  lorasurgery apply tuned.safetensors lora.safetensors:0.8 --unapply -o model.safetensors

  lorasurgery apply model-fp8.safetensors lora.safetensors -o tuned.safetensors --rounding stochastic --seed 1
"""


def apply(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint, an index of shards, or a model's or pipeline's folder.", show_default=False)],
    adapters: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapter files or PEFT folders with their weights, or tags.", show_default=False)],
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", help="The new model: a file for a file, a folder for shards and folders.", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    unapply: Annotated[bool, typer.Option("--unapply", help="Take the adapters out of a model that they were applied to; how exactly is told.")] = False,
    rounding: Annotated[str, typer.Option("--rounding", help="nearest, or stochastic: up or down by chance, so that small changes survive on average.")] = "nearest",
    seed: Annotated[int, typer.Option("--seed", help="Of stochastic rounding.")] = 0,
    dora: Annotated[str, typer.Option("--dora", help="What a weight other than 1 means for DoRA: interpolate (ComfyUI's way), peft (Diffusers' way), or comfyui (ComfyUI's own norm, too).")] = "interpolate",
    scales: Annotated[str, typer.Option("--scales", help="Of scaled fp8 weights: keep while the values fit, or new.")] = "keep",
    lora_dir: Annotated[Optional[Path], typer.Option("--lora-dir", help="Where the names in tags are looked up, subfolders included.", show_default=False)] = None,  # noqa: UP045
    presets: Annotated[Optional[Path], typer.Option("--presets", help="A file of named block weights, NAME:1,0,... a line, as the web UIs' extension has it.", show_default=False)] = None,  # noqa: UP045
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override what the model is taken for, e.g. flux1-dev.", show_default=False)] = None,  # noqa: UP045
    trained_alpha: TrainedAlpha = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read the result again and compare tensors of every family with the definitions in float64.")] = False,
    prefer_lycoris: Annotated[bool, typer.Option("--prefer-lycoris", help="Compute changes with the LyCORIS library, too, if it is installed, and tell the difference.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a key of an adapter matches no weight.")] = False,
    workers: Annotated[Optional[int], typer.Option("--workers", help="Processes. Default: one for each core, at most 8, and one more. On macOS and Windows threads.", show_default=False)] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Match, and measure change and rounding on some rows; needs no output.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every block.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Apply adapters to a model."""
    from lorasurgery.verbs.apply import ApplyOptions

    if out is None and not dry_run:
        raise RequestError("nothing says where the result goes", hint="-o OUT, or --dry-run")
    options = ApplyOptions(
        unapply=unapply, rounding=rounding, seed=seed, dora=dora, scales=scales, strict=strict, verify=verify,
        prefer_lycoris=prefer_lycoris, workers=workers, fork=sys.platform == "linux",
    )  # fmt: skip
    how = Request(
        model, tuple(adapters), out or model.with_name(f"{model.stem}-tuned{model.suffix}"), options, lora_dir=lora_dir,
        presets=presets, arch=arch, alpha=trained_alpha, force=force, dry_run=dry_run,
    )  # fmt: skip
    report = applied(how)
    if json_:
        data(json.dumps(report.to_json(), indent=2))
    else:
        for line in apply_lines(report, verbose=verbose):
            data(plain(line))
    if any(own.wrong for own in report.verified):
        raise typer.Exit(1)


apply.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
