"""The command line: one typer application, one file a command, errors and exit codes in one place."""

from __future__ import annotations

import gc
import os

# Start-up makes tens of thousands of objects that stay: looking through them for cycles again and again is a tenth of it.
gc.set_threshold(100_000, 50, 50)

# Factor-sized algebra is fastest with one BLAS thread per worker, and BLAS reads this when it is first loaded.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import signal
import sys
from functools import cache
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from lorasurgery.cli.render import show_error
from lorasurgery.cli.spellings import SPELLINGS, Spelled
from lorasurgery.cli.stopping import STOPPED, quiet
from lorasurgery.errors import RequestError, SurgeryError
from lorasurgery.version import __version__

COMMANDS = (
    "convert",
    "inspect",
    "check",
    "extract",
    "resize",
    "merge",
    "apply",
    "rerank",
    "ema",
    "split",
    "prune",
    "compare",
    "meta",
)
"""Every command, in the order of --help; each is the object of its name in the module of its name."""

COMPUTING = frozenset({"extract", "resize", "merge", "apply", "rerank", "ema", "compare"})
"""Commands that make many arrays."""
FAILED, USAGE = 1, 2
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's ``mallopt``, from its ``malloc.h``."""


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


@cache
def application(only: str | None = None) -> typer.Typer:
    """The typer application with every command, or with ``only`` one, so that the others need not be imported."""
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
    app.callback()(_options)
    for name in COMMANDS if only is None else (only,):
        command = getattr(import_module(f"lorasurgery.cli.{name}"), name)
        if isinstance(command, typer.Typer):
            app.add_typer(command)
        else:
            app.command(cls=Spelled if name in SPELLINGS else None)(command)
    return app


def __getattr__(name: str) -> typer.Typer:
    if name == "app":
        return application()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lorasurgery {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Nothing but --version: a callback also keeps `convert` a subcommand while it is the only one."""


def _keep_memory() -> None:
    """Let glibc keep what arrays gave back: it returns each of 128 KiB and more, and takes the next one page by page anew."""
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def main() -> None:
    """Run the command line."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    if first in COMPUTING:
        _keep_memory()
    try:
        quiet()
        application(first if first in COMMANDS else None)()
    except KeyboardInterrupt as error:
        show_error(error)
        sys.exit(STOPPED)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done; an interrupt of the way out has nothing to say
        gc.freeze()  # the process ends: three searches for cycles on the way out took a fifth of a short command
