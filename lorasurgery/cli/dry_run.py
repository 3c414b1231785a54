"""The input of a dry run, which needs no output, and what its result would be called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.cli.batch import SUFFIX, Job, jobs_for
from lorasurgery.cli.files import is_adapter

if TYPE_CHECKING:
    from pathlib import Path


def dry_jobs(given: Path, what: str, *, folder_output: bool) -> tuple[list[Job], bool]:
    """Jobs for one input without a named output, and whether they are for several files.

    ``what`` was done (``resized``) and names the result, so that it is never the input: ``lora-resized.safetensors``, or a
    folder ``resized`` for the adapters of a folder or pattern. Raises typer.BadParameter where there is no adapter.
    """
    if given.exists() and (given.is_file() or is_adapter(given)):
        stem = given.name if given.is_dir() else given.stem
        return [Job(given, given.with_name(f"{stem}-{what}{'' if folder_output else SUFFIX}"))], False
    home = given if given.is_dir() else given.parent
    return jobs_for([given], None, None, home / what, folder_output=folder_output), True
