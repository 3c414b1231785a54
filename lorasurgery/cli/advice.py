"""Advice that speaks of options of ``convert``, in commands that do not have them."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorasurgery.errors import SurgeryError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

OF_CONVERT = re.compile(r"--(lossy|qkv|lokr-rank|energy|prefix|drop (te|unet|REGEX|'))")
CONVERT = "lorasurgery convert"
STRICT = "without --strict"
FOLDER = re.compile(r", (a PEFT folder with \S+), or --out-dir for every adapter in it$")


@contextmanager
def advised(hints: Mapping[str, str]) -> Iterator[None]:
    """Errors say what to try in the words of the command: of ``hints``, or else with ``lorasurgery convert`` before it."""
    try:
        yield
    except SurgeryError as error:
        if error.hint is not None:
            error.hint = hints.get(error.hint) or before(error.hint)
        raise


def before(hint: str) -> str:
    """``hint`` for a command with one output and no options of ``convert``, which is to be run before where it takes them."""
    hint = FOLDER.sub(r", or \1", hint)
    if hint.startswith(STRICT):
        return STRICT
    found = OF_CONVERT.search(hint)
    if found is None or CONVERT in hint:
        return hint
    at = 0 if hint.startswith("--") else found.start()
    return f"{hint[:at]}{CONVERT} before this, with {hint[at:]}"
