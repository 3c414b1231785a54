"""Which files a ``meta`` command means, where its result goes, and one bad file that does not stop the rest."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import typer

from lorasurgery.cli.render import data, error_text, plain, show_error
from lorasurgery.errors import OutputExistsError, RequestError, SurgeryError

SCHEMA = 1
"""Version of the JSON forms of ``meta``; see docs/meta.md."""
SUFFIX = ".safetensors"


class Found(NamedTuple):
    """An input file, and its place below the folder it was found in."""

    path: Path
    relative: Path


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

    def check(self, inputs: list[Found], *, several: bool) -> None:
        """Raises RequestError unless exactly one place is named (none is enough for ``--dry-run``)."""
        given = sum((self.out is not None, self.out_dir is not None, self.in_place))
        if given > 1 or (not given and not self.dry_run):
            raise RequestError("one place for the result, please", hint="-o OUT for a new file, or --in-place")
        if self.out is not None and several:
            raise RequestError("several inputs have no room in one output", hint="--out-dir DIR or --in-place")
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
    """The safetensors files that are meant, and whether the request is for several.

    A folder stands for those below it (hidden ones, linked folders and earlier results in ``out_dir`` aside), a glob for
    what it matches. Raises RequestError when there are none.
    """
    results = None if out_dir is None else out_dir.absolute()
    found: list[Found] = []
    given = list(paths)
    several = len(given) > 1
    for path in given:
        if path.is_dir():
            several = True
            found += [Found(file, file.relative_to(path)) for file in _below(path, results)]
        elif not path.exists() and glob.has_magic(str(path)):
            several = True
            matched = [Path(text) for text in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  may be absolute
            found += [Found(file, Path(file.name)) for file in matched if file.suffix.lower() == SUFFIX]
        else:
            found.append(Found(path, Path(path.name)))
    if not found:
        raise RequestError(f"no {SUFFIX} file among {', '.join(map(str, given))}", hint="another folder or pattern")
    return found, several


def _below(folder: Path, results: Path | None) -> Iterator[Path]:
    for child in sorted(folder.iterdir()):
        if child.name.startswith(".") or child.absolute() == results:
            continue
        if child.is_dir() and not child.is_symlink():
            yield from _below(child, results)
        elif child.suffix.lower() == SUFFIX and child.is_file():
            yield child


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
        for found, result in zip(files, pool.map(lambda one: _attempt(one, act), files), strict=True):
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
