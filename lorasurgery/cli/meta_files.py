"""Which files a ``meta`` command means, where its result goes, and one bad file that does not stop the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import typer

from lorasurgery.cli.files import Found, found_in, means_several
from lorasurgery.cli.render import data, error_text, plain, show_error
from lorasurgery.errors import OutputExistsError, RequestError, SurgeryError
from lorasurgery.interrupts import held

SCHEMA = 1
"""Version of the JSON forms of ``meta``; see docs/meta.md."""
SUFFIXES = frozenset({".safetensors", ".sft"})

__all__ = ["SCHEMA", "Destination", "Found", "Shown", "expanded", "run_each"]


class Shown(NamedTuple):
    """One file's result: the object for ``--json``, the lines otherwise, and whether it counts as a failure."""

    json: dict[str, Any]
    lines: list[str]
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Destination:
    """Where an edit goes: ``out``, ``out_dir`` (several inputs) or the file itself."""

    out: Path | None = None
    out_dir: Path | None = None
    in_place: bool = False
    force: bool = False
    dry_run: bool = False

    def check(self, inputs: list[Found]) -> None:
        """Raises RequestError unless exactly one place is named (none is enough for ``--dry-run``)."""
        given = sum((self.out is not None, self.out_dir is not None, self.in_place))
        if given > 1 or (not given and not self.dry_run):
            raise RequestError("one place for the result, please", hint="-o OUT for a new file, or --in-place")
        if self.out is not None and len(inputs) > 1:
            raise RequestError(f"{len(inputs)} inputs have no room in one output", hint="--out-dir DIR or --in-place")
        if self.out_dir is not None and len({one.relative for one in inputs}) < len(inputs):
            raise RequestError("two inputs would get the same name in --out-dir", hint="one run for each")

    def target(self, found: Found) -> Path | None:
        """The output for an input, None for the file itself; raises OutputExistsError when it must not be written."""
        from lorasurgery.io.writer import check_output

        out = self.out_dir / found.relative if self.out_dir is not None else self.out
        if out is None:
            return None
        out = out / found.path.name if out.is_dir() else out
        if out.exists() and found.path.exists() and out.samefile(found.path):
            raise OutputExistsError("the output is the input", path=out, hint="--in-place to change the file itself")
        if not self.dry_run:
            check_output(out, [found.path], force=self.force)
        return out


def expanded(paths: Iterable[Path], out_dir: Path | None = None) -> tuple[list[Found], bool]:
    """The safetensors files that are meant (earlier results in ``out_dir`` aside), and whether the request is for several.

    Raises RequestError when there are none.
    """
    given = list(paths)
    found = [one for path in given for one in found_in(path, SUFFIXES, peft=False, results=out_dir)]
    if not found:
        raise RequestError(f"no .safetensors file among {', '.join(map(str, given))}", hint="another folder or pattern")
    return found, len(given) > 1 or means_several(given[0], peft=False)


def run_each(
    files: list[Found], act: Callable[[Found], Shown], *, as_json: bool, several: bool, parallel: bool = False
) -> None:
    """Show every file's result, in order; exit code 3 when some failed, 1 when all did (or the only one)."""
    if not several:
        only = _named(files[0], act)
        _show(only, as_json=as_json, indent=2)
        if only.failed:
            raise typer.Exit(1)
        return
    failed = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if parallel else 1) as pool:
        with held():
            results = pool.map(lambda one: _attempt(one, act), files)
        for found, result in zip(files, results, strict=True):
            if isinstance(result, Shown):
                _show(result, as_json=as_json, indent=None)
                failed += result.failed
                continue
            failed += 1
            show_error(result, found.path)
            if as_json:
                data(json.dumps({"schema": SCHEMA, "file": str(found.path), "error": error_text(result, found.path)}))
    if failed:
        raise typer.Exit(1 if failed == len(files) else 3)


def _named(found: Found, act: Callable[[Found], Shown]) -> Shown:
    """The result of one file; its errors say which file they are about."""
    try:
        return act(found)
    except SurgeryError as error:
        error.path = error.path or str(found.path)
        raise


def _attempt(found: Found, act: Callable[[Found], Shown]) -> Shown | SurgeryError | OSError:
    try:
        return _named(found, act)
    except (SurgeryError, OSError) as error:
        return error


def _show(result: Shown, *, as_json: bool, indent: int | None) -> None:
    if as_json:
        data(json.dumps(result.json, indent=indent))
        return
    for line in result.lines:
        data(plain(line))
