"""``lorasurgery rerank``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.alerts import Alert, large_errors
from lorasurgery.cli.batch import Job, jobs_for
from lorasurgery.cli.dry_run import dry_jobs
from lorasurgery.cli.meta_files import Found, Shown, run_each
from lorasurgery.cli.render import warning_lines
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from lorasurgery.verbs.rerank.rerank import Nested, Request, Reranked, Strength

SCHEMA = 1
"""Version of the JSON form; see docs/rerank.md."""

HELP = """Write smaller ranks of a DyLoRA, or of any LoRA whose first components are an adapter of their own.

The first components are copied byte for byte; [cyan]--svd[/cyan] takes the best approximation of the rank in their place.
Whether the file is a DyLoRA is read from its metadata and from the order of its components, and said. The report shows
what every rank costs, the least it could cost, and what becomes of the strength. Names and layout stay: files of unknown
models work, too.

[bold]Examples[/bold]

  lorasurgery rerank dylora.safetensors small.safetensors --rank 8

  lorasurgery rerank dylora.safetensors -o out.safetensors --all --unit 4 --alpha rescale

  lorasurgery rerank loras/*.safetensors --out-dir small --best --error 0.1 --svd

  lorasurgery rerank dylora.safetensors --all --dry-run
"""


def rerank(
    paths: Annotated[Optional[list[Path]], typer.Argument(metavar="IN... [OUT]", help="Input files or folders, and the output file unless --out or --out-dir is given.", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    rank: Annotated[Optional[int], typer.Option("--rank", help="The rank to write; modules of a smaller one stay.", show_default=False)] = None,  # noqa: UP045
    every: Annotated[bool, typer.Option("--all", help="Every multiple of --unit and the largest rank, as OUT-0004.safetensors, OUT-0008.safetensors ...")] = False,
    best: Annotated[bool, typer.Option("--best", help="The smallest rank that meets --energy and --error.")] = False,
    energy: Annotated[Optional[float], typer.Option("--energy", help="For --best: the share of the squared norm to keep, e.g. 0.9.", show_default=False)] = None,  # noqa: UP045
    error: Annotated[Optional[float], typer.Option("--error", help="For --best: the largest relative error, e.g. 0.1.", show_default=False)] = None,  # noqa: UP045
    unit: Annotated[Optional[int], typer.Option("--unit", help="Ranks are multiples of it. Default: the trainer's own, or 1; given alone it means --all.", show_default=False)] = None,  # noqa: UP045
    svd: Annotated[bool, typer.Option("--svd", help="The best approximation of the rank in place of the first components.")] = False,
    alpha: Annotated[Optional[str], typer.Option("--alpha", help="keep (or kohya): alpha stays, as sd-scripts' tool does. rescale: alpha sqrt(r/R), sd-scripts' strength in training. lycoris: alpha times the block size, LyCORIS' strength in training. scale: alpha r/R, the file's own strength. Default: keep, and scale with --svd.", show_default=False)] = None,  # noqa: UP045
    dtype: Annotated[str, typer.Option("--dtype", help="keep, fp32, fp16 or bf16.")] = "keep",
    given: Annotated[Optional[Path], typer.Option("--model", "--input", "-i", help="The input, as sd-scripts spells it.", show_default=False)] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option("--out", "-o", "--output", "--save_to", help="The output file; with --all, what its names begin with.", show_default=False)] = None,  # noqa: UP045
    out_dir: Annotated[Optional[Path], typer.Option("--out-dir", help="Folder for the outputs of several inputs; mirrors input folders.", show_default=False)] = None,  # noqa: UP045
    strict: Annotated[bool, typer.Option("--strict", help="Fail when the file has keys that are not understood, which are copied as they are.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing outputs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write; no output has to be named.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Write smaller ranks of a DyLoRA."""
    from lorasurgery.verbs.rerank.rerank import Request

    bounds = energy is not None or error is not None
    if best != bounds:
        raise RequestError("--best goes with --energy or --error", hint="--best --error 0.1")
    every = every or (unit is not None and rank is None and not best)
    how = Request(rank, every, energy, error, unit, svd, alpha, dtype)
    how.check()
    jobs, several = _jobs(paths or [], given, out, out_dir, dry_run=dry_run)
    targets = {job.source: job.target for job in jobs}
    run_each(
        [Found(job.source, Path(job.source.name)) for job in jobs],
        lambda found: _one(found.path, targets[found.path], how, strict=strict, force=force, dry_run=dry_run),
        as_json=json_,
        several=several,
    )


def _jobs(
    paths: list[Path], given: Path | None, out: Path | None, out_dir: Path | None, *, dry_run: bool
) -> tuple[list[Job], bool]:
    """Inputs and outputs, and whether the request is for several files; a dry run of one input needs no output."""
    inputs = [*([given] if given else []), *paths]
    if dry_run and out is None and out_dir is None and len(inputs) == 1:
        return dry_jobs(inputs[0], "reranked", folder_output=False)
    return jobs_for(paths, given, out, out_dir, folder_output=False), out_dir is not None


def _one(source: Path, target: Path, how: Request, *, strict: bool, force: bool, dry_run: bool) -> Shown:
    from lorasurgery.api import refuse_lost
    from lorasurgery.files.opened import read_any
    from lorasurgery.io.finite import computed_bytes
    from lorasurgery.io.writer import MODEL_HASH, check_output, write_safetensors
    from lorasurgery.verbs.rerank.rerank import open_nested, rerank

    if source.is_dir():
        raise RequestError("a folder of PEFT", path=source, hint="lorasurgery convert to a file first, or a file inside it")
    nested = open_nested(read_any(source))
    if strict:
        refuse_lost(nested.ledger.lost, source)
    ranks = nested.ranks(how)
    outputs = [target.with_name(f"{target.stem}-{n:04d}{target.suffix}") if how.every else target for n in ranks]
    if not dry_run:
        for path in outputs:
            check_output(path, [source], force=force)
    results: list[tuple[Reranked, Path]] = []
    for rank, path in zip(ranks, outputs, strict=True):
        result = rerank(nested, rank, how)
        if dry_run:
            for name, tensor in result.tensors.items():
                if tensor.compute is not None:
                    computed_bytes(name, tensor)
        else:
            hashes = MODEL_HASH in nested.raw.metadata or any(key.startswith("ss_") for key in result.metadata)
            write_safetensors(path, result.tensors, result.metadata, hashes=hashes)
        results.append((result, path))
    return Shown(_json(nested, how, results, written=not dry_run), _lines(nested, how, results, written=not dry_run))


def _json(nested: Nested, how: Request, results: list[tuple[Reranked, Path]], *, written: bool) -> dict[str, Any]:
    kind, reason = nested.verdict
    return {
        "schema": SCHEMA,
        "input": str(nested.raw.path),
        "kind": kind,
        "reason": reason,
        "trainer": nested.origin.trainer,
        "unit": nested.origin.unit,
        "rank": nested.rank,
        "modules": len(nested.modules),
        "method": "svd" if how.svd else "prefix",
        "alpha": how.policy,
        "outputs": [
            {
                "output": str(path),
                "written": written,
                "rank": result.rank,
                "error": result.error,
                "best_error": result.best,
                "worst_module": result.worst[0],
                "worst": result.worst[1],
                "strength": [strength._asdict() for strength in result.strengths],
                "notes": list(result.notes),
            }
            for result, path in results
        ],
        "ledger": nested.ledger.to_json(),
        "warnings": _warnings(results),
    }


def _warnings(results: list[tuple[Reranked, Path]]) -> list[Alert]:
    """Of large errors, an output each."""
    return [
        Alert(f"rank {result.rank}: {text}")
        for result, _ in results
        for text in large_errors(dict([result.worst]), result.error)
    ]


def _lines(nested: Nested, how: Request, results: list[tuple[Reranked, Path]], *, written: bool) -> list[str]:
    method = "best approximation" if how.svd else "first components"
    lines = [
        f"{nested.raw.path.name}: rank {nested.rank}, {len(nested.modules)} modules",
        f"  kind         {nested.verdict[1]}",
        f"  method       {method}, alpha {how.policy}",
        f"  {'rank':>4}  {'error':>8}  {'best':>8}  {'file':>8}  {'here':>8}  {'x':>6}  {'x training':>10}  output",
    ]
    for result, path in results:
        main = result.strengths[0]
        name = str(path) if written else f"{path} (not written)"
        lines.append(f"  {result.rank:>4}  {result.error:8.4f}  {result.best:8.4f}  {_strength(main)}  {name}")
        lines += [
            f"  {'':>4}  {'':>8}  {'':>8}  {_strength(other)}  {other.modules} modules of rank {other.old_rank}"
            for other in result.strengths[1:4]
        ]
        if len(result.strengths) > 4:
            lines.append(f"  {'':>4}  ... and {len(result.strengths) - 4} more groups of modules (--json lists all)")
    lines.append("  error: of the change at the file's own strength; best: the least at that rank; file, here: alpha / rank")
    notes = dict.fromkeys(note for result, _ in results for note in result.notes)
    return lines + warning_lines([*notes, *_warnings(results)])


def _strength(of: Strength) -> str:
    gain = of.written / of.file if of.file else 1.0
    trained = f"{of.written / of.trained:10.3g}" if of.trained else f"{'unknown':>10}"
    return f"{of.file:8.4g}  {of.written:8.4g}  {gain:6.3g}  {trained}"


rerank.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
