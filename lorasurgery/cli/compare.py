"""``lorasurgery compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.advice import advised
from lorasurgery.cli.reading_options import TrainedAlpha
from lorasurgery.cli.render import console, data, plain, show_error
from lorasurgery.errors import RequestError, SurgeryError

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.verbs.compare import Comparison
    from lorasurgery.verbs.compare.engine import Effect

DIFFERENT, TROUBLE = 1, 2

HELP = """Are two files the same adapter? And if not, where do they differ, and by how much?

Compared is what the files do, module by module, exactly and from their factors: across layouts, families (a LoHa and the
LoRA made of it), fused and split weights, ranks, dtypes and ways to write alpha. The distance of two changes is
||A - B|| / max(||A||, ||B||): 0 for the same, 1 where one file has nothing, 2 for opposites.

[bold]Exit codes[/bold], for scripts: 0 the same within the tolerance, 1 not, 2 they could not be compared.

The tolerance is four times what one rounding to the coarser dtype may change: 2.4e-07 for fp32, 2.0e-03 for fp16, 1.6e-02
for bf16. Every module must keep it.

[bold]Examples[/bold]

  lorasurgery compare lora.safetensors converted.safetensors

  lorasurgery compare a.safetensors b.safetensors --tolerance 0 && echo "exactly the same"

  lorasurgery compare dora.safetensors lora.safetensors --base sd15.safetensors --json
"""


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="An adapter file, or PEFT's folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    tolerance: Annotated[Optional[float], typer.Option("--tolerance", help="The largest distance that counts as the same. Default: by dtype, see above.", show_default=False)] = None,  # noqa: UP045  typer evaluates this on Python 3.10 too
    base: Annotated[Optional[Path], typer.Option("--base", help="The base model: what DoRA modules do to its weights is compared, in place of their parts; the names of a model no table knows come from it, too.", show_default=False)] = None,  # noqa: UP045
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045
    trained_alpha: TrainedAlpha = None,
    top: Annotated[int, typer.Option("--top", help="Modules in the table, the worst first.")] = 10,
    verbose: Annotated[bool, typer.Option("--verbose", help="A line for every module.")] = False,
    workers: Annotated[Optional[int], typer.Option("--workers", help="Threads. Default: one for each core, at most 8.", show_default=False)] = None,  # noqa: UP045
    json_: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON on stdout.")] = False,
) -> None:  # fmt: skip
    """Compare two adapters."""
    from lorasurgery.verbs.compare import CompareOptions, open_both
    from lorasurgery.verbs.compare import compare as compared

    options = CompareOptions(tolerance, workers)
    options.check()
    try:
        with advised({}):
            first, second = open_both(a, b, arch=arch, base=base, alpha=trained_alpha)
        found = compared(first, second, options, _effect(base, first, second))
    except RequestError:
        raise
    except (SurgeryError, OSError) as error:  # not "different": nothing is known
        show_error(error)
        raise typer.Exit(TROUBLE) from error
    if json_:
        data(json.dumps({**_files(a, b, first, second, base, tolerance), **found.to_json()}, indent=2))
    else:
        _show(found, (a, b), (first, second), None if verbose else top)
    if not found.same:
        raise typer.Exit(DIFFERENT)


def _effect(base: Path | None, a: Adapter, b: Adapter) -> Effect | None:
    """What measures modules by their effect on the base model, where one is given."""
    if base is None:
        return None
    from lorasurgery.models import open_model
    from lorasurgery.verbs.compare.effect import effect_of

    return effect_of(open_model(base, arch=a.architecture), a, b)


def _files(a: Path, b: Path, first: Adapter, second: Adapter, base: Path | None, tolerance: float | None) -> dict[str, Any]:
    """What was compared."""
    sides = {
        name: {"path": str(path), "model": own.architecture.key, "layout": own.layout, "modules": len(own)}
        for name, path, own in (("a", a, first), ("b", b, second))
    }
    return {**sides, "base": None if base is None else str(base), "tolerance": tolerance}


def _show(found: Comparison, paths: tuple[Path, Path], adapters: tuple[Adapter, Adapter], top: int | None) -> None:
    from lorasurgery.cli.compare_map import show_map
    from lorasurgery.cli.compare_text import module_lines, total_lines

    for line in total_lines(found, paths, adapters):
        data(plain(line))
    if found.comparable:
        if not found.same:
            show_map(console(), found.pairs, adapters[0].architecture)
        for line in module_lines(found, top):
            data(plain(line))


compare.__doc__ = "\n\n".join(p if p.startswith("  ") else " ".join(p.split()) for p in HELP.split("\n\n"))
