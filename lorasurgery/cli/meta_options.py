"""The arguments and options that the commands of ``lorasurgery meta`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

# typer evaluates these on Python 3.10 too, so they stay Optional
Files = Annotated[list[Path], typer.Argument(metavar="FILES...", help="Files, folders or globs.", show_default=False)]
File = Annotated[Path, typer.Argument(metavar="FILE", show_default=False)]
Out = Annotated[Optional[Path], typer.Option("--out", "-o", help="Write a new file.", show_default=False)]  # noqa: UP045
OutDir = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out-dir", help="Folder for the outputs of several inputs; mirrors input folders.", show_default=False),
]
InPlace = Annotated[bool, typer.Option("--in-place", help="Change the file itself; only the header if the new one fits.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would change, write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Text = Optional[str]  # noqa: UP045
Globs = Optional[list[str]]  # noqa: UP045
Pairs = Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", show_default=False)]  # noqa: UP045
Base = Annotated[
    Text, typer.Option(help="Base model, e.g. sdxl or flux1-dev: ss_base_model_version and modelspec.architecture.")
]
Thumbnail = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="Picture, embedded as modelspec.thumbnail; best a JPEG of 256x256."),
]
