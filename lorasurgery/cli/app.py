"""The command line: one typer application, one file a command, errors and exit codes in one place."""

from __future__ import annotations

import os

# Factor-sized algebra is fastest with one BLAS thread per worker, and BLAS reads this when it is first loaded.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from typing import Any

import typer
from typer.core import TyperGroup

from lorasurgery.cli.check import check
from lorasurgery.cli.convert import convert
from lorasurgery.cli.inspect import inspect
from lorasurgery.cli.meta import meta
from lorasurgery.cli.render import show_error
from lorasurgery.cli.rerank import rerank
from lorasurgery.errors import RequestError, SurgeryError
from lorasurgery.version import __version__

FAILED, USAGE, STOPPED = 1, 2, 130


class _Commands(TyperGroup):
    """Turns the library's errors into one line on stderr and an exit code, for every command."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  click's own types, which typer brings along or imports by version
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` has seen enough
            raise
        except RequestError as error:
            show_error(error)
            raise typer.Exit(USAGE) from error
        except (SurgeryError, OSError) as error:
            show_error(error)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            show_error(error)
            raise typer.Exit(STOPPED) from error


app = typer.Typer(
    name="lorasurgery",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Surgery on LoRA-family adapter files. Nothing is lost in silence; every result says whether it is exact.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 usage, 3 some files of a batch failed.",
)
app.command()(convert)
app.command()(inspect)
app.command()(check)
app.command()(rerank)
app.add_typer(meta)


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
    """Run the command line."""
    app()
