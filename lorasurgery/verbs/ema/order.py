"""The order of checkpoints: by the steps that their metadata counts, by the numbers in their names, or by their dates."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.io.header import RawFile

STEPS, TIME, GIVEN = "steps", "time", "given"
ORDERS = (STEPS, TIME, GIVEN)
_STEP = re.compile(r"(?:^|[-_.])step[-_s]?(\d+)$", re.IGNORECASE)
_NUMBER = re.compile(r"(?:^|[-_.]|epoch|e)(\d+)$", re.IGNORECASE)


class Ordered(NamedTuple):
    """Checkpoints, the oldest first."""

    files: list[RawFile]
    by: str
    """What tells their order, in words."""


def in_order(files: Sequence[RawFile], how: str = STEPS) -> Ordered:
    """The files, oldest first.

    ``steps``: by ``ss_steps`` of the metadata; where that does not tell them apart, by the number that ends the name
    (``-000010``, ``-step00000500``), the one without a number last, as sd-scripts names the end of a run. ``time``: by date of
    change, as musubi-tuner's tool does. ``given``: as they are. Raises RequestError where the order cannot be told.
    """
    if how not in ORDERS:
        raise RequestError(f"--sort is {', '.join(ORDERS[:-1])} or {ORDERS[-1]}, not {how}")
    if how == GIVEN:
        return Ordered(list(files), "as given")
    if how == TIME:
        return Ordered(sorted(files, key=lambda file: file.path.stat().st_mtime), "by date of change")
    counted = [_steps(file) for file in files]
    if _tell_apart(counted):
        return Ordered(_by(files, counted), "by ss_steps")
    for pattern, what in ((_STEP, "by the steps in their names"), (_NUMBER, "by the numbers in their names")):
        named = [_number(pattern, file) for file in files]
        if named.count(None) == 1 and len(files) > 2:  # the end of the run
            largest = max(number for number in named if number is not None)
            named = [largest + 1 if number is None else number for number in named]
        if _tell_apart(named):
            return Ordered(_by(files, named), what)
    raise RequestError(
        "neither ss_steps nor the numbers in their names tell the order of the files",
        hint="--sort given for the order of the command line, oldest first, or --sort time",
    )


def _by(files: Sequence[RawFile], numbers: Sequence[int | None]) -> list[RawFile]:
    return [file for _, file in sorted(zip(numbers, files, strict=True), key=lambda pair: pair[0] or 0)]


def _tell_apart(numbers: Sequence[int | None]) -> bool:
    return None not in numbers and len(set(numbers)) == len(numbers)


def _steps(file: RawFile) -> int | None:
    text = file.metadata.get("ss_steps", "")
    return int(text) if text.isdigit() else None


def _number(pattern: re.Pattern[str], file: RawFile) -> int | None:
    match = pattern.search(file.path.stem)
    return int(match[1]) if match else None
