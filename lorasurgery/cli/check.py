"""``lorasurgery check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from lorasurgery.cli.files import ADAPTERS, found_in, means_several
from lorasurgery.cli.render import SHOWN, data, error_text, plain, show_error
from lorasurgery.errors import SurgeryError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.checking.result import Result
    from lorasurgery.checking.rules import Consumer

FAILED, SOME_FAILED = 1, 3

HELP = """Say what a program will do with adapter files: which modules it loads, ignores, loads otherwise or refuses, and why.

Only headers and alphas are read. The answer comes from the loaders' own rules, and with it the command that mends it.

[bold]Programs[/bold]: [cyan]comfyui[/cyan], [cyan]diffusers[/cyan], [cyan]sd-scripts[/cyan] (also kohya),
[cyan]musubi[/cyan], [cyan]onetrainer[/cyan], [cyan]peft[/cyan], [cyan]lycoris[/cyan], [cyan]forge[/cyan],
[cyan]sdnext[/cyan]. What is not known of a program is said to be unknown.

[bold]Examples[/bold]

  lorasurgery check my_lora.safetensors --for comfyui

  lorasurgery check my_lora.safetensors --for diffusers --base flux1-dev.safetensors

  lorasurgery check loras/ --for comfyui --strict
"""


def check(
    paths: Annotated[list[Path], typer.Argument(metavar="FILES...", help="Adapter files, PEFT folders, folders of files, globs.", show_default=False)],  # noqa: E501  one option a line
    program: Annotated[str, typer.Option("--for", "-f", help="The program: comfyui, diffusers, sd-scripts, musubi, onetrainer, peft, lycoris, forge, sdnext.", show_default=False)],  # noqa: E501  one option a line
    arch: Annotated[Optional[str], typer.Option("--arch", help="Override detection, e.g. flux1 or flux1-schnell.", show_default=False)] = None,  # noqa: UP045, E501
    base: Annotated[Optional[Path], typer.Option("--base", help="The checkpoint it is to be loaded on (header only): its names and shapes count.", show_default=False)] = None,  # noqa: UP045, E501
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 unless every file loads completely.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, one object a line for several files.")] = False,  # noqa: E501  one option a line
) -> None:  # fmt: skip
    """Say what a program will do with adapter files."""
    from lorasurgery.checking.consumers import consumer

    own = consumer(program)
    model = None if base is None else _base(base)
    files = [found.path for path in paths for found in found_in(path, ADAPTERS)]
    if not files:
        raise typer.BadParameter(f"no adapter file among {', '.join(map(str, paths))}", param_hint="FILES")
    several = len(paths) > 1 or means_several(paths[0])
    failed, incomplete = _run(files, own, arch, model, as_json=json_, several=several)
    if failed:
        raise typer.Exit(FAILED if failed == len(files) else SOME_FAILED)
    if strict and incomplete:
        raise typer.Exit(FAILED)


def _run(
    files: Sequence[Path], own: Consumer, arch: str | None, base: Architecture | None, *, as_json: bool, several: bool
) -> tuple[int, int]:
    """Check every file; (number that could not be read, number that do not load completely)."""
    failed = incomplete = 0
    for file in files:
        try:
            result = _one(file, own, arch, base)
        except (SurgeryError, OSError) as error:
            failed += 1
            show_error(error, file)
            if as_json:
                data(json.dumps({"schema": 1, "input": str(file), "for": own.id, "error": error_text(error, file)}))
            continue
        incomplete += not result.complete
        if as_json:
            data(json.dumps(result.to_json(), indent=None if several else 2))
        elif several:
            data(plain(f"{result.path}: {result.architecture}, {result.verdict}"))
        else:
            _show(result)
    return failed, incomplete


def _one(file: Path, own: Consumer, arch: str | None, base: Architecture | None) -> Result:
    from lorasurgery.checking.engine import check as run
    from lorasurgery.checking.subject import read_subject

    return run(read_subject(file, arch=arch, base=base), own)


def _base(path: Path) -> Architecture:
    from lorasurgery.models import open_model

    return open_model(path).architecture


def _show(result: Result) -> None:
    """One file's result, as a few lines."""
    data(plain(f"{Path(result.path).name} for {result.consumer.name} {result.consumer.version}: {result.verdict}"))
    counts = ", ".join(f"{n} {status}" for status, n in result.counts.items() if n)
    also = f"  (the same keys fit {', '.join(result.candidates)})" if result.candidates else ""
    data(plain(f"  architecture {result.architecture}{also}"))
    data(plain(f"  modules      {len(result.findings)}: {counts}"))
    for text in result.refusals[:SHOWN]:
        data(plain(f"  refused      {text}"))
    if not result.refusals:
        for text in _reasons(result):
            data(plain(f"  {text}"))
    for note in result.notes:
        data(plain(f"  note         {note}"))
    if result.mend:
        data(plain(f"  mend         {result.mend}"))


def _reasons(result: Result) -> Iterator[str]:
    """Each reason with its first module."""
    first: dict[tuple[str, str], list[str]] = {}
    for finding in result.findings:
        if finding.text:
            first.setdefault((finding.status, finding.text), []).append(finding.module)
    for (status, text), modules in list(first.items())[:SHOWN]:
        yield f"{status:<12} {len(modules)}: {text} (first: {modules[0]})"
    if len(first) > SHOWN:
        yield f"... and {len(first) - SHOWN} more reasons (--json has all)"


check.__doc__ = HELP
