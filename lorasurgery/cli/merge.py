"""``lorasurgery merge``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.merge_run import Request, merged
from lorasurgery.cli.merge_text import merge_lines
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.render import data, plain
from lorasurgery.cli.resize_request import parse_ranks, parse_size
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from lorasurgery.operations.cut import ResizeOptions

HELP = """The sum of what adapters do, each times its weight: exact, whatever their ranks, alphas, families, layouts and dtypes.

A weight stands behind a colon, signed and linear: [cyan]FILE:0.7[/cyan]. Parts of the model have their own:
[cyan]FILE:0.7:te=0.5[/cyan], [cyan]FILE:1:double=0-18:0.5[/cyan], [cyan]FILE:1:re=attn:0[/cyan]. Names are te, te1, te2,
unet, transformer, in, mid, out, and the model's own blocks; of two names for a module the later counts. Prompts' tags work
as they are, with [cyan]--lora-dir[/cyan], and lists of block weights of 12, 17, 20, 26 and (FLUX.1) 61 values:
[cyan]FILE:1:lbw=1,0,0,...[/cyan], or by a name from [cyan]--presets[/cyan].

The result's rank is the sum of the ranks; [cyan]--rank[/cyan], [cyan]--policy[/cyan] or [cyan]--size[/cyan] cut it to the
best approximation of the sum, as [cyan]resize[/cyan] does, full differences included, and the error is told. Sums of LoKr
are full differences unless [cyan]--as lokr[/cyan] or a rank makes them small again; --dry-run shows what that costs.

[bold]Methods[/bold]: sum, average, slerp, model-stock; orthogonal and remove (the first file without what the others do);
ties, dare, dare-ties, della, breadcrumbs, magnitude-prune, sce (these need --rank, --policy, --size or --as full).

[bold]Examples[/bold]

  lorasurgery merge a.safetensors:0.7 b.safetensors:-0.4 -o merged.safetensors

  lorasurgery merge style.safetensors:0.8:te=0 face.safetensors -o merged.safetensors --rank 32

  lorasurgery merge "<lora:style:0.8:in=0:mid=1:out=0.5> <lora:face:0.6>" --lora-dir loras -o merged.safetensors

  lorasurgery merge a.safetensors:0:double=0-9:1 b.safetensors:0:double=10-18:1:single:1 -o merged.safetensors

  lorasurgery merge a.safetensors b.safetensors c.safetensors --method ties --density 0.3 --rank 64 -o merged.safetensors
