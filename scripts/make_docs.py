"""docs/cli.md from the commands' own help: ``make_docs.py [--check]``. With --check exits with 1 when it is not current."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import typer.main

from lorasurgery.cli.app import app

OUT = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# Command line

Written by `scripts/docs` from the commands' own help; do not edit it here.
"""


def plain(text: str) -> str:
    """Rich's markup as Markdown."""
    text = re.sub(r"\[cyan\](.*?)\[/cyan\]", r"`\1`", text)
    return re.sub(r"\[bold\](.*?)\[/bold\]", r"**\1**", text)


def body(help_text: str) -> str:
    """A command's description; its examples as one block of code."""
    lines = plain(inspect.cleandoc(help_text)).splitlines()
    examples = [line.strip() for line in lines if line.lstrip().startswith("lorasurgery ")]
    text = "\n".join(line for line in lines if not line.lstrip().startswith("lorasurgery ")).strip()
    shown = "\n".join(f"$ {line}" for line in examples)
    return f"{text}\n\n```console\n{shown}\n```\n" if examples else f"{text}\n"


def option(param: Any) -> str:  # noqa: ANN401  click's parameter, which typer brings along or imports by version
    """A row of the table of options."""
    spellings = ", ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    value = "" if param.is_flag else f" {param.type.name.upper()}"
    default = "" if param.is_flag or param.default in (None, ...) else f" Default: `{param.default}`."
    repeat = "" if param.required is False else " Required."
    return f"| {spellings}{value} | {plain(param.help or '').replace('|', chr(92) + '|')}{default}{repeat} |"


def page() -> str:
    """The whole reference."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD, f"{group.help}\n\n{group.epilog}\n"]
    for name, command in group.commands.items():
        parts += section(f"lorasurgery {name}", command, "##")
    return "\n".join(parts)


def section(name: str, command: Any, heading: str) -> list[str]:  # noqa: ANN401  as above
    """A command, or a group of them with its commands one heading lower."""
    if hasattr(command, "commands"):
        parts = [f"{heading} {name}\n\n{command.help}\n"]
        for own, inner in command.commands.items():
            parts += section(f"{name} {own}", inner, heading + "#")
        return parts
    arguments = " ".join(p.make_metavar(_context(command)) for p in command.params if p.param_type_name == "argument")
    options = [option(p) for p in command.params if p.param_type_name == "option"]
    return [
        f"{heading} {name}\n\n`{name} {arguments} [OPTIONS]`\n",
        body(command.callback.__doc__ or ""),
        "\n".join(["| option | meaning |", "|---|---|", *options]) + "\n",
    ]


def _context(command: Any) -> Any:  # noqa: ANN401  as above
    return command.context_class(command)


def main(*, check: bool) -> int:
    """Write the page, or compare it."""
    text = page()
    if check:
        current = OUT.is_file() and OUT.read_text(encoding="utf-8") == text
        print(f"{OUT.name} is {'current' if current else 'not current; run scripts/docs'}")
        return 0 if current else 1
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(text, encoding="utf-8")
    print(f"wrote {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
