"""``lorasurgery inspect``."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from lorasurgery.cli.files import expanded, means_several
from lorasurgery.cli.render import data, error_text, note, show_error
from lorasurgery.errors import SurgeryError
from lorasurgery.interrupts import held

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lorasurgery.inspection.description import Description

HELP = """Say what a file is: an adapter with everything its header tells, or what else it is.

Only the header and the few scalar tensors are read, so a file of many gigabytes takes no longer than a small one.
For several files, folders and globs there is one line a file, and with --json one JSON object a line.

[bold]Examples[/bold]

  lorasurgery inspect my_lora.safetensors

  lorasurgery inspect my_lora.safetensors --modules --spectrum

  lorasurgery inspect my_lora.safetensors --html my_lora.html

  lorasurgery inspect loras/ --json > loras.jsonl

  lorasurgery inspect loras/*.safetensors --strict
"""

FAILED, SOME_FAILED = 1, 3
WORKERS_FROM = 200
"""From so many files on, two or more processes read them."""

Files = Annotated[list[Path], typer.Argument(metavar="FILES...", help="Files, PEFT folders, other folders, or globs.")]


def inspect(
    files: Files,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON (docs/inspect.md).")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="List every key with its dtype and shape.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="List every module, or every block on a short terminal.")] = False,
    tags: Annotated[bool, typer.Option("--tags", help="List every training tag with its count.")] = False,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Singular values, norms, effective ranks.")] = False,
    html: Annotated[Optional[Path], typer.Option("--html", metavar="OUT", help="Write everything, spectra and tags included, as one self-contained web page.", show_default=False)] = None,  # noqa: UP045
    force: Annotated[bool, typer.Option("--force", help="Replace an existing page.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when there are warnings.")] = False,
) -> None:  # fmt: skip
    """Say what a file is."""
    wanted = {"keys": keys, "tags": tags or html is not None, "spectrum": spectrum or html is not None}
    found = [inner for path in files for inner in expanded(path)]
    if not found:
        raise typer.BadParameter(f"no model file among {', '.join(map(str, files))}", param_hint="FILES")
    if html is not None:
        if len(found) > 1:
            raise typer.BadParameter("one page is about one file", param_hint="--html")
        _page(found[0], html, wanted, as_json=json_, force=force, strict=strict)
    elif len(files) == 1 and not means_several(files[0]):
        _single(found[0], wanted, as_json=json_, modules=modules, strict=strict)
    else:
        _several(found, wanted, as_json=json_, strict=strict)


def _single(path: Path, wanted: dict[str, bool], *, as_json: bool, modules: bool, strict: bool) -> None:
    from lorasurgery.inspection import describe

    try:
        description = describe(path, **wanted)
    except (SurgeryError, OSError) as error:
        if as_json:
            data(json.dumps(_failure(path, error), indent=2))
        raise
    if as_json:
        data(json.dumps(description.to_json(), indent=2))
    else:
        from lorasurgery.cli.tables import show

        show(description, modules=modules)
    if strict and description.warnings:
        raise typer.Exit(FAILED)


def _page(path: Path, out: Path, wanted: dict[str, bool], *, as_json: bool, force: bool, strict: bool) -> None:
    from lorasurgery.inspection import describe
    from lorasurgery.inspection.page import render
    from lorasurgery.io.writer import check_output, replacing, write_all

    check_output(out, [path], force=force)
    description = describe(path, **wanted)
    page = render(description).encode()
    with replacing(out) as fd:
        write_all(fd, page)
    note(f"{path} -> {out} ({len(page) / 1000:.0f} kB)")
    if as_json:
        data(json.dumps(description.to_json(), indent=2))
    if strict and description.warnings:
        raise typer.Exit(FAILED)


def _several(paths: Sequence[Path], wanted: dict[str, bool], *, as_json: bool, strict: bool) -> None:
    """One line a file; a bad file does not stop the rest."""
    failed = 0
    for path, line, good in _lines(paths, wanted, as_json=as_json, strict=strict):
        failed += not good
        if isinstance(line, Exception):
            show_error(line, path)
            line = json.dumps(_failure(path, line)) if as_json else ""  # noqa: PLW2901
        if line:
            data(line)
    if failed:
        raise typer.Exit(FAILED if failed == len(paths) else SOME_FAILED)


Line = tuple[Path, "str | Exception", bool]


def _lines(paths: Sequence[Path], wanted: dict[str, bool], *, as_json: bool, strict: bool) -> Iterator[Line]:
    """Every file's line in order; many files are spread over processes, neighbours together for they are often alike."""
    jobs = [(path, wanted, as_json, strict) for path in paths]
    workers = _workers(len(paths))
    if workers < 2:
        yield from map(_line, jobs)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    if sys.platform != "win32":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # starting it would let interrupts through again
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_collect_rarely) as pool:
        with held():
            lines = pool.map(_line, jobs, chunksize=25)
        yield from lines


def _collect_rarely() -> None:
    """As the command line does: thousands of headers make millions of small objects and no cycles to look for."""
    gc.set_threshold(100_000, 50, 50)


def _workers(files: int) -> int:
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8) if files >= WORKERS_FROM else 1


def _line(job: tuple[Path, dict[str, bool], bool, bool]) -> Line:
    from lorasurgery.inspection import describe

    path, wanted, as_json, strict = job
    try:
        description = describe(path, **wanted)
    except SurgeryError as error:
        return path, _portable(error), False
    except OSError as error:
        return path, error, False
    line = json.dumps(description.to_json()) if as_json else _one_line(description)
    return path, line, not (strict and description.warnings)


def _portable(error: SurgeryError) -> SurgeryError:
    """The same sentence in an error that can cross process borders (the others have keyword arguments)."""
    plain = SurgeryError(error.message, path=error.path, hint=error.hint)
    plain.args = (error.message,)
    return plain


def _one_line(description: Description) -> str:
    from lorasurgery.cli.tables import one_line

    return one_line(description)


def _failure(path: Path, error: BaseException) -> dict[str, Any]:
    from lorasurgery.inspection.description import SCHEMA

    return {"schema": SCHEMA, "path": str(path), "kind": "unreadable", "error": error_text(error, path)}


inspect.__doc__ = HELP
