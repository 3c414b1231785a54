"""``lorasurgery extract``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.extract_progress import ProgressLine
from lorasurgery.cli.extract_request import HINTS, Old, Request, merged, places
from lorasurgery.cli.extract_text import dry_lines, family_lines, report_lines, spectrum_of
from lorasurgery.cli.render import console, data, note, plain
from lorasurgery.cli.resize_advice import Advice
from lorasurgery.cli.resize_request import parse_ranks, parse_size
from lorasurgery.errors import OutputExistsError, RequestError

if TYPE_CHECKING:
    from lorasurgery.verbs.extract import Running

HELP = """An adapter from two models: what TUNED is beyond BASE.

Safetensors, shards, Diffusers folders, weights-only checkpoints and GGUF, in any layout and dtype, the two not alike: weights
are matched by what they are. One matrix is in memory at a time; [cyan]--resume[/cyan] goes on after a stop and gives the
same file. Differences are exact, nothing is clamped, and what is left out is listed with its share of the change.

[bold]Ranks[/bold] are chosen as by resize: [cyan]--rank[/cyan] (32 unless something else decides), [cyan]--policy[/cyan]
with [cyan]--param[/cyan], [cyan]--size[/cyan] or [cyan]--recipe[/cyan]. sd-scripts' command lines work as they are.

[bold]Examples[/bold]

  lorasurgery extract base.safetensors tuned.safetensors lora.safetensors --rank 64

  lorasurgery extract base/ tuned/ lora.safetensors --policy energy --param 0.95 --rank 128 --target diffusers

  lorasurgery extract base.safetensors tuned.safetensors lora.safetensors --size 200MiB --device cuda

  lorasurgery extract base.safetensors tuned.safetensors --compare-families

  lorasurgery extract --model_org base.safetensors --model_tuned tuned.safetensors --save_to lora.safetensors --dim 32 --sdxl
