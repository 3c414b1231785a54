"""Warnings that must be seen: large errors, and outputs much larger than their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from lorasurgery.io.tensors import Tensor

LARGE_ERROR = 0.05
"""A relative error that nobody should miss."""
TIMES, LEAST = 4, 64 << 20
"""How many times as large as all inputs together, and how many bytes at least, is worth a word before it is written."""


class Alert(str):
    """A warning that is printed so that it stands out."""

    __slots__ = ()


def large_errors(errors: Mapping[str, float], total: float, of: str = "the change") -> list[Alert]:
    """At most one warning, where a module (or all together) is off by more than 5 % of ``of``.

    ``errors``: module -> relative error; ``total``: of all together.
    """
    name, worst = max(errors.items(), key=lambda item: item[1], default=("", 0.0))
    if not max(worst, total) > LARGE_ERROR:
        return []
    most = f", at worst {worst:.1%} ({name})" if name else ""
    many = sum(error > LARGE_ERROR for error in errors.values())
    share = f"; above {LARGE_ERROR:.0%} in {many} of {len(errors)} modules" if len(errors) > 1 else ""
    return [Alert(f"large error: {total:.1%} of {of} in all{most}{share}")]


def much_larger(tensors: Iterable[Tensor], inputs: Iterable[Path], smaller: str) -> list[Alert]:
    """At most one warning, where an output of these tensors is much larger than the files and folders it is made of.

    Shapes tell, before anything is computed. ``smaller``: the options that would make it smaller.
    """
    after, before = sum(tensor.nbytes for tensor in tensors), sum(bytes_of(path) for path in inputs)
    if after <= max(TIMES * before, LEAST) or not before:
        return []
    return [Alert(f"large output: {bytes_text(after)} from {bytes_text(before)} of input; smaller with {smaller}")]


def bytes_of(path: Path) -> int:
    """The size of a file, or of the safetensors files in a PEFT folder; 0 where there is none."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    return path.stat().st_size if path.exists() else 0


def bytes_text(size: int) -> str:
    """A size in the unit that suits it."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