"""


def merge(
    files: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapter files or PEFT folders with their weights, or tags.", show_default=False)],
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", help="The output file (a folder for peft).", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    lora_dir: Annotated[Optional[Path], typer.Option("--lora-dir", help="Where the names in tags are looked up, subfolders included.", show_default=False)] = None,  # noqa: UP045
    presets: Annotated[Optional[Path], typer.Option("--presets", help="A file of named block weights, NAME:1,0,... a line, as the web UIs' extension has it.", show_default=False)] = None,  # noqa: UP045
    method: Annotated[str, typer.Option("--method", "-m", help="How to merge, see above.")] = "sum",
    rank: Annotated[Optional[list[str]], typer.Option("--rank", "-r", help='Cut the result to rank N, or as for resize "MODULES:N", or "blocks=N,N,..." with one for each block. Repeatable.', show_default=False)] = None,  # noqa: UP045
    conv_rank: Annotated[Optional[list[str]], typer.Option("--conv-rank", help="The same for convolutions with a kernel. Default: --rank.", show_default=False)] = None,  # noqa: UP045
    policy: Annotated[Optional[str], typer.Option("--policy", help="Choose ranks by a rule, as resize does: sv_fro, energy, error, ...", show_default=False)] = None,  # noqa: UP045
    param: Annotated[Optional[float], typer.Option("--param", help="The policy's number.", show_default=False)] = None,  # noqa: UP045
    size: Annotated[Optional[str], typer.Option("--size", help="The largest size of the file, e.g. 40MiB.", show_default=False)] = None,  # noqa: UP045
    as_: Annotated[Optional[str], typer.Option("--as", help="lora: turn every family into LoRA; full: write full differences; lokr: the nearest LoKr (--factor).", show_default=False)] = None,  # noqa: UP045
    lokr_factor: Annotated[Optional[int], typer.Option("--factor", help="For --as lokr: LyCORIS' factor, -1 for balanced. Default: the files' own.", show_default=False)] = None,  # noqa: UP045
    t: Annotated[float, typer.Option("--t", help="slerp: 0 is the first file, 1 the second.")] = 0.5,
    density: Annotated[float, typer.Option("--density", help="Pruning methods: the share of elements that stays.")] = 0.5,
    gamma: Annotated[float, typer.Option("--gamma", help="breadcrumbs: the share of the largest elements that goes.")] = 0.01,
    epsilon: Annotated[float, typer.Option("--epsilon", help="della: the spread of the probabilities.")] = 0.15,
    majority: Annotated[str, typer.Option("--majority", help="ties and others elect signs by total (sum of values) or frequency (sum of signs).")] = "total",
    factor: Annotated[float, typer.Option("--lambda", help="Multiplies the result.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of dare, dare-ties and della.")] = 0,
    compat: Annotated[Optional[str], typer.Option("--compat", help="Reproduce another program's numbers: peft, kohya or kohya-concat; what is wrong with them is told.", show_default=False)] = None,  # noqa: UP045
    metadata: Annotated[str, typer.Option("--metadata", help="merge (what all agree on, trigger words of all), first (the first file's) or strip.")] = "merge",
    drop_nonlinear: Annotated[bool, typer.Option("--drop-nonlinear", help="Leave out modules that cannot be added (DoRA, OFT, ...) and list them; what other files have there stays.")] = False,
    fix_split_alpha: Annotated[bool, typer.Option("--fix-split-alpha", help="Put the alpha of modules right that sd-scripts' split_qkv fused.")] = False,
    target: Annotated[Optional[str], typer.Option("--target", "-t", help="Layout to write, as for convert. Default: that of the first file with more than text encoders.", show_default=False)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option("--dtype", help="keep (each module's own, the first file's where they differ), fp32, fp16 or bf16.")] = "keep",
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045
    trained_alpha: TrainedAlpha = None,
    base: Annotated[Optional[Path], typer.Option("--base", help="Base model, header only: names and shapes of a model no table knows.", show_default=False)] = None,  # noqa: UP045
    strict: Annotated[bool, typer.Option("--strict", help="Fail instead of leaving anything out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write; needs no output.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every module.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Merge adapters."""
    from lorasurgery.verbs.merge import MergeOptions

    if as_ not in (None, "lora", "full", "lokr"):
        raise RequestError(f"--as is lora, full or lokr, not {as_}", hint="lorasurgery convert, afterwards")
    if out is None and not dry_run:
        raise RequestError("nothing says where the result goes", hint="-o OUT, or --dry-run")
    options = MergeOptions(
        method=method, compat=compat, t=t, density=density, gamma=gamma, epsilon=epsilon, majority=majority, factor=factor,
        seed=seed, as_full=as_ == "full", as_lokr=as_ == "lokr", lokr_factor=lokr_factor, metadata=metadata, dtype=dtype, drop_nonlinear=drop_nonlinear,
        fix_split_alpha=fix_split_alpha,
        resize=_recompression(rank, conv_rank, policy, param, size, as_lora=as_ == "lora"),
    )  # fmt: skip
    how = Request(
        tuple(files), out or Path("merged.safetensors"), options, lora_dir=lora_dir, presets=presets, target=target, arch=arch,
        base=base, alpha=trained_alpha, as_lora=as_ == "lora", strict=strict, force=force, dry_run=dry_run,
    )  # fmt: skip
    found = merged(how)
    if json_:
        data(json.dumps(found.to_json(), indent=2))
        return
    for line in merge_lines(found, verbose=verbose):
        data(plain(line))


def _recompression(
    rank: list[str] | None,
    conv_rank: list[str] | None,
    policy: str | None,
    param: float | None,
    size: str | None,
    *,
    as_lora: bool,
) -> ResizeOptions | None:
    """The options of a cut, None where none was asked for; raises RequestError for what contradicts itself."""
    if not rank and not conv_rank and (policy, param, size) == (None, None, None):
        return None
    from lorasurgery.operations.cut import ResizeOptions

    chosen: dict[str, Any] = {**parse_ranks(rank, conv_rank)._asdict(), "policy": policy, "param": param}
    chosen["size"] = None if size is None else parse_size(size)
    options = ResizeOptions(**chosen, as_lora=as_lora)
    options.check()
    return options


merge.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
