"""The command line: one typer application, one file a command, errors and exit codes in one place."""

from __future__ import annotations

import os
import sys

# Factor-sized algebra is fastest with one BLAS thread per worker, and BLAS reads this when it is first loaded.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import typer

from lorasurgery.cli.convert import convert
from lorasurgery.cli.render import show_error
from lorasurgery.errors import SurgeryError
from lorasurgery.version import __version__

app = typer.Typer(
    name="lorasurgery",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Surgery on LoRA-family adapter files. Nothing is lost in silence; every result says whether it is exact.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 usage, 3 some files of a batch failed.",
)
app.command()(convert)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lorasurgery {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Nothing but --version: a callback also keeps `convert` a subcommand while it is the only one."""


def main() -> None:
    """Run the command line; an error of the library becomes one line on stderr and exit code 1."""
    try:
        app()
    except SurgeryError as error:
        show_error(error)
        sys.exit(1)
    except (OSError, KeyboardInterrupt) as error:
        show_error(error)
        sys.exit(1)