"""


def extract(
    paths: Annotated[Optional[list[Path]], typer.Argument(metavar="BASE TUNED [OUT]", help="The base model, the tuned one, and the output file (a folder for peft).", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    rank: Annotated[Optional[list[str]], typer.Option("--rank", "-r", help='The rank N (the most, where something else decides), or as for resize "MODULES:N", or "blocks=N,N,..." with one for each block; 0 leaves out. Repeatable.', show_default=False)] = None,  # noqa: UP045
    conv_rank: Annotated[Optional[list[str]], typer.Option("--conv-rank", help="The same for convolutions with a kernel. Default: --rank.", show_default=False)] = None,  # noqa: UP045
    pointwise_rank: Annotated[Optional[int], typer.Option("--pointwise-rank", help="Of 1x1 convolutions. Default: --rank.", show_default=False)] = None,  # noqa: UP045
    policy: Annotated[Optional[str], typer.Option("--policy", help="sv_ratio, sv_cumulative, sv_fro, energy (share of the squared norm), threshold (smallest singular value), knee, error (largest relative error) or params (share of the model's parameters).", show_default=False)] = None,  # noqa: UP045
    param: Annotated[Optional[float], typer.Option("--param", help="The policy's number.", show_default=False)] = None,  # noqa: UP045
    size: Annotated[Optional[str], typer.Option("--size", help="The largest size of the file, e.g. 200MiB: spent where it counts most, up to rank 128 unless --rank says more.", show_default=False)] = None,  # noqa: UP045
    recipe: Annotated[Optional[str], typer.Option("--recipe", help='As resize_lora: "fro_ckpt=1,thr=-3.5".', show_default=False)] = None,  # noqa: UP045
    family: Annotated[str, typer.Option("--family", help="lora, locon (the same, noted as LyCORIS'), lokr, loha, or full (the whole difference).")] = "lora",
    factor: Annotated[int, typer.Option("--factor", help="For lokr: LyCORIS' factor, -1 for balanced.")] = -1,
    tucker: Annotated[bool, typer.Option("--tucker", help="Convolutions with a kernel as Tucker products (lora_mid).")] = False,
    dora: Annotated[bool, typer.Option("--dora", help="Magnitude and direction apart.")] = False,
    alpha: Annotated[str, typer.Option("--alpha", help="rank (alpha is the rank) or a number. The effect is the same.")] = "rank",
    factors: Annotated[Optional[str], typer.Option("--factors", help="balanced, or kohya: all of the strength in up. Default: balanced; for sd-scripts' command lines kohya.", show_default=False)] = None,  # noqa: UP045
    uniform: Annotated[bool, typer.Option("--uniform", help="Pad with zeros to one rank, for readers that want that.")] = False,
    min_rank: Annotated[int, typer.Option("--min-rank", help="0: leave out modules of which the policy keeps nothing.")] = 1,
    target: Annotated[Optional[str], typer.Option("--target", "-t", help="Layout to write, as for convert. Default: diffusers for two models of Diffusers', else sd-scripts.", show_default=False)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option("--dtype", help="keep (the tuned model's; bf16 for fp8 and GGUF), fp32, fp16 or bf16.")] = "keep",
    include: Annotated[Optional[list[str]], typer.Option("--include", help="Only modules whose name matches a regular expression. Repeatable.", show_default=False)] = None,  # noqa: UP045
    exclude: Annotated[Optional[list[str]], typer.Option("--exclude", help="Leave these out. Repeatable.", show_default=False)] = None,  # noqa: UP045
    te: Annotated[bool, typer.Option("--te/--no-te", help="Text encoders too, where both models have them.")] = True,
    min_diff: Annotated[float, typer.Option("--min-diff", help="Leave out modules none of whose weights changed by more.")] = 0.0,
    full_small: Annotated[bool, typer.Option("--full-small", help="Embeddings whole, too; norms and biases that changed always are.")] = False,
    lora_only: Annotated[bool, typer.Option("--lora-only", help="No norms and no biases.")] = False,
    clamp: Annotated[Optional[float], typer.Option("--clamp-quantile", "--clamp_quantile", help="Clamp the factors at this quantile as sd-scripts does (0.99), which loses part of the change. Default: never.", show_default=False)] = None,  # noqa: UP045
    exact: Annotated[bool, typer.Option("--exact", help="Full decompositions instead of randomised ones.")] = False,
    tolerance: Annotated[float, typer.Option("--tolerance", help="How far the error of the randomised one may be above the best of its rank.")] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", help="Of the randomised decomposition.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:0,cuda:1 or mps.")] = "cpu",
    jobs: Annotated[Optional[int], typer.Option("--jobs", help="Matrices at the same time. Default: as many as cores, at most 8 and about a GiB; four a GPU.", show_default=False)] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an earlier run of the same command stopped.")] = False,
    hashes: Annotated[bool, typer.Option("--hash/--no-hash", help="Note the sha256 of both files in the metadata.")] = True,
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045
    compare: Annotated[bool, typer.Option("--compare-families", help="Write nothing: bytes against error of every family on up to 16 of the changed matrices.")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Show the singular values of the change, as inspect does.")] = False,
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", help="The output.", show_default=False)] = None,  # noqa: UP045
    strict: Annotated[bool, typer.Option("--strict", help="Fail when something that changed would be left out without having been excluded.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output, and forget what an earlier run had finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only match the models: what would be extracted, and the size for a fixed rank.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every module, every block, and everything left out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    model_org: Annotated[Optional[Path], typer.Option("--model_org", help="sd-scripts' BASE.", show_default=False)] = None,  # noqa: UP045
    model_tuned: Annotated[Optional[Path], typer.Option("--model_tuned", help="sd-scripts' TUNED.", show_default=False)] = None,  # noqa: UP045
    save_to: Annotated[Optional[Path], typer.Option("--save_to", help="sd-scripts' OUT.", show_default=False)] = None,  # noqa: UP045
    dim: Annotated[Optional[int], typer.Option("--dim", help="sd-scripts' --rank; 4 where its command line says nothing.", show_default=False)] = None,  # noqa: UP045
    conv_dim: Annotated[Optional[int], typer.Option("--conv_dim", help="sd-scripts' --conv-rank; without it its command line leaves convolutions with a kernel out.", show_default=False)] = None,  # noqa: UP045
    save_precision: Annotated[Optional[str], typer.Option("--save_precision", help="sd-scripts' --dtype: float, fp16 or bf16; float where its command line says nothing.", show_default=False)] = None,  # noqa: UP045
    encoder_diff: Annotated[Optional[float], typer.Option("--min_diff", help="sd-scripts': leave text encoders out unless a weight of theirs changed by more; 0.01 where its command line says nothing.", show_default=False)] = None,  # noqa: UP045
    sdxl: Annotated[bool, typer.Option("--sdxl", help="sd-scripts': refuse anything but SDXL.")] = False,
    v2: Annotated[bool, typer.Option("--v2", help="sd-scripts': refuse anything but SD 2.")] = False,
    no_metadata: Annotated[bool, typer.Option("--no_metadata", "--no-metadata", help="sd-scripts': no modelspec in the metadata.")] = False,
    load_precision: Annotated[Optional[str], typer.Option("--load_precision", help="sd-scripts' own; accepted, and not needed: differences are exact.", show_default=False)] = None,  # noqa: ARG001, UP045
    load_original_to: Annotated[Optional[str], typer.Option("--load_original_model_to", help="sd-scripts' own; accepted, and not needed.", show_default=False)] = None,  # noqa: ARG001, UP045
    load_tuned_to: Annotated[Optional[str], typer.Option("--load_tuned_model_to", help="sd-scripts' own; accepted, and not needed.", show_default=False)] = None,  # noqa: ARG001, UP045
    v_parameterization: Annotated[bool, typer.Option("--v_parameterization", help="sd-scripts' own; accepted, and not needed.")] = False,  # noqa: ARG001
    mem_eff: Annotated[bool, typer.Option("--mem_eff_safe_open", help="sd-scripts' own; accepted, and not needed.")] = False,  # noqa: ARG001
) -> None:  # fmt: skip
    """Extract an adapter."""
    old = Old(
        used=any(v is not None for v in (model_org, model_tuned, save_to, dim, conv_dim, save_precision, encoder_diff)),
        rank=dim, conv_rank=conv_dim, precision=save_precision, encoder_min_diff=encoder_diff, sdxl=sdxl, v2=v2,
    )  # fmt: skip
    if full_small and lora_only:
        raise RequestError("--full-small and --lora-only contradict each other", hint="one of them")
    cut = {
        **parse_ranks(rank, conv_rank)._asdict(), "pointwise_rank": pointwise_rank, "policy": policy, "param": param,
        "size": None if size is None else parse_size(size), "recipe": recipe, "alpha": alpha, "factors": factors,
        "uniform": uniform, "min_rank": min_rank, "dtype": dtype, "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
    }  # fmt: skip
    more = {
        "family": family, "target": target, "factor": factor, "tucker": tucker, "dora": dora, "text_encoders": te,
        "small": "all" if full_small else "none" if lora_only else None, "min_diff": min_diff, "clamp_quantile": clamp,
        "exact": exact, "tolerance": tolerance, "seed": seed, "device": device, "jobs": jobs, "spec": not no_metadata,
    }  # fmt: skip
    needs_output = not (dry_run or compare)
    where = places(paths or [], model_org, model_tuned, out, save_to, needs_output=needs_output, folder=target == "peft")
    with Advice(HINTS):
        request = Request(
            *where, merged(cut, more, old), resume, force, strict, hashes, arch, old, verbose, spectrum, quiet, json_
        )
        if compare:
            _compare(request)
        elif dry_run:
            _dry(request)
        else:
            _extract(request)


def _extract(how: Request) -> None:
    from lorasurgery.verbs.extract import extract as run
    from lorasurgery.verbs.extract.engine import partial

    waiting = partial(how.output)
    before = waiting.exists()
    try:
        with ProgressLine(shown=not how.quiet) as progress:
            report = run(how.base, how.tuned, how.output, how.options, _running(how, progress))
    except BaseException as error:
        unmet = isinstance(error, (RequestError, OutputExistsError))
        if waiting.exists() and not (before and unmet):
            same = "another size with --resume uses it" if unmet else "the same command with --resume goes on from there"
            note(f"{waiting} has what is finished; {same}")
        raise
    _show(report.to_json(), report_lines(report, verbose=how.verbose), how)
    if how.spectrum and not how.json:
        from lorasurgery.cli.heat_map import show_spectrum

        show_spectrum(console(), spectrum_of(report))


def _running(how: Request, progress: ProgressLine) -> Running:
    from lorasurgery.verbs.extract import Running

    return Running(how.resume, how.force, how.hashes, how.arch, how.old.only, progress, how.strict)


def _dry(how: Request) -> None:
    from lorasurgery.verbs.extract.dry import plan

    planned = plan(how.base, how.tuned, how.options, how.arch, how.old.only)
    _show(planned.to_json(), dry_lines(planned, verbose=how.verbose), how)


def _compare(how: Request) -> None:
    from lorasurgery.verbs.extract.compare import compare_families

    with ProgressLine(shown=not how.quiet) as progress:
        found = compare_families(how.base, how.tuned, how.options, _running(how, progress))
    _show(found.to_json(), family_lines(found), how)


def _show(found: dict[str, Any], lines: list[str], how: Request) -> None:
    if how.json:
        data(json.dumps(found, indent=2))
    else:
        for line in lines:
            data(plain(line))


extract.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
