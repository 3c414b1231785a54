"""``lorasurgery meta``: metadata and hashes, tensors untouched."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasurgery.cli import meta_options as opt
from lorasurgery.cli.meta_files import SCHEMA, Destination, Found, Shown, expanded, run_each
from lorasurgery.cli.render import data, plain
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from lorasurgery.io.header import RawFile
    from lorasurgery.verbs.meta.meta import Change, Edited

meta = typer.Typer(
    name="meta",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Show, edit and verify metadata and hashes of safetensors files; the tensors are not touched.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 usage, 3 some files of a batch failed.",
)


@meta.command()
def show(
    files: opt.Files,
    *,
    full: Annotated[bool, typer.Option("--full", help="Show long values whole.")] = False,
    json_: opt.Json = False,
) -> None:
    """Show all metadata, each value with its type, nested JSON unfolded."""
    from lorasurgery.cli import meta_text
    from lorasurgery.io.in_place import header_of
    from lorasurgery.verbs.meta.meta import read_metadata

    found, several = expanded(files)
    run_each(
        found, lambda one: meta_text.show(header_of(read_metadata(one.path)), full=full), as_json=json_, several=several
    )  # fmt: skip


@meta.command()
def get(
    file: opt.File, key: Annotated[str, typer.Argument(metavar="KEY", show_default=False)], json_: opt.Json = False
) -> None:  # fmt: skip
    """Print one value as it stands in the file; --json: with its type, nested JSON unfolded."""
    from lorasurgery.verbs.meta.meta import absent, read_metadata
    from lorasurgery.verbs.meta.values import typed

    raw = read_metadata(file)
    if key not in raw.metadata:
        raise absent(key, raw)
    text = raw.metadata[key]
    if json_:
        kind, value = typed(key, text)
        data(json.dumps({"schema": SCHEMA, "file": str(file), "key": key, "type": kind, "value": value, "text": text}))
    else:
        data("\n".join(plain(line) for line in text.split("\n")) if sys.stdout.isatty() else text)


@meta.command("set")
def set_(
    file: opt.File,
    pairs: opt.Pairs = None,
    *,
    trigger: Annotated[opt.Text, typer.Option(help="Trigger words: modelspec.trigger_phrase.")] = None,
    title: Annotated[opt.Text, typer.Option(help="modelspec.title.")] = None,
    author: Annotated[opt.Text, typer.Option(help="modelspec.author.")] = None,
    license_: Annotated[opt.Text, typer.Option("--license", help="modelspec.license.")] = None,
    description: Annotated[opt.Text, typer.Option(help="modelspec.description; Markdown is welcome.")] = None,
    tags: Annotated[opt.Text, typer.Option(help="modelspec.tags, separated by commas.")] = None,
    base: opt.Base = None,
    thumbnail: opt.Thumbnail = None,
    out: opt.Out = None,
    in_place: opt.InPlace = False,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    json_: opt.Json = False,
) -> None:
    """Set metadata keys.

    lorasurgery meta set my.safetensors --trigger "mypetcat" --license MIT --in-place
    """
    from lorasurgery.verbs.meta import values as meta_values
    from lorasurgery.verbs.meta.meta import set_values

    given = {
        "trigger": trigger, "title": title, "author": author, "license": license_, "description": description, "tags": tags,
    }  # fmt: skip
    values = [f"{meta_values.OPTION_KEYS[name]}={text}" for name, text in given.items() if text is not None]
    wanted = meta_values.assignments([*values, *(pairs or [])])
    if base is not None:
        wanted = meta_values.base_model(base) | wanted
    if thumbnail is not None:
        wanted["modelspec.thumbnail"] = meta_values.thumbnail(thumbnail)
    if not wanted:
        raise RequestError("nothing to set", hint="KEY=VALUE, or an option such as --trigger")
    _edit([file], set_values(wanted), Destination(out, None, in_place, force, dry_run), as_json=json_)


@meta.command()
def unset(
    file: opt.File,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys or globs.", show_default=False)],
    *,
    out: opt.Out = None,
    in_place: opt.InPlace = False,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    json_: opt.Json = False,
) -> None:
    """Remove metadata keys by name or glob."""
    from lorasurgery.verbs.meta.meta import unset as unset_keys

    _edit([file], unset_keys(keys), Destination(out, None, in_place, force, dry_run), as_json=json_)


@meta.command()
def strip(
    files: opt.Files,
    *,
    privacy: Annotated[
        bool,
        typer.Option("--privacy", help="Datasets, tags, comments, sessions, host names; paths are shortened in the rest."),
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Everything but what programs need to load the file.")] = False,
    only: Annotated[opt.Globs, typer.Option(metavar="GLOB", help="Remove what matches. Repeatable.")] = None,
    keep: Annotated[
        opt.Globs, typer.Option(metavar="GLOB", help="Keep what matches; alone, remove the rest. Repeatable.")
    ] = None,
    out: opt.Out = None,
    out_dir: opt.OutDir = None,
    in_place: opt.InPlace = False,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    json_: opt.Json = False,
) -> None:
    """Remove what should not be published; docs/meta.md lists what --privacy removes.

    lorasurgery meta strip my.safetensors --privacy -o public.safetensors
    """
    from lorasurgery.verbs.meta.meta import Stripping
    from lorasurgery.verbs.meta.meta import strip as strip_keys

    change = strip_keys(Stripping(only or (), privacy, everything, keep or ()))
    _edit(files, change, Destination(out, out_dir, in_place, force, dry_run), as_json=json_)


@meta.command()
def copy(
    source: Annotated[Path, typer.Argument(metavar="FROM", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TO", show_default=False)],
    *,
    only: Annotated[opt.Globs, typer.Option(metavar="GLOB", help="Copy what matches. Repeatable.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Remove what TO has of its own first.")] = False,
    out: opt.Out = None,
    in_place: opt.InPlace = False,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    json_: opt.Json = False,
) -> None:
    """Bring the metadata of FROM to the tensors of TO; -o writes a new file, --in-place changes TO.

    Hashes stay with their tensors; ranks and alphas come along only between files with the same tensors.
    """
    from lorasurgery.verbs.meta.meta import copied, read_metadata

    change = copied(read_metadata(source), only=only or (), replace=replace)
    _edit([target], change, Destination(out, None, in_place, force, dry_run), as_json=json_)


@meta.command()
def verify(
    files: opt.Files,
    *,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a hash in the metadata is stale.")] = False,
    json_: opt.Json = False,
) -> None:
    """Compute every hash a file is known by, and say whether those in its metadata are right, stale or absent."""
    from lorasurgery.cli import meta_text
    from lorasurgery.operations.notes.hashes import verify as verify_file
    from lorasurgery.verbs.meta.meta import read_metadata

    found, several = expanded(files)

    def one(file: Found) -> Shown:
        return meta_text.verified(file.path, verify_file(read_metadata(file.path)), one_line=several, strict=strict)

    run_each(found, one, as_json=json_, several=several, parallel=True)


@meta.command()
def fix(
    files: opt.Files,
    *,
    add: Annotated[bool, typer.Option("--add", help="Also write sd-scripts' two hashes where they are absent.")] = False,
    unknown: Annotated[bool, typer.Option("--all", help="Also replace what cannot be checked (LyCORIS's own hash).")] = False,
    out: opt.Out = None,
    out_dir: opt.OutDir = None,
    in_place: opt.InPlace = False,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    json_: opt.Json = False,
) -> None:
    """Write the right values over stale hashes."""
    from lorasurgery.operations.notes.hashes import verify as verify_file

    def correct(raw: RawFile) -> tuple[dict[str, str], list[str]]:
        return dict(raw.metadata) | verify_file(raw).corrections(add=add, unknown=unknown), []

    _edit(files, correct, Destination(out, out_dir, in_place, force, dry_run), as_json=json_)


def _edit(paths: list[Path], change: Change, where: Destination, *, as_json: bool) -> None:
    """Change the metadata of every file and show what came of it."""
    from lorasurgery.cli import meta_text
    from lorasurgery.verbs.meta.meta import edited

    files, several = expanded(paths, where.out_dir)
    where.check(files)

    def one(file: Found) -> Shown:
        target = where.target(file)
        done = edited(file.path, change)
        return meta_text.edit(file.path, done, target, _write(done, target, dry_run=where.dry_run))

    run_each(files, one, as_json=as_json, several=several)


def _write(done: Edited, target: Path | None, *, dry_run: bool) -> str:
    from lorasurgery.io.in_place import NEW, rewrite, write_beside

    if dry_run:
        return "dry run"
    if target is None:
        return rewrite(done.header, done.metadata)
    write_beside(done.header, done.metadata, target)
    return NEW
